"""Per-domain metrics of the loss: token sums, which are added over micro-batches and ranks, and means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_mopd.losses.response_tokens import ResponseTokens
from megatron_mopd.losses.token_samples import TokenSamples

METRICS = ("kl", "ce", "entropy", "ratio", "in_band", "clipped", "advantage")
"""Per-domain token means: divergence from the teachers (sampled-token objectives: its one-sample estimate
log theta - log T), cross-entropy of given answers, entropy (one-sample estimate -log theta), theta / mu,
fraction of tokens with a ratio inside the band, fraction that PPO clipped, mean |advantage|."""


class TokenObserver:
    """Adds per-token values of some trajectories to the sums [domains, metrics, 2] of their domains: total
    and count of every metric."""

    def __init__(
        self,
        sums: Tensor,
        tokens: ResponseTokens,
        domain_ids: Mapping[str, int],
        samples: TokenSamples | None = None,
    ):
        self._sums, self._tokens, self._samples = sums, tokens, samples
        domains = torch.tensor([domain_ids[t.domain] for t in tokens.trajectories], dtype=torch.long)
        self._domain = domains.repeat_interleave(torch.tensor(tokens.counts)).to(sums.device)

    def __call__(self, name: str, per_token: Tensor) -> None:
        values = torch.stack((per_token.detach().double(), torch.ones_like(per_token, dtype=torch.double)), 1)
        self._sums[:, METRICS.index(name)].index_add_(0, self._domain, values)
        if name == "kl" and self._samples is not None:
            self._samples.add(self._tokens, per_token)


def named_metrics(sums: Tensor, domains: Sequence[str]) -> dict[str, float]:
    """Per-domain means from summed reports [domains, metrics, 2]: `kl/math` and so on, for metrics with a
    nonzero count; `tokens/math` is the number of response tokens behind them."""
    metrics = {}
    for domain, row in zip(domains, sums.tolist()):
        if tokens := max(count for _, count in row):
            metrics[f"tokens/{domain}"] = tokens
        for name, (total, count) in zip(METRICS, row):
            if count:
                metrics[f"{name}/{domain}"] = total / count
    return metrics
