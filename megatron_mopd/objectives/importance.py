"""Rollout correction: per-token weights for samples from a policy that differs slightly from the trained one.

theta / mu is the probability ratio of the trained model to the sampler for a sampled token. It differs from 1
because the two engines round differently and because the student has been updated since. All weights are
constants (stop-gradient) and apply to every objective, including a full-vocabulary divergence.

A vector over response tokens [n] is the concatenation of whole responses with the given lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LOG_RATIO_LIMIT = 60.0
"""Ratios are limited to e^60: an infinite weight times 0 would make the loss NaN."""


def importance_weights(
    log_ratio: Tensor, lengths: Sequence[int], correction: str, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Weights w_t [n] of tokens with log-ratios log(theta / mu) [n], and whether each ratio is inside the
    band [n].

    `tis`: the ratio clamped to [low, high] (truncated importance sampling; one-sided with low = 0).
    `icepop`: the ratio inside the band, 0 outside (MiMo-V2-Flash, arXiv 2601.02780, 4.4; Nemotron-Cascade 2,
    arXiv 2603.19220, with [0.5, 2]). `sequence_mask`: the ratio, in responses whose mean ratio is inside the
    band; 0 in the others. `none`: 1. Never differentiated. No collectives.
    """
    ratio = log_ratio.detach().clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT).exp()
    if correction == "sequence_mask":
        mean = _segment_mean(ratio, lengths)
        inside = (mean >= low) & (mean <= high)
    else:
        inside = (ratio >= low) & (ratio <= high)
    if correction == "none":
        return torch.ones_like(ratio), inside
    if correction == "tis":
        return ratio.clamp(low, high), inside
    if correction in ("icepop", "sequence_mask"):
        return torch.where(inside, ratio, 0.0), inside
    raise ValueError(f"correction must be none, tis, icepop or sequence_mask, got {correction!r}")


def drift_gate(log_ratio: Tensor, lengths: Sequence[int], block: int, sharpness: float) -> Tensor:
    """Weights [n] that reduce the influence of blocks of `block` tokens on which the student has drifted
    since sampling.

    After Blockwise Policy-Drift Gating (arXiv 2606.24084): log-probability shifts log(theta / mu) [n],
    averaged over fixed blocks, become detached gates whose mean over a response is 1. The gate's shape,
    exp(-sharpness x mean |shift|), and the mean over each response (so that no other response of the batch
    changes it) are our choice. No collectives.
    """
    shift = log_ratio.detach().abs()
    blocks = [size for length in lengths for size in _blocks(length, block)]
    gate = torch.exp(-sharpness * _segment_mean(shift, blocks))
    return gate / _segment_mean(gate, lengths).clamp(min=torch.finfo(gate.dtype).tiny)


def _blocks(length: int, block: int) -> list[int]:
    return [min(block, length - start) for start in range(0, length, block)]


def _segment_mean(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Mean over each consecutive segment, broadcast to its elements: [n] -> [n]."""
    counts = torch.tensor(lengths, dtype=torch.long, device=values.device)
    segment = torch.arange(len(counts), device=values.device).repeat_interleave(counts)
    sums = values.new_zeros(len(counts)).index_add_(0, segment, values)
    return (sums / counts.clamp(min=1)).repeat_interleave(counts)
