"""Executes a plan: one stage's instruction list, from top to bottom, on whatever does the computing.

`execute` knows nothing about models. It posts receives, waits for the input of each computation, hands it to
a `StageWork`, sends the result on, and writes down when everything began and ended. `model_work.py` computes
with megatron-core; the benchmark's stages sleep.
"""

from __future__ import annotations

import time
from typing import Protocol

import torch
from torch import Tensor

from megatron_mopd.pipeline.communicator import PipelineCommunicator, Receive
from megatron_mopd.pipeline.instructions import (
    Compute,
    Instruction,
    LoadHead,
    LoadTeacher,
    OptimizerStep,
    Plan,
    Send,
    StudentForward,
    Synchronize,
    TeacherForward,
)
from megatron_mopd.pipeline.instructions import Receive as PostReceive
from megatron_mopd.pipeline.simulate import Event


class StageWork(Protocol):
    """What one stage can do. `None` is the input of the first stage and the output of the last."""

    def message(self, consumer: Compute) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type of the input of `consumer`."""

    def teacher_forward(self, entry: TeacherForward, hidden: Tensor | None) -> Tensor | None:
        """This stage's layers of a teacher; the last stage keeps the result."""

    def student_forward(self, entry: StudentForward, hidden: Tensor | None) -> Tensor | None:
        """One model chunk forward; the last one ends in the loss."""

    def student_backward(self, entry: Compute, gradient: Tensor | None) -> Tensor | None:
        """One model chunk backward; returns the gradient of its input."""

    def load(self, entry: LoadTeacher | LoadHead) -> None:
        """Start a copy of weights."""

    def synchronize(self) -> None:
        """Wait for all stages."""

    def optimizer_step(self) -> None:
        """All gradients of the step are there."""


class Stopwatch:
    """Marks on the computing device's own clock, read out later so that the host never waits for the device.

    Seconds count from `zero`, a host time (`time.perf_counter`) that all ranks noted at the same moment.
    """

    def __init__(self, device: torch.device, zero: float = 0.0):
        self._zero = zero
        self._base = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self._base = torch.cuda.Event(enable_timing=True)
            self._base.record()
        self._start = time.perf_counter()

    def mark(self):
        """Now, as the device reaches this point of its work."""
        if self._base is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, mark) -> float:
        """A mark in seconds; waits for the device to get there."""
        if self._base is None:
            return mark - self._zero
        mark.synchronize()
        return self._start - self._zero + self._base.elapsed_time(mark) / 1000


class Recording:
    """What a stage did when. Reading `events` waits for the device."""

    def __init__(self, stage: int, stopwatch: Stopwatch):
        self.stage, self._stopwatch = stage, stopwatch
        self._marks: list[tuple[Instruction, object, object]] = []
        self._events: list[Event] | None = None

    def add(self, entry: Instruction, start, end) -> None:
        self._marks.append((entry, start, end))

    def events(self) -> list[Event]:
        """The measured timeline of this stage."""
        if self._events is None:
            seconds = self._stopwatch.seconds
            self._events = [
                Event(self.stage, e, seconds(start), seconds(end)) for e, start, end in self._marks
            ]
            self._marks = []
        return self._events


def execute(
    plan: Plan, stage: int, work: StageWork, communicator: PipelineCommunicator, stopwatch: Stopwatch
) -> Recording:
    """Run `plan.stages[stage]`. Every rank of the pipeline does the same with its own stage.

    An exception of any instruction carries a note naming stage and instruction; a message that does not
    arrive is a `StageTimeout` that names the peer as well.
    """
    recording = Recording(stage, stopwatch)
    inputs: dict[Compute, Receive] = {}
    output: Tensor | None = None
    for position, entry in enumerate(plan.stages[stage]):
        try:
            if isinstance(entry, PostReceive):
                shape, dtype = work.message(entry.consumer)
                inputs[entry.consumer] = communicator.receive(entry.channel, shape, dtype)
            elif isinstance(entry, Send):
                assert output is not None, "there is nothing to send"
                communicator.send(entry.channel, output)
                output = None
            else:
                received = inputs.pop(entry).wait() if entry in inputs else None
                if isinstance(entry, Synchronize):
                    work.synchronize()
                    continue
                start = stopwatch.mark()
                if isinstance(entry, LoadTeacher | LoadHead):
                    work.load(entry)
                elif isinstance(entry, OptimizerStep):
                    work.optimizer_step()
                elif isinstance(entry, TeacherForward):
                    output = work.teacher_forward(entry, received)
                elif isinstance(entry, StudentForward):
                    output = work.student_forward(entry, received)
                else:
                    output = work.student_backward(entry, received)
                recording.add(entry, start, stopwatch.mark())
        except Exception as error:
            error.add_note(f"on pipeline stage {stage}, at instruction {position} ({entry})")
            raise
    return recording
