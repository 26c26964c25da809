"""The instructions of a pipeline plan. No torch.

A stage executes its list from top to bottom. Only computations and the two collectives block it: a load or a
message starts when its instruction is reached and proceeds asynchronously.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_mopd.pipeline.problem import PlanRequest, ScoringTask, TeacherJob


class Lane(enum.StrEnum):
    """A kind of message between stages. Lanes never wait for each other."""

    TEACHER_FORWARD = "teacher_forward"
    STUDENT_FORWARD = "student_forward"
    STUDENT_BACKWARD = "student_backward"


class Channel(NamedTuple):
    """A one-way channel between two stages on one lane. Messages arrive in the order they were sent."""

    lane: Lane
    source: int
    destination: int

    def __str__(self) -> str:
        return f"{self.lane} {self.source}->{self.destination}"


@dataclass(frozen=True, slots=True)
class TeacherForward:
    """Run this stage's layers of the teacher. On the last stage the hidden state goes into the cache."""

    job: TeacherJob

    def __str__(self) -> str:
        ahead = f" of step +{self.job.step}" if self.job.step else ""
        return f"teacher forward {self.job.teacher} micro-batch {self.job.microbatch}{ahead}"


@dataclass(frozen=True, slots=True)
class StudentForward:
    """Run the forward pass of one model chunk. For the last chunk of the last stage this includes the loss
    against the cached states.
    """

    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"student forward micro-batch {self.microbatch} chunk {self.chunk}"


@dataclass(frozen=True, slots=True)
class StudentBackward:
    """Run the backward pass of one model chunk and free its activations."""

    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"student backward micro-batch {self.microbatch} chunk {self.chunk}"


Compute = TeacherForward | StudentForward | StudentBackward


def next_place(compute: Compute, stage: int, p: int, v: int) -> tuple[Lane, int, Compute] | None:
    """Where the output of `compute` on `stage` goes: lane, stage, and the computation that consumes it. None:
    nowhere.
    """
    last = p - 1
    if isinstance(compute, TeacherForward):
        return None if stage == last else (Lane.TEACHER_FORWARD, stage + 1, compute)
    if isinstance(compute, StudentForward):
        if stage < last:
            return Lane.STUDENT_FORWARD, stage + 1, compute
        if compute.chunk == v - 1 or p == 1:
            return None
        return Lane.STUDENT_FORWARD, 0, StudentForward(compute.microbatch, compute.chunk + 1)
    if stage > 0:
        return Lane.STUDENT_BACKWARD, stage - 1, compute
    if compute.chunk == 0 or p == 1:
        return None
    return Lane.STUDENT_BACKWARD, last, StudentBackward(compute.microbatch, compute.chunk - 1)


@dataclass(frozen=True, slots=True)
class Receive:
    """Post the receive of the input of `consumer`, which runs on this stage further down the list."""

    channel: Channel
    consumer: Compute

    def __str__(self) -> str:
        return f"receive on {self.channel} for {self.consumer}"


@dataclass(frozen=True, slots=True)
class Send:
    """Start sending the last computation's output to the stage that runs `consumer`; never waits."""

    channel: Channel
    consumer: Compute

    def __str__(self) -> str:
        return f"send on {self.channel} for {self.consumer}"


@dataclass(frozen=True, slots=True)
class LoadTeacher:
    """Start copying a teacher's layers into a slot, whose previous occupant is no longer needed."""

    teacher: str
    slot: int

    def __str__(self) -> str:
        return f"load teacher {self.teacher} into slot {self.slot}"


@dataclass(frozen=True, slots=True)
class LoadHead:
    """Start copying a teacher's output head into a head slot (last stage only)."""

    teacher: str
    slot: int

    def __str__(self) -> str:
        return f"load head {self.teacher} into slot {self.slot}"


@dataclass(frozen=True, slots=True)
class Synchronize:
    """Every stage waits here for all the others."""

    def __str__(self) -> str:
        return "synchronize"


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """Reduce gradients, clip and update: all gradients of this step are complete on this stage. All stages
    wait for each other.

    Teacher forwards may follow it: they belong to later steps and fill the time until the next plan's first
    student forward arrives.
    """

    def __str__(self) -> str:
        return "optimizer step"


Instruction = Compute | Receive | Send | LoadTeacher | LoadHead | Synchronize | OptimizerStep


@dataclass(frozen=True)
class Plan:
    """One instruction list per stage, and the final state that the next request needs to know.

    deferred: requested look-ahead jobs that were left out because the cache has no room for their results.
    resident, resident_heads: the occupants of the slots at the end, slot by slot.
    """

    request: PlanRequest
    stages: tuple[tuple[Instruction, ...], ...]
    deferred: tuple[TeacherJob, ...] = ()
    resident: tuple[str, ...] = ()
    resident_heads: tuple[str, ...] = ()
    _digest: list[str] = field(default_factory=list, compare=False, repr=False)

    def next_scoring(self) -> tuple[ScoringTask, ...]:
        """The look-ahead tasks of the request as the next request must list them."""
        return self.request.next_scoring(self.deferred)

    def digest(self) -> str:
        """A hash of all instruction lists. Ranks whose digests differ would deadlock."""
        if not self._digest:
            text = "\n".join(
                f"{stage}: {entry}" for stage, entries in enumerate(self.stages) for entry in entries
            )
            self._digest.append(hashlib.sha256(text.encode()).hexdigest())
        return self._digest[0]
