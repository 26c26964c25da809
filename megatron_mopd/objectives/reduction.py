"""Named reductions: the relative weights of tokens in the loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import get_args

from megatron_mopd.choices import Reduction
from megatron_mopd.data.trajectory import Trajectory

REDUCTIONS = get_args(Reduction)


def token_weights(trajectories: Sequence[Trajectory], reduction: str) -> dict[int, float]:
    """Weight of each response token by trajectory index, for the whole global batch.

    The loss is sum_t weight_t L_t / N, where N is the number of response tokens in the global batch, so every
    weight is 1 for `token_mean`. `sequence_mean` gives each response the same total weight (N / (responses x
    |y|) per token, the 1/|y| of MiMo-V2-Flash, arXiv 2601.02780, 4.4), and `domain_mean` each domain (N /
    (domains x tokens of the domain)). Weights are computed from the global batch, so they do not depend on
    micro-batches, packing or the parallel layout.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r} is not one of {', '.join(REDUCTIONS)}")
    responses = [t for t in trajectories if t.response_length]
    total = sum(t.response_length for t in responses)
    if reduction == "token_mean":
        return {t.index: 1.0 for t in responses}
    if reduction == "sequence_mean":
        return {t.index: total / (len(responses) * t.response_length) for t in responses}
    per_domain = Counter()
    for trajectory in responses:
        per_domain[trajectory.domain] += trajectory.response_length
    return {t.index: total / (len(per_domain) * per_domain[t.domain]) for t in responses}
