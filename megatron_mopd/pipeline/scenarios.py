"""The cost of a schedule over many optimizer steps, with plans chained as in a training run. No torch.

All times are relative to a bubble-free step: the work of the busiest stage, teachers included. A rollout
batch feeds `steps_per_rollout` optimizer steps; look-ahead reaches from one step to the next of the same
batch, and into the next batch only if the rollout engine runs ahead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from megatron_mopd.pipeline.costs import CostModel
from megatron_mopd.pipeline.instructions import Plan
from megatron_mopd.pipeline.plan import Planner, bubble_free_time, lower_bound
from megatron_mopd.pipeline.problem import Limits, PlanRequest, ScoringTask, split_scoring
from megatron_mopd.pipeline.simulate import Simulation, simulate


@dataclass(frozen=True)
class Workload:
    """A repeated optimizer step: the student's micro-batches and how many of them each teacher scores."""

    stages: int
    microbatches: int
    costs: CostModel
    teachers: Mapping[str, int]
    virtual_stages: int = 1
    limits: Limits = field(default_factory=Limits)

    def request(self, scoring: tuple[ScoringTask, ...], kind: str = "bubble_fill", **slots) -> PlanRequest:
        """A request for one step of this workload."""
        return PlanRequest(
            stages=self.stages,
            microbatches=self.microbatches,
            costs=self.costs,
            virtual_stages=self.virtual_stages,
            scoring=scoring,
            kind=kind,
            limits=self.limits,
            **slots,
        )

    def bubble_free(self) -> float:
        """Time of one optimizer step without bubbles."""
        return bubble_free_time(self.request(split_scoring(self.teachers)))

    def bound(self) -> float:
        """Time per optimizer step that no schedule with a synchronous optimizer step beats."""
        return lower_bound(self.request(split_scoring(self.teachers)))


def chain(
    planner: Planner, work: Workload, kind: str, steps: int, *, reach: int, first: int = 1
) -> list[Plan]:
    """Plans of `steps` successive optimizer steps. Step i may score for the next `reach` steps.

    Look-ahead stops at the last step. The first step may score for the next `first` steps instead (the serial
    kind scores a whole rollout batch at its start).
    """
    plans: list[Plan] = []
    known = split_scoring(work.teachers)
    slots: dict[str, tuple[str, ...]] = {}
    for number in range(steps):
        horizon = min(steps - 1 - number, first if number == 0 else reach)
        listed = {task.step for task in known}
        for step in range(horizon + 1):
            if step not in listed:
                known += split_scoring(work.teachers, step=step)
        plan = planner.plan(work.request(known, kind, **slots))
        plans.append(plan)
        known = plan.next_scoring()
        slots = {"resident": plan.resident, "resident_heads": plan.resident_heads}
    return plans


def rollout_batch(planner: Planner, work: Workload, kind: str, steps: int) -> tuple[list[Plan], Simulation]:
    """The optimizer steps of one rollout batch; when the first starts, nothing is scored."""
    reach = {"bubble_fill": 1, "back_to_back": 0, "serial": 0}[kind]
    plans = chain(planner, work, kind, steps, reach=reach, first=steps - 1 if kind == "serial" else reach)
    return plans, simulate(plans)


def rollout_batch_ratio(planner: Planner, work: Workload, kind: str, steps: int = 4) -> float:
    """Time of a rollout batch of `steps` optimizer steps relative to bubble-free steps."""
    _, result = rollout_batch(planner, work, kind, steps)
    return result.optimizer_steps[-1] / (steps * work.bubble_free())


def steady_state_ratio(planner: Planner, work: Workload, *, steps: int = 4) -> float:
    """Time per optimizer step relative to a bubble-free one if the next step's samples are always available.

    Measured over `steps` steps in the middle of a longer run: the first steps are not in the steady state
    yet, and the last has no look-ahead.
    """
    plans = chain(planner, work, "bubble_fill", steps + 4, reach=1)[:-1]
    times = simulate(plans).optimizer_steps
    return (times[-1] - times[-1 - steps]) / (steps * work.bubble_free())


def packed_ratio(planner: Planner, work: Workload) -> float:
    """Time per optimizer step if teachers run inside the student's forward slot, relative to a bubble-free
    step.
    """
    p, costs = work.stages, work.costs
    share = [
        sum(count * costs.teacher(name)[stage] for name, count in work.teachers.items())
        / (work.microbatches * work.virtual_stages)
        for stage in range(p)
    ]
    forward = tuple(cost + share[place % p] for place, cost in enumerate(costs.student_forward))
    student = replace(work, costs=replace(costs, student_forward=forward), teachers={})
    plan = planner.plan(student.request(()))
    return simulate(plan).optimizer_steps[-1] / work.bubble_free()
