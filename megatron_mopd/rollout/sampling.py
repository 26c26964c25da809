"""Sample tokens from vocab-parallel logits without gathering them."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mopd.objectives.vocab_shard import VocabShard
from megatron_mopd.rollout.engine import SamplingParams
from megatron_mopd.rollout.noise import gumbel_noise

_NOISE_ELEMENTS = 1 << 24
"""Noise is generated for this many logits at a time (about 200 MB), whatever the batch and the vocabulary
size."""
_CACHED_ELEMENTS = 1 << 18
"""On the CPU, exponentials are computed for this many logits at a time: 1 MB, which fits in a core's
cache."""
_BLOCK = 512
"""On the CPU, the number of logits per block in the search for a row's maximum."""
_FIRST_CANDIDATES = 64
"""Top-p first looks at this many tokens of each shard; a wider nucleus requests eight times as many."""


def sample_tokens(
    logits: Tensor,
    shard: VocabShard,
    sampling: SamplingParams,
    *,
    seed: int,
    trajectories: Tensor,
    position: int | Tensor,
) -> tuple[Tensor, Tensor]:
    """Sample one token per row from vocab-parallel logits [b, V/tp]: (token ids [b] int64, log-probs [b]
    fp64).

    The draw is argmax(logits / temperature + Gumbel noise), with noise keyed by (seed, trajectory, position,
    id), so it does not depend on the batch or on the layout. The log-prob is the token's under the
    distribution it was drawn from: tempered, truncated by top-k and top-p, and renormalised. Greedy tokens
    (temperature 0) get their log-prob at temperature 1, because that under their point mass would be
    uninformative. Statistics are at least fp32. Padded columns of the vocabulary are removed first.

    Collectives over the tensor-parallel group: one all-gather of 5 doubles per row. Top-k adds one of k
    logits per row. Top-p without top-k adds one of 64 logits and one of 2 numbers per row, and repeats the
    former with 8 times as many, up to the whole shard, while the nucleus of some row is wider.
    """
    logits = logits[:, : max(shard.valid, 1)].to(torch.promote_types(logits.dtype, torch.float32))
    if shard.valid == 0:  # this shard is all padding
        logits = torch.full_like(logits, -torch.inf)
    if sampling.temperature not in (0.0, 1.0):
        logits = logits / sampling.temperature
    if sampling.is_truncated:
        threshold = _truncation_threshold(logits, shard, sampling)
        logits = logits.masked_fill(logits < threshold.unsqueeze(1), -torch.inf)

    if sampling.temperature == 0:
        score, column = _largest(logits)
        chosen = score
    else:
        score, column = _noisy_max(logits, shard.offset, seed, trajectories, position)
        chosen = logits.gather(1, column.unsqueeze(1)).squeeze(1)
    largest = score if sampling.temperature == 0 else logits.amax(dim=1)
    total = _exponential_sum(logits, largest)
    local = torch.stack((score, column + shard.offset, chosen, largest, total)).double()
    score, token, chosen, largest, total = shard.all_gather(local).unbind(dim=1)  # each [tp, b]
    winner = score.argmax(dim=0, keepdim=True)
    maximum = largest.amax(dim=0)
    normalizer = maximum + (total * (largest - maximum).exp()).sum(dim=0).log()
    token = token.gather(0, winner).squeeze(0).long()
    return token, chosen.gather(0, winner).squeeze(0) - normalizer


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Largest logit of every row [b] and its column, the first among equals."""
    columns = logits.size(1)
    if logits.device.type != "cpu" or columns < 2 * _BLOCK:
        return logits.max(dim=1)
    # On the CPU a maximum is vectorized only without its index: find the block first, then search in it.
    whole = columns // _BLOCK * _BLOCK
    peaks = logits[:, :whole].unflatten(1, (-1, _BLOCK)).amax(dim=2)
    if whole < columns:
        peaks = torch.cat((peaks, logits[:, whole:].amax(dim=1, keepdim=True)), dim=1)
    start = (peaks.argmax(dim=1, keepdim=True) * _BLOCK).clamp_(max=columns - _BLOCK)
    value, place = logits.gather(1, start + torch.arange(_BLOCK)).max(dim=1)
    return value, start.squeeze(1) + place


def _exponential_sum(logits: Tensor, largest: Tensor) -> Tensor:
    """Sum of exp(logits - largest) of every row [b], a bounded number of rows at a time."""
    # A shard without candidates has -inf everywhere: subtract 0 there, because inf - inf would be NaN.
    shift = largest.nan_to_num(neginf=0.0).unsqueeze(1)
    elements = _CACHED_ELEMENTS if logits.device.type == "cpu" else _NOISE_ELEMENTS
    rows = max(1, elements // logits.size(1))
    parts = zip(logits.split(rows), shift.split(rows), strict=True)
    return torch.cat([(part - most).exp_().sum(dim=1) for part, most in parts])


def _noisy_max(
    logits: Tensor, first_id: int, seed: int, trajectories: Tensor, position: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Largest value of logit + noise of every row and its column, a bounded number of rows at a time."""
    rows = max(1, _NOISE_ELEMENTS // logits.size(1))
    best = []
    positions = torch.as_tensor(position, device=trajectories.device).expand_as(trajectories)
    parts = (logits.split(rows), trajectories.split(rows), positions.split(rows))
    for part, names, places in zip(*parts, strict=True):
        noise = gumbel_noise(seed, names, places, first_id, logits.size(1))
        best.append((noise.to(logits.dtype) if logits.dtype != noise.dtype else noise).add_(part).max(dim=1))
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])


def _truncation_threshold(logits: Tensor, shard: VocabShard, sampling: SamplingParams) -> Tensor:
    """The smallest logit of each row [b] that top-k and top-p keep (ties are all kept).

    Every rank gathers the same candidates, so all make the same decisions.
    """
    if sampling.top_k > 0:
        kept = _candidates(logits, shard, sampling.top_k)[0][:, : sampling.top_k]
        return _nucleus_threshold(kept, kept.logsumexp(dim=1), sampling.top_p)[0]
    normalizer = shard.all_gather(logits.logsumexp(dim=1)).logsumexp(dim=0)
    width = _FIRST_CANDIDATES
    while True:
        candidates, highest_left_out = _candidates(logits, shard, width)
        threshold, reached = _nucleus_threshold(candidates, normalizer, sampling.top_p)
        if width >= shard.columns or bool((reached & (threshold >= highest_left_out)).all()):
            return threshold
        width *= 8


def _candidates(logits: Tensor, shard: VocabShard, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest logits of every shard, merged in descending order [b, tp x width], and a bound [b].

    No omitted logit is larger than the bound. One all-gather of b x width elements.
    """
    width = min(width, shard.columns)
    local = logits.new_full((logits.size(0), width), -torch.inf)
    found = logits.topk(min(width, logits.size(1)), dim=1).values
    local[:, : found.size(1)] = found
    gathered = shard.all_gather(local)  # [tp, b, width]
    return gathered.transpose(0, 1).flatten(1).sort(dim=1, descending=True).values, gathered[..., -1].amax(
        dim=0
    )


def _nucleus_threshold(candidates: Tensor, normalizer: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The smallest logit [b] of the smallest prefix of the descending `candidates` [b, n] with mass `top_p`;
    and whether the candidates reach that mass [b]."""
    if top_p >= 1:
        return candidates[:, -1], torch.ones_like(normalizer, dtype=torch.bool)
    probabilities = (candidates - normalizer.unsqueeze(1)).double().exp()
    mass = probabilities.cumsum(dim=1)
    # No NaN logit is kept; the first one's log-prob will be NaN.
    last = ((mass - probabilities < top_p).sum(dim=1, keepdim=True) - 1).clamp_(min=0)
    return candidates.gather(1, last).squeeze(1), mass[:, -1] >= top_p
