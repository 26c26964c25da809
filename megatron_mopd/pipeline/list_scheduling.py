"""Decides who computes what when: a discrete-event simulation in which every idle stage picks its next job.
No torch.

The student's forwards and backwards keep one fixed order on every stage (Megatron's interleaved order, which
for one chunk per stage is 1F1B); what is decided is how they and the teacher forwards interleave. The order
cannot get stuck: the oldest unfinished backward can always be reached with the activations that are allowed
(see `forward_group`).
"""

from __future__ import annotations

import heapq
import math
from typing import NamedTuple

from megatron_mopd.pipeline.problem import PlanRequest, TeacherJob

FORWARD, BACKWARD, TEACHER = 0, 1, 2


class Policy(NamedTuple):
    """The knobs of one attempt. The planner tries several and keeps the plan that is fastest on the clock.

    fixed_order: keep to Megatron's order of forwards and backwards on every stage; else a backward goes first
        whenever one is there, and a forward whenever the activation cap allows.
    extra_activations: forwards a stage may run ahead of 1F1B, within the limit.
    patience: a teacher forward is not started when student work is known to arrive before this share of it is
        over.
    teachers_first: run every teacher forward before the first student forward (back-to-back, serial).
    head: teacher forwards the first stage runs before its first student forward. A teacher slower than the
        student's forward needs this lead, or its first results reach the middle stages after their first gap.
    pace: the student's forwards fall due one by one, this many forward-and-backward times apart; until then a
        teacher forward goes first. 0: as soon as possible.
    lateness: how far, as a share of the teacher forward, it may push a student forward past its due time.
    """

    fixed_order: bool = False
    extra_activations: int = 0
    patience: float = 0.0
    teachers_first: bool = False
    head: int = 0
    pace: float = 0.0
    lateness: float = 0.0


class Placed(NamedTuple):
    """One computation with its planned start and end on its stage; `index` counts within its kind."""

    start: float
    end: float
    kind: int
    index: int


class SlotLoad(NamedTuple):
    """Load `teacher` into `slot` once use number `after` (-1: at once) is over; use number `before` needs it
    (one more than there are: the next plan does).
    """

    teacher: str
    slot: int
    after: int
    before: int


def slot_loads(uses: list[tuple[str, ...]], slots: int, resident: tuple[str, ...], following: str = ""):
    """Which loads serve a sequence of uses with so many slots, each at the earliest moment.

    A load takes the slot whose occupant is needed last, but not the one in use just before while another can
    give way: it could only begin when that use is over, and nothing would hide it. `following` is what the
    next plan begins with; it is brought in as soon as a slot is free for good. Returns the loads in the order
    they are started and the occupants at the end.
    """
    occupant = list(resident) + [""] * (slots - len(resident))
    positions: dict[str, list[int]] = {}
    for number, teachers in enumerate(uses):
        for teacher in teachers:
            positions.setdefault(teacher, []).append(number)
    cursor = dict.fromkeys(positions, 0)
    last_use = [-1] * slots
    loads: list[SlotLoad] = []
    latest = -1

    def next_use(slot: int) -> float:
        name = occupant[slot]
        if name not in positions or cursor[name] >= len(positions[name]):
            return math.inf
        return positions[name][cursor[name]]

    def load(teacher: str, number: int, needed: tuple[str, ...]) -> None:
        nonlocal latest
        free = [slot for slot in range(slots) if occupant[slot] not in needed]
        idle = [slot for slot in free if number == 0 or last_use[slot] < number - 1]
        slot = max(idle or free, key=lambda s: (next_use(s), -last_use[s]))
        latest = max(latest, last_use[slot])
        occupant[slot] = teacher
        loads.append(SlotLoad(teacher, slot, latest, number))

    for number, teachers in enumerate(uses):
        for teacher in teachers:
            if teacher not in occupant:
                load(teacher, number, teachers)
        for teacher in teachers:
            last_use[occupant.index(teacher)] = number
            cursor[teacher] += 1
    if following and following not in occupant:
        load(following, len(uses), ())
    return loads, tuple(occupant)


def forward_group(stages: int, chunks: int, limit: int) -> int:
    """How many micro-batches advance together through the chunks: Megatron's p, or fewer under a tight limit.

    A stage must hold (chunks - 1) * group forwards before the first backward can come back to it, plus one.
    """
    if chunks == 1:
        return stages
    return max(1, min(stages, (limit - 1) // (chunks - 1)))


def student_order(microbatches: int, chunks: int, group: int) -> tuple[list, list]:
    """The order of (micro-batch, chunk) for forwards and for backwards, the same on every stage."""
    forward, backward = [], []
    for first in range(0, microbatches, group):
        members = range(first, min(first + group, microbatches))
        forward += [(i, c) for c in range(chunks) for i in members]
        backward += [(i, c) for c in reversed(range(chunks)) for i in members]
    return forward, backward


def one_forward_one_backward(microbatches: int, chunks: int, group: int, warmup: int) -> list[int]:
    """One stage's student order: FORWARD or BACKWARD, `warmup` forwards first, then in turns.

    A last group that is not full is planned as if it were, and the missing micro-batches are then left out:
    leaving out whole micro-batches cannot make an order get stuck.
    """
    full = -(-microbatches // group) * group
    forward, backward = student_order(full, chunks, group)
    keep_forward = [i < microbatches for i, _ in forward]
    keep_backward = [i < microbatches for i, _ in backward]
    total = len(forward)
    warmup = min(warmup, total)
    order = [FORWARD] * sum(keep_forward[:warmup])
    for number in range(total):
        if warmup + number < total and keep_forward[warmup + number]:
            order.append(FORWARD)
        if keep_backward[number]:
            order.append(BACKWARD)
    return order


class Schedule:
    """The outcome: per stage the placed computations, with the orders and loads they refer to."""

    def __init__(self, request: PlanRequest, jobs: tuple[TeacherJob, ...], policy: Policy):
        self.request, self.jobs, self.policy = request, jobs, policy
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
            ahead = min(ahead + policy.extra_activations, room)
            warmup = (v - 1) * group + ahead
            self.activation_caps.append(warmup + 1)
            if policy.fixed_order:
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
        _run(self)
        # Heads are read by losses and by forwards that keep log-probs, in the order that has come out.
        uses = [(item, heads) for item in self.placed[-1] if (heads := self._heads_read(item))]
        self.head_uses = [(item.kind, item.index) for item, _ in uses]
        """What reads a head on the last stage: (kind, index) in order; `SlotLoad.after` counts these."""
        self.head_loads, self.resident_heads = slot_loads(
            [heads for _, heads in uses], request.head_slots(), request.resident_heads, request.next_head()
        )

    def _heads_read(self, item: Placed) -> tuple[str, ...]:
        """The teachers whose output heads a computation of the last stage reads."""
        if item.kind == TEACHER:
            job = self.jobs[item.index]
            return (job.teacher,) if job in self._scoring_heads else ()
        if item.kind == FORWARD:
            i, chunk = self.forward[item.index]
            return self._loss_heads[i] if chunk == self.request.virtual_stages - 1 else ()
        return ()


def _run(schedule: Schedule) -> None:
    """Fill `schedule.placed` by letting every stage choose whenever it is idle."""
    request, policy, jobs = schedule.request, schedule.policy, schedule.jobs
    p, v, costs = request.stages, request.virtual_stages, request.costs
    forward, backward = schedule.forward, schedule.backward
    n, n_jobs, last = len(forward), len(jobs), p - 1
    message = costs.message
    forward_at = {unit: number for number, unit in enumerate(forward)}
    backward_at = {unit: number for number, unit in enumerate(backward)}
    teacher_cost = {name: costs.teacher(name) for name in {job.teacher for job in jobs}}
    job_cost = [teacher_cost[job.teacher] for job in jobs]
    budget = math.inf if request.limits.cached_states is None else request.limits.cached_states

    inf = math.inf
    forward_in = [[inf] * n for _ in range(p)]
    backward_in = [[inf] * n for _ in range(p)]
    teacher_in = [[inf] * n_jobs for _ in range(p)]
    teacher_in[0] = [0.0] * n_jobs
    for number, (_, chunk) in enumerate(forward):
        if chunk == 0:
            forward_in[0][number] = 0.0
    next_forward, next_backward, next_job = [0] * p, [0] * p, [0] * p
    free_at, copy_at, held = [0.0] * p, [0.0] * p, [0] * p
    held[last] = request.scored_at_start()
    events: list[tuple[float, int]] = []

    loads_after: dict[int, list] = {}
    for load in schedule.teacher_loads:
        loads_after.setdefault(load.after, []).append(load)
    job_loaded = [{load.before: inf for load in schedule.teacher_loads} for _ in range(p)]

    def start_teacher_loads(stage: int, after: int, now: float) -> None:
        for load in loads_after.get(after, ()):
            copy_at[stage] = max(copy_at[stage], now) + costs.load(load.teacher, stage)
            job_loaded[stage][load.before] = copy_at[stage]
            heapq.heappush(events, (copy_at[stage], stage))

    for stage in range(p):
        start_teacher_loads(stage, -1, 0.0)
        heapq.heappush(events, (0.0, stage))

    teachers_first, strict = policy.teachers_first, policy.teachers_first and budget == inf
    serial = request.kind == "serial"
    teachers_left = p * n_jobs
    head = min(policy.head, n_jobs)
    cycle = policy.pace * max(map(sum, zip(costs.student_forward, costs.student_backward)))
    first_forward = [inf] * p
    serial_start = 0.0
    while events:
        now, stage = heapq.heappop(events)
        if now < free_at[stage]:
            continue
        f, b, t = next_forward[stage], next_backward[stage], next_job[stage]
        is_last = stage == last
        may_forward, may_backward = f < n and f - b < schedule.activation_caps[stage], b < n
        if policy.fixed_order and f + b < 2 * n:
            may_backward = schedule.orders[stage][f + b] == BACKWARD
            may_forward = not may_backward
        b_time = backward_in[stage][b] if may_backward else inf
        room = held[stage + 1] < budget if not is_last else (p > 1 or held[0] < budget)
        f_time, urgent = inf, False
        if may_forward:
            i, chunk = forward[f]
            f_time = forward_in[stage][f]
            if chunk == v - 1 and t <= schedule.last_job[i]:
                f_time, urgent = inf, True
            elif (strict and t < n_jobs) or (serial and teachers_left):
                f_time = inf
            elif serial:
                f_time = max(f_time, serial_start)
            elif f == 0 and stage == 0 and t < head and room:
                f_time = inf
        t_time = inf
        if t < n_jobs:
            if room:
                t_time = teacher_in[stage][t]
                if t in job_loaded[stage]:
                    t_time = max(t_time, job_loaded[stage][t])

        if t_time <= now and teachers_first:
            choice = TEACHER
        elif b_time <= now:
            choice = BACKWARD
        else:
            choice = FORWARD if f_time <= now else None
            if t_time <= now and (choice is None or f):
                # A teacher forward may go now if the next forward needs it, or if it ends before the
                # student's next work arrives or, for a forward already here, before that falls due.
                cost = job_cost[t][stage]
                due = first_forward[stage] + f * cycle
                fits = now + policy.patience * cost <= b_time and (
                    now + policy.patience * cost <= f_time
                    if choice is None
                    else now + (1 - policy.lateness) * cost <= due
                )
                if urgent or fits:
                    choice = TEACHER
            if choice is None:
                continue

        if choice == FORWARD:
            i, chunk = forward[f]
            end = now + costs.student_forward[chunk * p + stage]
            schedule.placed[stage].append(Placed(now, end, FORWARD, f))
            next_forward[stage] = f + 1
            if f == 0:
                first_forward[stage] = now
            if not is_last:
                forward_in[stage + 1][f] = end + message
                heapq.heappush(events, (end + message, stage + 1))
            elif chunk < v - 1:
                target, arrival = forward_at[i, chunk + 1], end + (message if p > 1 else 0.0)
                forward_in[0][target] = arrival
                heapq.heappush(events, (arrival, 0))
            else:
                backward_in[stage][backward_at[i, chunk]] = end
                if schedule.needed[i]:
                    held[last] -= schedule.releases[i]
                    heapq.heappush(events, (end, max(0, last - 1)))
        elif choice == BACKWARD:
            i, chunk = backward[b]
            end = now + costs.student_backward[chunk * p + stage]
            schedule.placed[stage].append(Placed(now, end, BACKWARD, b))
            next_backward[stage] = b + 1
            if stage > 0:
                backward_in[stage - 1][b] = end + message
                heapq.heappush(events, (end + message, stage - 1))
            elif chunk > 0:
                target, arrival = backward_at[i, chunk - 1], end + (message if p > 1 else 0.0)
                backward_in[last][target] = arrival
                heapq.heappush(events, (arrival, last))
        else:
            end = now + job_cost[t][stage]
            schedule.placed[stage].append(Placed(now, end, TEACHER, t))
            next_job[stage] = t + 1
            if not is_last:
                teacher_in[stage + 1][t] = end + message
                held[stage + 1] += 1
                heapq.heappush(events, (end + message, stage + 1))
            elif p == 1:
                held[0] += 1
            if 0 < stage < last:
                held[stage] -= 1
                heapq.heappush(events, (end, stage - 1))
            start_teacher_loads(stage, t, end)
            teachers_left -= 1
            if serial and not teachers_left:
                serial_start = end
                for other in range(p):
                    heapq.heappush(events, (end, other))
        free_at[stage] = end
        heapq.heappush(events, (end, stage))

    assert all(len(entries) == 2 * n + n_jobs for entries in schedule.placed), (
        "the scheduler left work undone"
    )
