"""Updates the planner's costs with measured durations. Pure Python, no torch.

Every rank summarizes its own events, the summaries are gathered over all ranks (a few hundred bytes each),
and every rank folds in the same summaries, so all ranks hold the same costs and make the same plan. The cost
model returned to the planner changes only when some cost has changed by more than `tolerance`, so plans stay
cached and measurement noise does not reorder them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from megatron_mopd.pipeline.costs import CostModel
from megatron_mopd.pipeline.instructions import (
    LoadHead,
    LoadTeacher,
    OptimizerStep,
    StudentBackward,
    StudentForward,
    TeacherForward,
)
from megatron_mopd.pipeline.problem import PlanRequest
from megatron_mopd.pipeline.simulate import Event


class Mean(NamedTuple):
    """The average duration of one kind of instruction: `key` is (name, stage, chunk or teacher).

    seconds: per unit of size for computations, each for the others. size: the sum that this is an average
    over.
    """

    key: tuple[str, int, int | str]
    seconds: float
    size: int


def _key(event: Event) -> tuple[str, int, int | str] | None:
    entry, stage = event.instruction, event.stage
    if isinstance(entry, StudentForward):
        return "student_forward", stage, entry.chunk
    if isinstance(entry, StudentBackward):
        return "student_backward", stage, entry.chunk
    if isinstance(entry, TeacherForward):
        return "teacher_forward", stage, entry.job.teacher
    if isinstance(entry, LoadTeacher):
        return "teacher_load", stage, entry.teacher
    if isinstance(entry, LoadHead):
        return "head_load", 0, entry.teacher
    # On other stages the optimizer step includes waiting for stage 0, which finishes its last backward last.
    return ("optimizer", 0, 0) if isinstance(entry, OptimizerStep) and stage == 0 else None


def summarize(events: Iterable[Event], request: PlanRequest) -> tuple[Mean, ...]:
    """One rank's average durations in one optimizer step, whose plan served `request`."""
    student, jobs = request.student_sizes(), request.job_sizes()
    totals: dict[tuple[str, int, int | str], list[float]] = {}
    for event in events:
        key = _key(event)
        if key is not None:
            entry, size = event.instruction, 1
            if isinstance(entry, StudentForward | StudentBackward):
                size = student[entry.microbatch]
            elif isinstance(entry, TeacherForward):
                size = jobs[entry.job]
            total = totals.setdefault(key, [0.0, 0])
            total[0] += event.end - event.start
            total[1] += size
    return tuple(
        Mean(key, seconds / size, int(size)) for key, (seconds, size) in sorted(totals.items(), key=str)
    )


def cost_keys(costs: CostModel, stages: int) -> list[tuple[str, int, int | str]]:
    """Every key that measurements for this cost model can have, in the same order on all ranks."""
    keys: list[tuple[str, int, int | str]] = [("optimizer", 0, 0)]
    for place in range(len(costs.student_forward)):
        chunk, stage = divmod(place, stages)
        keys += [("student_forward", stage, chunk), ("student_backward", stage, chunk)]
    for name in ("teacher_forward", "teacher_load"):
        keys += [(name, stage, t) for t, _ in getattr(costs, name) for stage in range(stages)]
    keys += [("head_load", 0, teacher) for teacher, _ in costs.head_load]
    return keys


class MeasuredCosts:
    """A running average of measured costs, starting from an initial guess.

    momentum: the weight of earlier steps in the running average.
    tolerance: the relative change of any cost above which `model()` returns new costs.
    """

    def __init__(self, initial: CostModel, stages: int, *, momentum: float = 0.8, tolerance: float = 0.1):
        self.stages, self.momentum, self.tolerance = stages, momentum, tolerance
        self._handed_out = initial
        self._averages: dict[tuple[str, int, int | str], float] = {}
        self._in_seconds = False

    def fold(self, summaries: Iterable[Sequence[Mean]]) -> None:
        """Fold in one step's summaries of all ranks, in rank order. First measurements replace the guess."""
        totals: dict[tuple[str, int, int | str], list[float]] = {}
        for summary in summaries:
            for key, seconds, size in summary:
                total = totals.setdefault(key, [0.0, 0])
                total[0] += seconds * size
                total[1] += size
        for key, (total, size) in totals.items():
            mean, old = total / size, self._averages.get(key)
            self._averages[key] = mean if old is None else self.momentum * old + (1 - self.momentum) * mean

    def model(self) -> CostModel:
        """The costs to plan with."""
        fresh = self._build()
        if any(
            abs(new - old) > self.tolerance * max(old, new) for new, old in _pairs(fresh, self._handed_out)
        ):
            self._handed_out = fresh
        return self._handed_out

    @property
    def is_measured(self) -> bool:
        """Whether the costs are measured seconds rather than guesses."""
        return bool(self._averages)

    def _build(self) -> CostModel:
        base = self._handed_out
        if self._averages and not self._in_seconds:
            # Scale the costs that have not been measured yet along with those that have.
            base = self._scaled(base)
            self._in_seconds = True

        def student(name: str) -> tuple[float, ...]:
            old = list(getattr(base, name))
            for (kind, stage, chunk), seconds in self._averages.items():
                if kind == name:
                    old[int(chunk) * self.stages + stage] = seconds
            return tuple(old)

        def teachers(name: str):
            return tuple(
                (teacher, tuple(self._averages.get((name, s, teacher), cost) for s, cost in enumerate(costs)))
                for teacher, costs in getattr(base, name)
            )

        return replace(
            base,
            student_forward=student("student_forward"),
            student_backward=student("student_backward"),
            teacher_forward=teachers("teacher_forward"),
            teacher_load=teachers("teacher_load"),
            head_load=tuple((t, self._averages.get(("head_load", 0, t), cost)) for t, cost in base.head_load),
            optimizer=self._averages.get(("optimizer", 0, 0), base.optimizer),
        )

    def _scaled(self, guess: CostModel) -> CostModel:
        measured = [self._averages.get(key) for key in cost_keys(guess, self.stages)]
        guesses = [_lookup(guess, key, self.stages) for key in cost_keys(guess, self.stages)]
        known = [(old, new) for old, new in zip(guesses, measured) if new is not None and old]
        factor = sum(new for _, new in known) / sum(old for old, _ in known) if known else 1.0

        def table(costs):
            return tuple((teacher, tuple(factor * cost for cost in row)) for teacher, row in costs)

        return replace(
            guess,
            student_forward=tuple(factor * cost for cost in guess.student_forward),
            student_backward=tuple(factor * cost for cost in guess.student_backward),
            teacher_forward=table(guess.teacher_forward),
            teacher_load=table(guess.teacher_load),
            head_load=tuple((teacher, factor * cost) for teacher, cost in guess.head_load),
            message=factor * guess.message,
            optimizer=factor * guess.optimizer,
        )


def _lookup(costs: CostModel, key: tuple[str, int, int | str], stages: int) -> float:
    name, stage, which = key
    if name == "optimizer":
        return costs.optimizer
    if name.startswith("student"):
        return getattr(costs, name)[int(which) * stages + stage]
    row = dict(getattr(costs, name))[which]
    return row if name == "head_load" else row[stage]


def _pairs(left: CostModel, right: CostModel):
    yield from zip(left.student_forward, right.student_forward)
    yield from zip(left.student_backward, right.student_backward)
    for name in ("teacher_forward", "teacher_load"):
        for (_, new), (_, old) in zip(getattr(left, name), getattr(right, name)):
            yield from zip(new, old)
    yield from ((new, old) for (_, new), (_, old) in zip(left.head_load, right.head_load))
    yield left.optimizer, right.optimizer
