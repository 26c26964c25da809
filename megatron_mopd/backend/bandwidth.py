"""Measures the bandwidth of a layout's groups: all-reduce, all-to-all and point-to-point. Checks the results.

Groups of one kind are measured at the same time, as training uses them. Bandwidths are bus bandwidths, which
do not depend on the group's size on ideal hardware: bytes moved per rank and second, 2 (n - 1) / n of the
buffer for an all-reduce and (n - 1) / n for an all-to-all. Source: nccl-tests, doc/PERFORMANCE.md.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mopd.backend.parallel import ParallelGroups


@dataclass(frozen=True)
class GroupBandwidth:
    """One group's bus bandwidths in bytes per second, as measured on its slowest rank."""

    kind: str
    ranks: tuple[int, ...]
    hosts: tuple[str, ...]
    """The hosts that the group is on, without duplicates."""
    bandwidth: dict[str, float]
    """Operation -> bytes per second."""
    wrong: tuple[str, ...]
    """Operations with incorrect results."""


def kinds(groups: ParallelGroups) -> dict[str, dist.ProcessGroup]:
    """This rank's groups with more than one rank, by kind; gradients are summed over DP x CP."""
    collection = groups.collection
    found = {
        "TP": collection.tp,
        "CP": collection.cp,
        "EP": collection.ep,
        "PP": collection.pp,
        "DP x CP": collection.dp_cp,
        "expert DP": collection.expt_dp,
    }
    return {name: group for name, group in found.items() if group.size() > 1}


def measure(groups: ParallelGroups, num_bytes: int, repeats: int = 5) -> list[GroupBandwidth]:
    """Every group of the layout, the same list on every rank. Collective over all ranks.

    Each operation moves a float32 buffer of about `num_bytes` per rank; the fastest of `repeats` counts,
    since other jobs may slow one down. Finally one all-gather of about 200 bytes per rank and group.
    """
    mine = []
    for kind, group in kinds(groups).items():
        bandwidth, wrong = {}, []
        for name, operation in _OPERATIONS.items():
            dist.barrier()
            seconds, is_right, moved = operation(group, groups.device, num_bytes, repeats)
            slowest = torch.tensor([seconds, float(not is_right)], dtype=torch.float64, device=groups.device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
            bandwidth[name] = moved / slowest[0].item()
            if slowest[1]:
                wrong.append(name)
        mine.append((kind, tuple(dist.get_process_group_ranks(group)), bandwidth, tuple(wrong)))
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (socket.gethostname(), mine))
    host_of = [host for host, _ in gathered]
    found = {}
    for _, per_rank in gathered:
        for kind, ranks, bandwidth, wrong in per_rank:
            hosts = tuple(dict.fromkeys(host_of[rank] for rank in ranks))
            found[kind, ranks] = GroupBandwidth(kind, ranks, hosts, bandwidth, wrong)
    return list(found.values())


def slow_groups(measured: list[GroupBandwidth], share: float = 0.5) -> list[tuple[GroupBandwidth, str]]:
    """Groups that reach less than `share` of their kind's median in an operation, and that operation."""
    slow = []
    for kind in dict.fromkeys(group.kind for group in measured):
        same = [group for group in measured if group.kind == kind]
        for operation in same[0].bandwidth:
            median = statistics.median(group.bandwidth[operation] for group in same)
            slow += [(group, operation) for group in same if group.bandwidth[operation] < share * median]
    return slow


def _all_reduce(group, device: torch.device, num_bytes: int, repeats: int) -> tuple[float, bool, float]:
    size, rank = group.size(), dist.get_rank(group)
    buffer = torch.empty(max(1, num_bytes // 4), dtype=torch.float32, device=device)

    seconds = _fastest(
        lambda: dist.all_reduce(buffer, group=group), device, repeats, prepare=lambda: buffer.fill_(rank + 1)
    )
    return seconds, _all_equal(buffer, size * (size + 1) / 2), 2 * (size - 1) / size * 4 * buffer.numel()


def _all_to_all(group, device: torch.device, num_bytes: int, repeats: int) -> tuple[float, bool, float]:
    size, rank = group.size(), dist.get_rank(group)
    sent = torch.full((size, max(1, num_bytes // 4 // size)), float(rank), device=device)
    received = torch.empty_like(sent)
    seconds = _fastest(lambda: dist.all_to_all_single(received, sent, group=group), device, repeats)
    is_right = all(_all_equal(row, other) for other, row in enumerate(received))
    return seconds, is_right, (size - 1) / size * 4 * sent.numel()


def _ring(group, device: torch.device, num_bytes: int, repeats: int) -> tuple[float, bool, float]:
    """Every rank sends to the next and receives from the previous one, as pipeline stages do."""
    size, rank = group.size(), dist.get_rank(group)
    ranks = dist.get_process_group_ranks(group)
    sent = torch.full((max(1, num_bytes // 4),), float(rank), device=device)
    received = torch.empty_like(sent)

    def exchange() -> None:
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, ranks[(rank + 1) % size], group),
                dist.P2POp(dist.irecv, received, ranks[(rank - 1) % size], group),
            ]
        )
        for work in works:
            work.wait()

    seconds = _fastest(exchange, device, repeats)
    return seconds, _all_equal(received, (rank - 1) % size), 4 * sent.numel()


_OPERATIONS: dict[str, Callable[..., tuple[float, bool, float]]] = {
    "all-reduce": _all_reduce,
    "all-to-all": _all_to_all,
    "point-to-point": _ring,
}


def _all_equal(tensor: Tensor, value: float) -> bool:
    return bool((tensor == value).all())


def _fastest(
    run: Callable[[], object],
    device: torch.device,
    repeats: int,
    prepare: Callable[[], object] = lambda: None,
) -> float:
    """Seconds of the fastest of `repeats` runs, after a warm-up run that connects the ranks."""
    times = []
    for _ in range(1 + repeats):
        prepare()
        _finish(device)
        start = time.perf_counter()
        run()
        _finish(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
