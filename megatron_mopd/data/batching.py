"""The tensors of micro-batches: trajectories padded or packed, and sliced for CP.

A micro-batch is as long as its content, rounded up to a few lengths; `division.py` decides what is in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_mopd.data.trajectory import Trajectory

LENGTHS_PER_OCTAVE = 16
"""Different lengths of micro-batches between a power of two and the next, so that allocators and kernels see
few shapes; at most 1/16 of a micro-batch is padding for that."""


@dataclass(frozen=True)
class BatchShape:
    """The layout of micro-batches; the same on every rank for a whole optimizer step."""

    micro_batch_size: int
    """Most rows of a padded micro-batch."""
    max_tokens: int | None
    """Token budget of a packed micro-batch; `None` pads instead of packing."""
    longest: int
    """Length of the batch's longest trajectory. Under CP every padded row is as long: which tokens of it a
    rank holds depends on its length, and must be the same for the student and its teachers."""
    alignment: int
    """Every row (padded) or document (packed, for its CP part) has a length that TP and CP can split evenly.
    """
    cp_size: int
    cp_rank: int
    response_share: float = 0.0
    """Share of response tokens among all tokens of the step's trajectories."""

    @classmethod
    def for_batch(
        cls,
        trajectories: Sequence[Trajectory],
        *,
        micro_batch_size: int,
        max_tokens: int | None,
        tp_size: int,
        cp_size: int,
        cp_rank: int,
    ) -> BatchShape:
        """The shape for one optimizer step; the longest trajectory fits every token budget."""
        alignment = tp_size * (2 * cp_size if cp_size > 1 else 1)
        longest = max(map(len, trajectories), default=1)
        if max_tokens is not None:
            max_tokens = _round_up(max(max_tokens, longest), alignment)
        share = sum(t.response_length for t in trajectories) / max(1, sum(map(len, trajectories)))
        return cls(micro_batch_size, max_tokens, longest, alignment, cp_size, cp_rank, share)

    @property
    def is_packed(self) -> bool:
        return self.max_tokens is not None

    def document_length(self, trajectory: Trajectory) -> int:
        """Length of a packed trajectory: padded so that it splits into 2 x cp zigzag slices."""
        return _round_up(len(trajectory), 2 * self.cp_size if self.cp_size > 1 else 1)

    def rows_and_length(self, trajectories: Sequence[Trajectory]) -> tuple[int, int]:
        """Rows of a micro-batch, and their length over all context-parallel ranks: padding included, at least
        one row."""
        if self.max_tokens is not None:
            used = sum(map(self.document_length, trajectories))
            return 1, max(used, min(self._rounded(used), self.max_tokens))
        own = max(map(len, trajectories), default=1)
        return max(1, len(trajectories)), self._rounded(self.longest if self.cp_size > 1 else own)

    def num_tokens(self, trajectories: Sequence[Trajectory]) -> int:
        """Tokens of a micro-batch over all context-parallel ranks, padding included."""
        rows, length = self.rows_and_length(trajectories)
        return rows * length

    def _rounded(self, length: int) -> int:
        """`length`, rounded up to one of `LENGTHS_PER_OCTAVE` lengths that the layout can split."""
        octave = 1 << (max(1, length) - 1).bit_length()
        return _round_up(max(1, length), _round_up(max(1, octave // 2 // LENGTHS_PER_OCTAVE), self.alignment))


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass of one context-parallel rank: [b, s] tokens and the positions of the
    loss."""

    trajectories: tuple[Trajectory, ...]
    tokens: Tensor
    """[b, s/cp] token ids, 0 where there is padding."""
    position_ids: Tensor
    """[1 or b, s/cp] position of every token in its own document."""
    padding_mask: Tensor
    """[b, s/cp], True for padding, which is excluded from routing statistics."""
    trajectory_ids: Tensor
    """[b, s/cp] index into `trajectories` of the one that a token belongs to; their number for padding.
    """
    response_share: float
    """Share of response tokens among all tokens of the global batch."""
    document_lengths: tuple[int, ...] | None
    """Packed: padded length of every document before the CP split (the last may be padding only)."""
    loss_index: Tensor
    """[n] indices into the [s/cp x b] flattened hidden states, ordered by trajectory: the positions whose
    next token is a response token. The shift between hidden states and the tokens that they predict happens
    only here."""
    target_ids: Tensor
    """[n] the response token that each of those positions predicts."""
    loss_counts: tuple[int, ...]
    """Entries of `loss_index` that belong to each trajectory, in order."""
    experts: Tensor | None = None
    """[layers of this stage, s/cp, b, k] experts that each token went to while it was sampled, -1 for tokens
    that were not sampled; only for the student, with routing replay."""

    def to(self, device: torch.device) -> MicroBatch:
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in (
                "tokens",
                "position_ids",
                "padding_mask",
                "trajectory_ids",
                "loss_index",
                "target_ids",
            )
        }
        if self.experts is not None:
            moved["experts"] = self.experts.to(device, non_blocking=True)
        return dataclasses.replace(self, **moved)


def collate(
    trajectories: Sequence[Trajectory], shape: BatchShape, routing: Mapping[int, Tensor] | None = None
) -> MicroBatch:
    """Tensors of one micro-batch for this context-parallel rank, on the CPU. An empty list gives a
    micro-batch of only padding; this rank must hold the tokens of `trajectories`. `routing` has the expert
    choices [tokens - 1, layers, k] of sampled trajectories, by index.
    """
    rows, row_length, documents = _documents(trajectories, shape)
    tokens = np.zeros((rows, row_length), dtype=np.int64)
    positions = np.zeros((rows, row_length), dtype=np.int64)
    owner = np.full((rows, row_length), len(trajectories), dtype=np.int64)
    loss_index, targets, counts = [], [], []
    for number, (row, start, length) in enumerate(documents):
        order = _zigzag(length, shape.cp_size, shape.cp_rank)
        local = slice(start, start + len(order))
        positions[row, local] = order
        if number >= len(trajectories):
            continue
        trajectory = trajectories[number]
        ids = np.zeros(length + 1, dtype=np.int64)
        ids[: len(trajectory)] = trajectory.token_ids
        tokens[row, local] = ids[order]
        owner[row, local] = np.where(order < len(trajectory), number, len(trajectories))
        predicts_response = (order >= len(trajectory.prompt.token_ids) - 1) & (order < len(trajectory) - 1)
        chosen = np.flatnonzero(predicts_response)
        loss_index.append((start + chosen) * rows + row)
        targets.append(ids[order[chosen] + 1])
        counts.append(len(chosen))
    return MicroBatch(
        trajectories=tuple(trajectories),
        tokens=torch.from_numpy(tokens),
        position_ids=torch.from_numpy(positions if shape.is_packed else positions[:1]),
        padding_mask=torch.from_numpy(owner == len(trajectories)),
        trajectory_ids=torch.from_numpy(owner),
        response_share=shape.response_share,
        document_lengths=tuple(length for *_, length in documents) if shape.is_packed else None,
        loss_index=torch.from_numpy(np.concatenate(loss_index or [np.zeros(0, np.int64)])),
        target_ids=torch.from_numpy(np.concatenate(targets or [np.zeros(0, np.int64)])),
        loss_counts=tuple(counts),
        experts=_experts(trajectories, routing, owner, positions) if routing else None,
    )


def _documents(
    trajectories: Sequence[Trajectory], shape: BatchShape
) -> tuple[int, int, list[tuple[int, int, int]]]:
    """Rows and columns of a micro-batch on this context-parallel rank, and (row, first column, length) of
    each trajectory and then of each padding document; the length is that over all context-parallel ranks.
    """
    rows, total = shape.rows_and_length(trajectories)
    if not shape.is_packed:
        return rows, total // shape.cp_size, [(row, 0, total) for row in range(rows)]
    lengths = list(map(shape.document_length, trajectories))
    if total > sum(lengths):
        lengths.append(total - sum(lengths))
    starts = np.cumsum([0, *lengths[:-1]]) // shape.cp_size
    return 1, total // shape.cp_size, [(0, int(start), length) for start, length in zip(starts, lengths)]


def _experts(
    trajectories: Sequence[Trajectory],
    routing: Mapping[int, Tensor],
    owner: np.ndarray,
    positions: np.ndarray,
) -> Tensor:
    """[layers, columns, rows, k] recorded expert choices; -1 where a token has none: padding, and the last
    token of a trajectory, which did not pass through the model. owner, positions: [rows, columns].
    """
    some = next(iter(routing.values()))
    experts = torch.full((*owner.shape, *some.shape[1:]), -1, dtype=torch.int16)
    for number, trajectory in enumerate(trajectories):
        if trajectory.index in routing:
            places = (owner == number) & (positions < len(trajectory) - 1)
            choices = routing[trajectory.index][torch.from_numpy(positions[places])]
            experts[torch.from_numpy(places)] = choices.to(torch.int16)
    return experts.permute(2, 1, 0, 3).contiguous()


def _zigzag(length: int, cp_size: int, cp_rank: int) -> np.ndarray:
    """Positions of a document that a context-parallel rank holds: slices r and 2 cp - 1 - r of 2 cp, as in
    megatron-core.
    """
    if cp_size == 1:
        return np.arange(length)
    part = length // (2 * cp_size)
    last = 2 * cp_size - 1 - cp_rank
    return np.concatenate(
        (np.arange(cp_rank * part, (cp_rank + 1) * part), np.arange(last * part, (last + 1) * part))
    )


def _round_up(number: int, multiple: int) -> int:
    return (number + multiple - 1) // multiple * multiple
