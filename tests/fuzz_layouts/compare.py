"""Tolerances between a layout and one rank, and the differences that exceed them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tests import _models
from tests.fuzz_layouts.case import Case
from tests.fuzz_layouts.run import Outcome

_COMPARED = {"loss", "tokens", "grad_norm", "lr", "skipped_steps"}
_COMPARED_PER_DOMAIN = {"kl", "ce", "entropy", "ratio", "in_band", "clipped", "advantage"}
_LATER = 50
"""Factor on the second step's tolerances: Adam divides by gradients of any size, which amplifies rounding."""


@dataclass(frozen=True)
class Tolerance:
    """Largest relative errors of the first step's metrics, its gradients, and the final weights; those of
    tensors are relative to the largest element of all of them."""

    metric: float
    gradient: float
    weight: float
    least: float = 1e-3
    """Errors of metrics below this value are relative to this value: a metric of 0 can be a difference of
    nonzero numbers."""
    share: float = 0.0
    """Errors of a policy-gradient loss below this share of the largest advantage are relative to that: it is
    a sum of terms of both signs, as large as the advantages."""

    @classmethod
    def of(cls, case: Case) -> Tolerance:
        if case.params_dtype == "float32":
            # For a teacher equal to the student, the rounding of log-probs of about -4 remains, 5e-7.
            return cls(2e-4, 2e-4, 5e-3, least=1e-2, share=0.1)
        if case.has_experts:  # megatron-core computes sigmoid routing scores in float32
            return cls(5e-6, 1e-5, 2e-4)
        return cls(2e-7, 2e-7, 1e-5)


def differences(case: Case, reference: Outcome, outcomes: list[Outcome]) -> list[str]:
    """Every value in which the ranks' outcomes differ from those of one rank, one line each."""
    allowed = Tolerance.of(case)
    problems = []
    for step, expected in enumerate(reference.metrics):
        for rank, outcome in enumerate(outcomes):
            tolerance = allowed.metric * (_LATER if step else 1)
            found = _metric_differences(expected, outcome.metrics[step], tolerance, allowed)
            problems += [f"step {step}, rank {rank}: {problem}" for problem in found]
    for step, expected in enumerate(reference.gradients):
        if all(outcome.gradients for outcome in outcomes):
            pieces = [outcome.gradients[step] for outcome in outcomes]
            tolerance = allowed.gradient * (_LATER if step else 1)
            found = _tensor_differences(case, expected, pieces, tolerance)
            problems += [f"step {step}, gradient: {problem}" for problem in found]
    pieces = [outcome.weights for outcome in outcomes]
    found = _tensor_differences(case, reference.weights, pieces, allowed.weight)
    problems += [f"weights: {problem}" for problem in found]
    for rank, outcome in enumerate(outcomes):
        for layer, bias in outcome.expert_biases.items():
            expected = reference.expert_biases[layer]
            if not torch.allclose(bias, expected, atol=1e-7):
                problems.append(f"rank {rank}: expert bias of layer {layer}: {bias} instead of {expected}")
    return problems


def _comparable(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics except those of time and memory."""

    def is_compared(name: str) -> bool:
        head, _, rest = name.partition("/")
        of_teacher = head == "teacher" and rest.endswith(("/kl", "/tokens"))
        return name in _COMPARED or head in _COMPARED_PER_DOMAIN or of_teacher

    return {name: value for name, value in metrics.items() if is_compared(name)}


def _metric_differences(expected: dict, found: dict, tolerance: float, allowed: Tolerance) -> list[str]:
    expected, found = _comparable(expected), _comparable(found)
    if expected.keys() != found.keys():
        return [f"other metrics: {', '.join(sorted(expected.keys() ^ found.keys()))}"]
    problems = []
    advantages = [abs(value) for name, value in expected.items() if name.startswith("advantage/")]
    terms = {"loss": allowed.share * max(advantages, default=0.0)}
    for name, value in expected.items():
        error = abs(found[name] - value) / max(abs(value), allowed.least, terms.get(name, 0.0))
        if not error <= tolerance and not (math.isnan(value) and math.isnan(found[name])):
            problems.append(f"{name}: {found[name]!r} instead of {value!r}")
    return problems


def _tensor_differences(case: Case, expected: list, pieces: list[list], tolerance: float) -> list[str]:
    try:
        wanted = _models.assemble([expected], case.vocab_size)
        found = _models.assemble(pieces, case.vocab_size)
    except AssertionError as error:  # replicas differ, or no rank holds a part
        return [str(error)]
    if wanted.keys() != found.keys():
        return [f"other tensors: {', '.join(sorted(wanted.keys() ^ found.keys()))}"]
    scale = max(max(_largest(value) for value in wanted.values()), 1e-6)
    problems = []
    for name, value in wanted.items():
        if found[name].shape != value.shape:
            problems.append(f"{name}: {list(found[name].shape)} instead of {list(value.shape)}")
        elif not (error := _largest(found[name] - value) / scale) <= tolerance:  # also true for NaN
            problems.append(f"{name}: off by {error:.2e} of {scale:.2e}")
    return problems


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()
