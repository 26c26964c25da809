"""Plans and executes optimizer steps; a run uses a single `PipelineDriver`.

Each block of data-parallel ranks has a plan of its own. Every rank computes it itself, from the micro-batches
of its block and measured costs that are the same everywhere, so no plan is communicated; before execution all
ranks verify that the plans of each block are identical and executable.
"""

from __future__ import annotations

import contextlib
import operator
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.config import ConfigError
from megatron_mopd.data.batching import MicroBatch
from megatron_mopd.pipeline.agreement import agree
from megatron_mopd.pipeline.check import check_plan
from megatron_mopd.pipeline.communicator import PipelineCommunicator
from megatron_mopd.pipeline.costs import CostModel
from megatron_mopd.pipeline.instructions import Instruction, Plan
from megatron_mopd.pipeline.measured_costs import Mean, MeasuredCosts, cost_keys, summarize
from megatron_mopd.pipeline.model_work import (
    ForwardWork,
    LossFunction,
    ModelWork,
    StepInput,
    TeacherModels,
)
from megatron_mopd.pipeline.plan import Planner, bubble_free_time, forward_lists
from megatron_mopd.pipeline.problem import LimitError, Limits, PlanRequest, ScoringTask
from megatron_mopd.pipeline.runtime import Execution, Recording, StageWork, Stopwatch
from megatron_mopd.pipeline.simulate import Event, simulate
from megatron_mopd.pipeline.timeline import draw_timeline, idle_share, without_waiting, write_chrome_trace
from megatron_mopd.teachers.hidden_cache import states_within

PLANNING_SHARE = 0.01
"""Planning may take this share of a step's time."""
_PLACEMENTS_PER_SECOND = 150_000
_MEASURED_EVERY = 10
"""Optimizer steps between exchanges of measured costs, after the first few steps."""


@dataclass
class Measured:
    """A plan that is being or has been executed, and this rank's recording of it."""

    plan: Plan
    recording: Recording


@dataclass
class Started:
    """The step in progress: its plan, the steps that the plan covers, and the steps that follow."""

    plan: Plan
    planned: list[StepInput]
    """The steps whose samples the plan scores; it trains on the first."""
    following: list[StepInput]
    teachers: TeacherModels | None


@dataclass
class Agreed:
    """A plan that all ranks have agreed on before its step starts."""

    steps: list[StepInput]
    """The steps that the plan could have covered."""
    settings: tuple[object, ...]
    planned: list[StepInput]
    plan: Plan


class PipelineDriver:
    """Construction is collective over all ranks of the run.

    teachers: name -> forward time relative to the student's; a guess that measurements replace.
    kind: `bubble_fill`, `back_to_back` or `serial`.
    cache_bytes: maximum bytes of teacher states that a stage may hold; `None`: only `limits` applies.

    One step of a run (`training.step.train_step`):

        execution = driver.start(chunks, steps, loss_function, teachers)
        execution.run_to_update()
        ...                              # the optimizer step
        driver.plan_next()
        execution.run_rest()
    """

    def __init__(
        self,
        groups: ParallelGroups,
        teachers: Mapping[str, float],
        *,
        kind: str = "bubble_fill",
        limits: Limits | None = None,
        cache_bytes: int | None = None,
        timeout: timedelta = timedelta(minutes=10),
    ):
        self.groups, self.kind, self.limits = groups, kind, limits or Limits()
        self.cache_bytes = cache_bytes
        p, v = groups.pp_size, groups.vpp_size
        self.communicator = PipelineCommunicator(groups.pp, groups.device, virtual_stages=v, timeout=timeout)
        dist.barrier(group=groups.pp)
        self._stopwatch = Stopwatch(groups.device, zero=time.perf_counter())
        self._planner = Planner(capacity=4, effort=0)
        self._costs = MeasuredCosts(CostModel.build(p, v, teacher_forward=teachers), p)
        self._slots: dict[str, tuple[str, ...]] = {}
        self._checked: set[str] = set()
        self.idle_shares: list[float] = []
        """Per stage, the share of a step in which it was idle, averaged over the steps between two exchanges
        of measured costs; empty before the first exchange and with a single stage."""
        self._started: Started | None = None
        self._agreed: Agreed | None = None
        self._scored_ahead: dict[StepInput, tuple[ScoringTask, ...]] = {}
        """The tasks of the steps that earlier plans looked ahead to, with `scored` set."""
        self._steps = 0
        self._unmeasured: list[Measured] = []
        self.recent: deque[Measured] = deque(maxlen=4)

    def look_ahead(self) -> int | None:
        """How many optimizer steps beyond the current one a plan may score for; `None`: all available
        steps."""
        if self.kind == "serial":
            return None
        return 1 if self.kind == "bubble_fill" and self.groups.pp_size > 1 else 0

    def start(
        self,
        chunks: Sequence[torch.nn.Module],
        steps: Sequence[StepInput],
        loss_function: LossFunction,
        teachers: TeacherModels | None,
    ) -> Execution:
        """Prepare to score and train on `steps[0]`, and to score later steps as far as the schedule kind
        looks ahead.

        Collectives: those of `agree` and `_exchange_costs`, unless `plan_next` has already run them for this
        step. Raises `LimitError` on every rank if no plan satisfies the limits.
        """
        steps = list(steps)
        agreed, self._agreed = self._agreed, None
        # The same on all ranks: whether a block's request has changed may differ from block to block.
        if agreed is None or not self._is_current(agreed, steps):
            self._exchange_costs()
            agreed = self.agree_on_plan(steps, teachers)
        plan, planned = agreed.plan, agreed.planned
        self.communicator.begin_plan()
        self._started = Started(plan, planned, steps[1:], teachers)
        work = ModelWork(chunks, planned, self.groups, loss_function, teachers)
        execution = self._execution(plan.stages[self.groups.pp.rank()], work)
        self.recent.append(Measured(plan, execution.recording))
        return execution

    def plan_next(self) -> None:
        """Plan the next step right after the weight update, where all stages synchronize anyway: teacher
        forwards after the update then overlap the next plan without another synchronization.

        Collectives: see `agree` and `_exchange_costs`.
        """
        started, self._started = self._started, None
        self.communicator.finish_last_plan()
        self._take_over(started.plan, started.planned)
        if started.following:
            self._exchange_costs()
            # A next step that cannot satisfy the limits raises when it starts; this step is complete.
            with contextlib.suppress(LimitError, ConfigError):
                self._agreed = self.agree_on_plan(started.following, started.teachers)
        self._steps += 1
        self._unmeasured.append(self.recent[-1])

    def forward(
        self,
        chunks: Sequence[torch.nn.Module],
        micro_batches: Sequence[MicroBatch],
        on_hidden: Callable[[MicroBatch, Tensor], None],
    ) -> None:
        """Run forward passes of the student without gradients, between two steps.

        on_hidden: called with the last stage's hidden states [s/cp(/tp), b, h] of each micro-batch.
        Collectives: the model's, and one scalar all-reduce over the pipeline.
        """
        lists = forward_lists(self.groups.pp_size, self.groups.vpp_size, len(micro_batches))
        work = ForwardWork(chunks, micro_batches, self.groups, on_hidden)
        self._execution(lists[self.groups.pp.rank()], work).run_rest()
        if self.groups.pp_size > 1:
            work.synchronize()  # after this, send buffers may be freed
            self.communicator.flush()

    def _execution(self, instructions: Sequence[Instruction], work: StageWork) -> Execution:
        return Execution(instructions, self.groups.pp.rank(), work, self.communicator, self._stopwatch)

    def last_events(self) -> list[Event]:
        """This rank's events in the last step; waits for the device."""
        return self.recent[-1].recording.events()

    def _scoring(self, step: StepInput) -> tuple[ScoringTask, ...]:
        """A step's tasks, including how much earlier plans have scored."""
        return self._scored_ahead.get(step, step.scoring)

    def _within_reach(self, steps: Sequence[StepInput]) -> list[StepInput]:
        """The steps that one plan covers: as many as this schedule kind looks ahead, except steps whose
        states are so large that the resulting limit would be too small for the first step.
        """
        steps = self._reachable(steps)
        while len(steps) > 1 and not any(task.scored for task in self._scoring(steps[-1])):
            states = self._cached_states(steps)
            if states is None or self._bare_request(steps).smallest_cache() <= states:
                break
            steps.pop()
        return steps

    def _cached_states(self, steps: Sequence[StepInput]) -> int | None:
        """How many scored micro-batches a stage may hold if it plans for these steps."""
        if self.cache_bytes is None:
            return self.limits.cached_states
        # Without room for those of the first step there is no plan.
        states = states_within(self.cache_bytes, steps[0].state_bytes)
        states = min(states, *(self.cache_bytes // max(1, step.state_bytes) for step in steps))
        return states if self.limits.cached_states is None else min(states, self.limits.cached_states)

    def _take_over(self, plan: Plan, steps: Sequence[StepInput]) -> None:
        """Record the state that the plan leaves to the next one: occupied slots, and scores of later
        steps."""
        self._slots = {"resident": plan.resident, "resident_heads": plan.resident_heads}
        ahead: dict[StepInput, list[ScoringTask]] = {step: [] for step in steps[1:]}
        for task in plan.next_scoring():
            ahead[steps[task.step + 1]].append(replace(task, step=0))
        self._scored_ahead = {step: tuple(tasks) for step, tasks in ahead.items()}

    def agree_on_plan(self, steps: Sequence[StepInput], teachers: TeacherModels | None = None) -> Agreed:
        """The plan that every rank of this block will execute, for as many of `steps` as it covers. Raises on
        all ranks if a rank has no plan that can be executed, or another one than its block; see `agree`.
        """
        plan, problem, planned = None, None, list(steps[:1])
        try:
            planned = self._within_reach(steps)
            request = self._request(planned, teachers)
            self._planner.effort = self._effort(request)
            plan = self._planner.plan(request)
            if plan.digest() not in self._checked:
                check_plan(plan)
                self._checked.add(plan.digest())
        except ValueError as error:
            plan, problem = None, error
        sizes = [(step.sizes, [task.sizes for task in step.scoring]) for step in planned]
        agree(self.groups, plan, problem, sizes, steps[0].state_bytes)
        assert plan is not None
        return Agreed(self._reachable(steps), self._settings(), planned, plan)

    def _is_current(self, agreed: Agreed, steps: Sequence[StepInput]) -> bool:
        """Whether the steps and the settings are those that the plan was made for."""
        reachable = self._reachable(steps)
        return (
            len(reachable) == len(agreed.steps)
            and all(map(operator.is_, reachable, agreed.steps))
            and agreed.settings == self._settings()
        )

    def _reachable(self, steps: Sequence[StepInput]) -> list[StepInput]:
        """The steps that this schedule kind may look ahead to."""
        reach = self.look_ahead()
        return list(steps[: None if reach is None else 1 + reach])

    def _settings(self) -> tuple[object, ...]:
        return self.kind, self.limits, self.cache_bytes

    def _bare_request(self, steps: Sequence[StepInput]) -> PlanRequest:
        """The request without the state that the last plan left."""
        return PlanRequest(
            stages=self.groups.pp_size,
            microbatches=len(steps[0].student),
            sizes=steps[0].sizes,
            costs=self._costs.model(),
            virtual_stages=self.groups.vpp_size,
            scoring=tuple(
                replace(task, step=number)
                for number, step in enumerate(steps)
                for task in self._scoring(step)
            ),
            kind=self.kind,
            limits=replace(self.limits, cached_states=self._cached_states(steps)),
        )

    def _request(self, steps: Sequence[StepInput], teachers: TeacherModels | None) -> PlanRequest:
        request = self._bare_request(steps)
        # The number of head slots never shrinks.
        heads = max(request.head_slots(), len(self._slots.get("resident_heads", ())))
        if teachers is not None and self.groups.is_last_stage:
            teachers.reserve_heads(heads)
        return replace(request, limits=replace(request.limits, resident_heads=heads), **self._slots)

    def _effort(self, request: PlanRequest) -> int:
        """Number of placements the planner may try, so that planning takes a small share of the step's
        time."""
        if not self._costs.is_measured:
            return 0
        seconds = bubble_free_time(request)
        return min(_PLACEMENTS_PER_SECOND, int(PLANNING_SHARE * seconds * _PLACEMENTS_PER_SECOND))

    def _exchange_costs(self) -> None:
        """Average the costs that all ranks measured since the last exchange. Every few steps, one all-reduce
        over all ranks (on the CPU) of two float64 per stage and kind of instruction; none with a single
        stage, whose plans need no costs.
        """
        if self.groups.pp_size == 1 or not self._unmeasured:
            self._unmeasured.clear()
            return
        if self._steps == 1:  # allocators and kernels are still warming up
            self._unmeasured.clear()
            return
        if self._steps > 3 and self._steps % _MEASURED_EVERY:
            return
        p, keys = self.groups.pp_size, cost_keys(self._costs.model(), self.groups.pp_size)
        sums = torch.zeros(2, len(keys) + p, dtype=torch.float64)
        places = {key: number for number, key in enumerate(keys)}
        recorded = [item.recording.events() for item in self._unmeasured]
        for item, events in zip(self._unmeasured, recorded):
            for key, seconds, size in summarize(events, item.plan.request):
                if key in places:
                    sums[0, places[key]] += seconds * size
                    sums[1, places[key]] += size
        self._unmeasured.clear()
        sums[0, len(keys) + self.groups.pp.rank()] = sum(map(idle_share, recorded))
        sums[1, len(keys) + self.groups.pp.rank()] = len(recorded)
        dist.all_reduce(sums)
        totals, counts = sums.tolist()
        means = [total / count if count else 0.0 for total, count in zip(totals, counts)]
        self._costs.fold([[Mean(key, mean, int(n)) for key, mean, n in zip(keys, means, counts) if n]])
        self.idle_shares = means[len(keys) :]

    def timelines(self, steps: int) -> dict[str, list[Event]]:
        """The last `steps` optimizer steps as planned and as measured on all stages of this pipeline, in
        seconds. One all-gather of the events over the pipeline.
        """
        recent = list(self.recent)[-steps:]
        mine = [item.recording.events() for item in recent]
        gathered: list[list[list[Event]]] = [[] for _ in range(self.groups.pp_size)]
        dist.all_gather_object(gathered, mine, group=self.groups.pp)
        measured = [
            event
            for one_step in zip(*gathered)
            for event in without_waiting([event for events in one_step for event in events])
        ]
        start = min((event.start for event in measured), default=0.0)
        costs = self._costs.model()
        plans = [replace(item.plan, request=replace(item.plan.request, costs=costs)) for item in recent]
        return {
            f"{self.kind}, planned": simulate(plans, record=True).events,
            f"{self.kind}, measured": [
                event._replace(start=event.start - start, end=event.end - start) for event in measured
            ],
        }

    def draw(self, directory: Path, steps: int) -> None:
        """Write `timeline.png` and `timeline.json` (for Perfetto) of the last `steps` optimizer steps,
        planned and measured. Collective over the pipeline; does nothing with a single stage or before the
        first step.
        """
        if self.groups.pp_size == 1 or not self.recent:
            return
        panels = self.timelines(steps)
        if self.groups.rank == 0:
            draw_timeline(panels, directory / "timeline.png", unit="seconds")
            write_chrome_trace(panels, directory / "timeline.json")
