"""One rank's part of a case: two optimizer steps and their outcome."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_mopd.config import ConfigError, DomainObjectives, config_from_dict
from megatron_mopd.config.objectives import needs_teachers
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.model.build import build_model
from megatron_mopd.model.gpt import is_expert, unwrap
from megatron_mopd.model.router_replay import install_routing_replay
from megatron_mopd.pipeline.costs import CostModel
from megatron_mopd.pipeline.problem import PlanRequest
from megatron_mopd.rollout.routing_records import RoutingRecords
from megatron_mopd.teachers.bank import TeacherBank
from megatron_mopd.teachers.encoding import BLOCK
from megatron_mopd.teachers.routing import Routing
from megatron_mopd.training.learner import Learner
from megatron_mopd.training.step import train_step
from megatron_mopd.training.step_batch import StepBatch, plan_step, plan_steps
from tests import _models
from tests._megatron_schedules import MegatronSchedules
from tests.fuzz_layouts.case import STUDENT_SEED, Case

LONGEST = 64
"""Length of the longest sequence in tokens."""


@dataclass
class Outcome:
    """A rank's results after the steps of a case; tensors are in pieces as of `tests._models.pieces`."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    gradients: list[list[tuple]] = field(default_factory=list)
    """Those of every step; empty where the distributed optimizer leaves each rank a shard of the sums."""
    weights: list[tuple] = field(default_factory=list)
    expert_biases: dict[int, Tensor] = field(default_factory=dict)
    """By layer."""


class Known:
    """Rewards that are already known; a `PendingRewards`."""

    def __init__(self, rewards: dict[int, float | None]):
        self._rewards = rewards

    def collect(self) -> dict[int, float | None]:
        return self._rewards


def run_case(rank: int, case: Case, directory: str, reference: bool) -> Outcome | str:
    """Run the steps of a case on this rank. Returns the outcome, or why the configuration is refused.
    Collective over all ranks."""
    torch.manual_seed(0)
    try:
        learner = make_learner(case, directory, reference)
    except ConfigError as error:
        return str(error)
    if not reference and case.spare and learner.bank is not None:
        _limit_cache(learner, case)
    outcome = Outcome()
    queue = deque(_plan(learner, case))
    while queue:
        offered = 1 if reference else case.offered
        metrics = train_step(learner, list(queue)[:offered])
        batch = queue.popleft()
        budget = learner.config.teacher_storage.hidden_cache_bytes
        assert len(batch.cache) == 0, "a cached hidden state was not used"
        assert budget is None or batch.cache.peak_bytes <= budget, "the cache exceeded its budget"
        outcome.metrics.append({name: float(value) for name, value in metrics.items()})
        if not learner.config.optimizer.use_distributed_optimizer:
            outcome.gradients.append(_models.pieces(learner, gradients=True))
    outcome.weights = _models.pieces(learner, gradients=False)
    outcome.expert_biases = {
        router.layer_number: router.expert_bias.detach().double()
        for router in _routers(learner)
        if getattr(router, "expert_bias", None) is not None
    }
    return outcome


def make_learner(case: Case, directory: str, reference: bool) -> Learner:
    """Build this rank's part of the student, teachers and optimizer. Collective over all ranks."""
    values = case.config_values(directory, reference)
    config = config_from_dict(values)
    student = case.model_config(case.student | ({} if reference else case.recompute))
    groups = _models.groups_of(config, student)
    chunks = build_model(student, groups, config.params_dtype, max_sequence_length=LONGEST, seed=STUDENT_SEED)
    if case.routing_replay:
        install_routing_replay(chunks)
    bank = routing = None
    if any(needs_teachers(objective) for objective in DomainObjectives(config.objective).all()):
        sources = case.sources()
        routing = Routing(config.routing, sources)
        kind, rounding = TeacherBank, {}
        if reference and case.storage.get("dtype"):
            kind, rounding = RoundedTeachers, {"case": case}
        bank = kind(
            sources,
            groups,
            config.params_dtype,
            LONGEST,
            config.teacher_storage,
            directory=f"{directory}/teachers",
            max_mixture=routing.max_teachers,
            **rounding,
        )
    learner = _models.assemble_learner(
        config, groups, chunks, student, sorted(case.domains), routing=routing, bank=bank
    )
    if reference:
        learner.pipeline = MegatronSchedules(groups)
    return learner


class RoundedTeachers(TeacherBank):
    """Teachers on one rank whose weights are rounded to 8 bits as the shards of a layout would be.

    A row of a matrix has one scale for every 128 columns, counted from the first column of the shard, so
    layouts differ only where they split columns.
    """

    def __init__(self, *args, case: Case, **kwargs):
        self._case = case
        super().__init__(*args, **kwargs)

    def _encode(self, key: tuple[str, str], segment: Tensor) -> Tensor:
        for place in self._encodings[key].segment.places:
            if len(place.shape) == 2 and ".router." not in place.name:
                weights = place.view(segment)
                for shard in weights.chunk(self._column_shards(place.name), dim=1):
                    for block in shard.split(BLOCK, dim=1):
                        block.copy_(rounded(block, self._case.storage["dtype"]))
        return segment

    def _column_shards(self, name: str) -> int:
        if not name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            return 1
        return self._case.size("etp" if is_expert(name) else "tp")


def rounded(block: Tensor, dtype: str) -> Tensor:
    """Round `block` [rows, columns] to 8-bit numbers with one scale per row: int8, or float8 (e4m3)."""
    largest = {"int8": 127.0, "fp8": 448.0}[dtype]
    scale = block.float().abs().amax(dim=1, keepdim=True) / largest
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    numbers = block.float() / scale
    numbers = numbers.round() if dtype == "int8" else numbers.to(torch.float8_e4m3fn).float()
    return numbers * scale


def _plan(learner: Learner, case: Case) -> list[StepBatch]:
    loaded = [
        (_as_sampled(learner, trajectories), rewards)
        for trajectories, rewards in map(case.trajectories, range(len(case.batches)))
    ]
    if case.steps_per_rollout > 1:
        rollout = [trajectory for trajectories, _ in loaded for trajectory in trajectories]
        rewards = {index: reward for _, by_index in loaded for index, reward in by_index.items()}
        return plan_steps(learner, rollout, Known(rewards), _records(case, learner, rollout))
    return [
        plan_step(learner, trajectories, Known(rewards), _records(case, learner, trajectories), step)
        for step, (trajectories, rewards) in enumerate(loaded)
    ]


def _as_sampled(learner: Learner, trajectories: list[Trajectory]) -> list[Trajectory]:
    """The trajectories as rollouts return them: each sampled by one data-parallel rank, which has its
    tokens."""
    ranks, rank = learner.groups.dp_size, learner.groups.dp.rank()
    sampled = [replace(t, sampled_by=t.index % ranks) for t in trajectories]
    return [t if t.sampled_by == rank else t.without_tokens() for t in sampled]


def _limit_cache(learner: Learner, case: Case) -> None:
    """Limit the hidden-state cache to slightly more than the minimum of micro-batches that any step needs."""
    storage, schedule = learner.config.teacher_storage, learner.config.schedule
    fewest, largest = 1, 1
    for step in range(len(case.batches)):
        batch = plan_step(learner, case.trajectories(step)[0], iteration=step)
        costs = CostModel.build(1, teacher_forward=dict.fromkeys(learner.bank.names, 1.0))
        request = PlanRequest(1, len(batch.student), costs, scoring=batch.scoring, kind=schedule.kind)
        fewest, largest = max(fewest, request.smallest_cache()), max(largest, batch.state_bytes)
    most = torch.tensor([fewest, largest])
    dist.all_reduce(most, dist.ReduceOp.MAX)  # over the blocks
    fewest, largest = most.tolist()
    if "bytes" in case.spare:
        storage = replace(storage, hidden_cache_bytes=int(largest * (fewest + case.spare["bytes"])))
        learner.pipeline.cache_bytes = storage.hidden_cache_bytes
    if "states" in case.spare:
        schedule = replace(schedule, max_cached_states=fewest + int(case.spare["states"]))
        limits = replace(learner.pipeline.limits, cached_states=schedule.max_cached_states)
        learner.pipeline.limits = limits
    learner.config = replace(learner.config, teacher_storage=storage, schedule=schedule)


def _routers(learner: Learner) -> list[TopKRouter]:
    modules = [module for chunk in learner.chunks for module in unwrap(chunk).modules()]
    return [module for module in modules if isinstance(module, TopKRouter)]


def _records(case: Case, learner: Learner, trajectories: list[Trajectory]) -> RoutingRecords | None:
    """Expert choices that depend only on trajectory, position and layer, so they are equal on any layout."""
    groups, layers = learner.groups, [router.layer_number for router in _routers(learner)]
    if not case.routing_replay or not layers:  # rollouts return none either on a stage without experts
        return None
    experts, topk = case.student["num_moe_experts"], case.student.get("moe_router_topk", 2)
    records = {}
    for trajectory in trajectories:
        if trajectory.sampled_by != groups.dp.rank():
            continue
        record = torch.zeros(len(trajectory) - 1, len(layers), topk, dtype=torch.uint8)
        for place, layer in enumerate(layers):
            rng = random.Random(f"{trajectory.index}/{layer}")
            for position in range(len(trajectory) - 1):
                record[position, place] = torch.tensor(rng.sample(range(experts), topk), dtype=torch.uint8)
        records[trajectory.index] = record
    return RoutingRecords(records, (len(layers), topk), torch.uint8)
