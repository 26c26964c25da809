"""One optimizer step: teachers score, the student learns, the weights change."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mopd.config import ConfigError
from megatron_mopd.config.objectives import samples_per_prompt
from megatron_mopd.data.exchange import gather_tokens
from megatron_mopd.losses.batch_facts import BatchFacts, outcome_advantages
from megatron_mopd.losses.batch_loss import BatchLoss
from megatron_mopd.losses.domain_sums import METRICS, named_metrics
from megatron_mopd.losses.token_samples import TokenSamples
from megatron_mopd.model.gpt import unwrap
from megatron_mopd.objectives.reduction import token_weights
from megatron_mopd.pipeline.problem import LimitError
from megatron_mopd.pipeline.runtime import Execution
from megatron_mopd.training.learner import Learner
from megatron_mopd.training.skipped_steps import (
    ExpertBiases,
    all_finite,
    causes_of_all_ranks,
    save_evidence,
    weights_damaged,
)
from megatron_mopd.training.step_batch import StepBatch
from megatron_mopd.training.teacher_metrics import cost_of_teachers, divergence_by_teacher, scoring_seconds

Report = dict[str, torch.Tensor]
"""What the loss reports for one micro-batch (`BatchLoss`)."""


def train_step(
    learner: Learner, batches: Sequence[StepBatch], samples: TokenSamples | None = None
) -> dict[str, float]:
    """One optimizer step on `batches[0]`: teachers score what is not scored yet, the student learns.

    `batches[1:]` are later steps that are already sampled: teachers may score them while the student leaves a
    stage idle. `samples` collects per-token divergences. Returns the step's metrics, equal on every rank
    except for times. Raises `ConfigError` on every rank, before anything runs, if `schedule.max_*` or
    `teacher_storage.hidden_cache_bytes` are too small.
    """
    started, batch = time.perf_counter(), batches[0]
    biases = ExpertBiases(learner.chunks)
    execution = _start(learner, batches, build_loss(learner, batch, samples))
    execution.run_to_update()
    metrics = _reduce(learner, batch, execution.work.reports, samples)
    metrics |= _update(learner, batch, metrics, biases)
    learner.pipeline.plan_next()
    execution.run_rest()
    return metrics | _costs(learner, batch, time.perf_counter() - started)


def _start(learner: Learner, batches: Sequence[StepBatch], loss: BatchLoss) -> Execution:
    """Zero the gradients, check the teachers' files, and plan the step."""
    for chunk in learner.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    learner.optimizer.zero_grad()
    if learner.bank is not None:
        learner.bank.check_files(learner.bank.names)
    try:
        return learner.pipeline.start(learner.chunks, batches, loss, learner.bank)
    except LimitError as error:
        raise _unmet_limits(learner, error) from None


def _unmet_limits(learner: Learner, error: LimitError) -> ConfigError:
    """Translate the planner's limits into configuration keys."""
    problems = []
    for name, value, smallest in error.unmet:
        key, own = f"schedule.max_{name}", getattr(learner.config.schedule, f"max_{name}", None)
        if name == "cached_states" and (own is None or own > value):
            key, size = "teacher_storage.hidden_cache_bytes", error.state_bytes
            own, smallest = learner.config.teacher_storage.hidden_cache_bytes, smallest * size
            problems.append(
                f"{key}: {own} cannot hold the teachers' hidden states that one step needs at a time, up to "
                f"{smallest} bytes; raise it, or make micro-batches smaller"
            )
        else:
            problems.append(
                f"{key}: {own} cannot be met by any plan of a step; it must be at least {smallest}"
            )
    return ConfigError("; ".join(problems))


def build_loss(learner: Learner, batch: StepBatch, samples: TokenSamples | None = None) -> BatchLoss:
    """The loss of one step, for the last stage. No collectives; the first micro-batch whose objective needs
    a reward waits for the verifiers."""

    @cache
    def advantages() -> dict[int, float]:
        rewards, siblings = batch.rewards.collect(), samples_per_prompt(learner.config)
        return outcome_advantages(batch.targets, batch.trajectories, rewards, siblings)

    facts = BatchFacts(
        batch.targets,
        token_weights(batch.trajectories, learner.config.objective.reduction),
        batch.cache,
        batch.findings,
        outcome_advantages=advantages,
        proximal_logprobs=batch.proximal,
        samples=samples,
    )
    return BatchLoss(learner.loss_settings, unwrap(learner.chunks[-1]), learner.bank, facts)


def _reduce(
    learner: Learner, batch: StepBatch, reports: Sequence[Report], samples: TokenSamples | None
) -> dict[str, float]:
    """Sum the reports over micro-batches, DP and CP, broadcast them from the last stage, and name them per
    domain. The token samples are reduced along with them.

    Collectives: one all-reduce over DP x CP and one broadcast over PP of 14 x domains + 2 float64 values
    (plus 3 for each token of the samples).
    """
    groups = learner.groups
    shape = (len(learner.domains), len(METRICS), 2)
    sums = torch.zeros(math.prod(shape) + 2, dtype=torch.float64, device=groups.device)
    for report in reports:
        sums[:-2] += report["domain_sums"].flatten()
        sums[-2] += report["weighted_sum"]
        sums[-1] += report["tokens"]
    if samples is not None:
        sums = torch.cat([samples.values, sums])
    if groups.is_last_stage:
        dist.all_reduce(sums, group=groups.collection.dp_cp)
    dist.broadcast(sums, src=groups.last_stage_rank, group=groups.pp)
    sums = sums.cpu()
    if samples is not None:
        samples.values, sums = sums.split([len(samples.values), math.prod(shape) + 2])
    loss, tokens = sums[-2:].tolist()
    sums = sums[:-2].view(shape)
    return (
        {"loss": loss / max(tokens, 1.0), "tokens": tokens}
        | named_metrics(sums, learner.domains)
        | divergence_by_teacher(sums[:, METRICS.index("kl")], learner.domains, batch.targets)
    )


def _update(
    learner: Learner, batch: StepBatch, metrics: dict[str, float], biases: ExpertBiases
) -> dict[str, float]:
    """Step the optimizer if loss and gradients are finite on every rank; otherwise skip the step.

    Collectives besides megatron-core's: one all-reduce of one float over all ranks. Raises
    `FloatingPointError` on every rank, before the weights change, if too many steps in a row were not finite.
    """
    batch.findings.add_sampled(t for micro_batch in batch.student for t in micro_batch.trajectories)
    # A clamp may have hidden a finding behind a finite loss.
    loss = math.nan if batch.findings.causes else metrics["loss"]
    if not all_finite(loss, learner.chunks, learner.groups):
        biases.restore()
        return _skip(learner, batch, metrics)
    _, grad_norm, _ = learner.optimizer.step()
    if grad_norm is not None and not math.isfinite(grad_norm):
        raise FloatingPointError(f"the gradient norm is {grad_norm}; resume from the last checkpoint")
    learner.skipped.end_row()
    learner.scheduler.step(increment=1)
    return {"grad_norm": float(grad_norm) if grad_norm is not None else 0.0, "lr": _learning_rate(learner)}


def _skip(learner: Learner, batch: StepBatch, metrics: dict[str, float]) -> dict[str, float]:
    """Record a skipped step; weights and learning-rate schedule do not change. Collectives:
    `causes_of_all_ranks`, and `gather_tokens` over the data-parallel group of rank 0, for the evidence."""
    skipped = learner.skipped
    iteration = learner.scheduler.num_steps + skipped.total + 1
    batch.findings.add_weights(learner.chunks, learner.groups.rank)
    causes = causes_of_all_ranks(batch.findings)
    directory, trajectories = Path(learner.config.run_dir) / "evidence", batch.trajectories
    if learner.groups.replica_rank == 0:
        trajectories = gather_tokens(trajectories, learner.groups.dp)
    evidence = save_evidence(
        directory, iteration, learner.chunks, trajectories, metrics, learner.groups, causes
    )
    skipped.add(causes, weights_damaged(causes))
    limit = learner.config.guard.max_skipped_steps
    if skipped.in_a_row > limit:
        weights = "the weights are those of the last finite step"
        if skipped.weights_damaged:
            weights = "the weights in memory are damaged, but the last checkpoint's are not"
        raise FloatingPointError(
            f"loss or gradient not finite in {skipped.in_a_row} steps in a row "
            f"(guard.max_skipped_steps={limit}; loss {metrics['loss']}); {weights}; see {evidence}"
            + "".join(f"; {cause}" for cause in causes[:1])
        )
    return {"skipped_steps": skipped.total, "grad_norm": math.nan, "lr": _learning_rate(learner)}


def _learning_rate(learner: Learner) -> float:
    return max(group["lr"] for group in learner.optimizer.param_groups)


def _costs(learner: Learner, batch: StepBatch, total: float) -> dict[str, Any]:
    """Where the step's time went on this rank, how idle the stages were, and what the teachers cost."""
    seconds = scoring_seconds(learner.pipeline.last_events())
    score = sum(seconds.values())
    metrics = {"time/score": score, "time/train": total - score}
    shares = learner.pipeline.idle_shares
    metrics |= {f"idle/stage_{stage}": share for stage, share in enumerate(shares)}
    if learner.bank is not None:
        metrics |= cost_of_teachers(learner.bank, batch.cache, seconds, learner.groups)
    return metrics
