"""How weights arrive while the caller computes: on a stream of their own on CUDA, on a thread on the CPU.

    arrival = arrivals.start(beginnings, finish, free)     # returns at once
    ...                                                    # the resident teacher goes on computing
    arrival.wait()                                         # the caller's next work sees the weights

Who may touch a buffer, and when. An arrival writes into its slot, and encoded weights first into a staging
buffer that all arrivals of a segment share.

    source    host memory or a file: written at start-up, only read from then on
    staging   the arrival's, from its first beginning until `finish` is over; then the next arrival's
    slot      the caller's, until the work before the mark `free`; then the arrival's; the caller's again
              after `wait`

The staging buffer has no mark and no lock: arrivals are strictly one after another, a beginning included. So
everything an arrival does runs in one order, in which the whole of the one before it precedes it:

    CPU             one worker thread runs begin, rest and finish of an arrival before it takes the next.
                    Collectives too are issued there: `start` is called in the same order on all replicas, and
                    nothing else uses their groups.
    CUDA            one stream. A collective runs on NCCL's stream, which waits for what the arrival stream
                    holds when it is issued (the decoding of the arrival before), and the arrival stream waits
                    for it in `rest`.
    CUDA, blocking  the same stream, fed by one worker thread, which never leaves an arrival half fed.

Between caller and arrival there are two hand-overs. The slot goes over with `free`: on CUDA the arrival
stream waits for that event; on the CPU the caller's work is done when `start` is called. It comes back with
`wait`: the caller's stream waits for the event after `finish`, the caller's thread for the worker. Memory
from torch's allocator is ordered on the stream that allocated it: slots and staging buffers are allocated on
the caller's and live as long as the bank, so they need no `record_stream`, but a mark after their allocation;
what decoding allocates comes from the arrival stream's own pool.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

Beginning = Callable[[], Callable[[], None]]
"""Issues a copy or a collective, and returns what waits for it (or does it, where it cannot be issued)."""


@dataclass
class Traffic:
    """What one teacher's arrivals (body and head) cost this rank since the last `take_traffic`."""

    loads: int = 0
    num_bytes: int = 0
    load_seconds: float = 0.0
    wait_seconds: float = 0.0
    """Part of `load_seconds`, or of the queue before it, in which work stood still."""


class Arrival(ABC):
    """Weights on their way into a slot."""

    @abstractmethod
    def wait(self) -> None:
        """Make the caller's further work wait for the weights; raises what went wrong on the way."""

    @abstractmethod
    def seconds(self) -> tuple[float, float]:
        """(how long the arrival took, how long work stood still for it); valid after `wait`."""


class Arrivals(ABC):
    """Where arrivals proceed while the caller goes on."""

    @abstractmethod
    def start(self, beginnings: Sequence[Beginning], finish: Callable[[], None], free: object) -> Arrival:
        """Run every beginning, what they return, and then `finish`, in the background.

        Nothing is written before the work marked by `free` (from `mark`; `None`: nothing) is done, nor before
        the last `start`'s arrival is complete. Called from one thread, on all replicas in the same order.
        """

    @abstractmethod
    def mark(self) -> object:
        """A mark after all work that the caller has started so far."""

    @abstractmethod
    def close(self) -> None:
        """Let what is under way arrive; nothing can start any more."""


def open_arrivals(device: torch.device, blocking: bool) -> Arrivals:
    """The arrivals of a device; `blocking`: what beginnings return occupies a thread (reading files)."""
    return CudaArrivals(device, blocking) if device.type == "cuda" else ThreadArrivals()


class ThreadArrivals(Arrivals):
    """CPU: a worker thread copies, the caller computes."""

    def __init__(self):
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="teacher-arrival")

    def start(self, beginnings, finish, free):
        def work() -> float:
            begun = time.perf_counter()  # time in the queue behind an earlier arrival is not this one's
            _run(beginnings, finish)
            return time.perf_counter() - begun

        return _ThreadArrival(self._worker.submit(work))

    def mark(self):
        return None

    def close(self):
        self._worker.shutdown()


def _run(beginnings: Sequence[Beginning], finish: Callable[[], None]) -> None:
    """All beginnings first, so that the segments of a teacher travel together."""
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
    """CUDA: a stream of its own. The host never waits, except for a thread that still reads files."""

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
