"""The LM head's gradient of a micro-batch is one sum, however many domains, teachers and terms it has."""

from __future__ import annotations

import pytest
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: F401  (before forking)

from benchmarks.head_gradient import configuration, loss_bytes
from megatron_mopd.backend.parallel import build_parallel_groups, select_device
from tests._distributed import run_ranks


def memory(rank, directory, dtype):
    config = configuration(directory, dtype)
    groups = build_parallel_groups(config.parallel, select_device("cpu"), seed=1)
    return [loss_bytes(config, groups, domains) for domains in (1, 12)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_twelve_domains_take_the_memory_of_one(tmp_path, dtype):
    """Forward and backward of 24 losses on one head, compared with 2."""
    (one, head), (twelve, _) = run_ranks(1, memory, str(tmp_path), dtype)[0]
    assert twelve <= 1.05 * one
    assert one < 4 * head, "more than the sum, logits and tiles of one response"
