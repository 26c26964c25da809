"""Counts the bytes that a rank receives in the collectives of torch.distributed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch.distributed as dist

_OTHERS = (
    "all_gather all_gather_into_tensor all_gather_object gather gather_object scatter reduce "
    "reduce_scatter reduce_scatter_tensor all_to_all broadcast_object_list send recv"
).split()


@contextlib.contextmanager
def received_bytes(group: dist.ProcessGroup | None = None) -> Iterator[list[float]]:
    """The bytes that this rank receives in each collective inside the context, of `group` only if given.

    An all-reduce counts as a ring gives it: 2 (n - 1) / n of its size. Other collectives than all-reduces,
    broadcasts and uneven all-to-alls fail, so that none goes uncounted.
    """
    found: list[float] = []
    all_reduce, broadcast, all_to_all = dist.all_reduce, dist.broadcast, dist.all_to_all_single

    def counts(given) -> bool:
        return group is None or given is group

    def counted_all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if counts(group):
            ranks = dist.get_world_size(group)
            found.append(tensor.nbytes * 2 * (ranks - 1) / ranks)
        return all_reduce(tensor, op, group, async_op)

    def counted_broadcast(tensor, src=None, group=None, async_op=False, **options):
        if counts(group) and dist.get_rank() != src:
            found.append(tensor.nbytes)
        return broadcast(tensor, src, group, async_op, **options)

    def counted_all_to_all(output, given, output_split_sizes, input_split_sizes, group=None, **options):
        if counts(group):
            own = output_split_sizes[dist.get_rank(group)]
            found.append((sum(output_split_sizes) - own) * output.element_size())
        return all_to_all(output, given, output_split_sizes, input_split_sizes, group, **options)

    def refused(name):
        original = getattr(dist, name)

        def call(*arguments, **options):
            assert not counts(options.get("group")), f"{name} is not counted"
            return original(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in _OTHERS:
            patch.setattr(dist, name, refused(name))
        patch.setattr(dist, "all_reduce", counted_all_reduce)
        patch.setattr(dist, "broadcast", counted_broadcast)
        patch.setattr(dist, "all_to_all_single", counted_all_to_all)
        yield found
