"""Host memory: page-locked buffers of exactly the size asked for, how much a job may still take, and what
Python's garbage collector need not look at.
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
    """[num_bytes] uint8 in host memory, page-locked where `device` is a CUDA device.

    torch's own pinned allocations are rounded up to a power of two, which for hundreds of gigabytes of
    weights may be as much again; ordinary memory is registered with the driver instead.
    """
    buffer = torch.empty(num_bytes, dtype=torch.uint8)
    if device.type == "cuda" and num_bytes:
        runtime = torch.cuda.cudart()
        torch.cuda.check_error(int(runtime.cudaHostRegister(buffer.data_ptr(), num_bytes, 0)))
        weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr())
    return buffer


@contextlib.contextmanager
def long_lived_objects() -> Iterator[None]:
    """Within, Python's garbage collector leaves alone what is there at the start: modules, models, the run.

    Hundreds of thousands of objects that live as long as the run; a full collection over them takes a quarter
    of a second, and megatron-core asks for one in every save.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def available_host_bytes() -> int:
    """Memory that processes on this host may still take: the kernel's estimate, or the control group's rest.

    The smaller of the two; file caches count as available, because the kernel gives them up.
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
        return available  # no control group of version 2, or not ours to read
    return available if limit == "max" else min(available, int(limit) - used + cached)
