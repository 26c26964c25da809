"""Process groups that only their members create.

`torch.distributed.new_group` by default has to be called by every rank of the run for every group. A layout
of thousands of ranks has thousands of groups, of which a rank belongs to about twenty: each call costs a rank
that is not a member a little, and with NCCL, whose world communicator then has to be split, a collective over
the whole run. Here only the members take part, so that the calls of a rank do not depend on how many others
there are.

torch's own way to do this, `use_local_synchronization`, has two restrictions that are lifted here:

- It names a group by its ranks and by the number of groups that this process has. Members that differ in
  that number (only the first and the last pipeline stage have an embedding group) look for each other under
  different names and wait until the timeout, and a name that is used again after its group was destroyed
  leads to the addresses of the old one.
- With a device bound to the world (`init_process_group(device_id=...)`), NCCL's communicator of a group is
  split from the world's, which is collective over the world. Instead, the members build a communicator of
  their own, at once, on the same device.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import distributed_c10d

_new_group = dist.new_group


def new_group(
    ranks: Sequence[int],
    timeout: timedelta | None = None,
    backend: str | None = None,
    group_desc: str | None = None,
    **settings,
) -> dist.ProcessGroup | None:
    """A new group of these ranks, in ascending order; `None`, at no cost, on a rank that is not among them.

    Collective over `ranks` alone. All ranks must create the groups that they share in the same order, as one
    group may have to wait for the creation of another. settings: further arguments of `dist.new_group`. One
    request to the store, of about 100 bytes, besides those of the backend.
    """
    rank = dist.get_rank()
    if rank not in ranks:
        return None
    with _named(_unused_name(ranks, rank)), _world_without_device() as device:
        return _new_group(
            list(ranks),
            timeout=timeout,
            backend=backend,
            group_desc=group_desc,
            use_local_synchronization=True,
            **{"device_id": device} | settings,
        )


@contextlib.contextmanager
def only_own_groups() -> Iterator[None]:
    """In this block, megatron-core's loops over all groups of a layout create those of this rank, with the
    function above."""
    rank, create = dist.get_rank(), parallel_state.create_group

    def create_own(ranks: Sequence[int], **settings) -> dist.ProcessGroup | None:
        return create(ranks, **settings) if rank in ranks else None

    def of_members(ranks: Sequence[int], use_local_synchronization: bool, **settings):
        return new_group(ranks, **settings)

    with _replaced(parallel_state, "create_group", create_own), _replaced(dist, "new_group", of_members):
        yield


def _unused_name(ranks: Sequence[int], rank: int) -> str:
    """The same name on all members, which no earlier group had.

    It numbers the groups of exactly these ranks: every member has created all earlier ones. The counts are in
    the store, so they are as old as the names that the store knows.
    """
    digest = hashlib.sha256(repr(sorted(ranks)).encode()).hexdigest()[:32]
    number = distributed_c10d._get_default_store().add(f"megatron_mopd/groups/{digest}/{rank}", 1)
    return f"members-{digest}-{number}"


def _named(name: str):
    """The next group that is created in the block gets this name."""
    return _replaced(distributed_c10d, "_process_group_name", lambda ranks, use_hashed_name: name)


@contextlib.contextmanager
def _world_without_device() -> Iterator:
    """The device bound to the world, which in this block is bound to none: torch then splits nothing."""
    world = dist.group.WORLD
    device = world.bound_device_id
    world.bound_device_id = None
    try:
        yield device
    finally:
        world.bound_device_id = device


@contextlib.contextmanager
def _replaced(module, name: str, replacement) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, replacement)
    try:
        yield
    finally:
        setattr(module, name, original)
