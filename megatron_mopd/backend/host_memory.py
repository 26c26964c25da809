"""Host memory: page-locked buffers of exact size, available memory, and objects that Python's garbage
collector can ignore.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor


def host_buffer(num_bytes: int, device: torch.device) -> Tensor:
    """[num_bytes] uint8 in host memory, page-locked if `device` is a CUDA device.

    torch rounds its pinned allocations up to a power of two, which may double hundreds of gigabytes of
    weights, so ordinary memory is registered with the driver instead.
    """
    buffer = torch.empty(num_bytes, dtype=torch.uint8)
    if device.type == "cuda" and num_bytes:
        runtime = torch.cuda.cudart()
        torch.cuda.check_error(int(runtime.cudaHostRegister(buffer.data_ptr(), num_bytes, 0)))
        weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr())
    return buffer


@contextlib.contextmanager
def long_lived_objects() -> Iterator[None]:
    """Inside the context, Python's garbage collector ignores all objects that exist at its start.

    Modules, models and the run are hundreds of thousands of objects that live as long as the run; a full
    collection over them takes a quarter of a second, and megatron-core triggers one in every save.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def available_host_bytes() -> int:
    """Memory available to processes on this host: the smaller of the kernel's estimate and what is left of
    the cgroup's limit.

    File caches count as available, because the kernel can reclaim them.
    """
    available = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        cached = sum(
            int(line.split()[1])
            for line in (group / "memory.stat").read_text().splitlines()
            if line.split()[0] in ("inactive_file", "active_file")
        )
    except (OSError, ValueError):
        return available  # no cgroup v2, or not readable
    return available if limit == "max" else min(available, int(limit) - used + cached)
