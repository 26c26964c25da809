"""Estimated FLOPs against torch's FLOP counter, and utilization against the peak of the device."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_mopd.estimate.flops import peak_flops, step_flops, utilization
from megatron_mopd.model.build import build_model
from megatron_mopd.model.flops import ForwardCost, forward_cost
from tests import _models
from tests._distributed import run_ranks
from tests.model.test_latent_attention import MLA, PLAIN_QUERY

TOKENS = 24
CASES = {
    "dense": _models.DENSE,
    "grouped queries": _models.GQA,
    "experts": _models.MOE,
    "shared experts": _models.SHARED,
    "latent": MLA,
    "latent, plain query": PLAIN_QUERY,
}


def _counted(rank):
    """Architecture -> (cost, FLOPs of matrix products, FLOPs of attention) of one forward pass."""
    groups, found = _models.groups_for({}), {}
    tokens = torch.arange(TOKENS).unsqueeze(0)
    for name, transformer in CASES.items():
        (chunk,) = build_model(
            _models.model_config(transformer), groups, "float32", max_sequence_length=64, seed=1
        )
        # The math backend of attention: torch does not count the fused ones on a CPU.
        plain = sdpa_kernel(SDPBackend.MATH)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
            chunk(tokens, tokens, None)
        counts = counter.get_flop_counts()["Global"]
        linear = sum(n for op, n in counts.items() if "mm" in str(op) and "bmm" not in str(op))
        found[name] = forward_cost(chunk.config, _models.VOCAB), linear, sum(counts.values()) - linear
    return found


def test_a_forward_pass_costs_what_torch_counts():
    (found,) = run_ranks(1, _counted, timeout=120)
    for name, (cost, linear, attention) in found.items():
        assert cost.token * TOKENS == linear, name
        # torch computes the full matrix of scores, of which a causal model needs the lower half.
        assert cost.pair * TOKENS**2 == attention, name
        assert cost.head == 2 * CASES[name]["hidden_size"] * _models.VOCAB


def test_a_step():
    student, small = ForwardCost(100.0, 2.0, 10.0), ForwardCost(1.0, 0.0, 1.0)
    batch = [_models.trajectory(0, [1, 2], [3], "arith"), _models.trajectory(1, [1], [2, 3, 4], "text")]
    mixtures = {"arith": (("a", 1.0),), "text": (("a", 0.5), ("b", 0.5))}
    flops = step_flops(batch, student, {"a": small, "b": small}, mixtures.__getitem__)
    first, second = 300 + 2 * 6 + 10, 400 + 2 * 10 + 30
    assert flops == 3 * (first + second) + (3 + 1) + 2 * (4 + 3)


def test_share_of_the_peak():
    peak = peak_flops("NVIDIA H100 80GB HBM3", "bfloat16")
    assert peak == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756.5e12
    assert peak_flops("NVIDIA GB200", "bfloat16") > peak_flops("NVIDIA B200", "bfloat16")
    assert peak_flops("NVIDIA H200", "bfloat16") == peak_flops("NVIDIA GH200 480GB", "bfloat16") == peak
    assert peak_flops("NVIDIA H200 NVL", "bfloat16") == peak_flops("NVIDIA H100 NVL", "bfloat16") == 835.5e12
    assert peak_flops("NVIDIA H20-3e", "bfloat16") == 148e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16") == 312e12
    # Other devices whose names contain a known name; their peak is not listed.
    for name in ("NVIDIA RTX A1000 Laptop GPU", "NVIDIA A10G", "NVIDIA L40", "NVIDIA H2000"):
        assert peak_flops(name, "bfloat16") is None
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") is None
    assert peak_flops("CPU (x86_64, 1 threads a rank)", "bfloat16") is None
    assert utilization(8 * 989.4e12, 2.0, 8, peak) == pytest.approx({"tflops": 494.7, "mfu": 0.5})
    assert utilization(1e12, 2.0, 1, None) == {"tflops": 0.5}
    assert utilization(1e12, 0.0, 1, None) == {}
