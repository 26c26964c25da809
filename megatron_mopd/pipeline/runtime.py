"""Executes a plan: runs one stage's instruction list from top to bottom.

An `Execution` is independent of models. It posts receives, waits for the input of each computation, passes it
to a `StageWork`, sends the result, and records start and end times. `model_work.py` computes with
megatron-core; the stages of the benchmark sleep.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_mopd.pipeline.communicator import PendingMessage, PipelineCommunicator
from megatron_mopd.pipeline.instructions import (
    Compute,
    Instruction,
    LoadHead,
    LoadTeacher,
    OptimizerStep,
    Receive,
    Send,
    StudentForward,
    Synchronize,
    TeacherForward,
)
from megatron_mopd.pipeline.simulate import Event


class StageWork(Protocol):
    """The operations of one stage. `None` is the input of the first stage and the output of the last."""

    def message(self, consumer: Compute) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the input of `consumer`."""

    def teacher_forward(self, entry: TeacherForward, hidden: Tensor | None) -> Tensor | None:
        """Run this stage's layers of a teacher; the last stage stores the result."""

    def student_forward(self, entry: StudentForward, hidden: Tensor | None) -> Tensor | None:
        """Run one model chunk's forward; the last chunk includes the loss."""

    def student_backward(self, entry: Compute, gradient: Tensor | None) -> Tensor | None:
        """Run one model chunk's backward; returns the gradient of its input."""

    def load(self, entry: LoadTeacher | LoadHead) -> None:
        """Start copying weights."""

    def synchronize(self) -> None:
        """Wait for all stages."""

    def finish_gradients(self) -> None:
        """Reduce the gradients after the step's last backward pass, so that weights can be updated."""


class Stopwatch:
    """Takes timestamps on the device and reads them later, so that the host never waits for the device.

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
        """A timestamp of when the device reaches this point of its work."""
        if self._base is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, mark) -> float:
        """A mark in seconds; waits for the device to reach it."""
        if self._base is None:
            return mark - self._zero
        mark.synchronize()
        return self._start - self._zero + self._base.elapsed_time(mark) / 1000


class Recording:
    """The timed instructions of a stage. Reading `events` waits for the device."""

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


class Execution:
    """Executes the instruction list of this rank's stage; every rank of the pipeline executes its own.

    The caller updates the weights between the two parts:

        execution.run_to_update()      # teachers score, the student learns, gradients are reduced
        ...                            # the optimizer step
        execution.run_rest()           # teachers score samples of later steps

    An exception raised by an instruction carries a note that names stage and instruction; a message that does
    not arrive raises a `StageTimeout`, which also names the peer.
    """

    def __init__(
        self,
        instructions: Sequence[Instruction],
        stage: int,
        work: StageWork,
        communicator: PipelineCommunicator,
        stopwatch: Stopwatch,
    ):
        self.stage, self.work, self.recording = stage, work, Recording(stage, stopwatch)
        self._communicator, self._stopwatch = communicator, stopwatch
        self._instructions = iter(enumerate(instructions))
        self._messages: dict[Compute, PendingMessage] = {}
        self._output: Tensor | None = None
        self._update: tuple[OptimizerStep, Any] | None = None
        """The optimizer-step instruction, once reached, and its start mark."""

    def run_to_update(self) -> None:
        """Execute everything before the optimizer step; gradients are complete afterwards."""
        for position, entry in self._instructions:
            self._execute_instruction(position, entry)
            if isinstance(entry, OptimizerStep):
                return

    def run_rest(self) -> None:
        """Record the end of the optimizer step and execute everything after it."""
        if self._update is not None:
            self.recording.add(*self._update, self._stopwatch.mark())
        for position, entry in self._instructions:
            self._execute_instruction(position, entry)

    def _execute_instruction(self, position: int, entry: Instruction) -> None:
        try:
            if isinstance(entry, Receive):
                shape, dtype = self.work.message(entry.consumer)
                self._messages[entry.consumer] = self._communicator.receive(entry.channel, shape, dtype)
            elif isinstance(entry, Send):
                assert self._output is not None, "there is nothing to send"
                self._communicator.send(entry.channel, self._output)
                self._output = None
            elif isinstance(entry, Synchronize):
                self.work.synchronize()
            elif isinstance(entry, OptimizerStep):
                self._update = entry, self._stopwatch.mark()
                self.work.finish_gradients()
            elif isinstance(entry, LoadTeacher | LoadHead):
                start = self._stopwatch.mark()
                self.work.load(entry)
                self.recording.add(entry, start, self._stopwatch.mark())
            else:
                received = self._messages.pop(entry).wait() if entry in self._messages else None
                start = self._stopwatch.mark()
                self._output = self._compute(entry, received)
                self.recording.add(entry, start, self._stopwatch.mark())
        except Exception as error:
            error.add_note(f"on pipeline stage {self.stage}, at instruction {position} ({entry})")
            raise

    def _compute(self, entry: Compute, received: Tensor | None) -> Tensor | None:
        if isinstance(entry, TeacherForward):
            return self.work.teacher_forward(entry, received)
        if isinstance(entry, StudentForward):
            return self.work.student_forward(entry, received)
        return self.work.student_backward(entry, received)
