"""A `StageWork` on vectors of four numbers, to compare the executor on real ranks with plain autograd."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_mopd.pipeline.communicator import PipelineCommunicator
from megatron_mopd.pipeline.instructions import StudentBackward, StudentForward, TeacherForward
from megatron_mopd.pipeline.plan import make_plan
from megatron_mopd.pipeline.problem import PlanRequest
from megatron_mopd.pipeline.runtime import Execution, Stopwatch

_SIZE = 4
_groups: dict[int, dist.ProcessGroup] = {}
_communicators: dict[tuple[int, bool], PipelineCommunicator] = {}


def pipeline_group(stages: int) -> dist.ProcessGroup:
    """This rank's group when the world is split into pipelines of `stages` ranks."""
    if stages not in _groups:
        for first in range(0, dist.get_world_size(), stages):
            group = dist.new_group(range(first, first + stages))
            if first <= dist.get_rank() < first + stages:
                _groups[stages] = group
    return _groups[stages]


def communicator(stages: int, virtual_stages: int) -> PipelineCommunicator:
    key = stages, virtual_stages > 1
    if key not in _communicators:
        _communicators[key] = PipelineCommunicator(
            pipeline_group(stages), torch.device("cpu"), virtual_stages=virtual_stages
        )
    return _communicators[key]


def weight(*place) -> torch.Tensor:
    """A fixed random matrix for a student layer, a teacher layer or an input."""
    generator = torch.Generator().manual_seed(abs(hash(place)) % 2**31)
    return torch.randn(_SIZE, _SIZE, generator=generator, dtype=torch.float64) / 2


def token(*key: int) -> torch.Tensor:
    return weight(*key)[0]


def teacher_number(teacher: str) -> int:
    return 100 + int(teacher[1:])


class SmallWork:
    """One tanh layer per model chunk and per teacher stage; the loss uses every cached state that a
    micro-batch needs according to the request.
    """

    def __init__(self, request: PlanRequest, stage: int):
        self.request, self.stage, self.p = request, stage, request.stages
        self.weights = [
            weight(chunk * self.p + stage).requires_grad_(True) for chunk in range(request.virtual_stages)
        ]
        self.kept: dict[tuple[str, int, int], torch.Tensor] = {}
        for task in request.scoring:
            for first in task.microbatches[: task.scored]:
                self.kept[task.teacher, first, task.step] = teacher_states(request, task.teacher, first)
        self.inputs, self.outputs, self.local = {}, {}, {}
        self.finished = False

    def message(self, consumer):
        return (_SIZE,), torch.float64

    def load(self, entry):
        pass

    def synchronize(self):
        dist.all_reduce(torch.zeros(1), group=pipeline_group(self.p))

    def finish_gradients(self):
        self.synchronize()
        self.finished = True

    def teacher_forward(self, entry: TeacherForward, hidden):
        job, number = entry.job, teacher_number(entry.job.teacher)
        hidden = token(number, job.microbatch) if hidden is None else hidden
        output = torch.tanh(weight(number, self.stage) @ hidden)
        if self.stage < self.p - 1:
            return output
        self.kept[job.teacher, job.microbatch, job.step] = output
        return None

    def student_forward(self, entry: StudentForward, hidden):
        key = entry.microbatch, entry.chunk
        if hidden is None:
            hidden = token(entry.microbatch) if entry.chunk == 0 and self.stage == 0 else self.local.pop(key)
        hidden = hidden.clone().requires_grad_(True)
        output = torch.tanh(self.weights[entry.chunk] @ hidden)
        if self.stage == self.p - 1 and entry.chunk == self.request.virtual_stages - 1:
            output = loss(self.request, entry.microbatch, output, self.kept)
        self.inputs[key], self.outputs[key] = hidden, output
        if self.p == 1 and entry.chunk < self.request.virtual_stages - 1:
            self.local[entry.microbatch, entry.chunk + 1] = output.detach()
        return output.detach()

    def student_backward(self, entry: StudentBackward, gradient):
        key = entry.microbatch, entry.chunk
        if gradient is None:
            gradient = self.local.pop(("gradient", *key), None)
        hidden = self.inputs.pop(key)
        self.outputs.pop(key).backward(gradient)
        if self.p == 1 and entry.chunk:
            self.local["gradient", entry.microbatch, entry.chunk - 1] = hidden.grad
        return hidden.grad


def loss(request: PlanRequest, microbatch: int, hidden: torch.Tensor, kept) -> torch.Tensor:
    total = hidden.square().sum()
    for task in request.scoring:
        for first, last in task.uses():
            if task.step == 0 and first <= microbatch <= last:
                total = total + (1 + microbatch) * (hidden @ kept[task.teacher, first, 0])
    return total


def teacher_states(request: PlanRequest, teacher: str, first: int) -> torch.Tensor:
    number = teacher_number(teacher)
    hidden = token(number, first)
    for stage in range(request.stages):
        hidden = torch.tanh(weight(number, stage) @ hidden)
    return hidden


def reference(request: PlanRequest) -> list[torch.Tensor]:
    """Gradients of every layer's weight, computed one micro-batch at a time without a pipeline."""
    places = request.stages * request.virtual_stages
    weights = [weight(place).requires_grad_(True) for place in range(places)]
    kept = {
        (task.teacher, first, 0): teacher_states(request, task.teacher, first)
        for task in request.scoring
        if task.step == 0
        for first in task.microbatches
    }
    for microbatch in range(request.microbatches):
        hidden = token(microbatch)
        for place in range(places):
            hidden = torch.tanh(weights[place] @ hidden)
        loss(request, microbatch, hidden, kept).backward()
    return [w.grad for w in weights]


def run_request(rank: int, request: PlanRequest) -> tuple[list[torch.Tensor], int]:
    """Execute a plan for `request` on this rank.

    Returns the gradients of this stage's chunks and the number of cached states.
    """
    plan = make_plan(request, effort=0)
    group = pipeline_group(request.stages)
    work = SmallWork(request, group.rank())
    channels = communicator(request.stages, request.virtual_stages)
    rank, stopwatch = group.rank(), Stopwatch(torch.device("cpu"))
    execution = Execution(plan.stages[rank], rank, work, channels, stopwatch)
    execution.run_to_update()
    assert work.finished
    execution.run_rest()
    dist.barrier()
    channels.flush()
    assert not work.inputs and not work.outputs and not work.local
    return [w.grad for w in work.weights], len(work.kept)
