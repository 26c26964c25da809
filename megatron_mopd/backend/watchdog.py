"""A thread that detects when this rank hangs or another rank has failed.

A rank hangs if it starts no new phase for the configured time. Every rank then prints its phase, its current
pipeline instruction and its stack, and the job ends. If another rank failed, this rank may be waiting for it
in a collective: it writes its stack into the run directory and exits without an error message, so that the
failing rank's message is the last one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from megatron_mopd.backend.failure import FIRST_FAILURE, is_first_to_fail
from megatron_mopd.backend.messages import visible

_HANG = "megatron_mopd/hang"
_POLL = 1.0
"""Seconds between polls of the store: one small request per rank."""
_OTHERS_SPEAK = 3.0
"""Seconds between detecting a hang and exiting, in which all other ranks detect it and print their stacks."""
_UNRESPONSIVE = 15.0
"""Seconds after the timeout when the process exits even if no Python thread can run."""


class Watchdog(contextlib.AbstractContextManager):
    """Watches the thread that created it, between `__enter__` and `__exit__`.

    timeout: seconds a phase may last; 0 watches only for other ranks' failures. directory: where stacks are
    written. No collectives; polls the store.
    """

    def __init__(self, timeout: float, directory: Path):
        self._timeout, self._directory = timeout, directory
        self._thread = threading.get_ident()
        self._phase, self._since = "start", time.monotonic()
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._rank, self._store = 0, None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._rank = dist.get_rank()
            # A separate connection, because a store holds its lock while it waits.
            self._store = dist.distributed_c10d._get_default_store().clone()

    def __enter__(self) -> Watchdog:
        self.begin(self._phase)
        self._watcher.start()
        return self

    def __exit__(self, *exception) -> None:
        self._closed.set()
        if self._timeout:
            faulthandler.cancel_dump_traceback_later()
        if exception[0] is None:
            self._watcher.join()

    def begin(self, phase: str) -> None:
        """Report progress: a new phase starts now."""
        self._phase, self._since = phase, time.monotonic()
        if self._timeout:  # last resort, in case something holds the GIL
            faulthandler.dump_traceback_later(
                self._timeout + _UNRESPONSIVE, exit=True, file=sys.__stderr__ or sys.stderr
            )

    def _watch(self) -> None:
        while not self._closed.wait(min(_POLL, self._timeout / 4 or _POLL)):
            stood = time.monotonic() - self._since
            if self._timeout and stood > self._timeout:
                self._end_hang(f"no progress for {stood:.0f} s")
            if self._store is None:
                continue
            try:
                hang, failure = self._store.check([_HANG]), self._store.check([FIRST_FAILURE])
            except (dist.DistError, RuntimeError):
                hang, failure = False, not self._closed.is_set()  # the store's owner has exited
            if hang:
                self._end_hang("another rank is hung")
            if failure:
                self._end_quietly()

    def _end_hang(self, reason: str) -> None:
        text = f"WATCHDOG: rank {self._rank}: {reason}; {self.where()}"
        if self._store is not None:
            with contextlib.suppress(dist.DistError, RuntimeError):
                self._store.set(_HANG, str(self._rank))
        self._write(text)
        print(text, file=sys.stderr, flush=True)
        time.sleep(_OTHERS_SPEAK)
        message = (
            f"error: the run made no progress for guard.hang_timeout_minutes={self._timeout / 60:g} (phase "
            f"{self._phase!r}): every rank's stack is above and in {self._directory}; a rank that is missing "
            "there is the one that stopped"
        )
        if is_first_to_fail(message):
            print(message, file=sys.stderr, flush=True)
        os._exit(1)

    def _end_quietly(self) -> None:
        where = self.where()
        if self._closed.wait(_OTHERS_SPEAK):
            return  # this rank failed as well and reports it itself
        self._write(f"rank {self._rank}: another rank failed; {where}")
        sys.stdout.flush()
        os._exit(1)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._directory.mkdir(parents=True, exist_ok=True)
            (self._directory / f"rank_{self._rank}.txt").write_text(text + "\n")

    def where(self) -> str:
        """Phase, pipeline instruction and stack of the watched thread."""
        frame = sys._current_frames().get(self._thread)
        instruction = _instruction(frame)
        at = f", instruction {instruction}" if instruction else ""
        stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
        return visible(f"phase {self._phase!r}{at}, at\n{stack}", keep_lines=True)


def _instruction(frame: FrameType | None) -> str | None:
    """The current instruction of `pipeline.runtime.Execution`, read from the frame that runs it."""
    while frame is not None:
        variables = frame.f_locals if frame.f_code.co_name == "_execute_instruction" else {}
        if {"self", "position", "entry"} <= variables.keys():
            stage = variables["self"].stage
            return f"{variables['position']} of stage {stage} ({variables['entry']})"
        frame = frame.f_back
    return None
