"""megatron-core on CPU and gloo.

megatron-core assumes CUDA in a few dozen places: device arguments, streams, the CUDA random generator, tensor
type names. `install()` replaces each of them with its CPU equivalent, once per process; on CUDA machines it
is never called and nothing is patched. This file, `gloo.py` and `versions.py` are the only places in this
package that patch another library; `overrides.py` changes attributes of a model temporarily.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os

import torch
import torch.distributed
from megatron.core.tensor_parallel import random as megatron_random
from torch.utils._device import _device_constructors

from megatron_mopd.backend.gloo import share_device

_CPU = torch.device("cpu")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
_installed = False


class _Stream:
    """The interface of a CUDA stream on a device where everything runs in order."""

    def __init__(self, *args, **kwargs):
        self.device = _CPU

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return event or _Event()

    def synchronize(self):
        pass

    def query(self):
        return True


class _Event:
    """A CUDA event that has always completed."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0


def _names_cuda(device) -> bool:
    return str(device).startswith("cuda") or isinstance(device, int)


def _on_cpu(factory):
    """Make `torch.zeros(..., device="cuda")` and similar factories create CPU tensors, without pinning."""

    @functools.wraps(factory)
    def wrapper(*args, **kwargs):
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return wrapper


def _all_to_all_single(original):
    """gloo needs split sizes as lists of int, but the MoE token dispatcher passes tensors."""

    @functools.wraps(original)
    def wrapper(output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
        def as_list(sizes):
            return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes

        return original(
            output,
            input,
            as_list(output_split_sizes),
            as_list(input_split_sizes),
            group=group,
            async_op=async_op,
        )

    return wrapper


def _all_gather(original):
    """gloo needs equal shapes, but experts sharded over tensor-parallel ranks gather unequal row counts."""

    @functools.wraps(original)
    def wrapper(tensor_list, tensor, group=None, async_op=False):
        rows = [t.size(0) if t.dim() else 0 for t in tensor_list]
        if async_op or min(rows) == max(rows):
            return original(tensor_list, tensor, group=group, async_op=async_op)
        padded = tensor.new_zeros((max(rows), *tensor.shape[1:]))
        padded[: tensor.size(0)] = tensor
        gathered = [torch.empty_like(padded) for _ in rows]
        original(gathered, padded, group=group)
        for target, source in zip(tensor_list, gathered):
            target.copy_(source[: target.size(0)])

    return wrapper


def _reduce_scatter(original):
    """gloo has no reduce-scatter of unequal parts: all-reduce everything and keep this rank's part."""

    @functools.wraps(original)
    def wrapper(output, input_list, op=torch.distributed.ReduceOp.SUM, group=None, async_op=False):
        rows = [t.size(0) if t.dim() else 0 for t in input_list]
        if async_op or min(rows) == max(rows):
            return original(output, input_list, op=op, group=group, async_op=async_op)
        everything = torch.cat(input_list)
        torch.distributed.all_reduce(everything, op=op, group=group)
        output.copy_(everything.split(rows)[torch.distributed.get_rank(group)])

    return wrapper


def _tensor_type(original):
    """Optimizers compare `param.type()` with CUDA type names; treat float64 parameters like float32."""

    @functools.wraps(original)
    def wrapper(self, dtype=None, non_blocking=False, **kwargs):
        if dtype is not None:
            return original(self, dtype, non_blocking, **kwargs)
        name = original(self).replace("torch.DoubleTensor", "torch.FloatTensor")
        return name.replace("torch.", "torch.cuda.", 1)

    return wrapper


def _get_rng_state(*args, **kwargs):
    return torch.get_rng_state()


def _set_rng_state(state, *args, **kwargs):
    torch.set_rng_state(state)


def _keep_freed_memory() -> None:
    """Let the C library keep up to 1 GB of memory freed by large temporary tensors for the next ones.

    Memory returned to the system comes back as zeroed pages with one page fault per 4 KB, which costs a few
    percent of the time for a model of 100 million parameters. Affects only glibc; `MALLOC_*` environment
    variables take precedence.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the maximum it accepts
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def install() -> None:
    """Replace megatron-core's CUDA calls with CPU equivalents in this process. Idempotent."""
    global _installed
    if _installed:
        return
    _installed = True
    _keep_freed_memory()
    share_device()

    # `with torch.device("meta")` recognizes factories by identity, and looks them up on first use: it must
    # find the originals, which the wrappers below call. (`transformers` loads models under it; with wrappers
    # in its list, its rotary tables were left uninitialized.)
    _device_constructors()
    for name in (
        "zeros",
        "ones",
        "empty",
        "full",
        "tensor",
        "arange",
        "zeros_like",
        "ones_like",
        "empty_like",
        "rand",
    ):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.type = _tensor_type(torch.Tensor.type)

    cuda = torch.cuda
    stream = _Stream()
    cuda.current_device = lambda: _CPU
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = lambda device=None: stream
    cuda.stream = lambda stream=None: contextlib.nullcontext()
    cuda.device_count = lambda: 0
    for counter in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, counter, lambda device=None: 0)
    cuda.reset_peak_memory_stats = lambda device=None: None
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args, **kwargs: None
    cuda.manual_seed = cuda.manual_seed_all = lambda seed: torch.default_generator.manual_seed(seed) and None
    cuda.get_rng_state = cuda.random.get_rng_state = _get_rng_state
    cuda.set_rng_state = cuda.random.set_rng_state = _set_rng_state
    # Dropout on the CPU advances the CPU generator, about which megatron-core would warn.
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)
    megatron_random._get_cuda_rng_state = _get_rng_state
    megatron_random._set_cuda_rng_state = _set_rng_state

    torch.distributed.all_to_all_single = _all_to_all_single(torch.distributed.all_to_all_single)
    torch.distributed.all_gather = _all_gather(torch.distributed.all_gather)
    torch.distributed.reduce_scatter = _reduce_scatter(torch.distributed.reduce_scatter)
    # megatron-core decorates small functions with torch.compile, which costs minutes on the CPU and saves
    # nothing.
    torch.compiler.set_stance("force_eager")
