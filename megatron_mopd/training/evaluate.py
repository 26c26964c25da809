"""Accuracy on held-out prompts, scored by their verifiers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.tokenizer import Tokenizer
from megatron_mopd.data.verifiers import score
from megatron_mopd.rollout.engine import RolloutEngine, SamplingParams


def evaluate(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    sampling: SamplingParams,
    groups: ParallelGroups,
    *,
    seed: int,
) -> dict[str, float]:
    """Sample one response a prompt and score it; returns `accuracy/<domain>` and their mean, `accuracy`,
    equal on every rank.

    Every rank scores its share of the responses. Collective: one all-reduce of 3 x domains integers over all
    ranks.
    """
    trajectories = engine.generate(prompts, sampling, seed=seed)
    domains = sorted({prompt.domain for prompt in prompts})
    counts = torch.zeros(len(domains), 3, dtype=torch.int64, device=groups.device)  # correct, scored, crashed
    for trajectory in trajectories[groups.rank :: groups.world_size]:
        verdict = score(trajectory.prompt, tokenizer.decode(trajectory.response_ids))
        row = domains.index(trajectory.domain)
        counts[row, 0] += bool(verdict.correct)
        counts[row, 1] += verdict.correct is not None
        counts[row, 2] += verdict.crashed
    dist.all_reduce(counts)
    metrics: dict[str, float] = {}
    for domain, (correct, scored, crashed) in zip(domains, counts.tolist()):
        if scored:
            metrics[f"accuracy/{domain}"] = correct / scored
        if crashed:
            metrics[f"verifier_crashes/{domain}"] = crashed
    if metrics:
        accuracies = [value for key, value in metrics.items() if key.startswith("accuracy/")]
        metrics["accuracy"] = sum(accuracies) / max(1, len(accuracies))
    return metrics
