"""The ranks check in with the store before they initialize torch.distributed, which only says that it timed
out.

A rank makes a constant number of requests, and one every `_BETWEEN_LOOKS` seconds while it waits, so that the
store's process can serve thousands of ranks. Only an error costs more: its message names ranks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch.distributed as dist

from megatron_mopd.backend.agreement import ranks_text
from megatron_mopd.config import ConfigError

_ARRIVED = "arrived"
_EVERYONE = "everyone_arrived"
_BETWEEN_LOOKS = 0.05
_LOOKS_PER_SECOND = 10_000
"""Of all ranks together; a store serves several times as many requests."""
_LET_OTHERS_READ = 1.0
"""Seconds."""


def check_in(store: dist.Store, rank: int, world_size: int, timeout_minutes: float, device_type: str) -> None:
    """Wait for all ranks, and check that they compute on the same kind of device: process groups with
    different backends would hang.

    Raises `ConfigError` naming the ranks that are missing after the timeout, or those on each kind of device.
    No collectives.
    """
    announce(store, rank, world_size, device_type)
    deadline = time.monotonic() + 60 * timeout_minutes
    between = max(_BETWEEN_LOOKS, world_size / _LOOKS_PER_SECOND)
    while not store.check([_EVERYONE]):
        left = deadline - time.monotonic()
        if left < 0:
            raise ConfigError(_whom_it_lacks(store, world_size, timeout_minutes))
        time.sleep(min(between, left + 0.001))
    if store.add(f"{_ARRIVED}_on_{device_type}", 0) < world_size:
        if rank == 0:
            time.sleep(_LET_OTHERS_READ)  # the store may end with this process
        types = [kind.decode() for kind in store.multi_get([_key(one) for one in range(world_size)])]
        by_type = {kind: [r for r, t in enumerate(types) if t == kind] for kind in sorted(set(types))}
        found = ", ".join(f"{kind} on {ranks_text(ranks)}" for kind, ranks in by_type.items())
        raise ConfigError(
            f"ranks differ in device: {found}; every rank needs a GPU, or device=cpu on all of them"
        )


def announce(store: dist.Store, rank: int, world_size: int, device_type: str) -> None:
    """This rank's part of the check-in, without waiting: four requests, and one more by the last rank.

    A rank counts once, also if it announces itself again.
    """
    store.set(_key(rank), device_type)
    if store.add(f"{_key(rank)}/times", 1) > 1:
        return
    store.add(f"{_ARRIVED}_on_{device_type}", 1)  # before the total, which is then complete only after it
    if store.add(_ARRIVED, 1) == world_size:
        store.set(_EVERYONE, "")


def _key(rank: int) -> str:
    return f"{_ARRIVED}/{rank}"


def _whom_it_lacks(store: dist.Store, world_size: int, timeout_minutes: float) -> str:
    missing = _missing(store, range(world_size))
    return (
        f"only {world_size - len(missing)} of {world_size} ranks started within "
        f"{timeout_minutes:g} minutes; missing: {', '.join(map(str, missing))}. "
        "Look at their logs, or raise parallel.distributed_timeout_minutes"
    )


def _missing(store: dist.Store, ranks: Sequence[int]) -> list[int]:
    """Those of the ranks that have not announced themselves. By bisection: a request tells whether all of its
    keys exist, and usually few ranks are missing, or all of a host."""
    if store.check([_key(rank) for rank in ranks]):
        return []
    if len(ranks) == 1:
        return list(ranks)
    half = len(ranks) // 2
    return _missing(store, ranks[:half]) + _missing(store, ranks[half:])
