"""The cost of each instruction of a pipeline plan. Pure Python, no torch.

Frozen and hashable, because it is part of a plan request (`problem.py`). Times share one arbitrary unit:
seconds for measured costs, multiples of a student forward in tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


def per_position(values: float | Sequence[float], count: int, name: str) -> tuple[float, ...]:
    """Expand a single value or a sequence to `count` costs. Raises ValueError (with `name`) if the length
    differs or a cost is negative or not finite.
    """
    numbers = (float(values),) * count if isinstance(values, int | float) else tuple(map(float, values))
    if len(numbers) != count:
        raise ValueError(f"costs: {name} has {len(numbers)} entries, expected {count}")
    if any(not math.isfinite(number) or number < 0 for number in numbers):
        raise ValueError(f"costs: {name} must be finite and not negative, got {numbers}")
    return numbers


@dataclass(frozen=True)
class CostModel:
    """The duration of each instruction, per stage.

    Computations are given per unit of size: their duration is that times the size of the micro-batch
    (`PlanRequest.sizes`, `ScoringTask.sizes`). Sizes are tokens in training and 1 in tables.
    Student costs are listed by virtual stage (`chunk * stages + stage`), teacher costs by stage.
    `teacher_load` is the time of one stage's asynchronous copy of that teacher's layers, `head_load` that of
    its output head on the last stage. `message` is the transfer time of a stage-to-stage message, `optimizer`
    the time of the optimizer step itself. Build one with :meth:`build`, which accepts a single number if all
    positions cost the same.
    """

    student_forward: tuple[float, ...]
    student_backward: tuple[float, ...]
    teacher_forward: tuple[tuple[str, tuple[float, ...]], ...] = ()
    teacher_load: tuple[tuple[str, tuple[float, ...]], ...] = ()
    head_load: tuple[tuple[str, float], ...] = ()
    message: float = 0.0
    optimizer: float = 0.0

    @classmethod
    def build(
        cls,
        stages: int,
        virtual_stages: int = 1,
        *,
        student_forward: float | Sequence[float] = 1.0,
        student_backward: float | Sequence[float] = 2.0,
        teacher_forward: Mapping[str, float | Sequence[float]] | None = None,
        teacher_load: Mapping[str, float | Sequence[float]] | None = None,
        head_load: Mapping[str, float] | None = None,
        message: float = 0.0,
        optimizer: float = 0.0,
    ) -> CostModel:
        """Build from the costs of a whole model stage: a single student cost is divided evenly over the
        stage's chunks.

        Raises ValueError if a sequence has the wrong length or a cost is negative or not finite.
        """

        def student(values: float | Sequence[float], name: str) -> tuple[float, ...]:
            if isinstance(values, int | float):
                values = values / virtual_stages
            return per_position(values, stages * virtual_stages, name)

        def table(costs: Mapping[str, float | Sequence[float]] | None, name: str):
            items = sorted((costs or {}).items())
            return tuple((key, per_position(value, stages, f"{name}[{key}]")) for key, value in items)

        per_position((message, optimizer), 2, "message and optimizer")
        heads = sorted((head_load or {}).items())
        return cls(
            student_forward=student(student_forward, "student_forward"),
            student_backward=student(student_backward, "student_backward"),
            teacher_forward=table(teacher_forward, "teacher_forward"),
            teacher_load=table(teacher_load, "teacher_load"),
            head_load=tuple((key, per_position(value, 1, f"head_load[{key}]")[0]) for key, value in heads),
            message=float(message),
            optimizer=float(optimizer),
        )

    def teacher(self, name: str) -> tuple[float, ...]:
        """Forward time of teacher `name` on each stage; ValueError if its cost is unknown."""
        for teacher, costs in self.teacher_forward:
            if teacher == name:
                return costs
        known = ", ".join(teacher for teacher, _ in self.teacher_forward) or "none"
        raise ValueError(f"costs: no teacher_forward for teacher {name!r} (known: {known})")

    def load(self, name: str, stage: int) -> float:
        """Time to load teacher `name`'s layers onto `stage`; 0 if not given."""
        return next((costs[stage] for teacher, costs in self.teacher_load if teacher == name), 0.0)

    def head(self, name: str) -> float:
        """Time to load teacher `name`'s output head onto the last stage; 0 if not given."""
        return next((cost for teacher, cost in self.head_load if teacher == name), 0.0)
