"""The global batch of one optimizer step, split into micro-batches for the student and every teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from megatron_mopd.config.objectives import needs_old_policy
from megatron_mopd.data.arrays import logprob_dtype
from megatron_mopd.data.batching import BatchShape, MicroBatch, collate
from megatron_mopd.data.division import Division
from megatron_mopd.data.exchange import deliver_tokens
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.losses.findings import Findings
from megatron_mopd.losses.targets import Targets
from megatron_mopd.losses.teacher_scores import TeacherScores
from megatron_mopd.model.gpt import unwrap
from megatron_mopd.pipeline.problem import ScoringTask
from megatron_mopd.rollout.routing_records import RoutingRecords
from megatron_mopd.teachers.hidden_cache import HiddenCache
from megatron_mopd.training.learner import Learner
from megatron_mopd.training.proximal_policy import proximal_logprobs
from megatron_mopd.training.rewards import NO_REWARDS, PendingRewards
from megatron_mopd.training.scoring_tasks import scoring_task
from megatron_mopd.training.teacher_blocks import shares_of_blocks


@dataclass(frozen=True, eq=False)
class StepBatch:
    """This rank's view of the batch of one step; a `StepInput` of the pipeline."""

    trajectories: Sequence[Trajectory]
    """The global batch, with tokens of the trajectories that this rank trains on, and of no others."""
    targets: Targets
    student: list[MicroBatch]
    teachers: dict[str, list[MicroBatch]]
    """Teacher name -> the micro-batches it scores, which hold only samples routed to it; their number is the
    same on every DP rank of a block. Teachers without samples in the block are left out."""
    scoring: tuple[ScoringTask, ...]
    """Which student micro-batches need each teacher micro-batch, and their sizes in tokens."""
    sizes: tuple[int, ...]
    """Tokens of each student micro-batch, the most on any DP rank of the block."""
    cache: HiddenCache
    scores: TeacherScores
    findings: Findings
    """Non-finite values in this rank's losses and log-probs."""
    rewards: PendingRewards
    iteration: int = 0
    """Optimizer steps done before this one; routing weights depend on it."""
    state_bytes: int = 0
    """Largest number of bytes that one scored micro-batch leaves in the cache of any rank of the block."""
    proximal: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """Trajectory index -> log-probs at the start of the rollout batch, on the last stage (`BatchFacts`)."""


def plan_steps(
    learner: Learner,
    rollout: Sequence[Trajectory],
    rewards: PendingRewards = NO_REWARDS,
    routing: RoutingRecords | None = None,
    iteration: int = 0,
) -> list[StepBatch]:
    """Split a rollout batch into optimizer steps from `iteration` on: `global_batch_size` trajectories each,
    in order.

    If PPO clipping needs the policy at the start of a rollout batch of several steps, one forward pass of the
    student over the whole batch records its log-probs.
    """
    size = learner.config.schedule.global_batch_size
    batches = [
        plan_step(learner, rollout[start : start + size], rewards, routing, iteration + number)
        for number, start in enumerate(range(0, len(rollout), size))
    ]
    if len(batches) == 1 or not learner.objectives.any(needs_old_policy, learner.domains):
        return batches
    return [replace(batch, proximal=_proximal(learner, batch)) for batch in batches]


def _proximal(learner: Learner, batch: StepBatch) -> dict[int, torch.Tensor]:
    return proximal_logprobs(
        learner.pipeline,
        learner.chunks,
        batch.student,
        settings=learner.loss_settings,
        findings=batch.findings,
    )


def plan_step(
    learner: Learner,
    trajectories: Sequence[Trajectory],
    rewards: PendingRewards = NO_REWARDS,
    routing: RoutingRecords | None = None,
    iteration: int = 0,
) -> StepBatch:
    """Share the batch among blocks of DP ranks by teacher, and each share among the block's ranks and
    micro-batches.

    Sampled tokens travel here from the ranks that have them in `trajectories` to those that train on them.
    Collectives over DP: `deliver_tokens`; with routing replay, `RoutingRecords.exchange`.
    """
    groups, targets = learner.groups, learner.targets(iteration)
    shape, block = _batch_shape(learner, trajectories), groups.block
    shares = shares_of_blocks(trajectories, block, targets, *learner.forward_costs)
    rank = groups.dp.rank()
    # Other blocks are divided only as far as this rank has tokens for them.
    divisions = {
        # Ordered by target, so that a micro-batch's loss has few parts.
        number: Division(share, block.size, shape, lambda t: targets[t.domain].order)
        for number, share in enumerate(shares)
        if number == block.index or any(t.sampled_by == rank for t in share)
    }
    wanted: list[list[int]] = []
    for number in range(block.count):
        per_rank = divisions[number].per_rank() if number in divisions else [[]] * block.size
        wanted += [[t.index for t in share] for share in per_rank]
    division = divisions[block.index]
    experts = None
    if routing is not None:
        experts = routing.exchange(trajectories, wanted, groups.dp, groups.device)
    dtype = logprob_dtype(unwrap(learner.chunks[0]).config.params_dtype)
    trajectories = deliver_tokens(trajectories, wanted, groups.dp, groups.device, dtype)
    with_tokens = {t.index: t for t in trajectories if t.has_tokens}

    def collated(
        members: Sequence[Trajectory], routing: Mapping[int, torch.Tensor] | None = None
    ) -> MicroBatch:
        return collate([with_tokens[t.index] for t in members], shape, routing)

    storage = learner.config.teacher_storage
    cache = HiddenCache(
        groups.device, storage.hidden_cache_device, storage.hidden_cache_dtype, storage.hidden_cache_bytes
    )
    findings = Findings()
    scores = TeacherScores(learner.loss_settings, learner.bank, targets, cache, findings)
    student = division.cut()
    scored = {
        name: division.cut(lambda t, name=name: targets[t.domain].is_scored_by(name))
        for name in (learner.bank.names if learner.bank else ())
        if any(targets[t.domain].is_scored_by(name) for t in shares[block.index])
    }
    place = rank % block.size
    return StepBatch(
        trajectories,
        targets,
        student=[collated(members, experts) for members in student.of_rank(place)],
        teachers={
            name: [collated(members) for members in cut.of_rank(place)] for name, cut in scored.items()
        },
        scoring=tuple(
            scoring_task(name, cut, student, scores.keeps_log_probs) for name, cut in scored.items()
        ),
        sizes=student.sizes,
        cache=cache,
        scores=scores,
        findings=findings,
        rewards=rewards,
        iteration=iteration,
        # Under context parallelism one rank may hold a whole response.
        state_bytes=max(
            (
                scores.num_bytes(name, part)
                for name, cut in scored.items()
                for row in cut.rows
                for part in row
            ),
            default=0,
        ),
    )


def _batch_shape(learner: Learner, trajectories: Sequence[Trajectory]) -> BatchShape:
    groups, schedule = learner.groups, learner.config.schedule
    return BatchShape.for_batch(
        trajectories,
        micro_batch_size=schedule.micro_batch_size,
        max_tokens=schedule.max_tokens_per_micro_batch,
        tp_size=groups.tp_size,
        cp_size=groups.cp_size,
        cp_rank=groups.cp.rank(),
    )
