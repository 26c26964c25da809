"""Turns a request into a plan: what every pipeline stage runs, in which order. Pure Python, no torch.

    plan = Planner().plan(PlanRequest(stages=8, microbatches=32, costs=costs, scoring=scoring))
    plan.stages[3]          # the instruction list of stage 3, the same for every rank of that stage

The planner builds several candidate schedules (`list_scheduling.py`), keeps the fastest, places the optimizer
step, and writes one instruction list per stage, including the loads, sends and receives that the schedule
implies. It is deterministic: every rank that plans the same request gets the same plan.
"""

from __future__ import annotations

import itertools
import math
import random
from bisect import bisect_left, bisect_right
from collections import OrderedDict

from megatron_mopd.pipeline.instructions import (
    Channel,
    Compute,
    Instruction,
    LoadHead,
    LoadTeacher,
    OptimizerStep,
    Plan,
    Receive,
    Send,
    StudentBackward,
    StudentForward,
    Synchronize,
    TeacherForward,
    next_place,
)
from megatron_mopd.pipeline.list_scheduling import Placed, PriorityRule, Schedule
from megatron_mopd.pipeline.messages import place_messages
from megatron_mopd.pipeline.orders import BACKWARD, FORWARD, TEACHER, student_order
from megatron_mopd.pipeline.problem import PlanRequest, TeacherJob


class Planner:
    """Plans requests and caches the plans of the last `capacity` distinct ones.

    `effort` is the number of computations that may be placed while searching for a better schedule; a few
    candidates are always tried. 150,000 takes about a second on one core.
    """

    def __init__(self, capacity: int = 32, effort: int = 150_000):
        self.capacity, self.effort = capacity, effort
        self._plans: OrderedDict[PlanRequest, Plan] = OrderedDict()

    def plan(self, request: PlanRequest) -> Plan:
        """The plan for `request`; raises ValueError if no plan can satisfy it."""
        if request in self._plans:
            self._plans.move_to_end(request)
            return self._plans[request]
        plan = make_plan(request, effort=self.effort)
        self._plans[request] = plan
        if len(self._plans) > self.capacity:
            self._plans.popitem(last=False)
        return plan


def make_plan(request: PlanRequest, *, effort: int = 150_000) -> Plan:
    """Plan one optimizer step without caching the plan; see :class:`Planner`."""
    request.validate()
    jobs, deferred = _jobs_that_fit(request)
    if request.kind == "bubble_fill":
        schedule = _best_schedule(request, jobs, effort)
    else:
        schedule = Schedule(request, jobs, PriorityRule(fixed_order=True, teachers_first=True))
    return Plan(
        request=request,
        stages=_instruction_lists(schedule),
        deferred=deferred,
        resident=schedule.resident,
        resident_heads=schedule.resident_heads,
    )


def forward_lists(stages: int, virtual_stages: int, microbatches: int) -> tuple[tuple[Instruction, ...], ...]:
    """Instruction lists for forward passes of the student only, in the order of its training forwards."""
    order, _ = student_order(microbatches, virtual_stages, stages)
    lists: list[list[Instruction]] = [[] for _ in range(stages)]
    senders: dict[tuple[int, Compute], Channel] = {}
    for stage in range(stages):
        for microbatch, chunk in order:
            target = next_place(StudentForward(microbatch, chunk), stage, stages, virtual_stages)
            if target is not None:
                lane, destination, consumer = target
                senders[destination, consumer] = Channel(lane, stage, destination)
    for stage, entries in enumerate(lists):
        for compute in (StudentForward(*unit) for unit in order):
            if (channel := senders.get((stage, compute))) is not None:
                entries.append(Receive(channel, compute))
            entries.append(compute)
            if (target := next_place(compute, stage, stages, virtual_stages)) is not None:
                lane, destination, consumer = target
                entries.append(Send(Channel(lane, stage, destination), consumer))
    return tuple(map(tuple, lists))


def bubble_free_time(request: PlanRequest) -> float:
    """The work of the busiest stage; in a steady state no schedule for this request can be faster."""
    return max(_work(request, request.pending_jobs()))


def lower_bound(request: PlanRequest) -> float:
    """A lower bound on the time per optimizer step: the busiest stage, or the student's own fill and drain.

    Between two optimizer steps a stage can start only after the first forward has passed all earlier stages,
    and its last backward must still pass back through them.
    """
    return max(bubble_free_time(request), _student_time(request))


def _student_time(request: PlanRequest) -> float:
    p, costs, sizes = request.stages, request.costs, request.student_sizes()
    fill = itertools.accumulate(costs.student_forward[: p - 1], initial=0.0)
    drain = itertools.accumulate(costs.student_backward[: p - 1], initial=0.0)
    return max(
        sizes[0] * before + work + sizes[-1] * after
        for before, work, after in zip(fill, _work(request, ()), drain)
    )


def _work(request: PlanRequest, jobs: tuple[TeacherJob, ...]) -> list[float]:
    p, costs = request.stages, request.costs
    size_of = request.job_sizes()
    size: dict[str, int] = {}
    for job in jobs:
        size[job.teacher] = size.get(job.teacher, 0) + size_of[job]
    return [
        sum(request.student_sizes()) * (sum(costs.student_forward[s::p]) + sum(costs.student_backward[s::p]))
        + sum(total * costs.teacher(name)[s] for name, total in size.items())
        for s in range(p)
    ]


def _jobs_that_fit(request: PlanRequest) -> tuple[tuple[TeacherJob, ...], tuple[TeacherJob, ...]]:
    """The jobs to run, and the look-ahead jobs to defer: the cache has no room for their results, or the next
    step needs that room for results that it uses first."""
    jobs = request.pending_jobs()
    budget = request.limits.cached_states
    if budget is None:
        return jobs, ()
    own = sum(job.step == 0 for job in jobs)
    if request.kind == "serial":  # everything is scored before anything is used
        room = budget - request.scored_at_start() - own
    else:
        room = budget - sum(task.scored for task in request.scoring if task.step > 0)
    counts = range(own, min(len(jobs), own + max(0, room)) + 1)
    # Results that are scored early only take room from those that are scored later.
    feasible = bisect_left(counts, True, key=lambda n: request.next_smallest_cache(jobs[n:]) > budget)
    keep = counts[max(0, feasible - 1)]
    return jobs[:keep], jobs[keep:]


# --- the search ---------------------------------------------------------------------------------------


def _candidates(request: PlanRequest, jobs: tuple[TeacherJob, ...]):
    """Rules to try, the most promising first. The first few do well on even stages; the rest are a grid."""
    p, deep = request.stages, request.virtual_stages > 1
    heads = sorted({0, p // 4, p // 2, 3 * p // 4, p})
    if not jobs:
        return [PriorityRule(fixed_order=True), PriorityRule(), PriorityRule(extra_activations=1)]
    first = [
        PriorityRule(deep, pace=1.0, head=p // 4 if deep else 0),
        PriorityRule(deep, patience=1.0),
        PriorityRule(deep),
        PriorityRule(deep, extra_activations=p, head=p // 4, pace=1.0),
        PriorityRule(True, patience=0.5, head=p // 2, pace=1.0, lateness=0.5),
        PriorityRule(True, patience=0.5),
    ]
    grid = [
        PriorityRule(fixed, extra, patience, False, head, pace, late)
        for fixed, extra, patience, head, (pace, late) in itertools.product(
            (deep, not deep),
            (0, max(1, p // 2), p * request.virtual_stages),
            (0.0, 0.5, 1.0),
            heads,
            ((0.0, 0.0), (1.0, 0.0), (1.0, 0.5), (1.5, 0.0), (1.5, 0.5), (2.0, 0.5), (1.0, 0.9)),
        )
    ]
    random.Random(0).shuffle(grid)
    return first + [rule for rule in grid if rule not in first]


def _best_schedule(request: PlanRequest, jobs: tuple[TeacherJob, ...], effort: int) -> Schedule:
    placements = request.stages * (2 * request.microbatches * request.virtual_stages + len(jobs))
    tries = max(6, effort // placements)
    bound = max(*_work(request, jobs), _student_time(request))
    best, best_key = None, (math.inf, math.inf)
    for rule in _candidates(request, jobs)[:tries]:
        schedule = Schedule(request, jobs, rule)
        time = _effective_time(schedule)
        # A tenth of a percent is worth less than an activation.
        key = (round(time / bound, 3) if bound else time, rule.extra_activations)
        if key < best_key:
            best, best_key = schedule, key
        if time <= bound * 1.0005:
            break
    return best


def _effective_time(schedule: Schedule) -> float:
    """How long the plan occupies a stage, given what may run before and after it on that stage.

    Look-ahead at the end overlaps the time until the next plan's first forward arrives. If all of this step's
    micro-batches are already scored, the previous plan is assumed to overlap with this one in the same way.
    """
    request = schedule.request
    p = request.stages
    ahead = any(job.step for job in schedule.jobs)
    own = any(job.step == 0 for job in schedule.jobs)
    first = request.student_sizes()[0]
    times = [first * cost for cost in request.costs.student_forward[: p - 1]]
    fill = itertools.accumulate(times, initial=0.0)
    cuts, barrier = _optimizer_cuts(schedule)
    time = barrier
    for placed, cut, offset in zip(schedule.placed, cuts, fill):
        end = max(placed[-1].end, barrier)
        if cut < len(placed):
            end += max(0.0, barrier - placed[cut].start)
        if ahead:
            end -= offset if own else max(placed[0].start, offset)
        time = max(time, end)
    return time


def _optimizer_cuts(schedule: Schedule) -> tuple[list[int], float]:
    """Where the optimizer step splits each stage's list, and when the last stage arrives there.

    All stages wait for each other at that point. A stage that finishes early runs look-ahead meanwhile, but a
    teacher forward cannot be interrupted: of several candidate moments, the one that leaves the least idle
    time is taken.
    """
    placed = schedule.placed
    after_student = [1 + max(i for i, item in enumerate(items) if item.kind == BACKWARD) for items in placed]
    earliest = max(items[cut - 1].end for items, cut in zip(placed, after_student))
    if all(cut == len(items) for items, cut in zip(placed, after_student)):
        return after_student, earliest
    ends = [[item.end for item in items] for items in placed]
    longest = max(
        item.end - item.start for items, cut in zip(placed, after_student) for item in items[cut - 1 :]
    )
    moments = sorted(
        {end for row in ends for end in row[bisect_left(row, earliest) :] if end <= earliest + longest}
    )
    best: tuple[float, list[int], float] = (math.inf, after_student, earliest)
    for moment in [earliest, *moments[:: max(1, len(moments) // 16)]]:
        # Rounding must not exclude a forward that ends exactly at the cut.
        cuts = [max(cut, bisect_right(row, moment * (1 + 1e-12))) for cut, row in zip(after_student, ends)]
        barrier = max(row[cut - 1] for row, cut in zip(ends, cuts))
        unused = max(
            (max(0.0, barrier - items[cut].start) if cut < len(items) else 0.0)
            for items, cut in zip(placed, cuts)
        )
        if unused < best[0] - 1e-9:
            best = (unused, cuts, barrier)
    return best[1], best[2]


# --- from a schedule to instruction lists -------------------------------------------------------------


class _Table:
    """A schedule's computations as instructions."""

    def __init__(self, schedule: Schedule):
        self._kinds: tuple[list[Compute], ...] = (
            [StudentForward(i, c) for i, c in schedule.forward],
            [StudentBackward(i, c) for i, c in schedule.backward],
            [TeacherForward(job) for job in schedule.jobs],
        )

    def __getitem__(self, item: Placed) -> Compute:
        return self._kinds[item.kind][item.index]


def _instruction_lists(schedule: Schedule) -> tuple[tuple[Instruction, ...], ...]:
    request, table = schedule.request, _Table(schedule)
    computes = [[table[item] for item in items] for items in schedule.placed]
    cuts, _ = _optimizer_cuts(schedule)
    barriers: list[list[int]] = [[cut] for cut in cuts]
    meetings: list[Instruction] = [OptimizerStep()]
    if request.kind == "serial" and schedule.jobs:
        meetings.insert(0, Synchronize())
        for items, positions in zip(schedule.placed, barriers):
            positions.insert(0, next(i for i, item in enumerate(items) if item.kind == FORWARD))
    receives, sends = place_messages(schedule, computes, barriers)
    lists = []
    for stage, items in enumerate(schedule.placed):
        entries, loads_after = _loads(schedule, stage)
        stops, slots = barriers[stage], iter(receives[stage])
        for position, item in enumerate(items):
            for number, stop in enumerate(stops):
                if position == stop:
                    entries += [*next(slots), meetings[number]]
            entries += [*next(slots), computes[stage][position]]
            if position in sends[stage]:
                entries.append(sends[stage][position])
            if item.kind != BACKWARD:
                entries += loads_after.get((item.kind, item.index), [])
        if stops[-1] == len(items):
            entries += [*next(slots), meetings[-1]]
        lists.append(tuple(entries))
    return tuple(lists)


def _loads(
    schedule: Schedule, stage: int
) -> tuple[list[Instruction], dict[tuple[int, int], list[Instruction]]]:
    """A stage's loads of teachers and heads: those at the start, and those after a (kind, index)."""
    start: list[Instruction] = []
    after: dict[tuple[int, int], list[Instruction]] = {}
    for load in schedule.teacher_loads:
        place = start if load.after < 0 else after.setdefault((TEACHER, load.after), [])
        place.append(LoadTeacher(load.teacher, load.slot))
    if stage == schedule.request.stages - 1:
        for load in schedule.head_loads:
            place = start if load.after < 0 else after.setdefault(schedule.head_uses[load.after], [])
            place.append(LoadHead(load.teacher, load.slot))
    return start, after
