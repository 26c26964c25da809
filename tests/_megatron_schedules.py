"""Megatron-core's schedules as an oracle for ours: one call for a teacher's forward passes, one for the
student's forward and backward passes.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_with_interleaving,
    forward_backward_pipelining_without_interleaving,
)
from torch import Tensor

from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.data.batching import MicroBatch
from megatron_mopd.model.gpt import unwrap
from megatron_mopd.pipeline.model_work import LossFunction, StepInput, TeacherModels, forward


def run_student(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    groups: ParallelGroups,
    loss_function: LossFunction,
) -> list[dict[str, Any]]:
    """Forward and backward of every micro-batch, then gradient synchronization and per-token normalization.

    Returns what `loss_function` reported for each micro-batch on the last stage, an empty list elsewhere.
    Every rank of a pipeline, and every rank that shares experts with it, must pass the same number of
    micro-batches.
    """
    return _run(chunks, micro_batches, groups, loss_function, forward_only=False)


def run_teacher(
    chunk: torch.nn.Module,
    micro_batches: Sequence[MicroBatch],
    groups: ParallelGroups,
    on_hidden: Callable[[MicroBatch, Tensor], None],
) -> None:
    """Forward passes of a frozen teacher; see `run_forward`."""
    run_forward([chunk], micro_batches, groups, on_hidden)


def run_forward(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    groups: ParallelGroups,
    on_hidden: Callable[[MicroBatch, Tensor], None],
) -> None:
    """Forward passes without gradients. `on_hidden` receives the last stage's hidden states as soon as each
    is computed.

    The schedule keeps what its loss function returns until it ends, so `on_hidden` must copy what it needs
    off the device and return nothing.
    """

    def take(micro_batch: MicroBatch, hidden: Tensor):
        on_hidden(micro_batch, hidden)
        return hidden.new_zeros(()), torch.zeros((), dtype=torch.int, device=hidden.device), {}

    # Not `inference_mode`: the rotary tables cached here are used again by passes that need gradients.
    with torch.no_grad():
        _run(chunks, micro_batches, groups, take, forward_only=True)


def _run(chunks, micro_batches, groups, loss_function, forward_only):
    config = copy.copy(unwrap(chunks[0]).config)
    # Stages tell each other the shape of every message; with gloo the interleaved schedule hangs then.
    config.variable_seq_lengths = len(chunks) == 1
    rows, length = micro_batches[0].tokens.shape
    if len(chunks) > 1:
        assert len({m.tokens.shape for m in micro_batches}) == 1, "they must have one shape"
        # It runs micro-batches in groups of the pipeline's size.
        missing = -len(micro_batches) % groups.pp_size
        micro_batches = [*micro_batches, *[_without_content(micro_batches[0])] * missing]

    def forward_step(iterator: Iterator[MicroBatch], chunk: torch.nn.Module):
        micro_batch = next(iterator)
        return forward(chunk, micro_batch), partial(loss_function, micro_batch)

    iterators = [(batch.to(groups.device) for batch in micro_batches) for _ in chunks]
    arguments = dict(
        forward_step_func=forward_step,
        num_microbatches=len(micro_batches),
        seq_length=length * groups.cp_size,
        micro_batch_size=rows,
        forward_only=forward_only,
        pg_collection=groups.collection,
    )
    if groups.pp_size == 1:
        return forward_backward_no_pipelining(data_iterator=iterators[0], model=chunks[0], **arguments)
    arguments["p2p_communicator"] = P2PCommunicator(groups.pp, config)
    if len(chunks) == 1:
        return forward_backward_pipelining_without_interleaving(
            data_iterator=iterators[0], model=chunks[0], **arguments
        )
    return forward_backward_pipelining_with_interleaving(
        data_iterator=iterators, model=list(chunks), **arguments
    )


def _without_content(like: MicroBatch) -> MicroBatch:
    """A micro-batch of the same shape that is only padding."""
    return dataclasses.replace(
        like,
        trajectories=(),
        tokens=torch.zeros_like(like.tokens),
        padding_mask=torch.ones_like(like.padding_mask),
        trajectory_ids=torch.zeros_like(like.trajectory_ids),
        loss_index=like.loss_index[:0],
        target_ids=like.target_ids[:0],
        loss_counts=(),
        experts=None,
    )


class MegatronSchedules:
    """Replaces a `PipelineDriver`: runs one step after another, every teacher before the student."""

    def __init__(self, groups: ParallelGroups):
        self.groups, self.idle_shares = groups, []

    def start(
        self,
        chunks: Sequence[torch.nn.Module],
        steps: Sequence[StepInput],
        loss_function: LossFunction,
        teachers: TeacherModels | None,
    ) -> MegatronExecution:
        return MegatronExecution(list(chunks), steps[0], self.groups, loss_function, teachers)

    def plan_next(self) -> None:
        """Do nothing: these schedules need no plan."""

    def forward(self, chunks, micro_batches, on_hidden) -> None:
        run_forward(chunks, micro_batches, self.groups, on_hidden)

    def last_events(self) -> list:
        return []


@dataclass
class MegatronExecution:
    """A step that `MegatronSchedules` started, with the interface of `pipeline.runtime.Execution`."""

    chunks: list[torch.nn.Module]
    step: StepInput
    groups: ParallelGroups
    loss_function: LossFunction
    teachers: TeacherModels | None
    reports: list[dict[str, Any]] = field(default_factory=list)

    @property
    def work(self) -> MegatronExecution:
        return self

    def run_to_update(self) -> None:
        groups = self.groups
        for name, micro_batches in self.step.teachers.items():
            keep = partial(self.step.scores.keep, name)
            run_teacher(self.teachers.make_resident(name), micro_batches, groups, keep)
        self.reports += run_student(self.chunks, self.step.student, groups, self.loss_function)

    def run_rest(self) -> None:
        """Do nothing: no later step is scored ahead."""
