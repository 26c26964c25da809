"""Determines the replicas of teacher weights, whether a host has enough memory, and which rank writes each
file."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mopd.backend.agreement import first_problem
from megatron_mopd.backend.host_memory import available_host_bytes
from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.backend.process_groups import new_group
from megatron_mopd.config import ConfigError
from megatron_mopd.teachers.layout import DENSE, EXPERT, HEAD
from megatron_mopd.teachers.storage import FileStore, Store

_SHARE_OF_FREE_MEMORY = 0.95


def replica_groups(groups: ParallelGroups) -> dict[str, dist.ProcessGroup]:
    """The ranks that replicate each segment."""
    dense, expert = groups.collection.dp_cp, groups.collection.expt_dp
    return {DENSE: dense, EXPERT: expert, HEAD: dense}


def gather_groups(groups: ParallelGroups) -> dict[str, dist.ProcessGroup]:
    """A new group over the replicas of each body segment in this rank's block, with communicators of its own.
    Collective over the members of each group."""
    return {
        name: new_group(members, group_desc=f"TEACHER_GATHER_{name}")
        for name, members in _replicas_in_block(groups).items()
    }


def sharding(groups: ParallelGroups) -> dict[str, int]:
    """Number of parts into which `host_sharded` splits each segment: its replicas in a block."""
    return {name: len(members) for name, members in _replicas_in_block(groups).items()} | {HEAD: 1}


def _replicas_in_block(groups: ParallelGroups) -> dict[str, list[int]]:
    replicas = {DENSE: groups.collection.dp_cp, EXPERT: groups.collection.expt_dp}
    return {name: groups.in_block(group) for name, group in replicas.items()}


def are_kept(store: Store, sizes: Mapping[tuple[str, str], int]) -> bool:
    """Whether files from an earlier start hold these payloads on every rank; raises `ConfigError` on all
    ranks for damaged files.

    Collectives: for files, two all-reduces of 8 bytes over all ranks.
    """
    if not isinstance(store, FileStore):
        return False
    problem, kept = None, False
    try:
        kept = all(store.has(key, size) for key, size in sizes.items())
    except ConfigError as error:
        problem = str(error)
    if found := first_problem(problem):
        raise ConfigError(found.text)
    everywhere = torch.tensor([int(kept)])
    dist.all_reduce(everywhere, dist.ReduceOp.MIN)
    return bool(everywhere.item())


def bytes_per_mode(payload: Mapping[str, int], parts: Mapping[str, int]) -> dict[str, int]:
    """Host memory that one rank needs for payloads of these sizes (bytes by segment), in each storage
    mode."""
    return {
        "host": sum(payload.values()),
        "host_sharded": sum(size // parts[name] for name, size in payload.items()),
        "mmap": 0,
    }


def check_host_memory(
    mode: str, payload: Mapping[str, int], parts: Mapping[str, int], groups: ParallelGroups
) -> None:
    """Raise `ConfigError` on every rank if a host has less free memory than the teachers of its ranks need.

    The message says what the other modes need, `host_sharded` with its default, the ranks of a host as a
    block. One all-gather of a few numbers over all ranks.
    """
    mine = _Need(
        socket.gethostname(),
        available_host_bytes(),
        bytes_per_mode(payload, parts),
        dict(payload),
        {name: min(dist.get_process_group_ranks(group)) for name, group in replica_groups(groups).items()},
    )
    reports = [mine] * groups.world_size
    dist.all_gather_object(reports, mine)
    by_host: dict[str, list[_Need]] = {}
    for report in reports:
        by_host.setdefault(report.host, []).append(report)
    for host, here in sorted(by_host.items()):
        needed = {key: sum(need.by_mode[key] for need in here) for key in mine.by_mode}
        if mode != "host_sharded":
            needed["host_sharded"] = _one_copy(here)
        available = min(need.free for need in here)
        if needed[mode] > _SHARE_OF_FREE_MEMORY * available:
            others = ", ".join(f"{key} {_gib(size)}" for key, size in needed.items())
            raise ConfigError(
                f"teacher_storage.mode: {mode} needs {_gib(needed[mode])} of host memory on {host} for the "
                f"teachers of its {len(here)} ranks, and {_gib(available)} are free; needed by mode: "
                f"{others} (teacher_storage.dtype=int8 takes about half of bfloat16)"
            )


class _Need(NamedTuple):
    """What one rank needs of its host's memory."""

    host: str
    free: int
    by_mode: dict[str, int]
    payload: dict[str, int]
    """Bytes by segment."""
    copy: dict[str, int]
    """By segment, a number that is the same on ranks with the same weights."""


def _one_copy(here: Sequence[_Need]) -> int:
    """Bytes of a host if its ranks keep each body segment once, and every rank its heads."""
    bodies = {(name, need.copy[name]): need.payload[name] for need in here for name in (DENSE, EXPERT)}
    return sum(bodies.values()) + sum(need.payload[HEAD] for need in here)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def file_paths(
    directory: Path,
    fingerprints: Mapping[str, str],
    layouts: Mapping[tuple[str, str], tuple[str, str | None]],
    groups: ParallelGroups,
) -> dict[tuple[str, str], Path]:
    """The file of every (teacher, segment) on this rank, the same for all replicas.

    The name depends on the weights' fingerprint and the layout, so a different checkpoint, parallel layout or
    encoding uses a different file.
    """
    collection = groups.collection
    stage = f"pp{collection.pp.rank()}of{collection.pp.size()}"
    dense = f"{stage}-tp{collection.tp.rank()}of{collection.tp.size()}"
    expert = (
        f"{stage}-ep{collection.ep.rank()}of{collection.ep.size()}"
        f"-etp{collection.expt_tp.rank()}of{collection.expt_tp.size()}"
    )
    paths = {}
    for (teacher, segment), layout in layouts.items():
        digest = hashlib.sha256(repr((fingerprints[teacher], layout)).encode()).hexdigest()[:16]
        place = expert if segment == EXPERT else dense
        paths[teacher, segment] = directory / teacher / f"{segment}-{place}-{digest}.weights"
    return paths


def store_once(
    store: Store,
    payloads: Mapping[tuple[str, str], Callable[[], Tensor]],
    groups: ParallelGroups,
) -> None:
    """Put the payloads into the store. One rank writes each file that several ranks read.

    The first replica writes; on hosts that cannot see its file (local disks), the first replica on that host
    does. For files, two barriers over all ranks and an all-gather of host names; otherwise no collective.
    """
    if not isinstance(store, FileStore):
        for key, payload in payloads.items():
            store.put(key, payload())
        return
    replicas = replica_groups(groups)
    hosts: list[str] = [""] * groups.world_size
    dist.all_gather_object(hosts, socket.gethostname())

    def write(writes: Callable[[str], bool]) -> None:
        for key, payload in payloads.items():
            if writes(key[1]) and not store.has(key, (encoded := payload()).numel()):
                store.put(key, encoded)
        dist.barrier()

    def first_of_host(segment: str) -> bool:
        members = dist.get_process_group_ranks(replicas[segment])
        return groups.rank == min(rank for rank in members if hosts[rank] == hosts[groups.rank])

    write(lambda segment: replicas[segment].rank() == 0)
    write(first_of_host)
    for key in payloads:
        store.adopt(key)
