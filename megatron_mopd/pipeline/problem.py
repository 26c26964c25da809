"""The planner's input: micro-batches, teachers and limits. Pure Python, no torch.

All classes are frozen and hashable, so a request is its own key in the planner's cache. Times share one
arbitrary unit: seconds for measured costs, multiples of a student forward in tables.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, get_args

from megatron_mopd.choices import ScheduleKind
from megatron_mopd.pipeline.costs import CostModel, per_position

KINDS = get_args(ScheduleKind)


class UnmetLimit(NamedTuple):
    """A field of `Limits` that no plan for the request can satisfy."""

    name: str
    value: int
    smallest: int
    """The smallest value that works."""


class LimitError(ValueError):
    """No plan for a request can satisfy its limits.

    state_bytes: for `cached_states`, the bytes of the largest scored micro-batch.
    """

    def __init__(self, unmet: Sequence[UnmetLimit], state_bytes: int = 0):
        super().__init__(
            "; ".join(
                f"limit {name}={value} cannot be met by any plan: the smallest value that works is {smallest}"
                for name, value, smallest in unmet
            )
        )
        self.unmet, self.state_bytes = tuple(unmet), state_bytes


class TeacherJob(NamedTuple):
    """One forward pass of one teacher. `microbatch` is the first student micro-batch whose loss needs its
    result.

    `step` counts optimizer steps from the one being planned (0).
    """

    teacher: str
    microbatch: int
    step: int = 0


@dataclass(frozen=True)
class ScoringTask:
    """The forward passes of one teacher for one optimizer step, in execution order.

    Each forward is identified by the first student micro-batch that needs its result. If a teacher's
    micro-batches are split differently from the student's, `last_uses` gives the last student micro-batch
    that needs each result; empty means that it is also the first. An earlier plan has already cached the
    results of the first `scored` forwards. An empty task is allowed and costs nothing.

    Two kinds of computation on the last stage read the teacher's output head: the losses of the student
    micro-batches in `loss_heads` (None: all that need a result), and the forwards in `scoring_heads`, which
    store log-probs of the sampled tokens instead of hidden states.

    `sizes` are the sizes of the forwards, in the unit that costs are given for (`CostModel`); empty: 1 each.
    """

    teacher: str
    microbatches: tuple[int, ...]
    step: int = 0
    scored: int = 0
    last_uses: tuple[int, ...] = ()
    scoring_heads: tuple[int, ...] = ()
    loss_heads: tuple[int, ...] | None = None
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.microbatches)) != len(self.microbatches):
            raise ValueError(f"scoring of teacher {self.teacher!r}: a micro-batch appears twice")
        if self.step < 0:
            raise ValueError(f"scoring of teacher {self.teacher!r}: step is {self.step}, must be 0 or more")
        if not 0 <= self.scored <= len(self.microbatches):
            raise ValueError(
                f"scoring of teacher {self.teacher!r}: scored={self.scored}, but it has "
                f"{len(self.microbatches)} micro-batches"
            )
        if self.last_uses and (
            len(self.last_uses) != len(self.microbatches)
            or any(last < first for first, last in zip(self.microbatches, self.last_uses))
        ):
            raise ValueError(
                f"scoring of teacher {self.teacher!r}: last_uses={self.last_uses} does not match first uses "
                f"{self.microbatches}"
            )
        _check_sizes(self.sizes, len(self.microbatches), f"scoring of teacher {self.teacher!r}")
        needed = self.needed_by()
        for name, values, known in (
            ("scoring_heads", self.scoring_heads, self.microbatches),
            ("loss_heads", self.loss_heads or (), needed),
        ):
            if not set(values) <= set(known):
                raise ValueError(f"scoring of teacher {self.teacher!r}: {name}={values} is not among {known}")

    def uses(self) -> tuple[tuple[int, int], ...]:
        """(first, last) student micro-batch that needs each forward's result."""
        return tuple(zip(self.microbatches, self.last_uses or self.microbatches))

    def needed_by(self) -> tuple[int, ...]:
        """The student micro-batches that need at least one result, in order."""
        return tuple(sorted({i for first, last in self.uses() for i in range(first, last + 1)}))

    def pending(self) -> tuple[TeacherJob, ...]:
        """The jobs that have not run yet."""
        return tuple(TeacherJob(self.teacher, i, self.step) for i in self.microbatches[self.scored :])


def _check_sizes(sizes: Sequence[int], count: int, where: str) -> None:
    if sizes and len(sizes) != count:
        raise ValueError(f"{where}: {len(sizes)} sizes for {count} micro-batches")
    if any(size <= 0 for size in sizes):
        raise ValueError(f"{where}: sizes must be above 0, got {tuple(sizes)}")


def split_scoring(
    counts: Mapping[str, int], *, step: int = 0, scored: bool = False
) -> tuple[ScoringTask, ...]:
    """Tasks over consecutive micro-batches: `{"math": 3, "code": 2}` gives math 0-2 and code 3-4."""
    scoring, first = [], 0
    for teacher, count in counts.items():
        numbers = tuple(range(first, first + count))
        scoring.append(ScoringTask(teacher, numbers, step, count if scored else 0))
        first += count
    return tuple(scoring)


def one_f_one_b_activations(stages: int, virtual_stages: int) -> int:
    """Activations the first stage holds in Megatron's (interleaved) 1F1B schedule, in chunks."""
    return stages if virtual_stages == 1 else 2 * (stages - 1) + (virtual_stages - 1) * stages + 1


@dataclass(frozen=True)
class Limits:
    """Memory limits of one stage, as counts; None selects the default described here.

    activations: student forwards whose backward has not run yet, in chunks. None: as many as the first stage
        holds in Megatron's 1F1B, so no stage needs more memory than it would there. Teachers much slower than
        the student are hidden completely if this is 1.5 times that number.
    resident_teachers: slots for teacher layers. With two, one teacher loads while another computes.
    resident_heads: slots for teacher output heads on the last stage. None: two, or as many as one micro-batch
        needs.
    cached_states: teacher hidden states, in micro-batches: received inputs of teacher forwards and, on the
        last stage, scored micro-batches that the student's loss has not used yet. None: no limit.
    """

    activations: int | None = None
    resident_teachers: int = 2
    resident_heads: int | None = None
    cached_states: int | None = None


@dataclass(frozen=True)
class PlanRequest:
    """One optimizer step to plan: the student's micro-batches, the scoring tasks and the limits.

    Tasks with step 0 score this step's micro-batches; those that an earlier plan has scored are still listed,
    with `scored` set, because their states occupy the cache and their heads are needed. Tasks with a later
    step are look-ahead. `resident` and `resident_heads` give the contents of the slots when the plan starts,
    slot by slot ("" for an empty one). `sizes` are the sizes of the student's micro-batches, in the unit that
    costs are given for; empty: 1 each.
    """

    stages: int
    microbatches: int
    costs: CostModel
    virtual_stages: int = 1
    scoring: tuple[ScoringTask, ...] = ()
    kind: str = "bubble_fill"
    limits: Limits = field(default_factory=Limits)
    resident: tuple[str, ...] = ()
    resident_heads: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()

    def validate(self) -> None:
        """Raises ValueError if no plan can serve the request (`LimitError` if its limits are too small); the
        message says what to change."""
        if self.stages < 1 or self.virtual_stages < 1 or self.microbatches < 1:
            raise ValueError(
                f"stages={self.stages}, virtual_stages={self.virtual_stages}, "
                f"microbatches={self.microbatches}: each must be at least 1"
            )
        if self.kind not in KINDS:
            raise ValueError(f"schedule kind {self.kind!r} is not one of {', '.join(KINDS)}")
        _check_sizes(self.sizes, self.microbatches, "student")
        places = self.stages * self.virtual_stages
        for name in ("student_forward", "student_backward"):
            per_position(getattr(self.costs, name), places, name)
        seen = set()
        for task in self.scoring:
            key = (task.teacher, task.step)
            if key in seen:
                raise ValueError(
                    f"teacher {task.teacher!r} has two scoring tasks for step {task.step}: merge them"
                )
            seen.add(key)
            if task.microbatches:
                per_position(
                    self.costs.teacher(task.teacher), self.stages, f"teacher_forward[{task.teacher}]"
                )
            if task.step == 0 and any(not 0 <= i < self.microbatches for use in task.uses() for i in use):
                raise ValueError(
                    f"teacher {task.teacher!r} scores micro-batches {task.microbatches}, but the student "
                    f"has {self.microbatches} (numbered from 0)"
                )
        for name, values, slots in (
            ("resident", self.resident, self.limits.resident_teachers),
            ("resident_heads", self.resident_heads, self.head_slots()),
        ):
            if len(values) > slots:
                raise ValueError(f"{name} lists {len(values)} teachers, but there are {slots} slots")
        self._validate_limits()

    def _validate_limits(self) -> None:
        limits = self.limits
        heads = max(1 if self.jobs_reading_heads() else 0, *map(len, self.heads_needed()))
        needed = [
            ("activations", limits.activations, self.virtual_stages),
            ("resident_teachers", limits.resident_teachers, 1 if self.pending_jobs() else 0),
            ("resident_heads", limits.resident_heads, heads),
            ("cached_states", limits.cached_states, self.smallest_cache()),
        ]
        unmet = [UnmetLimit(*item) for item in needed if item[1] is not None and item[1] < item[2]]
        if unmet:
            raise LimitError(unmet)

    def student_sizes(self) -> tuple[int, ...]:
        """The size of every student micro-batch."""
        return self.sizes or (1,) * self.microbatches

    def job_sizes(self) -> dict[TeacherJob, int]:
        """The size of every teacher forward, including those that have run."""
        return {
            TeacherJob(task.teacher, first, task.step): size
            for task in self.scoring
            for first, size in zip(task.microbatches, task.sizes or (1,) * len(task.microbatches))
        }

    def activation_limit(self) -> int:
        """How many student forwards a stage may hold whose backward has not run yet, in chunks."""
        if self.limits.activations is not None:
            return self.limits.activations
        return one_f_one_b_activations(self.stages, self.virtual_stages)

    def states_needed(self) -> tuple[tuple[str, ...], ...]:
        """For each student micro-batch, the teachers whose cached results its loss needs."""
        return self._by_microbatch({g.teacher: g.needed_by() for g in self.scoring if g.step == 0})

    def heads_needed(self) -> tuple[tuple[str, ...], ...]:
        """For each student micro-batch, the teachers whose head its loss reads."""
        return self._by_microbatch(
            {
                g.teacher: g.needed_by() if g.loss_heads is None else g.loss_heads
                for g in self.scoring
                if g.step == 0
            }
        )

    def _by_microbatch(self, of_teacher: Mapping[str, tuple[int, ...]]) -> tuple[tuple[str, ...], ...]:
        found: list[list[str]] = [[] for _ in range(self.microbatches)]
        for teacher, numbers in of_teacher.items():
            for i in numbers:
                found[i].append(teacher)
        return tuple(map(tuple, found))

    def jobs_reading_heads(self) -> frozenset[TeacherJob]:
        """The jobs that themselves read their teacher's head, on the last stage."""
        return frozenset(
            TeacherJob(g.teacher, first, g.step) for g in self.scoring for first in g.scoring_heads
        )

    def releases(self) -> tuple[int, ...]:
        """For each student micro-batch, how many cached states can be freed after its loss."""
        counts = [0] * self.microbatches
        for task in self.scoring:
            if task.step == 0:
                for _, last in task.uses():
                    counts[last] += 1
        return tuple(counts)

    def head_slots(self) -> int:
        """How many output heads the last stage may hold."""
        if self.limits.resident_heads is not None:
            return self.limits.resident_heads
        return max(2, max(map(len, self.heads_needed()), default=0))

    def scored_at_start(self) -> int:
        """Teacher hidden states in the cache when the plan starts, in micro-batches."""
        return sum(task.scored for task in self.scoring)

    def pending_jobs(self) -> tuple[TeacherJob, ...]:
        """Every job that has not run yet, grouped by teacher, so that each teacher is loaded once per step.

        The tasks of this step come first, ordered by the first micro-batch that needs them. If the cache is
        too small for the states that this order keeps waiting, the jobs are ordered by the micro-batches that
        need them instead, and teachers are loaded more than once. Among the look-ahead tasks of one step the
        teacher used last goes first, because it is resident.
        """
        jobs = self._jobs_by_teacher()
        limit = self.limits.cached_states
        if limit is not None and self.kind != "serial" and self._peak_of_cache(jobs) > limit:
            jobs = _by_need(jobs)
        resident = jobs[-1].teacher if jobs else next((name for name in reversed(self.resident) if name), "")
        for step in sorted({task.step for task in self.scoring if task.step > 0}):
            ahead = [task for task in self.scoring if task.step == step and task.pending()]
            ahead.sort(key=lambda task: task.teacher != resident)
            for task in ahead:
                jobs.extend(task.pending())
                resident = task.teacher
        return tuple(jobs)

    def next_teacher(self) -> str:
        """The teacher that the next step probably starts with: the first of this step, because batches are
        ordered by teacher. "" if the next step's own jobs are in this request, or if there are no jobs.
        """
        scoring = [task for task in self.scoring if task.microbatches]
        if not scoring or any(task.step for task in scoring) or not self.limits.resident_teachers:
            return ""
        return min(scoring, key=lambda task: task.microbatches[0]).teacher

    def _jobs_by_teacher(self) -> list[TeacherJob]:
        """This step's jobs that have not run yet, grouped by teacher."""
        own = [task for task in self.scoring if task.step == 0 and task.pending()]
        own.sort(key=lambda task: min(job.microbatch for job in task.pending()))
        return [job for task in own for job in task.pending()]

    def next_head(self) -> str:
        """The head that the next step's first teacher forward reads; "" if it reads none or is unknown."""
        teacher = self.next_teacher()
        return teacher if any(g.teacher == teacher and g.scoring_heads for g in self.scoring) else ""

    def smallest_cache(self) -> int:
        """The fewest cached states with which this step can be completed (without any look-ahead)."""
        own = self._jobs_by_teacher()
        if self.kind == "serial":
            return self.scored_at_start() + len(own)
        return self._peak_of_cache(_by_need(own))  # no order keeps fewer states waiting

    def next_smallest_cache(self, deferred: Sequence[TeacherJob]) -> int:
        """`smallest_cache` of the next request, after a plan that leaves out the look-ahead jobs
        `deferred`."""
        scoring = self.next_scoring(deferred)
        last = max((last for task in scoring if task.step == 0 for _, last in task.uses()), default=0)
        return replace(self, microbatches=last + 1, scoring=scoring, sizes=()).smallest_cache()

    def next_scoring(self, deferred: Sequence[TeacherJob]) -> tuple[ScoringTask, ...]:
        """The look-ahead tasks as the next request must list them, after a plan that leaves out the jobs
        `deferred`: `step` is one lower, and `scored` is set.
        """
        left = Counter((job.teacher, job.step) for job in deferred)
        return tuple(
            replace(g, step=g.step - 1, scored=len(g.microbatches) - left[g.teacher, g.step])
            for g in self.scoring
            if g.step > 0
        )

    def _peak_of_cache(self, own: Sequence[TeacherJob]) -> int:
        """Peak number of states waiting for their loss if this step's jobs run in this order and each student
        micro-batch runs as soon as it can."""
        last_job = [-1] * self.microbatches
        for number, job in enumerate(own):
            last_job[job.microbatch] = number
        held = peak = self.scored_at_start()
        done = 0
        for released, last in zip(self.releases(), last_job):
            if last >= done:
                held += last + 1 - done
                done = last + 1
            peak = max(peak, held)
            held -= released
        return peak


def _by_need(jobs: Sequence[TeacherJob]) -> list[TeacherJob]:
    """The jobs in the order of the first micro-batch that needs them."""
    return sorted(jobs, key=lambda job: job.microbatch)
