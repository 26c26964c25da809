"""Sends what a sampled response consists of, once, from the rank that sampled it to the one that needs it.

All ranks share how a response ended. They also know which data-parallel rank sampled it
(`Trajectory.sampled_by`) and which will train on it, so all sizes are known and nothing is agreed on first. A
rank receives the tokens of its own share, however many ranks there are, and 32 bytes per response.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mopd.data.arrays import BYTES_PER_ID, joined
from megatron_mopd.data.trajectory import Trajectory

Wanted = Sequence[Sequence[int]]
"""[data-parallel rank]: the trajectory indices that it needs."""
Ending = tuple[int, bool, float]
"""A response's length, whether a stop token ended it, and the float64 sum of its log-probs."""


def share_endings(
    mine: Mapping[int, Ending], count: int, group: dist.ProcessGroup, device: torch.device
) -> list[Ending]:
    """The endings of `count` responses on every rank, of which each has its own, by index.

    Collective over the data-parallel group: one all-reduce of 16 bytes per response, in which a ring gives a
    rank at most 32.
    """
    endings, sums = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.double)
    for index, (length, is_finished, total) in mine.items():
        endings[index], sums[index] = 2 * length + is_finished, total
    shared = torch.stack((endings, sums.view(torch.long)))
    if count and group.size() > 1:
        shared = shared.to(device)
        dist.all_reduce(shared, group=group)  # of zeros and one number: no bit of it changes
        shared = shared.cpu()
    endings, sums = shared[0].tolist(), shared[1].view(torch.double).tolist()
    return [(ending // 2, bool(ending % 2), total) for ending, total in zip(endings, sums)]


def exchange(
    wanted: Wanted,
    owners: Mapping[int, int],
    num_bytes: Mapping[int, int],
    parts: Callable[[int], Iterable[Tensor]],
    group: dist.ProcessGroup,
    device: torch.device,
) -> dict[int, Tensor]:
    """The bytes [num_bytes[i]] uint8 of the trajectories that this rank wants, by index, in host memory.

    `owners` names the rank of the group that has a trajectory's bytes, and `num_bytes` their number, both
    equal on all ranks; indices without owner are ignored. `parts` yields the contiguous tensors that make up
    a trajectory that this rank owns. Collective: one all-to-all over `group`, in which a rank receives the
    bytes that it wants and does not own, each once.
    """
    rank, ranks = group.rank(), range(group.size())
    outgoing = [[i for i in share if owners.get(i) == rank] for share in wanted]
    incoming: list[list[int]] = [[] for _ in ranks]
    for index in wanted[rank]:
        if index in owners:
            incoming[owners[index]].append(index)

    def size(indices: Iterable[int]) -> int:
        return sum(num_bytes[index] for index in indices)

    flat = [part.view(-1).view(torch.uint8) for share in outgoing for i in share for part in parts(i)]
    sent = torch.cat(flat) if flat else torch.zeros(0, dtype=torch.uint8)
    received = torch.empty(sum(map(size, incoming)), dtype=torch.uint8, device=device)
    dist.all_to_all_single(
        received,
        sent.to(device),
        output_split_sizes=list(map(size, incoming)),
        input_split_sizes=list(map(size, outgoing)),
        group=group,
    )
    order = [index for indices in incoming for index in indices]
    pieces = received.cpu().split([num_bytes[index] for index in order])
    return dict(zip(order, pieces, strict=True))


def deliver_tokens(
    trajectories: Sequence[Trajectory],
    wanted: Wanted,
    group: dist.ProcessGroup,
    device: torch.device,
    dtype: np.dtype,
) -> list[Trajectory]:
    """The same trajectories, with tokens exactly where they are wanted.

    Sampled tokens come from the rank that sampled them; given ones are everywhere before. The arrays are
    views of one flat array of ids and one of log-probs, which have `dtype`. Collective over the data-parallel
    group: one all-to-all, 8 bytes per sampled token (12 with float64 log-probs), to the ranks that want it.
    """
    mine = set(wanted[group.rank()])
    kept = [t if t.index in mine else t.without_tokens() for t in trajectories]
    if group.size() == 1:
        return kept
    by_index = {t.index: t for t in trajectories if t.sampled_by is not None}
    if not by_index:
        return kept

    def parts(index: int) -> Iterable[Tensor]:
        logprobs = by_index[index].logprobs.astype(dtype, copy=False)
        return torch.from_numpy(by_index[index].response_ids), torch.from_numpy(logprobs)

    owners = {index: t.sampled_by for index, t in by_index.items()}
    each = BYTES_PER_ID + dtype.itemsize
    num_bytes = {index: each * t.response_length for index, t in by_index.items()}
    received = exchange(wanted, owners, num_bytes, parts, group, device)
    halves = [np.split(piece.numpy(), [BYTES_PER_ID * len(piece) // each]) for piece in received.values()]
    ids = joined([id_bytes.view(np.int32) for id_bytes, _ in halves], np.int32)
    logprobs = joined([bytes_.view(dtype) for _, bytes_ in halves], dtype)
    found = dict(zip(received, zip(ids, logprobs, strict=True), strict=True))
    return [
        replace(t, response_ids=found[t.index][0], logprobs=found[t.index][1]) if t.index in found else t
        for t in kept
    ]


def gather_tokens(trajectories: Sequence[Trajectory], group: dist.ProcessGroup) -> list[Trajectory]:
    """The same trajectories, on the group's first rank with all tokens that any rank of the group holds.

    For what one rank writes about a whole batch: the first rank needs memory for all of it. Collective over
    the data-parallel group: one gather of all tokens to its first rank.
    """
    if group.size() == 1:
        return list(trajectories)
    held = {t.index: (t.response_ids, t.logprobs) for t in trajectories if t.has_tokens}
    gathered = [{} for _ in range(group.size())] if group.rank() == 0 else None
    dist.gather_object(held, gathered, dst=dist.get_global_rank(group, 0), group=group)
    if gathered is None:
        return list(trajectories)
    found = {index: arrays for of_rank in gathered for index, arrays in of_rank.items()}
    return [
        replace(t, response_ids=found[t.index][0], logprobs=found[t.index][1]) if t.index in found else t
        for t in trajectories
    ]
