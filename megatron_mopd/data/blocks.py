"""Shares a batch among blocks of data-parallel ranks, so that each block sees few teachers.

A *block* is the smallest set of data-parallel ranks that must run the same instructions: those that share an
expert group, or one rank of a dense model. If every rank trained on samples of every teacher, each would load
all teachers and compute nearly empty micro-batches for them. So the batch, grouped by teacher mixture, is
divided among the blocks, in two stages: first how much of each mixture goes to which block (`portions`), then
which trajectories, longest first (`share_among_blocks`).

Nothing is remembered from step to step, so that a resumed run divides its batches as an uninterrupted one.
Blocks nevertheless keep most of their teachers, because mixtures are cut in the order of their names wherever
that leaves every block with few enough of them, and small ones are dealt by name otherwise.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Sequence
from heapq import heapify, heapreplace
from itertools import accumulate

import numpy as np

from megatron_mopd.data.trajectory import Trajectory

TOLERANCE = 0.05
"""How much more than the mean a block may be given so that a mixture is not split."""

_STUDENT_WAITS = 0.5
"""Estimated share of the time that ranks wait for a mixture's longest trajectory in the student's passes too;
the rest is filled with other mixtures."""

_MANY_PLACES = 32
"""From this number on, arrays are faster than a heap."""

_DUST = 1e-9
"""Portions below this share of a block are rounding errors."""

Portions = list[list[tuple[int, float]]]
"""[mixture]: the blocks that it goes to, and how much of it to each."""


def share_among_blocks(
    trajectories: Sequence[Trajectory],
    blocks: int,
    mixtures: Sequence[Hashable],
    costs: np.ndarray,
    block_size: int = 1,
    scoring_costs: np.ndarray | None = None,
) -> list[list[Trajectory]]:
    """[block]: the trajectories that it trains on, so that all blocks have nearly equal work.

    Each trajectory is in exactly one share; with few trajectories some shares are empty. A share has at most
    ceil(mixtures / blocks) + 1 mixtures, which are ordered by their text. The result does not depend on the
    order of `trajectories`, only on their `index`, so it is the same on every rank without communication.

    mixtures, costs, scoring_costs: [trajectory] its mixture, the cost of its student and teachers together,
    above 0, and the part of it that is its teachers' (`None`: 0). The `block_size` ranks of a block run in
    step, so a mixture costs a block's teachers at least as much as its longest trajectory costs each rank,
    and the student part of that.
    """
    if blocks == 1 or not trajectories:
        return [list(trajectories), *([] for _ in range(blocks - 1))]
    names = {name: number for number, name in enumerate(sorted(set(mixtures), key=str))}
    numbers = np.fromiter(map(names.__getitem__, mixtures), np.int64, len(mixtures))
    scoring = np.zeros(len(names)) if scoring_costs is None else np.bincount(numbers, scoring_costs)
    owners = assign_blocks(
        numbers,
        costs,
        np.fromiter((t.index for t in trajectories), np.int64, len(mixtures)),
        blocks,
        block_size,
        scoring / np.bincount(numbers, costs),
    )
    shares: list[list[Trajectory]] = [[] for _ in range(blocks)]
    for owner, trajectory in zip(owners.tolist(), trajectories):
        shares[owner].append(trajectory)
    return shares


def assign_blocks(
    mixtures: np.ndarray,
    costs: np.ndarray,
    indices: np.ndarray,
    blocks: int,
    block_size: int,
    scoring_share: np.ndarray,
) -> np.ndarray:
    """[n] the block of each trajectory, from [n] the number of its mixture, its cost and its index, and
    [mixture] its teachers' share of the cost.

    Each trajectory, longest first, goes to the block that still lacks most of its mixture. What a block gets
    too much or too little of one mixture is made up for with its next.
    """
    order = np.lexsort((indices, -costs, mixtures))
    ends = np.cumsum(np.bincount(mixtures))
    firsts = ends - np.bincount(mixtures)
    sorted_costs = costs[order]
    sizes = np.bincount(mixtures, costs)
    idle = np.maximum(0.0, block_size * sorted_costs[firsts] - sizes)
    work = sizes + (scoring_share + (1 - scoring_share) * _STUDENT_WAITS) * idle
    owners = np.empty(len(order), np.int64)
    owed = np.zeros(blocks)
    for mixture, portion in enumerate(portions(work.tolist(), blocks)):
        members = order[firsts[mixture] : ends[mixture]]
        where, amounts = (np.array(column) for column in zip(*portion))
        lacking = owed[where] + amounts * (sizes[mixture] / work[mixture])
        owners[members] = where[_longest_first(costs[members], lacking)]
        if len(portion) > 1:
            owed[where] = lacking
    return owners


def _longest_first(costs: np.ndarray, lacking: np.ndarray) -> np.ndarray:
    """[n] the place that gets each of `costs`, in descending order: the one that is `lacking` most, of which
    the cost is then subtracted.

    """
    chosen = np.empty(len(costs), np.int64)
    if len(lacking) < _MANY_PLACES:
        heap = [(-amount, place) for place, amount in enumerate(lacking.tolist())]
        heapify(heap)
        for number, cost in enumerate(costs.tolist()):
            lack, place = heap[0]
            chosen[number] = place
            heapreplace(heap, (lack + cost, place))
        np.subtract.at(lacking, chosen, costs)
        return chosen
    # All places that have their turn before the first has its second are served at once.
    start = 0
    while start < len(costs):
        order = np.argsort(-lacking, kind="stable")
        turns = np.count_nonzero(lacking > lacking[order[0]] - costs[start])
        places = order[: max(1, min(turns, len(costs) - start))]
        chosen[start : start + len(places)] = places
        lacking[places] -= costs[start : start + len(places)]
        start += len(places)
    return chosen


def portions(sizes: Sequence[float], blocks: int) -> Portions:
    """How much of each mixture goes to which blocks: at most ceil(mixtures / blocks) + 1 mixtures to a block,
    and to each block as much as to the others within `TOLERANCE`. sizes: [mixture] total cost, in the order
    of the mixtures' names.
    """
    count = sum(size > 0 for size in sizes)
    most = -(-count // blocks) + 1
    for cut in (_cut_in_order, _small_ones_whole, _sliding_window):
        found = cut(sizes, blocks, TOLERANCE)
        if found and _most_mixtures(found, blocks) <= most:
            return found
    return _sliding_window(sizes, blocks, 0.0)


def _most_mixtures(found: Portions, blocks: int) -> int:
    counts = [0] * blocks
    for portion in found:
        for block, _ in portion:
            counts[block] += 1
    return max(counts)


def _cut_in_order(sizes: Sequence[float], blocks: int, tolerance: float) -> Portions:
    """The mixtures one after another, cut into as many contiguous parts as there are blocks."""
    return _cut(sizes, [sum(sizes) / blocks] * blocks, tolerance)


def _small_ones_whole(sizes: Sequence[float], blocks: int, tolerance: float) -> Portions:
    """The smallest mixtures whole, as many to each block, and the others cut in order into the room that is
    left. So it does not depend on the small ones' sizes, but only on which they are, where each of them goes.

    Empty if a block has no room left.
    """
    present = sorted((size, number) for number, size in enumerate(sizes) if size > 0)
    each = -(-len(present) // blocks) - 1
    rooms = [sum(sizes) / blocks] * blocks
    found: Portions = [[] for _ in sizes]
    large = list(sizes)
    for place, number in enumerate(sorted(number for _, number in present[: each * blocks])):
        found[number].append((place % blocks, sizes[number]))
        rooms[place % blocks] -= sizes[number]
        large[number] = 0.0
    if each == 0 or min(rooms) <= 0:
        return []
    return [whole or cut for whole, cut in zip(found, _cut(large, rooms, tolerance))]


def _cut(sizes: Sequence[float], rooms: Sequence[float], tolerance: float) -> Portions:
    """The mixtures one after another, cut into contiguous parts of nearly the sizes `rooms`: [block].

    Wherever `tolerance` allows, a part ends with a mixture instead of splitting it, and the difference is
    spread over all blocks from there to the next such place.
    """
    ends, walls = [0.0, *accumulate(sizes)], [0.0, *accumulate(rooms)]
    dust = _DUST * ends[-1] / len(rooms)
    found: Portions = [[] for _ in sizes]
    joints = _joints(ends, walls, tolerance)
    for (mixture, block), (last_mixture, last_block) in zip(joints, joints[1:]):
        filling = (ends[last_mixture] - ends[mixture]) / (walls[last_block] - walls[block])
        room = filling * rooms[block]
        for number in range(mixture, last_mixture):
            left = sizes[number]
            while left > dust:
                part = left if block == last_block - 1 else min(left, room)
                found[number].append((block, part))
                left, room = left - part, room - part
                if room <= dust and block < last_block - 1:
                    block += 1
                    room = filling * rooms[block]
    return found


def _joints(ends: Sequence[float], walls: Sequence[float], tolerance: float) -> list[tuple[int, int]]:
    """(mixture, block) pairs, from (0, 0) to (all, all), before which the same mixtures and blocks end: as
    many as possible such that between two of them blocks are filled to at most 1 + `tolerance`.

    ends, walls: where each mixture ends, and the room of each block, in a row.
    """
    reached: dict[tuple[int, int], tuple[int, float]] = {(0, 0): (0, 0.0)}
    before: dict[tuple[int, int], tuple[int, int]] = {}
    last = len(ends) - 1, len(walls) - 1
    for mixture in range(1, len(ends)):
        if ends[mixture] == ends[mixture - 1] and mixture != last[0]:
            continue
        above = bisect_left(walls, ends[mixture])
        for block in {above - 1, above} if mixture != last[0] else {last[1]}:
            best = None
            for (other_mixture, other_block), (joints, fullest) in reached.items():
                if other_mixture == mixture or not other_block < block < len(walls):
                    continue
                filling = (ends[mixture] - ends[other_mixture]) / (walls[block] - walls[other_block])
                if filling > 1 + max(tolerance, _DUST):
                    continue
                candidate = (joints, -max(fullest, filling))
                if best is None or candidate > best[0]:
                    best = candidate, (other_mixture, other_block)
            if best is not None:
                (joints, emptiest), before[mixture, block] = best
                reached[mixture, block] = (joints + 1, -emptiest)
    path = [last]
    while path[-1] in before:
        path.append(before[path[-1]])
    return path[::-1]


def _sliding_window(sizes: Sequence[float], blocks: int, tolerance: float) -> Portions:
    """The mixtures by size, a window of c of them to each block: the smallest that fill it, the last of them
    split. Up to `tolerance` more or less than the mean, so that fewer are split.

    With tolerance 0 no block gets more than c = ceil((mixtures - 1) / blocks) + 1 (Shachnai and Tamir, "On
    two class-constrained versions of the multiple knapsack problem", Algorithmica 29, 2001).
    """
    found: Portions = [[] for _ in sizes]
    left = sorted((size, number) for number, size in enumerate(sizes) if size > 0)
    window = -(-(len(left) - 1) // blocks) + 1
    for block in range(blocks):
        mean = sum(size for size, _ in left) / (blocks - block)
        sums = (sum(size for size, _ in left[i : i + window]) for i in range(len(left)))
        filling = (start for start, total in enumerate(sums) if total >= mean * (1 - _DUST))
        start = next(filling, max(0, len(left) - window))
        room, slack = mean, max(tolerance, _DUST) * mean
        while start < len(left) and room > slack:
            size, number = left.pop(start)
            part = size if size <= room + slack or block == blocks - 1 else room
            found[number].append((block, part))
            room -= part
            if part < size:
                insort(left, (size - part, number))
                break
    for size, number in left:  # what rounding has left
        found[number].append((blocks - 1, size))
    return found
