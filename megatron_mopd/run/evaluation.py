"""Accuracy and pass@k on held-out prompts, scored by their verifiers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.tokenizer import Tokenizer
from megatron_mopd.data.verifiers import score_all
from megatron_mopd.observe.progress import phase, progress
from megatron_mopd.rollout.engine import RolloutEngine, SamplingParams
from megatron_mopd.run.setup import Run


def evaluation(run: Run) -> dict[str, float]:
    """Evaluate on the held-out prompts, per domain: accuracy of greedy answers and pass@k of sampled ones."""
    if run.eval_prompts is None:
        return {}
    rollout, settings = run.config.rollout, run.config.evaluation
    greedy = SamplingParams(
        max_new_tokens=rollout.max_new_tokens,
        temperature=0.0,
        stop_token_ids=SamplingParams.from_config(rollout, run.stop_ids).stop_token_ids,
        allow_not_finite=True,  # the next step detects damaged weights
    )
    shared = (run.engine, list(run.eval_prompts), run.tokenizer)
    with phase(f"evaluating {len(run.eval_prompts)} prompts", often=True):
        metrics = evaluate(*shared, greedy, run.groups, seed=run.config.seed)
    if settings.pass_at:
        sampling = replace(greedy, temperature=settings.temperature, top_p=settings.top_p)
        samples = settings.samples_per_prompt or max(settings.pass_at)
        with phase(f"sampling {samples} responses to each of them", often=True):
            metrics |= evaluate_pass_at(
                *shared,
                sampling,
                run.groups,
                seed=run.config.seed,
                pass_at=settings.pass_at,
                samples_per_prompt=samples,
            )
    return metrics


def evaluation_fingerprint(run: Run) -> str:
    """SHA-256 of everything besides the weights that `evaluation` depends on: its prompts and settings."""
    if run.eval_prompts is None:
        return ""
    rollout = run.config.rollout
    facts = (
        run.eval_prompts.fingerprint(),
        run.config.evaluation,
        rollout.max_new_tokens,
        rollout.stop_token_ids,
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def evaluate(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    sampling: SamplingParams,
    groups: ParallelGroups,
    *,
    seed: int,
) -> dict[str, float]:
    """Sample one response per prompt and score it; returns `accuracy/<domain>` and their mean, `accuracy`,
    equal on every rank.

    Each rank scores a share of the responses that its data-parallel rank sampled. Collective: see `_judge`.
    """
    judged = _judge(engine, prompts, tokenizer, sampling, groups, seed=seed, samples_per_prompt=1)
    metrics: dict[str, float] = {}
    for domain, rows in _by_domain(prompts).items():
        correct, scored, crashed = judged[rows].sum(dim=0).tolist()
        if scored:
            metrics[f"accuracy/{domain}"] = correct / scored
        if crashed:
            metrics[f"verifier_crashes/{domain}"] = crashed
    return metrics | _mean(metrics, "accuracy")


def evaluate_pass_at(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    sampling: SamplingParams,
    groups: ParallelGroups,
    *,
    seed: int,
    pass_at: Iterable[int],
    samples_per_prompt: int,
) -> dict[str, float]:
    """`pass_at_<k>/<domain>` and `pass_at_<k>`, the mean over domains, for every k; equal on every rank.

    Only responses that got a verdict count; a prompt with fewer than k of them is left out.
    Collective: see `_judge`.
    """
    judged = _judge(
        engine, prompts, tokenizer, sampling, groups, seed=seed, samples_per_prompt=samples_per_prompt
    )
    metrics: dict[str, float] = {}
    for k in pass_at:
        for domain, rows in _by_domain(prompts).items():
            counts = [(scored, correct) for correct, scored, _ in judged[rows].tolist() if scored >= k]
            if counts:
                mean = sum(pass_at_k(n, c, k) for n, c in counts) / len(counts)
                metrics[f"pass_at_{k}/{domain}"] = mean
        metrics |= _mean(metrics, f"pass_at_{k}")
    return metrics


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k responses is correct, from `correct` of `samples`:
    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, eq. 1). Needs k <= samples.
    """
    assert 0 <= correct <= samples and 1 <= k <= samples, (samples, correct, k)
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def _judge(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    sampling: SamplingParams,
    groups: ParallelGroups,
    *,
    seed: int,
    samples_per_prompt: int,
) -> Tensor:
    """Numbers of correct, scored and crashed responses per prompt, [prompts, 3] int64 in host memory.

    Collective: one all-reduce of that size over all ranks.
    """
    trajectories = engine.generate(prompts, sampling, seed=seed, samples_per_prompt=samples_per_prompt)
    counts = torch.zeros(len(prompts), 3, dtype=torch.int64)
    here = [t for t in trajectories if t.judge(groups.dp_size) == groups.dp.rank()]
    mine = here[groups.replica_rank :: groups.replica_size]
    verdicts = score_all([(t.prompt, tokenizer.decode(t.response_ids.tolist())) for t in mine])
    for trajectory, verdict in zip(progress(mine, "verifying"), verdicts):
        row = trajectory.index // samples_per_prompt
        counts[row, 0] += bool(verdict.correct)
        counts[row, 1] += verdict.correct is not None
        counts[row, 2] += verdict.crashed
    counts = counts.to(groups.device)
    dist.all_reduce(counts)
    return counts.cpu()


def _by_domain(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        rows.setdefault(prompt.domain, []).append(number)
    return dict(sorted(rows.items()))


def _mean(metrics: dict[str, float], name: str) -> dict[str, float]:
    values = [value for key, value in metrics.items() if key.startswith(f"{name}/")]
    return {name: sum(values) / len(values)} if values else {}
