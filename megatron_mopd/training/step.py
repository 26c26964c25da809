"""One optimizer step: teachers score, the student learns."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.config import Config, ConfigError, DomainObjectives, ModelConfig
from megatron_mopd.config.objectives import (
    needs_old_policy,
    needs_teachers,
    rollout_sizes,
    samples_per_prompt,
)
from megatron_mopd.data.batching import (
    BatchShape,
    MicroBatch,
    collate,
    equalize,
    group_micro_batches,
    split_over_ranks,
)
from megatron_mopd.data.position import DataPosition
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.model.gpt import unwrap
from megatron_mopd.objectives.reduction import token_weights
from megatron_mopd.pipeline.driver import PipelineDriver
from megatron_mopd.pipeline.megatron_schedules import run_student, run_teacher
from megatron_mopd.pipeline.problem import LimitError, Limits, TeacherGroup
from megatron_mopd.rollout.routing import RoutingRecords
from megatron_mopd.teachers.bank import TeacherBank
from megatron_mopd.teachers.hidden_cache import HiddenCache
from megatron_mopd.teachers.routing import Mixture, Routing
from megatron_mopd.training.batch_facts import BatchFacts, outcome_advantages
from megatron_mopd.training.losses import METRICS, BatchLoss, named_metrics
from megatron_mopd.training.nonfinite import (
    ExpertBiases,
    Findings,
    SkippedSteps,
    all_finite,
    causes_of_all_ranks,
    save_evidence,
    weights_damaged,
)
from megatron_mopd.training.old_policy import proximal_logprobs
from megatron_mopd.training.rewards import NO_REWARDS, PendingRewards
from megatron_mopd.training.teacher_groups import teacher_group
from megatron_mopd.training.teacher_metrics import cost_of_teachers, divergence_by_teacher, scoring_seconds
from megatron_mopd.training.teacher_scores import TeacherScores
from megatron_mopd.training.token_samples import TokenSamples


@dataclass
class Learner:
    """Everything one optimizer step touches."""

    config: Config
    groups: ParallelGroups
    chunks: list[torch.nn.Module]
    """The student's chunks on this rank, wrapped in DistributedDataParallel."""
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    model: ModelConfig
    """The student's architecture, everything resolved."""
    manifest: dict[str, Any]
    """Fingerprints of what a resumed run must agree with: tokenizer, student, teachers, prompts."""
    domains: list[str]
    """Every domain of the run, sorted: the order of per-domain sums on all ranks."""
    routing: Routing | None = None
    """`None` when no domain's objective has teachers."""
    bank: TeacherBank | None = None
    vocab_size: int | None = None
    """Ids from 0 on that take part in every softmax: the tokenizer's; default: all rows of the model. Rows
    beyond, with which models are padded to round sizes, are no tokens: they are never sampled and belong to
    no distribution, neither the student's nor a teacher's."""
    skipped: SkippedSteps = field(default_factory=SkippedSteps)
    sampled_from: dict[int, int] = field(default_factory=dict)
    """Rollout batch -> identity of the weights that it is sampled from (`rollout_log`)."""
    position: DataPosition = field(init=False)
    """How iterations correspond to rollout batches and prompts."""
    pipeline: PipelineDriver | None = field(init=False, default=None)
    """`None` when megatron-core's own schedules are used."""

    def __post_init__(self):
        """Collective over all ranks: the pipeline's communicators."""
        self.vocab_size = self.vocab_size or self.model.vocab_size
        schedule = self.config.schedule
        self.position = DataPosition(*rollout_sizes(self.config))
        if schedule.kind != "megatron":
            self.pipeline = PipelineDriver(
                self.groups,
                dict.fromkeys(self.bank.names if self.bank else (), 1.0),
                kind=schedule.kind,
                limits=Limits(activations=schedule.max_activations, cached_states=schedule.max_cached_states),
                timeout=timedelta(minutes=self.config.parallel.distributed_timeout_minutes),
            )

    @cached_property
    def objectives(self) -> DomainObjectives:
        """The objective of every domain."""
        return DomainObjectives(self.config.objective)

    def mixture(self, domain: str, iteration: int = 0) -> Mixture:
        """The teachers that a domain's objective compares the student with; none for `sft` and `grpo`."""
        if not needs_teachers(self.objectives.of(domain)):
            return ()
        return self.routing.at(iteration).mixture(domain)


@dataclass
class StepBatch:
    """The global batch of one optimizer step as this rank sees it; a `StepInput` of the pipeline."""

    trajectories: Sequence[Trajectory]
    shape: BatchShape
    student: list[MicroBatch]
    teachers: dict[str, list[MicroBatch]]
    """Teacher name -> the micro-batches it scores; only samples routed to it, the same number on every DP
    rank."""
    groups: tuple[TeacherGroup, ...]
    """Which student micro-batches need each of the teachers' micro-batches, and how many are scored."""
    cache: HiddenCache
    scores: TeacherScores
    rewards: PendingRewards
    iteration: int = 0
    """Optimizer steps done before this one; routing weights follow it."""
    state_bytes: int = 0
    """Most bytes that one scored micro-batch leaves in the cache of any rank."""
    proximal: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """Trajectory index -> log-probs at the start of the rollout batch, on the last stage (`BatchFacts`)."""
    findings: Findings = field(default_factory=Findings)
    """What this rank's losses and log-probs found to be not finite."""
    causes: list[str] = field(default_factory=list)
    """Of a step that was left out: what the losses and log-probs of all ranks found."""
    samples: TokenSamples | None = None
    """Where the step is to take down the divergence of single tokens; complete after it, on every rank."""
    seconds: dict[str, float] = field(default_factory=dict)

    def keep(self, teacher: str, micro_batch: MicroBatch, hidden: torch.Tensor) -> None:
        """Put what the loss needs of a teacher's last-layer hidden states into the cache."""
        self.scores.keep(teacher, micro_batch, hidden)


def plan_steps(
    learner: Learner,
    rollout: Sequence[Trajectory],
    rewards: PendingRewards = NO_REWARDS,
    routing: RoutingRecords | None = None,
    iteration: int = 0,
) -> list[StepBatch]:
    """The optimizer steps that a rollout batch feeds, from `iteration` on: `global_batch_size` trajectories
    each, in order.

    Where PPO's clipping needs the policy at the start of a rollout batch of several steps, one forward pass
    of the student over the whole batch takes down its log-probs.
    """
    size = learner.config.schedule.global_batch_size
    batches = [
        plan_step(learner, rollout[start : start + size], rewards, routing, iteration + number)
        for number, start in enumerate(range(0, len(rollout), size))
    ]
    if len(batches) > 1 and learner.objectives.any(needs_old_policy, learner.domains):
        for batch in batches:
            batch.proximal = proximal_logprobs(
                learner.chunks,
                batch.student,
                batch.shape,
                learner.groups,
                vocab_size=learner.vocab_size,
                chunk_size=learner.config.objective.chunk_size,
                temperature=learner.config.rollout.temperature,
                findings=batch.findings,
            )
    return batches


def plan_step(
    learner: Learner,
    trajectories: Sequence[Trajectory],
    rewards: PendingRewards = NO_REWARDS,
    routing: RoutingRecords | None = None,
    iteration: int = 0,
) -> StepBatch:
    """Split the batch over DP ranks, ordered by teacher, and cut it into micro-batches.

    Collectives: only with routing replay, `RoutingRecords.exchange` over DP.
    """
    groups, schedule = learner.groups, learner.config.schedule
    shape = BatchShape.for_batch(
        trajectories,
        micro_batch_size=schedule.micro_batch_size,
        max_tokens=schedule.max_tokens_per_micro_batch,
        tp_size=groups.tp_size,
        cp_size=groups.cp_size,
        cp_rank=groups.cp.rank(),
        fixed=groups.pp_size > 1,
    )

    def mixture(trajectory: Trajectory) -> Mixture:
        return learner.mixture(trajectory.domain, iteration)

    # Ordered by teacher and objective, so that a micro-batch's loss has few parts.
    per_rank = split_over_ranks(
        trajectories,
        groups.dp_size,
        lambda trajectory: (mixture(trajectory), repr(learner.objectives.of(trajectory.domain))),
    )

    def cut(selected: list[list[Trajectory]]) -> list[list[list[Trajectory]]]:
        return equalize([group_micro_batches(share, shape) for share in selected])

    experts = None
    if routing is not None:
        wanted = [[t.index for t in share] for share in per_rank]
        experts = routing.exchange(wanted, groups.dp, groups.device)

    def mine(
        per_rank: list[list[list[Trajectory]]], experts: Mapping[int, torch.Tensor] | None = None
    ) -> list[MicroBatch]:
        return [collate(group, shape, experts) for group in per_rank[groups.dp.rank()]]

    student = cut(per_rank)
    storage = learner.config.teacher_storage
    cache = HiddenCache(
        groups.device, storage.hidden_cache_device, storage.hidden_cache_dtype, storage.hidden_cache_bytes
    )
    findings = Findings()
    scores = TeacherScores(
        cache, learner.config, learner.objectives, groups, learner.bank, learner.vocab_size, findings
    )
    teachers, uses, largest = {}, [], 0
    for name in learner.bank.names if learner.bank else ():
        selected = [[t for t in share if any(name == n for n, _ in mixture(t))] for share in per_rank]
        if any(selected):
            scored = cut(selected)
            teachers[name] = mine(scored)
            uses.append(teacher_group(name, scored, student, scores.keeps_log_probs))
            # Under context parallelism one rank may hold a whole response.
            largest = max(largest, *(scores.num_bytes(name, part) for share in scored for part in share))
    return StepBatch(
        trajectories,
        shape,
        mine(student, experts),
        teachers,
        tuple(uses),
        cache,
        scores,
        rewards,
        iteration,
        largest,
        findings=findings,
    )


def train_step(learner: Learner, batches: Sequence[StepBatch]) -> dict[str, float]:
    """One optimizer step on `batches[0]`: teachers score what is not scored yet, the student learns.

    `batches[1:]` are later steps whose samples are already there: teachers may score them while the student
    leaves a stage idle. Returns the step's metrics, equal on every rank. Raises `ConfigError` on every rank,
    before anything runs, where `schedule.max_*` or `teacher_storage.hidden_cache_bytes` are too small.
    """
    started = time.perf_counter()
    batch, metrics = batches[0], {}
    for chunk in learner.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    learner.optimizer.zero_grad()
    loss = build_loss(learner, batch)
    if learner.bank is not None:
        learner.bank.check_files(learner.bank.names)

    biases = ExpertBiases(learner.chunks)

    def update(reports: list[dict[str, torch.Tensor]]) -> None:
        metrics.update(_update(learner, batch, reports, biases))

    seconds: dict[str, float] = {}
    if learner.pipeline is not None:
        learner.pipeline.cache_bytes = learner.config.teacher_storage.hidden_cache_bytes
        try:
            learner.pipeline.run(learner.chunks, batches, loss, learner.bank, update)
        except LimitError as error:
            raise _unmet_limits(learner, batch, error) from None
        shares = learner.pipeline.idle_shares
        metrics |= {f"idle/stage_{stage}": share for stage, share in enumerate(shares)}
        seconds = scoring_seconds(learner.pipeline.recent[-1].recording.events())
        batch.seconds["score"] = sum(seconds.values())
    else:
        names = list(batch.teachers)
        scoring = {group.teacher for group in batch.groups if group.scoring_heads}
        for number, (name, micro_batches) in enumerate(batch.teachers.items()):
            teacher = learner.bank.make_resident(name)
            # After the last comes the first: the next step begins with it.
            learner.bank.prefetch(names[(number + 1) % len(names)])
            if learner.groups.is_last_stage and name in scoring:
                learner.bank.prefetch_head(name)
            begun = time.perf_counter()
            run_teacher(teacher, micro_batches, batch.shape, learner.groups, partial(batch.keep, name))
            seconds[name] = time.perf_counter() - begun
        batch.seconds["score"] = time.perf_counter() - started
        update(run_student(learner.chunks, batch.student, batch.shape, learner.groups, loss))
    batch.seconds["train"] = time.perf_counter() - started - batch.seconds.get("score", 0.0)
    if learner.bank is not None:
        metrics |= cost_of_teachers(learner.bank, batch.cache, seconds, learner.groups)
    return metrics


def _unmet_limits(learner: Learner, batch: StepBatch, error: LimitError) -> ConfigError:
    """What the planner's limits are in the configuration."""
    problems = []
    for name, value, smallest in error.unmet:
        key, own = f"schedule.max_{name}", getattr(learner.config.schedule, f"max_{name}", None)
        if name == "cached_states" and (own is None or own > value):
            key, size = "teacher_storage.hidden_cache_bytes", batch.state_bytes
            own, smallest = learner.config.teacher_storage.hidden_cache_bytes, smallest * size
            problems.append(
                f"{key}: {own} cannot hold the teachers' hidden states that one step needs together, up to "
                f"{smallest} bytes; raise it, or make micro-batches smaller"
            )
        else:
            problems.append(
                f"{key}: {own} cannot be met by any plan of a step; it must be at least {smallest}"
            )
    return ConfigError("; ".join(problems))


def _update(
    learner: Learner, batch: StepBatch, reports: list[dict[str, torch.Tensor]], biases: ExpertBiases
) -> dict[str, float]:
    """Metrics of the step, and the optimizer step when loss and gradients are finite on every rank.

    Collectives beyond megatron-core's: one all-reduce over DP x CP and one broadcast over PP of 14 x domains
    + 2 float64 values (and the token samples), and one all-reduce of one float over all ranks. Raises
    `FloatingPointError` on every rank alike, before the weights change, when too many steps in a row were not
    finite.
    """
    metrics = _reduce(learner, batch, reports)
    batch.findings.add_sampled(t for micro_batch in batch.student for t in micro_batch.trajectories)
    # A clamp may have turned what was found into a finite loss.
    loss = math.nan if batch.findings.causes else metrics["loss"]
    if not all_finite(loss, learner.chunks, learner.groups):
        biases.restore()
        return metrics | _skip(learner, batch, metrics)
    _, grad_norm, _ = learner.optimizer.step()
    if grad_norm is not None and not math.isfinite(grad_norm):
        raise FloatingPointError(f"the gradient norm is {grad_norm}; resume from the last checkpoint")
    learner.skipped.in_a_row, learner.skipped.weights_damaged = 0, False
    learner.scheduler.step(increment=1)
    metrics["grad_norm"] = float(grad_norm) if grad_norm is not None else 0.0
    metrics["lr"] = max(group["lr"] for group in learner.optimizer.param_groups)
    return metrics


def _skip(learner: Learner, batch: StepBatch, metrics: dict[str, float]) -> dict[str, float]:
    """Leave the optimizer step out: neither weights nor learning-rate schedule move. Collective:
    `causes_of_all_ranks`."""
    iteration = learner.scheduler.num_steps + learner.skipped.total + 1
    directory = Path(learner.config.run_dir) / "evidence"
    batch.findings.add_weights(learner.chunks, learner.groups.rank)
    batch.causes = causes_of_all_ranks(batch.findings)
    evidence = save_evidence(
        directory, iteration, learner.chunks, batch.trajectories, metrics, learner.groups, batch.causes
    )
    learner.skipped.total += 1
    learner.skipped.in_a_row += 1
    learner.skipped.weights_damaged = weights_damaged(batch.causes)
    limit = learner.config.guard.max_skipped_steps
    if learner.skipped.in_a_row > limit:
        weights = "the weights are those of the last finite step"
        if learner.skipped.weights_damaged:
            weights = "the weights in memory are damaged, the last checkpoint's are not"
        raise FloatingPointError(
            f"loss or gradient not finite in {learner.skipped.in_a_row} steps in a row "
            f"(guard.max_skipped_steps={limit}; loss {metrics['loss']}); {weights}; see {evidence}"
            + "".join(f"; {cause}" for cause in batch.causes[:1])
        )
    return {
        "skipped_steps": learner.skipped.total,
        "grad_norm": math.nan,
        "lr": max(group["lr"] for group in learner.optimizer.param_groups),
    }


def build_loss(learner: Learner, batch: StepBatch) -> BatchLoss:
    """The loss of one step, for the last stage. No collectives; the first micro-batch whose objective needs a
    reward waits for the verifiers."""

    @cache
    def advantages() -> dict[int, float]:
        rewards, group = batch.rewards.collect(), samples_per_prompt(learner.config)
        return outcome_advantages(learner.objectives, batch.trajectories, rewards, group)

    facts = BatchFacts(
        token_weights=token_weights(batch.trajectories, learner.config.objective.reduction),
        outcome_advantages=advantages,
        proximal_logprobs=batch.proximal,
    )
    return BatchLoss(
        learner.objectives,
        learner.groups,
        learner.vocab_size,
        learner.domains,
        unwrap(learner.chunks[-1]),
        facts,
        findings=batch.findings,
        rollout_temperature=learner.config.rollout.temperature,
        routing=learner.routing.at(batch.iteration) if learner.routing else None,
        bank=learner.bank,
        cache=batch.cache,
        samples=batch.samples,
    )


def _reduce(learner: Learner, batch: StepBatch, reports: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Sums over micro-batches, DP and CP, from the last stage to all; named per domain. The token samples
    come along.
    """
    groups = learner.groups
    shape = (len(learner.domains), len(METRICS), 2)
    sums = torch.zeros(math.prod(shape) + 2, dtype=torch.float64, device=groups.device)
    for report in reports:
        sums[:-2] += report["domain_sums"].flatten()
        sums[-2] += report["weighted_sum"]
        sums[-1] += report["tokens"]
    if batch.samples is not None:
        sums = torch.cat([batch.samples.values, sums])
    if groups.is_last_stage:
        dist.all_reduce(sums, group=groups.collection.dp_cp)
    dist.broadcast(sums, src=groups.last_stage_rank, group=groups.pp)
    sums = sums.cpu()
    if batch.samples is not None:
        batch.samples.values, sums = sums.split([len(batch.samples.values), math.prod(shape) + 2])
    loss, tokens = sums[-2:].tolist()
    metrics = {"loss": loss / max(tokens, 1.0), "tokens": tokens}
    sums = sums[:-2].view(shape)
    by_teacher = divergence_by_teacher(
        sums[:, METRICS.index("kl")], learner.domains, lambda name: learner.mixture(name, batch.iteration)
    )
    return metrics | named_metrics(sums, learner.domains) | by_teacher
