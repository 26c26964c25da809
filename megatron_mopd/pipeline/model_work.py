"""Runs a plan's computations on real models, using megatron-core's building blocks.

The student's forward and backward passes are megatron-core's `forward_step` and `backward_step` with the same
arguments as in its schedules, so auxiliary-loss scaling, activation recompute, output deallocation and
gradient hooks behave as they do there. Teachers bypass `forward_step`, which would set the auxiliary loss's
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
from megatron_mopd.data.batching import MicroBatch
from megatron_mopd.model.gpt import HiddenStateGPT, unwrap
from megatron_mopd.model.packing import PackedDocuments
from megatron_mopd.model.router import balancing
from megatron_mopd.model.router_replay import replaying
from megatron_mopd.pipeline.instructions import (
    Compute,
    LoadHead,
    LoadTeacher,
    StudentBackward,
    StudentForward,
    TeacherForward,
)
from megatron_mopd.pipeline.problem import ScoringTask

LossFunction = Callable[[MicroBatch, Tensor], tuple[Tensor, Tensor, dict[str, Any]]]
"""(micro-batch, last-stage hidden states [s/cp(/tp), b, h]) -> (summed loss, number of tokens, values to
report)."""


class ScoreSink(Protocol):
    """Receives a step's scores; `losses.teacher_scores.TeacherScores`."""

    def keep(self, teacher: str, micro_batch: MicroBatch, hidden: Tensor) -> None:
        """Store what the loss needs of a teacher's last-layer hidden states [s/cp(/tp), b, h]; last stage
        only."""


class StepInput(Protocol):
    """One optimizer step's micro-batches on this rank; `training.step_batch.StepBatch`."""

    student: Sequence[MicroBatch]
    teachers: Mapping[str, Sequence[MicroBatch]]
    scoring: tuple[ScoringTask, ...]
    """For each teacher, which student micro-batches need each of its micro-batches, and their sizes in
    tokens; `step` and `scored` are 0."""
    sizes: tuple[int, ...]
    """Tokens of each student micro-batch, the most on any rank that runs the same plan."""
    scores: ScoreSink
    state_bytes: int
    """Maximum number of bytes that one scored micro-batch takes in the cache of any rank."""


class TeacherModels(Protocol):
    """The source of the teachers' weights; `teachers.bank.TeacherBank`."""

    def config(self, name: str) -> TransformerConfig:
        """Transformer configuration of teacher `name`, resident or not."""

    def prefetch(self, name: str, slot: int | None = None) -> None:
        """Start loading its layers."""

    def prefetch_head(self, name: str, slot: int | None = None) -> None:
        """Start loading its output head; last stage only."""

    def reserve_heads(self, count: int) -> None:
        """Allocate this many slots for output heads."""

    def make_resident(self, name: str) -> HiddenStateGPT:
        """This stage of teacher `name`, frozen, with its weights loaded."""


class ModelWork:
    """One optimizer step of one rank; a `StageWork`.

    steps: this step, followed by the later steps whose teacher forwards the plan contains.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        steps: Sequence[StepInput],
        groups: ParallelGroups,
        loss_function: LossFunction,
        teachers: TeacherModels | None,
    ):
        self._chunks, self._steps, self._groups = list(chunks), steps, groups
        self._loss_function, self._teachers = loss_function, teachers
        self._config = unwrap(chunks[0]).config
        self._number = {
            (task.teacher, first, step): number
            for step, item in enumerate(steps)
            for task in item.scoring
            for number, first in enumerate(task.microbatches)
        }
        self._stage, self._p = groups.pp.rank(), groups.pp_size
        self._inputs: dict[tuple[int, int], Tensor | None] = {}
        self._outputs: dict[tuple[int, int], Tensor] = {}
        self._backwards_left = [len(steps[0].student)] * len(self._chunks)
        self.reports: list[dict[str, Any]] = []
        """The values reported by the loss for each micro-batch; empty on all stages but the last."""
        self._num_tokens = torch.zeros([], dtype=torch.int, device=groups.device)
        self._embedding = clear_embedding_activation_buffer(self._config, self._chunks, groups.is_last_stage)

    def message(self, consumer: Compute) -> tuple[tuple[int, ...], torch.dtype]:
        """[s/cp(/tp), b, h] of the consumer's model and step."""
        if isinstance(consumer, TeacherForward):
            config, batch = self._teachers.config(consumer.job.teacher), self._scored(consumer)
        else:
            config, batch = self._config, self._steps[0].student[consumer.microbatch]
        return message_shape(config, batch, self._groups), config.pipeline_dtype

    def load(self, entry: LoadTeacher | LoadHead) -> None:
        """Start loading a teacher into the slot that the plan has freed for it."""
        arrive = self._teachers.prefetch if isinstance(entry, LoadTeacher) else self._teachers.prefetch_head
        arrive(entry.teacher, entry.slot)

    def teacher_forward(self, entry: TeacherForward, hidden: Tensor | None) -> Tensor | None:
        job, batch = entry.job, self._scored(entry).to(self._groups.device)
        output = forward_without_gradients(self._teachers.make_resident(job.teacher), batch, hidden)
        if not self._groups.is_last_stage:
            return output
        self._steps[job.step].scores.keep(job.teacher, batch, output)
        return None

    def _scored(self, entry: TeacherForward) -> MicroBatch:
        """The micro-batch of a teacher forward."""
        job = entry.job
        number = self._number[job.teacher, job.microbatch, job.step]
        return self._steps[job.step].teachers[job.teacher][number]

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
            self.reports,
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
        # The message shares the output's memory and keeps it alive until it has been sent; the graph no
        # longer needs it.
        message = output.detach()
        deallocate_output_tensor(output, self._config.deallocate_pipeline_outputs)
        return message

    def student_backward(self, entry: StudentBackward, gradient: Tensor | None) -> Tensor | None:
        key, chunk = (entry.microbatch, entry.chunk), self._chunks[entry.chunk]
        hidden, output = self._inputs.pop(key), self._outputs.pop(key)
        self._backwards_left[entry.chunk] -= 1
        is_final = self._backwards_left[entry.chunk] == 0
        overlapped = self._config.no_sync_func is not None
        # Like megatron-core, reduce gradients bucket by bucket during the last backward pass if no later work
        # can hide the reduction; otherwise right after it, while the other stages still compute.
        in_hooks = self._config.grad_sync_func is None or (self._stage == 0 and len(self._chunks) == 1)
        hold = overlapped and not (is_final and in_hooks)
        with chunk.no_sync() if hold else contextlib.nullcontext():
            gradient = backward_step(hidden, output, gradient, self._config)
        if overlapped and is_final and not in_hooks:
            chunk.start_grad_sync()
        return gradient

    def synchronize(self) -> None:
        """Wait for all stages; see `synchronize`."""
        synchronize(self._groups)

    def finish_gradients(self) -> None:
        """Reduce the gradients over data-parallel ranks (tied embeddings also over the first and last stage)
        and divide them by the number of tokens.
        """
        assert not self._outputs, "every forward pass has had its backward pass"
        groups, config = self._groups, self._config
        finish_embedding_wgrad_compute(config, self._embedding, groups.is_last_stage, groups.tp)
        config.finalize_model_grads_func(self._chunks, self._num_tokens, pg_collection=groups.collection)


class ForwardWork:
    """Forward passes of the student without backward passes; a `StageWork` for forward-only lists.

    on_hidden: called with the last stage's hidden states of each micro-batch.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        micro_batches: Sequence[MicroBatch],
        groups: ParallelGroups,
        on_hidden: Callable[[MicroBatch, Tensor], None],
    ):
        self._chunks, self._micro_batches = list(chunks), micro_batches
        self._groups, self._on_hidden = groups, on_hidden

    def message(self, consumer: Compute) -> tuple[tuple[int, ...], torch.dtype]:
        """[s/cp(/tp), b, h] of the student."""
        config, batch = unwrap(self._chunks[0]).config, self._micro_batches[consumer.microbatch]
        return message_shape(config, batch, self._groups), config.pipeline_dtype

    def student_forward(self, entry: StudentForward, hidden: Tensor | None) -> Tensor | None:
        batch = self._micro_batches[entry.microbatch].to(self._groups.device)
        output = forward_without_gradients(self._chunks[entry.chunk], batch, hidden)
        if not self._groups.is_last_stage or entry.chunk < len(self._chunks) - 1:
            return output
        self._on_hidden(batch, output)
        return None

    def synchronize(self) -> None:
        """Wait for all stages; see `synchronize`."""
        synchronize(self._groups)


def synchronize(groups: ParallelGroups) -> None:
    """Wait for all stages of this rank's pipeline, with one scalar all-reduce."""
    token = torch.zeros(1, device=groups.device)
    dist.all_reduce(token, group=groups.pp)
    token.cpu()  # NCCL only orders work on the device; this makes the host wait


def message_shape(
    config: TransformerConfig, micro_batch: MicroBatch, groups: ParallelGroups
) -> tuple[int, int, int]:
    """Shape [s/cp(/tp), b, h] of the message between stages of a model with this `config`. Every stage of a
    pipeline has the same micro-batches, so it is never communicated."""
    rows, length = micro_batch.tokens.shape
    if config.sequence_parallel:
        length //= groups.tp_size
    return length, rows, config.hidden_size


def forward(chunk: torch.nn.Module, micro_batch: MicroBatch) -> Tensor:
    """Run one model chunk on one micro-batch (on the chunk's device); returns hidden states, or the stage's
    output."""
    documents = None
    if micro_batch.document_lengths is not None:
        documents = PackedDocuments.from_lengths(
            list(micro_batch.document_lengths), micro_batch.tokens.device
        )
    model = unwrap(chunk)
    is_moe = model.config.num_moe_experts is not None
    with replaying(chunk, micro_batch.experts), balancing(model.routers, micro_batch):
        return chunk(
            micro_batch.tokens,
            micro_batch.position_ids,
            None,
            packed_seq_params=documents,
            padding_mask=micro_batch.padding_mask if is_moe else None,
        )


def forward_without_gradients(
    chunk: torch.nn.Module, micro_batch: MicroBatch, hidden: Tensor | None
) -> Tensor:
    """`forward` without gradients of a chunk whose input from the previous stage is `hidden`."""
    model = unwrap(chunk)
    model.set_input_tensor(hidden)
    # Not `inference_mode`: passes that need gradients reuse the rotary tables cached here.
    with torch.no_grad():
        output = forward(chunk, micro_batch)
    model.set_input_tensor(None)
    return output
