"""Checks that a plan can be executed, before any tensor moves. Pure Python, no torch.

On a cluster a mismatch between stages causes a hang, not an error, so this module checks for it: every
message must be sent and received, in the same order at both ends of its channel; every stage must run every
computation; no stage may exceed a limit. A plan without such problems is then executed by `one_queue.py`,
where all kernels of a stage share one hardware queue, so that a message can also delay computations. Each of
its waits is for another instruction, so the execution gets stuck if and only if program order, messages and
queues form a cycle, whatever the speed of the stages: passing it proves that the plan cannot deadlock. Its
waits include those of `simulate.py`, where a posted message never delays a computation, as if each stream had
its own queue. So a plan that passes needs no second execution, and one that does not is executed there too,
which shows whether the queue is the cause.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from megatron_mopd.pipeline.instructions import (
    Channel,
    Compute,
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
    next_place,
)
from megatron_mopd.pipeline.one_queue import simulate_one_queue
from megatron_mopd.pipeline.simulate import PlanError, simulate


def check_plan(plan: Plan) -> None:
    """Raises PlanError if the plan cannot be executed; the message names stage, instruction and peer."""
    problems = find_problems(plan)
    if problems:
        raise PlanError(problems)
    try:
        simulate_one_queue(plan)
    except PlanError:
        simulate(plan)
        raise


def check_same_plan(digests: Mapping[int, str]) -> None:
    """Raises PlanError if the ranks of a block do not hold the same plan; `digests[rank]` is that rank's
    `Plan.digest()`.
    """
    if len(set(digests.values())) <= 1:
        return
    common, _ = Counter(digests.values()).most_common(1)[0]
    others = [rank for rank, digest in digests.items() if digest != common]
    raise PlanError(
        [
            f"ranks {others} hold a different plan from the other {len(digests) - len(others)} of their "
            "block: their micro-batch counts, scoring tasks, costs or limits differ"
        ]
    )


def find_problems(plan: Plan) -> list[str]:
    """All problems of the plan that can be found without executing it."""
    request = plan.request
    p, v = request.stages, request.virtual_stages
    if len(plan.stages) != p:
        return [f"the plan has {len(plan.stages)} instruction lists for {p} stages"]
    expected: set[Compute] = {StudentForward(i, c) for i in range(request.microbatches) for c in range(v)}
    expected |= {StudentBackward(i, c) for i in range(request.microbatches) for c in range(v)}
    deferred = set(plan.deferred)
    expected |= {TeacherForward(job) for job in request.pending_jobs() if job not in deferred}

    problems = [f"{job} belongs to this step and was deferred" for job in plan.deferred if job.step == 0]
    walks = [_Walk(plan, stage) for stage in range(p)]
    for walk in walks:
        problems += walk.problems
        for compute in sorted(expected - walk.position.keys(), key=str):
            sources = [_describe_peer(compute, walk.stage, p, v)]
            problems.append(f"stage {walk.stage} never runs ({compute}){''.join(filter(None, sources))}")
        for compute in sorted(walk.position.keys() - expected, key=str):
            problems.append(
                f"stage {walk.stage}, instruction {walk.position[compute]} ({compute}): "
                "the request does not ask for it"
            )
        if walk.collectives != walks[0].collectives:
            problems.append(
                f"stage {walk.stage} has the collectives {walk.collectives or 'none'}, stage 0 has "
                f"{walks[0].collectives or 'none'}"
            )
    problems += _channel_problems(walks)
    return problems


def _describe_peer(compute: Compute, stage: int, p: int, v: int) -> str:
    target = next_place(compute, stage, p, v)
    return f", and stage {target[1]} waits for its result" if target else ""


def _channel_problems(walks: list[_Walk]) -> list[str]:
    problems = []
    sent: dict[Channel, list] = {}
    received: dict[Channel, list] = {}
    for walk in walks:
        for table, mine in ((sent, walk.sent), (received, walk.received)):
            for channel, entries in mine.items():
                table.setdefault(channel, []).extend((walk.stage, *entry) for entry in entries)
    for channel in sorted(sent.keys() | received.keys()):
        sends, receives = sent.get(channel, []), received.get(channel, [])
        for number, (left, right) in enumerate(zip(sends, receives)):
            if left[2] != right[2]:
                problems.append(
                    f"{channel}: message {number} is ({left[2]}) at stage {left[0]}, instruction {left[1]}, "
                    f"but ({right[2]}) at stage {right[0]}, instruction {right[1]}"
                )
                break
        for stage, position, consumer in sends[len(receives) :]:
            problems.append(
                f"stage {stage}, instruction {position}: send on {channel} for ({consumer}) has no receive "
                f"at stage {channel.destination}, which receives {len(receives)} of {len(sends)} messages"
            )
        for stage, position, consumer in receives[len(sends) :]:
            problems.append(
                f"stage {stage}, instruction {position}: receive on {channel} for ({consumer}) has no send "
                f"at stage {channel.source}, which sends {len(sends)} of {len(receives)} messages"
            )
    return problems


class _Walk:
    """Reads one stage's list from top to bottom and collects what it runs, sends and receives, and the local
    rules that it breaks.
    """

    def __init__(self, plan: Plan, stage: int):
        request = plan.request
        self.plan, self.stage, self.request = plan, stage, request
        self.p, self.v = request.stages, request.virtual_stages
        self.is_last = stage == self.p - 1
        self.problems: list[str] = []
        self.position: dict[Compute, int] = {}
        self.sent: dict[Channel, list] = {}
        self.received: dict[Channel, list] = {}
        self.collectives: list[str] = []
        self.awaited: set[Compute] = set()
        self.unsent: dict[Compute, tuple[Channel, int, Compute]] = {}
        self.activations = 0
        self.cached = request.scored_at_start() if self.is_last else 0
        self.states, self.releases = request.states_needed(), request.releases()
        self.loss_heads, self.scoring_heads = request.heads_needed(), request.jobs_reading_heads()
        slots = request.limits.resident_teachers
        self.slots = list(request.resident) + [""] * (slots - len(request.resident))
        self.head_slots = list(request.resident_heads) + [""] * (
            request.head_slots() - len(request.resident_heads)
        )
        self.unscored = {(job.teacher, job.microbatch) for job in request.pending_jobs() if job.step == 0}
        for position, entry in enumerate(plan.stages[stage]):
            self.read(position, entry)
        for channel, position, _ in self.unsent.values():
            self.report(
                position,
                self.plan.stages[stage][position],
                f"no send to stage {channel.destination} follows it",
            )
        if self.collectives.count("optimizer step") != 1:
            self.problems.append(
                f"stage {stage} has {self.collectives.count('optimizer step')} optimizer steps, not 1"
            )

    def report(self, position: int, entry: object, what: str) -> None:
        self.problems.append(f"stage {self.stage}, instruction {position} ({entry}): {what}")

    def read(self, position: int, entry: object) -> None:
        if isinstance(entry, Receive):
            self.received.setdefault(entry.channel, []).append((position, entry.consumer))
            if entry.channel.destination != self.stage:
                self.report(position, entry, f"it is addressed to stage {entry.channel.destination}")
            self.awaited.add(entry.consumer)
            if entry.channel.lane is Lane.TEACHER_FORWARD:
                self.hold_state(position, entry, 1)
        elif isinstance(entry, Send):
            self.sent.setdefault(entry.channel, []).append((position, entry.consumer))
            key = (entry.channel.lane, entry.consumer)
            if self.unsent.pop(key, None) is None:
                self.report(
                    position, entry, f"stage {entry.channel.destination} does not expect it from this stage"
                )
        elif isinstance(entry, LoadTeacher | LoadHead):
            self.load(position, entry)
        elif isinstance(entry, OptimizerStep | Synchronize):
            self.collectives.append(str(entry))
            if isinstance(entry, OptimizerStep) and self.activations:
                self.report(
                    position, entry, f"{self.activations} student forwards have not been run backward yet"
                )
        else:
            self.compute(position, entry)

    def load(self, position: int, entry: LoadTeacher | LoadHead) -> None:
        slots, limit = (
            (self.slots, "resident_teachers")
            if isinstance(entry, LoadTeacher)
            else (self.head_slots, "resident_heads")
        )
        if entry.slot >= len(slots):
            self.report(position, entry, f"limit {limit} allows slots 0 to {len(slots) - 1}")
        else:
            slots[entry.slot] = entry.teacher

    def compute(self, position: int, entry: Compute) -> None:
        if entry in self.position:
            self.report(position, entry, f"it already ran at instruction {self.position[entry]}")
        self.position[entry] = position
        source = self.source(entry)
        if source is not None and entry not in self.awaited:
            self.report(position, entry, f"no receive from stage {source} comes before it")
        target = next_place(entry, self.stage, self.p, self.v)
        if target is not None:
            lane, destination, consumer = target
            self.unsent[lane, consumer] = (Channel(lane, self.stage, destination), position, consumer)
        if isinstance(entry, TeacherForward):
            self.teacher_forward(position, entry)
        elif isinstance(entry, StudentForward):
            self.student_forward(position, entry)
        else:
            self.activations -= 1
            if StudentForward(entry.microbatch, entry.chunk) not in self.position:
                self.report(position, entry, "its forward has not run on this stage")

    def source(self, entry: Compute) -> int | None:
        """The stage that sends this computation's input, or None if the input is not received."""
        if isinstance(entry, StudentBackward):
            if not self.is_last:
                return self.stage + 1
            return 0 if entry.chunk < self.v - 1 and self.p > 1 else None
        if self.stage > 0:
            return self.stage - 1
        crosses = isinstance(entry, StudentForward) and entry.chunk > 0 and self.p > 1
        return self.p - 1 if crosses else None

    def teacher_forward(self, position: int, entry: TeacherForward) -> None:
        job = entry.job
        if job.teacher not in self.slots:
            self.report(position, entry, f"teacher {job.teacher} is not loaded, the slots hold {self.slots}")
        if self.is_last:
            if job in self.scoring_heads:
                self.read_head(position, entry, job.teacher)
            self.unscored.discard((job.teacher, job.microbatch) if job.step == 0 else None)
            if self.p == 1:
                self.hold_state(position, entry, 1)
        elif self.stage > 0:
            self.cached -= 1

    def student_forward(self, position: int, entry: StudentForward) -> None:
        self.activations += 1
        limit = self.request.activation_limit()
        if self.activations > limit:
            self.report(position, entry, f"{self.activations} activations in flight, the limit is {limit}")
        if self.is_last and entry.chunk == self.v - 1 and 0 <= entry.microbatch < len(self.states):
            self.cached -= self.releases[entry.microbatch]
            for teacher in self.loss_heads[entry.microbatch]:
                self.read_head(position, entry, teacher)
            for teacher in self.states[entry.microbatch]:
                if any(name == teacher and first <= entry.microbatch for name, first in self.unscored):
                    self.report(position, entry, f"teacher {teacher} has not scored this micro-batch yet")

    def read_head(self, position: int, entry: Compute, teacher: str) -> None:
        if teacher not in self.head_slots:
            self.report(position, entry, f"head of teacher {teacher} is not loaded")

    def hold_state(self, position: int, entry: object, count: int) -> None:
        self.cached += count
        limit = self.request.limits.cached_states
        if limit is not None and self.cached > limit:
            self.report(
                position, entry, f"{self.cached} teacher states held, the limit cached_states is {limit}"
            )
