"""Divides a block's share of a batch among its data-parallel ranks and into micro-batches.

Ranks that run in step (they share experts, or a plan) run their k-th micro-batches at the same time, and the
longest decides how long that takes. So packed micro-batches are levelled across ranks, for the student and
for every teacher that sees part of them, and long trajectories run beside each other: a row of micro-batches
that contains one is filled up to its length on all ranks.

Every rank knows the length of every trajectory of the batch, so all ranks compute the same division and
nothing is communicated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from itertools import zip_longest

from megatron_mopd.data.batching import BatchShape
from megatron_mopd.data.trajectory import Trajectory

Row = list[Sequence[Trajectory]]
"""[data-parallel rank]: the trajectories of micro-batches that run at the same time."""

_Item = tuple[int, Trajectory]
"""A trajectory after its length as a document."""

_FILL = 0.96
"""How much of the token budget a row is planned to use, so that whole trajectories fit."""
_SLACK = 1.06
"""How much more of a mixture than the mean a rank may get, so that the student's tokens are level."""


@dataclass(frozen=True)
class Cut:
    """One model's micro-batches on every data-parallel rank; as many on each, so some may be empty."""

    rows: list[Row]
    """[micro-batch][data-parallel rank]."""
    sizes: tuple[int, ...]
    """Tokens of each micro-batch, padding included, on the rank where it is largest."""

    def of_rank(self, rank: int) -> list[Sequence[Trajectory]]:
        """One rank's micro-batches."""
        return [row[rank] for row in self.rows]


class Division:
    """The division of trajectories among `ranks` that run in step, ordered by `key` (teacher mixture)."""

    def __init__(
        self,
        trajectories: Sequence[Trajectory],
        ranks: int,
        shape: BatchShape,
        key: Callable[[Trajectory], Hashable],
    ):
        self._shape, self._ranks = shape, ranks
        groups: dict[Hashable, list[Trajectory]] = {}
        for trajectory in sorted(trajectories, key=lambda t: (-len(t), t.index)):
            groups.setdefault(key(trajectory), []).append(trajectory)
        ordered = [groups[name] for name in sorted(groups, key=str)]
        self._rows = self._packed(ordered) if shape.is_packed else self._deal(ordered)
        """Trajectories of one mixture each, mixture after mixture. Packed: those that run at the same time;
        padded: all of a mixture."""

    def per_rank(self) -> list[list[Trajectory]]:
        """Every rank's trajectories, ordered by mixture."""
        return [[t for row in self._rows for t in row[rank]] for rank in range(self._ranks)]

    def cut(self, selected: Callable[[Trajectory], bool] = lambda _: True) -> Cut:
        """The micro-batches of a model that sees the trajectories that are `selected`.

        At least one micro-batch. Packed: the same rows in every cut, without what the model does not see, and
        consecutive ones joined where they fit the token budget on every rank. So in two cuts of a division
        the same trajectories are together from the start, and two consecutive micro-batches hold more than
        one of a cut with more trajectories could.
        """
        rows = [[list(filter(selected, share)) for share in row] for row in self._rows]
        rows = [row for row in rows if any(row)]
        rows = self._joined(rows) if self._shape.is_packed else self._padded(rows)
        rows = rows or [[[] for _ in range(self._ranks)]]
        return Cut(rows, tuple(max(map(self._shape.num_tokens, row)) for row in rows))

    def _padded(self, groups: Sequence[Row]) -> list[Row]:
        """`micro_batch_size` trajectories at a time."""
        size = self._shape.micro_batch_size
        shares = [[t for share in shares for t in share] for shares in zip(*groups)]
        parts = [[share[i : i + size] for i in range(0, len(share), size)] for share in shares]
        return [list(row) for row in zip_longest(*parts, fillvalue=())]

    def _deal(self, groups: Sequence[Sequence[Trajectory]]) -> list[Row]:
        """Back and forth over the ranks, longest first: ranks differ by at most one trajectory of each group,
        and their k-th trajectories have similar lengths."""
        turn, dealt = 0, []
        for group in groups:
            row: Row = [[] for _ in range(self._ranks)]
            for trajectory in group:
                lap, place = divmod(turn, self._ranks)
                row[place if lap % 2 == 0 else self._ranks - 1 - place].append(trajectory)
                turn += 1
            dealt.append(row)
        return dealt

    def _joined(self, rows: Sequence[Row]) -> list[Row]:
        """Consecutive rows together where they fit the token budget on every rank."""
        joined: list[Row] = []
        for row in rows:
            if joined:
                both = [[*left, *right] for left, right in zip(joined[-1], row)]
                if all(self._length(members) <= self._shape.max_tokens for members in both):
                    joined[-1] = both
                    continue
            joined.append(row)
        return joined

    def _packed(self, groups: Sequence[Sequence[Trajectory]]) -> list[Row]:
        """As few rows of each mixture as fit the token budget, each of nearly equal length on all ranks."""
        rows: list[Row] = []
        totals = [0] * self._ranks
        for group in groups:
            left = [(self._shape.document_length(t), t) for t in group]
            while left:
                row = self._beside(left, totals)
                if row is None:
                    row, left = self._next_row(left)
                    row, totals = self._lined_up(row, totals)
                else:
                    left, totals = [], [total + _size(share) for total, share in zip(totals, row)]
                rows.append([[t for _, t in share] for share in row])
        return rows

    def _beside(self, items: list[_Item], totals: list[int]) -> list[list[_Item]] | None:
        """All `items` of a mixture, longest first, in the room that is left beside `totals` of tokens in the
        student's last micro-batch, or `None`.

        Each onto the rank with the fewest tokens in total, unless its teacher would need longer for it than
        for the mean or for the longest trajectory, for which the other ranks wait anyway.
        """
        size, budget = _size(items), self._shape.max_tokens
        if sum(totals) == 0 or sum(totals) + size > _FILL * budget * self._ranks:
            return None
        limit = max(items[0][0], _SLACK * size / self._ranks)
        row: list[list[_Item]] = [[] for _ in range(self._ranks)]
        own = [0] * self._ranks
        heap = sorted((total, rank) for rank, total in enumerate(totals))
        for item in items:
            full = []
            while heap and own[heap[0][1]] + item[0] > limit:
                full.append(heappop(heap))
            if not heap or heap[0][0] + item[0] > budget:
                return None
            total, rank = heap[0]
            heapreplace(heap, (total + item[0], rank))
            row[rank].append(item)
            own[rank] += item[0]
            for entry in full:
                heappush(heap, entry)
        return row

    def _next_row(self, left: list[_Item]) -> tuple[list[list[_Item]], list[_Item]]:
        """The next row of a mixture of which these are `left`, longest first, and what is left then.

        As much as gives all its remaining rows the same length or, if the longest trajectory is longer, as
        much as fits beside that; then longest first, each onto the rank with the fewest tokens.
        """
        mean = _size(left) / self._ranks
        rows = math.ceil(mean / (_FILL * self._shape.max_tokens))
        height = max(mean / rows, left[0][0])
        chosen, later = left, []
        if rows > 1:
            chosen, later = _sample(left, height * self._ranks, rest=(mean - height) / (rows - 1))
        row: list[list[_Item]] = [[] for _ in range(self._ranks)]
        heap = [(0, rank) for rank in range(self._ranks)]
        for item in chosen:
            length, rank = heap[0]
            if length + item[0] <= self._shape.max_tokens:
                row[rank].append(item)
                heapreplace(heap, (length + item[0], rank))
            else:
                later.append(item)
        return row, sorted(later, key=_longest_first)

    def _lined_up(self, row: list[list[_Item]], totals: list[int]) -> tuple[list[list[_Item]], list[int]]:
        """The row with its shares exchanged between ranks, so that it fits into the student's last
        micro-batch, which has these `totals` of tokens, and the new totals; otherwise a new micro-batch."""
        lengths = list(map(_size, row))
        shares = sorted(range(self._ranks), key=lambda place: -lengths[place])
        ranks = sorted(range(self._ranks), key=totals.__getitem__)
        lined_up, both = list(row), list(totals)
        for rank, place in zip(ranks, shares):
            lined_up[rank] = row[place]
            both[rank] += lengths[place]
        return (lined_up, both) if max(both) <= self._shape.max_tokens else (row, lengths)

    def _length(self, members: Sequence[Trajectory]) -> int:
        return sum(map(self._shape.document_length, members))


def _size(items: Sequence[_Item]) -> int:
    return sum(length for length, _ in items)


def _longest_first(item: _Item) -> tuple[int, int]:
    return -item[0], item[1].index


def _sample(items: Sequence[_Item], size: float, rest: float) -> tuple[list[_Item], list[_Item]]:
    """About `size` tokens out of `items` (longest first), and the others. Those of more than `rest` tokens
    are taken first, because later rows will be that long; of the others, some of every length."""
    taken = [item for item in items if item[0] > rest]
    others = items[len(taken) :]
    wanted = max(0.0, size - _size(taken))
    share, due, have, later = wanted / max(1, _size(others)), 0.0, 0.0, []
    for item in others:
        due += share * item[0]
        if have + item[0] / 2 <= due:
            have += item[0]
            taken.append(item)
        else:
            later.append(item)
    return taken, later
