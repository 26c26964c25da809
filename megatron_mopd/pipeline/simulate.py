"""Simulates plans: step time, idle shares, memory peaks, deadlocks. Pure Python, no torch.

Every stage executes its list. Computations and the two collectives occupy the stage; a message is delivered
one transfer time after it has been sent *and* its receive has been posted; loads share one copy engine per
stage. Each stage is advanced until it blocks, not in time steps, so the cost is linear in the number of
instructions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_mopd.pipeline.instructions import (
    Channel,
    Instruction,
    Lane,
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
)


class Event(NamedTuple):
    """One instruction that took time on a stage (or, for a load, on its copy engine). Times are in the cost
    model's unit.
    """

    stage: int
    instruction: Instruction
    start: float
    end: float


class PlanError(ValueError):
    """A plan that cannot be executed. Each entry of `problems` names stage, instruction and peer."""

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        shown = "\n  ".join(self.problems[:20])
        more = f"\n  and {len(self.problems) - 20} more" if len(self.problems) > 20 else ""
        super().__init__(f"the plan cannot be executed:\n  {shown}{more}")


@dataclass
class Simulation:
    """The simulated execution of one plan, or of several in sequence.

    finish: when each stage reaches the end of its last list.
    busy: compute time of each stage.
    optimizer_steps: when each optimizer step is complete.
    peak_activations, peak_cached_states: per stage, in program order, so they do not depend on timing.
    events: the timeline, if requested.
    """

    finish: list[float]
    busy: list[float]
    optimizer_steps: list[float]
    peak_activations: list[int]
    peak_cached_states: list[int]
    events: list[Event] = field(default_factory=list)

    @property
    def total(self) -> float:
        """When the last stage finishes."""
        return max(self.finish)

    @property
    def idle_share(self) -> list[float]:
        """Per stage, the share of the total time in which it does not compute."""
        return [1 - busy / self.total if self.total else 0.0 for busy in self.busy]


@dataclass(slots=True)
class Road:
    """The state of one channel."""

    sent: list[tuple[float, object]] = field(default_factory=list)
    posted: list[float] = field(default_factory=list)
    waiting: bool = False


def simulate(plans: Plan | Sequence[Plan], *, record: bool = False) -> Simulation:
    """Execute plans one after another; a stage starts its next list as soon as it has finished the previous
    one.

    Each plan runs with its own request's costs. Raises PlanError if the stages deadlock; the message says
    what every blocked stage waits for.
    """
    return Machine(as_sequence(plans), record).run()


def as_sequence(plans: Plan | Sequence[Plan]) -> list[Plan]:
    """The plans of a simulation, of which there must be at least one, all with the same number of stages."""
    plans = [plans] if isinstance(plans, Plan) else list(plans)
    if not plans:
        raise ValueError("simulate needs at least one plan")
    if any(plan.request.stages != plans[0].request.stages for plan in plans):
        raise ValueError("all plans of a simulation must have the same number of stages")
    return plans


class Machine:
    """The state of an execution: what each stage has done, and when."""

    def __init__(self, plans: list[Plan], record: bool):
        p = plans[0].request.stages
        self.plans, self.p, self.record = plans, p, record
        self.clock, self.copy_at, self.busy = [0.0] * p, [0.0] * p, [0.0] * p
        self.plan_number, self.position = [0] * p, [0] * p
        self.roads: dict[Channel, Road] = {}
        self.expected: list[dict] = [{} for _ in range(p)]
        self.loaded: list[dict[str, float]] = [{} for _ in range(p)]
        self.heads: dict[str, float] = {}
        self.meetings: list[list] = []
        self.meeting_number = [0] * p
        self.optimizer_steps: list[float] = []
        self.activations, self.peak_activations = [0] * p, [0] * p
        self.cached, self.peak_cached = [0] * p, [0] * p
        self.cached[-1] = self.peak_cached[-1] = plans[0].request.scored_at_start()
        self.local: list[set] = [set() for _ in range(p)]
        self.events: list[Event] = []
        self.message_cost = [plan.request.costs.message for plan in plans]
        self.teacher_cost = [dict(plan.request.costs.teacher_forward) for plan in plans]
        self.sizes = [plan.request.student_sizes() for plan in plans]
        self.job_sizes = [plan.request.job_sizes() for plan in plans]
        self.loss_heads = [plan.request.heads_needed() for plan in plans]
        self.scoring_heads = [plan.request.jobs_reading_heads() for plan in plans]
        self.releases = [plan.request.releases() for plan in plans]

    def run(self) -> Simulation:
        self.ready = deque(range(self.p))
        queued = [True] * self.p
        self.queued = queued
        while self.ready:
            stage = self.ready.popleft()
            queued[stage] = False
            self.advance(stage)
        blocked = [s for s in range(self.p) if self.plan_number[s] < len(self.plans)]
        if blocked:
            raise PlanError([self.describe_block(stage) for stage in blocked])
        return Simulation(
            self.clock, self.busy, self.optimizer_steps, self.peak_activations, self.peak_cached, self.events
        )

    def wake(self, stage: int) -> None:
        if not self.queued[stage]:
            self.queued[stage] = True
            self.ready.append(stage)

    def blocked_at(self, stage: int) -> tuple[int, Instruction]:
        """The position and instruction that a stage has not been able to execute."""
        position = self.position[stage]
        return position, self.plans[self.plan_number[stage]].stages[stage][position]

    def describe_block(self, stage: int) -> str:
        """What a stage waits for."""
        position, entry = self.blocked_at(stage)
        where = f"stage {stage}, instruction {position} ({entry})"
        if isinstance(entry, Synchronize | OptimizerStep):
            absent = [s for s in range(self.p) if s not in self.meetings[self.meeting_number[stage]][2]]
            return f"{where} waits for stages {absent}"
        channel, number = self.expected[stage].get(entry, (None, 0))
        if channel is None:
            return f"{where} waits for an input that this stage neither computes nor receives"
        sent = len(self.roads[channel].sent)
        return (
            f"{where} waits for message {number} from stage {channel.source} on {channel}, {sent} were sent"
        )

    def advance(self, stage: int) -> None:
        """Execute instructions of one stage until it must wait or finishes."""
        while self.plan_number[stage] < len(self.plans):
            number = self.plan_number[stage]
            entries = self.plans[number].stages[stage]
            position = self.position[stage]
            while position < len(entries):
                if not self.execute(stage, number, entries[position]):
                    self.position[stage] = position
                    return
                position += 1
            self.plan_number[stage] += 1
            self.position[stage] = 0

    def road(self, channel: Channel) -> Road:
        """The state of a channel."""
        road = self.roads.get(channel)
        if road is None:
            road = self.roads[channel] = Road()
        return road

    def execute(self, stage: int, number: int, entry: Instruction) -> bool:
        """Execute one instruction; False if it must wait."""
        kind = type(entry)
        if kind is Receive:
            road = self.road(entry.channel)
            self.expected[stage][entry.consumer] = (entry.channel, len(road.posted))
            road.posted.append(self.clock[stage])
            if entry.channel.lane is Lane.TEACHER_FORWARD:
                self.cache(stage, 1)
            return True
        if kind is Send:
            road = self.road(entry.channel)
            road.sent.append((self.clock[stage], entry.consumer))
            if road.waiting:
                road.waiting = False
                self.wake(entry.channel.destination)
            return True
        if kind is LoadTeacher or kind is LoadHead:
            self.load(stage, number, entry)
            return True
        if kind is Synchronize or kind is OptimizerStep:
            return self.meet(stage, number, entry)
        return self.compute(stage, number, entry)

    def compute(self, stage: int, number: int, entry: Instruction) -> bool:
        request = self.plans[number].request
        p, last_chunk, costs = self.p, request.virtual_stages - 1, request.costs
        start = self.clock[stage]
        kind = type(entry)
        expected = self.expected[stage].get(entry)
        if expected is not None:
            channel, message = expected
            road = self.roads[channel]
            if message >= len(road.sent):
                road.waiting = True
                return False
            sent_at, consumer = road.sent[message]
            if consumer != entry:
                raise PlanError(
                    [
                        f"stage {stage} receives on {channel} for ({entry}), but stage "
                        f"{channel.source} sends ({consumer})"
                    ]
                )
            start = max(start, max(sent_at, road.posted[message]) + self.message_cost[number])
            del self.expected[stage][entry]
        elif not self.has_local_input(stage, entry, last_chunk):
            return False

        is_last = stage == p - 1
        if kind is TeacherForward:
            teacher = entry.job.teacher
            start = max(start, self.loaded[stage].get(teacher, 0.0))
            if is_last and entry.job in self.scoring_heads[number]:
                start = max(start, self.heads.get(teacher, 0.0))
            end = start + self.job_sizes[number][entry.job] * self.teacher_cost[number][teacher][stage]
            if p == 1:
                self.cache(stage, 1)
            elif not is_last and stage > 0:
                self.cache(stage, -1)
        elif kind is StudentForward:
            self.activations[stage] += 1
            self.peak_activations[stage] = max(self.peak_activations[stage], self.activations[stage])
            size = self.sizes[number][entry.microbatch]
            end = start + size * costs.student_forward[entry.chunk * p + stage]
            if is_last and entry.chunk == last_chunk:
                teachers = self.loss_heads[number][entry.microbatch]
                arrival = max((self.heads.get(teacher, 0.0) for teacher in teachers), default=0.0)
                start, end = max(start, arrival), max(start, arrival) + (end - start)
                self.cache(stage, -self.releases[number][entry.microbatch])
                self.local[stage].add(StudentBackward(entry.microbatch, entry.chunk))
            elif p == 1:
                self.local[stage].add(StudentForward(entry.microbatch, entry.chunk + 1))
        else:
            self.activations[stage] -= 1
            size = self.sizes[number][entry.microbatch]
            end = start + size * costs.student_backward[entry.chunk * p + stage]
            if p == 1 and entry.chunk > 0:
                self.local[stage].add(StudentBackward(entry.microbatch, entry.chunk - 1))
        self.finish(stage, entry, start, end)
        return True

    def has_local_input(self, stage: int, entry: Instruction, last_chunk: int) -> bool:
        """True if `entry` needs no input or its input was computed on this stage."""
        first_forward = isinstance(entry, StudentForward) and entry.chunk == 0
        if stage == 0 and (first_forward or isinstance(entry, TeacherForward)):
            return True
        if entry in self.local[stage]:
            self.local[stage].discard(entry)
            return True
        return False

    def finish(self, stage: int, entry: Instruction, start: float, end: float) -> None:
        self.clock[stage] = end
        self.busy[stage] += end - start
        if self.record:
            self.events.append(Event(stage, entry, start, end))

    def cache(self, stage: int, change: int) -> None:
        self.cached[stage] += change
        self.peak_cached[stage] = max(self.peak_cached[stage], self.cached[stage])

    def load(self, stage: int, number: int, entry: LoadTeacher | LoadHead) -> None:
        costs = self.plans[number].request.costs
        teacher = isinstance(entry, LoadTeacher)
        cost = costs.load(entry.teacher, stage) if teacher else costs.head(entry.teacher)
        start = max(self.copy_at[stage], self.clock[stage])
        self.copy_at[stage] = start + cost
        (self.loaded[stage] if teacher else self.heads)[entry.teacher] = start + cost
        if self.record:
            self.events.append(Event(stage, entry, start, start + cost))

    def meet(self, stage: int, number: int, entry: Synchronize | OptimizerStep) -> bool:
        """Arrive at a collective of all stages; True once all of them have arrived."""
        meeting = self.meeting_number[stage]
        if meeting == len(self.meetings):
            self.meetings.append([entry, 0.0, set()])
        record = self.meetings[meeting]
        if record[0] != entry:
            raise PlanError([f"stage {stage} is at ({entry}) where another stage is at ({record[0]})"])
        if stage not in record[2]:
            record[2].add(stage)
            record[1] = max(record[1], self.clock[stage])
            if len(record[2]) == self.p:
                if isinstance(entry, OptimizerStep):
                    self.optimizer_steps.append(record[1] + self.plans[number].request.costs.optimizer)
                for other in range(self.p):
                    if other != stage:
                        self.wake(other)
        if len(record[2]) < self.p:
            return False
        cost = self.plans[number].request.costs.optimizer if isinstance(entry, OptimizerStep) else 0.0
        self.meeting_number[stage] += 1
        if cost:
            self.finish(stage, entry, record[1], record[1] + cost)
        else:
            self.clock[stage] = record[1]
        return True
