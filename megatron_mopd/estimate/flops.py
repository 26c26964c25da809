"""Floating-point operations of a step, and their share of the device's peak.

A backward pass counts as two forward passes (`model.flops`). Recompute, sampling and the divergence itself
are not counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.model.flops import ForwardCost
from megatron_mopd.teachers.routing import Mixture

# Dense bfloat16 FLOP/s from the manufacturer's data sheets, most of which print twice that value, with
# sparsity. The first entry whose words all occur in the device's name is used.
_PEAKS = {
    "GB300": 2.5e15,
    "B300": 2.25e15,
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 989.4e12,
    "H200 NVL": 835.5e12,
    "H200": 989.4e12,
    "H100 PCIe": 756.5e12,
    "H100 NVL": 835.5e12,
    "H100": 989.4e12,
    "H800 PCIe": 756.5e12,
    "H800": 989.4e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
}


def step_flops(
    trajectories: Sequence[Trajectory],
    student: ForwardCost,
    teachers: Mapping[str, ForwardCost],
    mixture: Callable[[str], Mixture],
) -> float:
    """FLOPs of one optimizer step on the global batch: the student forward and backward, each trajectory's
    teachers forward.
    """
    total = 0.0
    for trajectory in trajectories:
        total += 3 * student.of(trajectory)
        total += sum(teachers[name].of(trajectory) for name, _ in mixture(trajectory.domain))
    return total


def peak_flops(device: str, params_dtype: str) -> float | None:
    """Peak FLOP/s of the named device; `None` if unknown."""
    if params_dtype != "bfloat16":
        return None
    # "A100" is a word of "NVIDIA A100-SXM4-80GB", but not of "NVIDIA RTX A1000".
    words = set(re.split(r"[\s-]+", device))
    return next((peak for name, peak in _PEAKS.items() if words.issuperset(name.split())), None)


def utilization(flops: float, seconds: float, ranks: int, peak: float | None) -> dict[str, Any]:
    """`tflops` per second and rank, and `mfu`, their share of the peak, if it is known."""
    if not seconds > 0:
        return {}
    each = flops / seconds / ranks
    return {"tflops": each / 1e12} | ({"mfu": each / peak} if peak else {})
