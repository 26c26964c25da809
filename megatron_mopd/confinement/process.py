"""The trainer's side: starts a confined process, sends it requests, and kills it if necessary."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mopd.confinement.frames import Disconnected, pack, receive, send, unpack
from megatron_mopd.confinement.kernel import Confinement
from megatron_mopd.confinement.server import ANSWERED, DIED, LATE, LONGEST_REQUEST, REQUEST, TOO_LONG

_OUTCOMES = {
    LATE: "no answer within {seconds:g} s",
    DIED: "it used too much memory or time, or died",
    TOO_LONG: "its answer is too long",
}
_START_SECONDS = 120.0
# In addition to its own limit, a request may wait for a fork on a busy machine.
_GRACE_SECONDS = 5.0
_LONGEST_ANSWER = 1 << 26
_PACKAGE_PARENT = Path(__file__).resolve().parents[2]
# The only environment variables that a confined process gets: the paths of its modules and their libraries.
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")


class Unanswered(Exception):
    """A confined process gave no answer: it took too long, or died."""


class HandlerError(Unanswered):
    """A handler raised an error; the text is the error message reported by the worker."""


class ConfinedProcess:
    """A process that runs `module`, which calls `server.serve`; started when first needed, and restarted
    after it had to be killed. Methods may be called from any thread; calls are serialized.
    """

    def __init__(self, module: str):
        self._module = module
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()
        self._confinement: Confinement | None = None
        self._closed = False

    def start(self) -> Confinement:
        """Start the process if it is not running; returns how it is confined. Takes seconds.

        Raises `Unanswered` if it cannot be started.
        """
        with self._lock:
            if self._process is None:
                self._start()
            return self._confinement

    def ask(self, name: str, *arguments: Any, seconds: float, alone: bool = False) -> Any:
        """The result of handler `name` for `arguments`: plain JSON values.

        `seconds`: limit on wall-clock time; for a separate worker, on CPU time too. `alone`: use a worker
        that serves no other request. Raises `Unanswered`. Returns at most a few seconds after the limit,
        whatever the process does.
        """
        (answer,) = self.ask_many([(name, *arguments)], seconds=seconds, alone=alone)
        if isinstance(answer, Unanswered):
            raise answer
        return answer

    def ask_many(
        self, requests: Sequence[tuple[Any, ...]], *, seconds: float, alone: bool = False
    ) -> list[Any | Unanswered]:
        """Like `ask` for each (name, *arguments), one after another, each with its own `seconds`; requests
        without an answer have an `Unanswered` with the reason in its place. Raises `Unanswered` if none can
        be answered.
        """
        message = REQUEST.pack(seconds, alone) + pack([pickle.dumps(request) for request in requests])
        if len(message) > LONGEST_REQUEST:
            raise Unanswered("the request is too long")
        with self._lock:
            if self._process is None:
                self._start()
            deadline = time.monotonic() + seconds * len(requests) + _GRACE_SECONDS
            try:
                send(self._process.stdin.fileno(), message, deadline)
                replies = unpack(receive(self._process.stdout.fileno(), deadline, _LONGEST_ANSWER))
                if len(replies) != len(requests):
                    raise ValueError("not an answer for each request")
            except TimeoutError:
                self._kill()
                raise Unanswered(f"no answer within {seconds:g} s") from None
            except (Disconnected, ValueError):
                self._kill()
                raise Unanswered("the confined process itself died") from None
            except BaseException:  # after Ctrl-C, the answer would be mistaken for the next request's
                self._kill()
                raise
        return [_answer(reply, seconds) for reply in replies]

    def close(self) -> None:
        """Kill the process, if any, permanently: callers waiting for an answer get `Unanswered`."""
        self._closed = True
        if (process := self._process) is not None:
            _kill_all(process)  # without the lock, which a waiting caller holds
        with self._lock:
            if self._process is not None:
                self._kill()

    def _start(self) -> None:
        if self._closed:
            raise Unanswered("it was closed")
        environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        # One thread: do not compete with training for cores, nor use address space for idle threads.
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*sys.path, str(_PACKAGE_PARENT)]))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # can be killed as a group, and does not receive the terminal's Ctrl-C
        )
        for pipe in (self._process.stdin, self._process.stdout):
            os.set_blocking(pipe.fileno(), False)
        try:
            found = receive(self._process.stdout.fileno(), time.monotonic() + _START_SECONDS, 1 << 16)
            fields = json.loads(found)
            self._confinement = Confinement(**{n: v for n, v in fields.items() if n != "missing"})
        except (Disconnected, TimeoutError, ValueError, TypeError):
            self._kill()
            raise Unanswered(
                f"`{sys.executable} -P -m {self._module}` cannot be started; run it by hand to see why"
            ) from None
        except BaseException:
            self._kill()
            raise

    def _kill(self) -> None:
        """Kill the process and all its forks, and close the pipes without blocking."""
        process, self._process = self._process, None
        _kill_all(process)
        for pipe in (process.stdin, process.stdout):
            pipe.close()  # nothing is buffered: all writes go to the descriptor directly
        process.wait()


def _kill_all(process: subprocess.Popen) -> None:
    if process.returncode is None:  # not reaped yet, so the process id is still valid
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)


def examine() -> Confinement:
    """How this machine's kernel can confine processes; starts one for half a second.

    Raises `Unanswered` if none can be started.
    """
    process = ConfinedProcess("megatron_mopd.confinement.nothing")
    try:
        return process.start()
    finally:
        process.close()


def _answer(reply: bytes, seconds: float) -> Any | Unanswered:
    """The value in a reply, which is untrusted and parsed only as JSON, or why there is none."""
    if reply[:1] != ANSWERED:
        return Unanswered(_OUTCOMES.get(reply[:1], "its answer is empty").format(seconds=seconds))
    try:
        fields = json.loads(reply[1:])
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or fields.keys() not in ({"value"}, {"error"}):
        return Unanswered("its answer is not a value")
    return fields["value"] if "value" in fields else HandlerError(str(fields["error"]))
