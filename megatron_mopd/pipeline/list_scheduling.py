"""List scheduling: a discrete-event simulation in which every idle stage picks its next computation. No
torch.

The student's forwards run in one fixed order on every stage, and so do its backwards (Megatron's interleaved
order, which for one chunk per stage is 1F1B); the simulation decides how they interleave with each other and
with the teacher forwards. It cannot deadlock: within the activation limit the oldest unfinished backward can
always be reached (see `forward_group`).
"""

from __future__ import annotations

import math
from heapq import heappop, heappush
from itertools import accumulate
from typing import NamedTuple

from megatron_mopd.pipeline.orders import (
    BACKWARD,
    FORWARD,
    TEACHER,
    forward_group,
    one_forward_one_backward,
    student_order,
)
from megatron_mopd.pipeline.problem import PlanRequest, TeacherJob
from megatron_mopd.pipeline.slots import slot_loads


class PriorityRule(NamedTuple):
    """How an idle stage picks its next computation. The planner tries several rules and keeps the fastest
    schedule.

    fixed_order: follow Megatron's order of forwards and backwards on every stage; otherwise run a backward as
        soon as one is ready, and a forward whenever the activation cap allows it.
    extra_activations: forwards that a stage may run ahead of 1F1B, within the limit.
    patience: do not start a teacher forward if student work is known to arrive before this fraction of it has
        run.
    teachers_first: run all teacher forwards before the first student forward (back-to-back, serial).
    head: teacher forwards that the first stage runs before its first student forward. A teacher slower than
        the student's forward needs this lead, or its first results reach the middle stages after their first
        gap.
    pace: interval at which the student's forwards become due, in their forward-plus-backward times; before a
        forward is due, a teacher forward takes precedence. 0: as soon as possible.
    lateness: how far a teacher forward may delay a student forward past its due time, as a fraction of the
        teacher forward.
    """

    fixed_order: bool = False
    extra_activations: int = 0
    patience: float = 0.0
    teachers_first: bool = False
    head: int = 0
    pace: float = 0.0
    lateness: float = 0.0


class Placed(NamedTuple):
    """One computation with its planned start and end on its stage; `index` counts computations of its
    kind."""

    start: float
    end: float
    kind: int
    index: int


class Schedule:
    """The computations placed on each stage, with the orders and loads they refer to."""

    def __init__(self, request: PlanRequest, jobs: tuple[TeacherJob, ...], rule: PriorityRule):
        self.request, self.jobs, self.rule = request, jobs, rule
        p, v = request.stages, request.virtual_stages
        limit = request.activation_limit()
        group = forward_group(p, v, limit)
        self.forward, self.backward = student_order(request.microbatches, v, group)
        self.activation_caps, self.orders = [], []
        room = limit - 1 - (v - 1) * group
        for stage in range(p):
            ahead = (p - stage - 1) * (1 if v == 1 else 2)
            if v > 1 and group < p:
                ahead = min(ahead, 2 * group)
            ahead = min(ahead + rule.extra_activations, room)
            warmup = (v - 1) * group + ahead
            self.activation_caps.append(warmup + 1)
            if rule.fixed_order:
                self.orders.append(one_forward_one_backward(request.microbatches, v, group, warmup))
        self.teacher_loads, self.resident = slot_loads(
            [(job.teacher,) for job in jobs],
            max(1, request.limits.resident_teachers),
            request.resident,
            request.next_teacher(),
        )
        self.needed, self.releases = request.states_needed(), request.releases()
        self._loss_heads, self._scoring_heads = request.heads_needed(), request.jobs_reading_heads()
        self.last_job = [-1] * request.microbatches
        for number, job in enumerate(jobs):
            if job.step == 0:
                self.last_job[job.microbatch] = number
        self.placed: list[list[Placed]] = [[] for _ in range(p)]
        self.started: list[int] = []
        """The stage of every computation, in the order in which the scheduler started them: none depends on a
        later one, not even if their times are equal."""
        _Simulation(self).run()
        # Losses, and forwards that store log-probs, read heads in the order of the schedule.
        uses = [(item, heads) for item in self.placed[-1] if (heads := self._heads_read(item))]
        self.head_uses = [(item.kind, item.index) for item, _ in uses]
        """The computations that read a head on the last stage: (kind, index) in order; `SlotLoad.after`
        counts these."""
        self.head_loads, self.resident_heads = slot_loads(
            [heads for _, heads in uses], request.head_slots(), request.resident_heads, request.next_head()
        )

    def _heads_read(self, item: Placed) -> tuple[str, ...]:
        """The teachers whose output heads a computation on the last stage reads."""
        if item.kind == TEACHER:
            job = self.jobs[item.index]
            return (job.teacher,) if job in self._scoring_heads else ()
        if item.kind == FORWARD:
            i, chunk = self.forward[item.index]
            return self._loss_heads[i] if chunk == self.request.virtual_stages - 1 else ()
        return ()


class _Stage:
    """A pipeline stage in simulated time: when its inputs arrive, and what it has started."""

    def __init__(self, schedule: Schedule, number: int):
        forwards, jobs = len(schedule.forward), len(schedule.jobs)
        self.number = number
        self.forward_in = [math.inf] * forwards
        """When the input of each forward arrives; infinite until known."""
        self.backward_in = [math.inf] * forwards
        self.teacher_in = [math.inf if number else 0.0] * jobs
        self.loaded_at = {load.before: math.inf for load in schedule.teacher_loads}
        """When the teacher that a job needs is loaded."""
        self.next_forward = self.next_backward = self.next_job = 0
        self.first_forward = math.inf
        self.free_at = 0.0
        self.loads_end = 0.0
        """When the loads started so far finish; loads run one after another."""
        self.cached_states = 0
        self.activation_cap = schedule.activation_caps[number]
        self.order = schedule.orders[number] if schedule.orders else None
        self.placed = schedule.placed[number]


class _Simulation:
    """Fills `schedule.placed`: an idle stage starts the computation that `schedule.rule` prefers."""

    def __init__(self, schedule: Schedule):
        request, self.schedule, self.rule = schedule.request, schedule, schedule.rule
        self.costs, self.message = request.costs, request.costs.message
        self.forward_cost, self.backward_cost = request.costs.student_forward, request.costs.student_backward
        self.chunks, self.n_jobs = request.virtual_stages, len(schedule.jobs)
        self.n_forwards = len(schedule.forward)
        self.stages = [_Stage(schedule, number) for number in range(request.stages)]
        self.last = request.stages - 1
        for number, (_, chunk) in enumerate(schedule.forward):
            if chunk == 0:
                self.stages[0].forward_in[number] = 0.0
        self.forward_at = {unit: number for number, unit in enumerate(schedule.forward)}
        self.backward_at = {unit: number for number, unit in enumerate(schedule.backward)}
        teacher_cost = {name: self.costs.teacher(name) for name in {job.teacher for job in schedule.jobs}}
        job_size = request.job_sizes()
        self.job_cost = [
            tuple(job_size[job] * cost for cost in teacher_cost[job.teacher]) for job in schedule.jobs
        ]
        self.size = request.student_sizes()
        self.loads_after: dict[int, list] = {}
        for load in schedule.teacher_loads:
            self.loads_after.setdefault(load.after, []).append(load)

        limit = request.limits.cached_states
        self.cache_limit = math.inf if limit is None else limit
        self.stages[self.last].cached_states = request.scored_at_start()
        self.teachers_first = self.rule.teachers_first
        self.teachers_before_forwards = self.teachers_first and limit is None
        self.serial = request.kind == "serial"
        self.teachers_left = request.stages * self.n_jobs
        self.student_may_start = 0.0  # with `serial`, once all teachers are done
        self.lead = min(self.rule.head, self.n_jobs)
        cycle = max(map(sum, zip(self.forward_cost, self.backward_cost)))
        before = accumulate((self.size[i] for i, _ in schedule.forward), initial=0)
        self.due = [size * (self.rule.pace * cycle) for size in before]
        """When each forward becomes due after the first."""
        self.events: list[tuple[float, int]] = []

    def run(self) -> None:
        start = {FORWARD: self._start_forward, BACKWARD: self._start_backward, TEACHER: self._start_teacher}
        for stage in self.stages:
            self._start_loads(stage, -1, 0.0)
            heappush(self.events, (0.0, stage.number))
        while self.events:
            now, number = heappop(self.events)
            stage = self.stages[number]
            if now < stage.free_at:
                continue
            kind = self._choice(stage, now)
            if kind is not None:
                stage.free_at = start[kind](stage, now)
                self.schedule.started.append(number)
                heappush(self.events, (stage.free_at, number))
        assert all(len(stage.placed) == 2 * self.n_forwards + self.n_jobs for stage in self.stages), (
            "the scheduler left work undone"
        )

    # --- which computation comes next -------------------------------------------------------------

    def _choice(self, stage: _Stage, now: float) -> int | None:
        """The kind of computation the stage starts now; None if it is better, or necessary, to wait."""
        may_forward, may_backward = self._allowed(stage)
        backward_time = stage.backward_in[stage.next_backward] if may_backward else math.inf
        if backward_time <= now and not self.teachers_first:
            return BACKWARD
        has_room = self.cache_limit == math.inf or self._has_room(stage)
        forward_time, needs_teacher = math.inf, False
        if may_forward:
            forward_time, needs_teacher = self._forward_time(stage, has_room)
        is_teacher_ready = has_room and self._teacher_time(stage) <= now

        if is_teacher_ready and self.teachers_first:
            return TEACHER
        if backward_time <= now:
            return BACKWARD
        if is_teacher_ready and (needs_teacher or self._fits(stage, now, forward_time, backward_time)):
            return TEACHER
        return FORWARD if forward_time <= now else None

    def _allowed(self, stage: _Stage) -> tuple[bool, bool]:
        """Whether the student's fixed order (or, without one, the activation cap) allows a forward, and a
        backward."""
        forwards, backwards = stage.next_forward, stage.next_backward
        if stage.order is not None and forwards + backwards < 2 * self.n_forwards:
            is_backward = stage.order[forwards + backwards] == BACKWARD
            return not is_backward, is_backward
        within_cap = forwards - backwards < stage.activation_cap
        return forwards < self.n_forwards and within_cap, backwards < self.n_forwards

    def _has_room(self, stage: _Stage) -> bool:
        """Whether the destination's cache has room for the result of one more teacher forward."""
        if stage.number < self.last:
            return self.stages[stage.number + 1].cached_states < self.cache_limit
        return self.last > 0 or stage.cached_states < self.cache_limit

    def _forward_time(self, stage: _Stage, has_room: bool) -> tuple[float, bool]:
        """When the next forward may start, and whether a teacher forward must run before it."""
        number, job = stage.next_forward, stage.next_job
        microbatch, chunk = self.schedule.forward[number]
        if chunk == self.chunks - 1 and job <= self.schedule.last_job[microbatch]:
            return math.inf, True
        if self.teachers_before_forwards and job < self.n_jobs:
            return math.inf, False
        if self.serial:
            earliest = math.inf if self.teachers_left else self.student_may_start
            return max(stage.forward_in[number], earliest), False
        if number == 0 and stage.number == 0 and job < self.lead and has_room:
            return math.inf, False
        return stage.forward_in[number], False

    def _teacher_time(self, stage: _Stage) -> float:
        """When both the input and the weights of the next teacher forward are available."""
        job = stage.next_job
        if job == self.n_jobs:
            return math.inf
        arrival, loaded = stage.teacher_in[job], stage.loaded_at.get(job, 0.0)
        return arrival if arrival > loaded else loaded

    def _fits(self, stage: _Stage, now: float, forward_time: float, backward_time: float) -> bool:
        """Whether a teacher forward ends before the student's next work arrives or, if a student forward is
        already waiting, before it is due.
        """
        cost = self.job_cost[stage.next_job][stage.number]
        waited_for = now + self.rule.patience * cost
        if forward_time > now:
            return waited_for <= backward_time and waited_for <= forward_time
        if stage.next_forward == 0:
            return False
        due = stage.first_forward + self.due[stage.next_forward]
        return waited_for <= backward_time and now + (1 - self.rule.lateness) * cost <= due

    # --- starting a computation: each method returns its end time ---------------------------------

    def _start_forward(self, stage: _Stage, now: float) -> float:
        number = stage.next_forward
        microbatch, chunk = self.schedule.forward[number]
        end = now + self.size[microbatch] * self.forward_cost[chunk * len(self.stages) + stage.number]
        stage.placed.append(Placed(now, end, FORWARD, number))
        stage.next_forward += 1
        if number == 0:
            stage.first_forward = now
        if stage.number < self.last:
            self.stages[stage.number + 1].forward_in[number] = end + self.message
            heappush(self.events, (end + self.message, stage.number + 1))
        elif chunk < self.chunks - 1:
            arrival = end + (self.message if self.last else 0.0)
            self.stages[0].forward_in[self.forward_at[microbatch, chunk + 1]] = arrival
            heappush(self.events, (arrival, 0))
        else:
            stage.backward_in[self.backward_at[microbatch, chunk]] = end
            if self.schedule.needed[microbatch]:
                stage.cached_states -= self.schedule.releases[microbatch]
                heappush(self.events, (end, max(0, self.last - 1)))
        return end

    def _start_backward(self, stage: _Stage, now: float) -> float:
        number = stage.next_backward
        microbatch, chunk = self.schedule.backward[number]
        end = now + self.size[microbatch] * self.backward_cost[chunk * len(self.stages) + stage.number]
        stage.placed.append(Placed(now, end, BACKWARD, number))
        stage.next_backward += 1
        if stage.number > 0:
            self.stages[stage.number - 1].backward_in[number] = end + self.message
            heappush(self.events, (end + self.message, stage.number - 1))
        elif chunk > 0:
            arrival = end + (self.message if self.last else 0.0)
            self.stages[self.last].backward_in[self.backward_at[microbatch, chunk - 1]] = arrival
            heappush(self.events, (arrival, self.last))
        return end

    def _start_teacher(self, stage: _Stage, now: float) -> float:
        job = stage.next_job
        end = now + self.job_cost[job][stage.number]
        stage.placed.append(Placed(now, end, TEACHER, job))
        stage.next_job += 1
        if stage.number < self.last:
            following = self.stages[stage.number + 1]
            following.teacher_in[job] = end + self.message
            following.cached_states += 1
            heappush(self.events, (end + self.message, following.number))
            if stage.number > 0:
                stage.cached_states -= 1
                heappush(self.events, (end, stage.number - 1))
        elif self.last == 0:
            stage.cached_states += 1
        self._start_loads(stage, job, end)
        self.teachers_left -= 1
        if self.serial and not self.teachers_left:
            self.student_may_start = end
            for other in self.stages:
                heappush(self.events, (end, other.number))
        return end

    def _start_loads(self, stage: _Stage, after: int, now: float) -> None:
        for load in self.loads_after.get(after, ()):
            stage.loads_end = max(stage.loads_end, now) + self.costs.load(load.teacher, stage.number)
            stage.loaded_at[load.before] = stage.loads_end
            heappush(self.events, (stage.loads_end, stage.number))
