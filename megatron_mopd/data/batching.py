"""Batch trajectories into micro-batches: split over data-parallel ranks, grouped, padded or packed, sliced
for CP.

Every rank knows every trajectory of the batch (they are short lists of integers), so all ranks compute the
same split and nothing is communicated. Ranks that share a collective always get the same number of
micro-batches, of the same shape where a pipeline needs it: missing ones are empty.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_mopd.data.trajectory import Trajectory


@dataclass(frozen=True)
class BatchShape:
    """The layout of micro-batches; the same on every rank for a whole optimizer step."""

    micro_batch_size: int
    """Rows of a padded micro-batch."""
    max_tokens: int | None
    """Token budget of a packed micro-batch; `None` pads instead of packing."""
    seq_length: int
    """Row length of padded micro-batches, a multiple of `alignment`."""
    alignment: int
    """Every row (padded) or document (packed, for its CP part) has a length that TP and CP can split evenly.
    """
    cp_size: int
    cp_rank: int
    fixed: bool
    """All micro-batches have the full shape, as required by pipeline stages that exchange activations."""
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
        fixed: bool,
    ) -> BatchShape:
        """The shape for one optimizer step; the longest trajectory determines the row length."""
        alignment = tp_size * (2 * cp_size if cp_size > 1 else 1)
        longest = _round_up(max(map(len, trajectories), default=1), alignment)
        if max_tokens is not None:
            max_tokens = max(_round_up(max_tokens, alignment), longest)
        share = sum(len(t.response_ids) for t in trajectories) / max(1, sum(map(len, trajectories)))
        return cls(micro_batch_size, max_tokens, longest, alignment, cp_size, cp_rank, fixed, share)

    @property
    def document_multiple(self) -> int:
        """Packed documents are padded to this, so that each splits into 2 x cp zigzag slices."""
        return 2 * self.cp_size if self.cp_size > 1 else 1


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


def split_over_ranks(
    trajectories: Sequence[Trajectory], dp_size: int, key: Callable[[Trajectory], Hashable]
) -> list[list[Trajectory]]:
    """Deal trajectories to data-parallel ranks: each `key` (teacher mixture) evenly, lengths balanced,
    ordered by key.

    The longest go first, back and forth over the ranks, so that ranks differ by at most one trajectory of
    each key.
    """
    ranks: list[list[Trajectory]] = [[] for _ in range(dp_size)]
    turn = 0
    for _, group in _grouped(trajectories, key):
        for trajectory in sorted(group, key=lambda t: (-len(t), t.index)):
            lap, place = divmod(turn, dp_size)
            ranks[place if lap % 2 == 0 else dp_size - 1 - place].append(trajectory)
            turn += 1
    return ranks


def group_micro_batches(trajectories: Sequence[Trajectory], shape: BatchShape) -> list[list[Trajectory]]:
    """Split one rank's trajectories, in order, into micro-batches of `micro_batch_size` rows or `max_tokens`
    tokens.
    """
    if shape.max_tokens is None:
        size = shape.micro_batch_size
        return [list(trajectories[i : i + size]) for i in range(0, len(trajectories), size)]
    groups: list[list[Trajectory]] = []
    filled = shape.max_tokens + 1
    for trajectory in trajectories:
        length = _round_up(len(trajectory), shape.document_multiple)
        if filled + length > shape.max_tokens:
            groups.append([])
            filled = 0
        groups[-1].append(trajectory)
        filled += length
    return groups


def equalize(per_rank: list[list[list[Trajectory]]]) -> list[list[list[Trajectory]]]:
    """Append empty micro-batches until every rank has as many as the busiest one (at least one)."""
    most = max(1, max(map(len, per_rank)))
    return [groups + [[] for _ in range(most - len(groups))] for groups in per_rank]


def collate(
    trajectories: Sequence[Trajectory], shape: BatchShape, routing: Mapping[int, Tensor] | None = None
) -> MicroBatch:
    """Tensors of one micro-batch for this context-parallel rank, on the CPU. An empty list gives a
    micro-batch of only padding. `routing` has the expert choices [tokens - 1, layers, k] of sampled
    trajectories, by index.
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
    packed = shape.max_tokens is not None
    return MicroBatch(
        trajectories=tuple(trajectories),
        tokens=torch.from_numpy(tokens),
        position_ids=torch.from_numpy(positions if packed else positions[:1]),
        padding_mask=torch.from_numpy(owner == len(trajectories)),
        trajectory_ids=torch.from_numpy(owner),
        response_share=shape.response_share,
        document_lengths=tuple(length for *_, length in documents) if packed else None,
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
    if shape.max_tokens is None:
        rows = shape.micro_batch_size if shape.fixed else max(1, len(trajectories))
        return rows, shape.seq_length // shape.cp_size, [(row, 0, shape.seq_length) for row in range(rows)]
    lengths = [_round_up(len(t), shape.document_multiple) for t in trajectories]
    used, total = sum(lengths), shape.max_tokens
    if not shape.fixed:
        total = max(_round_up(used, shape.alignment), shape.alignment)
    if total > used:
        lengths.append(total - used)
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


def _grouped(trajectories, key):
    groups: dict[Hashable, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(key(trajectory), []).append(trajectory)
    return sorted(groups.items(), key=lambda item: str(item[0]))


def _round_up(number: int, multiple: int) -> int:
    return (number + multiple - 1) // multiple * multiple
