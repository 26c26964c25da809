"""The estimate of a run's memory beside what one real step allocates, and a world that no machine has."""

from __future__ import annotations

import multiprocessing

import pytest

from megatron_mopd.commands import estimate
from megatron_mopd.config import config_from_dict
from tests import _runs

DENSE = dict(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=96,
    make_vocab_size_divisible_by=8,
)
MOE = DENSE | dict(num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=32)


def in_a_process(function, *arguments):
    """Run `function` in a forked process of its own: the imagined world leaves nothing behind here."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(function(*arguments)))
    child.start()
    child.join(120)
    assert not queue.empty(), "the process ended without an answer"
    return queue.get()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("memory")
    _runs.write_inputs(directory)
    return directory


def configuration(directory, student, **sections):
    values = _runs.values(
        directory,
        objective={"kind": "full_vocab_kl"},
        routing={"default": "self"},
        rollout={"max_new_tokens": 20},
        **sections,
    )
    return config_from_dict(values | {"student": student, "teachers": [{"name": "self"}]})


@pytest.mark.parametrize("student", [DENSE, MOE], ids=["dense", "moe"])
def test_a_small_run_allocates_what_was_estimated(inputs, student):
    assert in_a_process(estimate.check, configuration(inputs, student)) == 0


def test_components_of_a_large_world_shrink_as_the_layout_says(inputs):
    parallel = dict(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=4,
        expert_tensor_parallel_size=1,
    )
    config = configuration(
        inputs,
        MOE,
        parallel=parallel,
        schedule={"global_batch_size": 512},
        teacher_storage={"mode": "host_sharded"},
    )
    ranks = estimate.stage_ranks(config, 64)
    assert ranks == [0, 32]
    first, last = in_a_process(estimate.estimate, config, 64, ranks).values()
    whole = in_a_process(estimate.estimate, configuration(inputs, MOE), 1, [0])[0]
    both = first.device["student weights"] + last.device["student weights"]
    # Dense weights over TP 2, experts over EP 4, norms and the router on every rank.
    assert whole.device["student weights"] / 4 < both < whole.device["student weights"] / 1.6
    assert "logits chunk" not in first.device and last.device["logits chunk"] > 0
    # 16 replicas of the optimizer's dense part, 8 of its experts.
    assert first.device["optimizer"] < first.device["gradients"] * 2 / 7
    assert first.host["teacher storage"] < first.device["student weights"] / 7
