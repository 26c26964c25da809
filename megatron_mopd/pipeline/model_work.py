"""A plan's computations on real models, with megatron-core's own building blocks.

The student's forward and backward passes are megatron-core's `forward_step` and `backward_step` with the
same arguments its schedules give them, so auxiliary-loss scaling, activation recompute, output deallocation
and gradient hooks behave as they do there. Teachers bypass `forward_step`: it would set the auxiliary loss's
global scale between a student's forward and its backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import (
    clear_embedding_activation_buffer,
    deallocate_output_tensor,
    finish_embedding_wgrad_compute,
    forward_step,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.backend.versions import backward_step
from megatron_mopd.data.batching import BatchShape, MicroBatch
from megatron_mopd.model.gpt import HiddenStateGPT, unwrap
from megatron_mopd.pipeline.instructions import (
    Compute,
    LoadHead,
    LoadTeacher,
    StudentBackward,
    StudentForward,
    TeacherForward,
)
from megatron_mopd.pipeline.megatron_schedules import LossFunction, forward
from megatron_mopd.pipeline.problem import TeacherGroup


class StepInput(Protocol):
    """One optimizer step's micro-batches on this rank."""

    shape: BatchShape
    student: Sequence[MicroBatch]
    teachers: Mapping[str, Sequence[MicroBatch]]
    groups: tuple[TeacherGroup, ...]
    """For each teacher, which student micro-batches need each of its micro-batches; `step` is 0."""
    state_bytes: int
    """Most bytes that one scored micro-batch leaves in the cache of any rank."""

    def keep(self, teacher: str, micro_batch: MicroBatch, hidden: Tensor) -> None:
        """Take what the loss needs of a teacher's last-layer hidden states [s/cp(/tp), b, h]; last stage."""


class Teachers(Protocol):
    """Where teachers come from; `teachers.bank.TeacherBank`."""

    def config(self, name: str) -> TransformerConfig:
        """Its transformer configuration, resident or not."""

    def prefetch(self, name: str, slot: int | None = None) -> None:
        """Start the arrival of its layers."""

    def prefetch_head(self, name: str, slot: int | None = None) -> None:
        """Start the arrival of its output head; last stage."""

    def reserve_heads(self, count: int) -> None:
        """Have this many slots for output heads."""

    def make_resident(self, name: str) -> HiddenStateGPT:
        """The frozen stage of teacher `name`, with its weights."""


class ModelWork:
    """One optimizer step of one rank; a `StageWork`.

    steps: the step itself and the later ones whose teacher forwards the plan contains.
    at_optimizer_step: called when gradients are reduced and divided by the number of tokens, with what the
        loss reported for each micro-batch (nothing but on the last stage).
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        steps: Sequence[StepInput],
        groups: ParallelGroups,
        loss_function: LossFunction,
        teachers: Teachers | None,
        at_optimizer_step: Callable[[list[dict[str, Any]]], None],
    ):
        self._chunks, self._steps, self._groups = list(chunks), steps, groups
        self._loss_function, self._teachers = loss_function, teachers
        self._at_optimizer_step = at_optimizer_step
        self._config = unwrap(chunks[0]).config
        self._number = {
            (group.teacher, first, step): number
            for step, item in enumerate(steps)
            for group in item.groups
            for number, first in enumerate(group.microbatches)
        }
        self._stage, self._p = groups.pp.rank(), groups.pp_size
        self._inputs: dict[tuple[int, int], Tensor | None] = {}
        self._outputs: dict[tuple[int, int], Tensor] = {}
        self._backwards_left = [len(steps[0].student)] * len(self._chunks)
        self._reports: list[dict[str, Any]] = []
        self._num_tokens = torch.zeros([], dtype=torch.int, device=groups.device)
        self._embedding = clear_embedding_activation_buffer(self._config, self._chunks, groups.is_last_stage)

    def message(self, consumer: Compute) -> tuple[tuple[int, ...], torch.dtype]:
        """[s/cp(/tp), b, h] of the model and the step that the consumer belongs to."""
        step, config = self._steps[0], self._config
        if isinstance(consumer, TeacherForward):
            step = self._steps[consumer.job.step]
            config = self._teachers.config(consumer.job.teacher)
        shape, groups = step.shape, self._groups
        length = (shape.max_tokens or shape.seq_length) // groups.cp_size
        if config.sequence_parallel:
            length //= groups.tp_size
        rows = 1 if shape.max_tokens else shape.micro_batch_size
        return (length, rows, config.hidden_size), config.pipeline_dtype

    def load(self, entry: LoadTeacher | LoadHead) -> None:
        """Start a teacher's arrival in the slot that the plan has kept free for it."""
        arrive = self._teachers.prefetch if isinstance(entry, LoadTeacher) else self._teachers.prefetch_head
        arrive(entry.teacher, entry.slot)

    def teacher_forward(self, entry: TeacherForward, hidden: Tensor | None) -> Tensor | None:
        job = entry.job
        step = self._steps[job.step]
        batch = step.teachers[job.teacher][self._number[job.teacher, job.microbatch, job.step]]
        batch = batch.to(self._groups.device)
        chunk = self._teachers.make_resident(job.teacher)
        chunk.set_input_tensor(hidden)
        # Not `inference_mode`: the rotary tables cached here are used again by passes that need gradients.
        with torch.no_grad():
            output = forward(chunk, batch)
        chunk.set_input_tensor(None)
        if not self._groups.is_last_stage:
            return output
        step.keep(job.teacher, batch, output)
        return None

    def student_forward(self, entry: StudentForward, hidden: Tensor | None) -> Tensor | None:
        step, last_chunk = self._steps[0], len(self._chunks) - 1
        batch = step.student[entry.microbatch].to(self._groups.device)
        if hidden is not None:
            hidden.requires_grad_(True)
        is_last = self._groups.is_last_stage and entry.chunk == last_chunk
        output, num_tokens = forward_step(
            lambda _, model: (forward(model, batch), partial(self._loss_function, batch)),
            None,
            self._chunks[entry.chunk],
            len(step.student),
            hidden,
            self._reports,
            self._config,
            self._groups.cp_size,
            is_first_microbatch=entry.microbatch == 0,
            current_microbatch=entry.microbatch,
            vp_stage=entry.chunk if last_chunk else None,
            is_last_stage=is_last,
        )
        self._num_tokens += num_tokens
        key = entry.microbatch, entry.chunk
        self._inputs[key], self._outputs[key] = hidden, output
        if is_last:
            return None
        # The message shares the output's memory and keeps it until it has been sent; the graph needs it no
        # longer.
        message = output.detach()
        deallocate_output_tensor(output, self._config.deallocate_pipeline_outputs)
        return message

    def student_backward(self, entry: StudentBackward, gradient: Tensor | None) -> Tensor | None:
        key, chunk = (entry.microbatch, entry.chunk), self._chunks[entry.chunk]
        hidden, output = self._inputs.pop(key), self._outputs.pop(key)
        self._backwards_left[entry.chunk] -= 1
        is_final = self._backwards_left[entry.chunk] == 0
        overlapped = self._config.no_sync_func is not None
        # Gradients are reduced bucket by bucket during the last backward pass where nothing else is left to
        # hide it behind, as megatron-core does; elsewhere right after it, while the other stages still
        # compute.
        in_hooks = self._config.grad_sync_func is None or (self._stage == 0 and len(self._chunks) == 1)
        hold = overlapped and not (is_final and in_hooks)
        with chunk.no_sync() if hold else contextlib.nullcontext():
            gradient = backward_step(hidden, output, gradient, self._config)
        if overlapped and is_final and not in_hooks:
            chunk.start_grad_sync()
        return gradient

    def synchronize(self) -> None:
        """One all-reduce of a number over the pipeline."""
        token = torch.zeros(1, device=self._groups.device)
        dist.all_reduce(token, group=self._groups.pp)
        token.cpu()  # NCCL orders the device's work only; the host waits here

    def optimizer_step(self) -> None:
        """Reduce the gradients over data-parallel ranks (tied embeddings over the pipeline's ends too),
        divide them by the number of tokens, and call back.
        """
        assert not self._outputs, "every forward pass has had its backward pass"
        groups, config = self._groups, self._config
        finish_embedding_wgrad_compute(config, self._embedding, groups.is_last_stage, groups.tp)
        config.finalize_model_grads_func(self._chunks, self._num_tokens, pg_collection=groups.collection)
        self._at_optimizer_step(self._reports)
