"""One gloo device for all process groups of a process.

torch gives every gloo group its own device, whose thread wakes up a hundred times per second to poll for
events. megatron-core creates about forty groups per rank: on a machine with few cores their threads take a
noticeable part of the time, and all of it if groups of earlier runs are still referenced.
"""

from __future__ import annotations

import functools
import os
from datetime import timedelta

from torch.distributed import ProcessGroupGloo, Store

_THREADS = 2
"""Threads per group for its collectives, torch's default."""
_init = ProcessGroupGloo.__init__


@functools.cache
def _device(process: int, interface: str | None) -> ProcessGroupGloo.Device:
    """The device of this process. Keyed by process, because a fork inherits the object without its thread."""
    if interface is None:
        return ProcessGroupGloo.create_default_device()
    return ProcessGroupGloo.create_device(interface=interface)


def _init_on_shared_device(
    self: ProcessGroupGloo, store: Store, rank: int, size: int, timeout: timedelta
) -> None:
    """`ProcessGroupGloo.__init__` as torch.distributed calls it. Respects `GLOO_SOCKET_IFNAME`, the
    comma-separated interfaces to use."""
    names = os.environ.get("GLOO_SOCKET_IFNAME")
    options = ProcessGroupGloo._Options()
    options._devices = [_device(os.getpid(), name) for name in (names.split(",") if names else [None])]
    options._threads = _THREADS * len(options._devices)
    options._timeout = timeout
    _init(self, store, rank, size, options)


def share_device() -> None:
    """From now on, gloo groups of this process and its forks use one device per network interface."""
    ProcessGroupGloo.__init__ = _init_on_shared_device
