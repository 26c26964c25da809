"""Divides a batch among data-parallel ranks and into micro-batches.

Ranks that run in step (they share experts, or a plan) run their k-th micro-batches at the same time, and the
longest decides how long that takes. So tokens are levelled: every teacher mixture over the ranks, and each
rank's share over its micro-batches, longest trajectory first onto the emptiest place.

Every rank knows the length of every trajectory of the batch, so all ranks compute the same division and
nothing is communicated.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from itertools import zip_longest

from megatron_mopd.data.batching import BatchShape
from megatron_mopd.data.trajectory import Trajectory

Row = list[Sequence[Trajectory]]
"""[data-parallel rank]: the trajectories of micro-batches that run at the same time."""


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
    """The division of a batch of trajectories, ordered by `key` (teacher mixture)."""

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
        self._groups = self._level(ordered) if shape.is_packed else self._deal(ordered)
        """[mixture]: its trajectories on every rank."""

    def per_rank(self) -> list[list[Trajectory]]:
        """Every rank's trajectories, ordered by mixture."""
        return [[t for group in self._groups for t in group[rank]] for rank in range(self._ranks)]

    def cut(self, selected: Callable[[Trajectory], bool] = lambda _: True) -> Cut:
        """The micro-batches of a model that sees the mixtures whose trajectories are `selected`.

        At least one micro-batch. Packed: a mixture is cut into as few micro-batches as fit, of levelled
        length, and consecutive ones are joined where they fit together. Two cuts of one division therefore
        nest: in both, the same trajectories are together from the start.
        """
        groups = [[list(filter(selected, share)) for share in group] for group in self._groups]
        groups = [group for group in groups if any(group)]
        rows = self._packed(groups) if self._shape.is_packed else self._padded(groups)
        rows = rows or [[[] for _ in range(self._ranks)]]
        return Cut(rows, tuple(max(map(self._shape.num_tokens, row)) for row in rows))

    def _padded(self, groups: Sequence[Row]) -> list[Row]:
        """`micro_batch_size` trajectories at a time."""
        size = self._shape.micro_batch_size
        shares = [[t for share in shares for t in share] for shares in zip(*groups)]
        parts = [[share[i : i + size] for i in range(0, len(share), size)] for share in shares]
        return [list(row) for row in zip_longest(*parts, fillvalue=())]

    def _packed(self, groups: Sequence[Row]) -> list[Row]:
        """Each group cut into levelled pieces, and consecutive pieces together where they fit the token
        budget on every rank."""
        joined: list[Row] = []
        for row in (piece for group in groups for piece in self._pieces(group)):
            if joined:
                both = [[*left, *right] for left, right in zip(joined[-1], row)]
                if all(self._length(members) <= self._shape.max_tokens for members in both):
                    joined[-1] = both
                    continue
            joined.append(row)
        return joined

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

    def _level(self, groups: Sequence[Sequence[Trajectory]]) -> list[Row]:
        """Equal numbers of tokens of each group; what is unequal goes to the ranks that have least so far."""
        totals, levelled = [0] * self._ranks, []
        for group in groups:
            shares = self._spread(group, self._ranks)
            row: Row = [[] for _ in range(self._ranks)]
            for rank, share in zip(sorted(range(self._ranks), key=totals.__getitem__), shares):
                row[rank] = share
                totals[rank] += self._length(share)
            levelled.append(row)
        return levelled

    def _pieces(self, group: Row) -> list[Row]:
        """A group cut into as few levelled micro-batches as fit the token budget on every rank."""
        budget = self._shape.max_tokens
        count = max(1, *(-(-self._length(share) // budget) for share in group))
        while True:
            spread = [self._spread(share, count) for share in group]
            if all(self._length(piece) <= budget for pieces in spread for piece in pieces):
                return [list(row) for row in zip(*spread)]
            count += 1

    def _spread(self, trajectories: Sequence[Trajectory], places: int) -> list[list[Trajectory]]:
        """Trajectories, longest first, each onto the emptiest of `places`; the fullest place first."""
        loads = [(0, place) for place in range(places)]
        heapify(loads)
        found: list[list[Trajectory]] = [[] for _ in range(places)]
        for trajectory in trajectories:
            load, place = loads[0]
            found[place].append(trajectory)
            heapreplace(loads, (load + self._shape.document_length(trajectory), place))
        return [found[place] for _, place in sorted(loads, key=lambda item: (-item[0], item[1]))]

    def _length(self, members: Sequence[Trajectory]) -> int:
        return sum(map(self._shape.document_length, members))
