"""Loads weights while the caller computes: on a separate stream on CUDA, on a thread on the CPU.

    arrival = arrivals.start(beginnings, finish, free)     # returns immediately
    ...                                                    # the resident teacher keeps computing
    arrival.wait()                                         # the caller's next work sees the weights

Buffer ownership. An arrival writes into its slot; encoded weights first go into a staging buffer that all
arrivals of a segment share.

    source    host memory or a file: written at start-up, read-only afterwards
    staging   owned by the arrival from its first beginning until `finish` returns; then by the next arrival
    slot      owned by the caller up to the mark `free`; then by the arrival; after `wait` by the caller again

The staging buffer has no mark and no lock, because arrivals, including their beginnings, are strictly
sequential: every operation of an arrival runs after all operations of the previous one.

    CPU             one worker thread runs begin, rest and finish of an arrival before it takes the next. It
                    also issues collectives: `start` is called in the same order on all replicas, and nothing
                    else uses their groups.
    CUDA            one stream. A collective runs on NCCL's stream, which waits for what the arrival stream
                    holds when it is issued (decoding of the previous arrival), and the arrival stream waits
                    for it in `rest`.
    CUDA, blocking  the same stream, fed by one worker thread, which enqueues each arrival completely.

Ownership of the slot changes twice. `free` passes it to the arrival: on CUDA the arrival stream waits for
that event; on the CPU the caller's work is complete when `start` is called. `wait` returns it: the caller's
stream waits for the event after `finish`, or the caller's thread for the worker. Memory from torch's
allocator is ordered on the stream that allocated it: slots and staging buffers are allocated on the caller's
stream and live as long as the bank, so they need a mark after their allocation but no `record_stream`;
decoding allocates from the arrival stream's own pool.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

Beginning = Callable[[], Callable[[], None]]
"""Issues a copy or a collective and returns a callable that waits for it (or performs it, if it cannot be
issued asynchronously)."""


@dataclass
class Traffic:
    """Cost of one teacher's arrivals (body and head) on this rank since the last `take_traffic`."""

    loads: int = 0
    num_bytes: int = 0
    load_seconds: float = 0.0
    wait_seconds: float = 0.0
    """Part of `load_seconds`, or of the queueing time before it, in which work was blocked."""


class Arrival(ABC):
    """An asynchronous load of weights into a slot."""

    @abstractmethod
    def wait(self) -> None:
        """Make the caller's further work wait for the weights; re-raises errors of the load."""

    @abstractmethod
    def seconds(self) -> tuple[float, float]:
        """(duration of the arrival, time that work was blocked on it); valid after `wait`."""


class Arrivals(ABC):
    """Runs arrivals in the background."""

    @abstractmethod
    def start(self, beginnings: Sequence[Beginning], finish: Callable[[], None], free: object) -> Arrival:
        """Run every beginning, the callables they return, and then `finish`, in the background.

        Nothing is written before the work marked by `free` (from `mark`; `None`: no work) and the previous
        arrival are complete. Called from one thread, on all replicas in the same order.
        """

    @abstractmethod
    def mark(self) -> object:
        """A mark after all work that the caller has started so far."""

    @abstractmethod
    def close(self) -> None:
        """Wait for pending arrivals; no arrival can be started afterwards."""


def open_arrivals(device: torch.device, blocking: bool) -> Arrivals:
    """The arrivals of a device; `blocking`: the callables that beginnings return block a thread (reading
    files)."""
    return CudaArrivals(device, blocking) if device.type == "cuda" else ThreadArrivals()


class ThreadArrivals(Arrivals):
    """CPU: a worker thread copies while the caller computes."""

    def __init__(self):
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="teacher-arrival")

    def start(self, beginnings, finish, free):
        def work() -> float:
            begun = time.perf_counter()  # excludes time in the queue behind an earlier arrival
            _run(beginnings, finish)
            return time.perf_counter() - begun

        return _ThreadArrival(self._worker.submit(work))

    def mark(self):
        return None

    def close(self):
        self._worker.shutdown()


def _run(beginnings: Sequence[Beginning], finish: Callable[[], None]) -> None:
    """Issue all beginnings first, so that the segments of a teacher are transferred concurrently."""
    for rest in [begin() for begin in beginnings]:
        rest()
    finish()


class _ThreadArrival(Arrival):
    def __init__(self, work: Future):
        self._work = work
        self._waited: float | None = None

    def wait(self):
        started = time.perf_counter()
        self._work.result()
        if self._waited is None:
            self._waited = time.perf_counter() - started

    def seconds(self):
        return self._work.result(), self._waited or 0.0


class CudaArrivals(Arrivals):
    """CUDA: a separate stream. The host never waits, except for a thread that is still reading files."""

    def __init__(self, device: torch.device, blocking: bool):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="teacher-arrival") if blocking else None

    def start(self, beginnings, finish, free):
        started = torch.cuda.Event(enable_timing=True)
        arrived = torch.cuda.Event(enable_timing=True)

        def work() -> None:
            torch.cuda.set_device(self._device)  # the current device and stream belong to the thread
            with torch.cuda.stream(self._stream):
                if free is not None:
                    self._stream.wait_event(free)
                started.record(self._stream)
                _run(beginnings, finish)
                arrived.record(self._stream)

        if self._worker is not None:
            return _CudaArrival(self._worker.submit(work), started, arrived)
        work()
        return _CudaArrival(None, started, arrived)

    def mark(self):
        return torch.cuda.current_stream(self._device).record_event()

    def close(self):
        if self._worker is not None:
            self._worker.shutdown()
        self._stream.synchronize()


class _CudaArrival(Arrival):
    def __init__(self, work: Future | None, started, arrived):
        self._work, self._started, self._arrived = work, started, arrived
        self._before: torch.cuda.Event | None = None
        self._after: torch.cuda.Event | None = None

    def wait(self):
        stream = torch.cuda.current_stream()
        before = torch.cuda.Event(enable_timing=True)
        before.record(stream)
        if self._work is not None:
            self._work.result()
        stream.wait_event(self._arrived)
        if self._before is None:
            after = torch.cuda.Event(enable_timing=True)
            after.record(stream)
            self._before, self._after = before, after

    def seconds(self):
        self._arrived.synchronize()
        if self._after is None:
            return self._started.elapsed_time(self._arrived) / 1e3, 0.0
        self._after.synchronize()
        return (
            self._started.elapsed_time(self._arrived) / 1e3,
            self._before.elapsed_time(self._after) / 1e3,
        )
