"""Inside a confined process: it imports modules, drops privileges, and forks workers to handle requests.

The started process (the supervisor) never interprets a request. It passes the bytes to a worker, enforces the
time limit, and returns the answer. A late or dead worker is replaced by a fork, which takes milliseconds,
while a new process takes seconds. A worker cannot affect the supervisor: it only holds one pipe in each
direction and cannot send signals.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import signal
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NoReturn

from megatron_mopd.confinement.expressions import Allowed, Evaluations
from megatron_mopd.confinement.frames import Disconnected, pack, receive, send, unpack
from megatron_mopd.confinement.kernel import confine, confine_worker, readable_by_imports

REQUEST = struct.Struct("<d?")
"""Header of packed requests: time limit of each in seconds, and whether each gets a separate worker."""
ANSWERED, LATE, DIED, TOO_LONG = b"a", b"l", b"d", b"t"
LONGEST_REQUEST = 1 << 28
_FOREVER = float("inf")
# A worker is replaced after this many answers, so that the caches of libraries do not accumulate.
_REQUESTS_OF_A_WORKER = 2000
_MORE_THAN_AN_EXPRESSION = b"more than an expression"


@dataclass(frozen=True)
class WorkerLimits:
    """Resource limits of a confined process."""

    memory_bytes: int = 2 << 30
    """Address space of each process, in addition to what it uses after its imports."""
    longest_answer: int = 1 << 12
    """Maximum bytes of JSON in an answer."""


Handlers = Mapping[str, Callable[..., Any]]


def serve(handlers: Handlers, limits: WorkerLimits, *, checks_evaluation: bool) -> NoReturn:
    """Answer requests from standard input until it is closed; the first answer is the `Confinement`.

    A request is a pickled (name of a handler, arguments) from the trainer, which is trusted; an answer is
    JSON: `{"value": ...}`, or `{"error": ...}` if the handler raised. With `checks_evaluation`, a worker
    serves further requests as long as its libraries evaluate only pure expressions (`expressions.Allowed`); a
    request that needs more is retried in a separate worker.
    """
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # keep library output out of the answers
        os.dup2(nothing, descriptor)
    os.set_blocking(requests, False)
    os.set_blocking(replies, False)
    evaluations = Evaluations()
    readable = readable_by_imports()
    os.environ.clear()
    confinement, program = confine(limits.memory_bytes, readable)
    gc.collect()
    gc.freeze()  # prevents copy-on-write of pages in forks just because the collector touches them
    workers = _Workers(handlers, limits, evaluations if checks_evaluation else None, program, requests)
    send(replies, json.dumps(confinement.to_dict()).encode(), _FOREVER)
    with contextlib.suppress(Disconnected):
        while True:
            request = receive(requests, _FOREVER, LONGEST_REQUEST)
            seconds, alone = REQUEST.unpack_from(request)
            answers = workers.answer(unpack(request[REQUEST.size :]), seconds, alone)
            send(replies, pack(answers), _FOREVER)
    workers.end()
    os._exit(0)


class _Workers:
    """The worker that is reused between requests, and those that serve only one."""

    def __init__(
        self,
        handlers: Handlers,
        limits: WorkerLimits,
        evaluations: Evaluations | None,
        program: bytes,
        requests: int,
    ):
        self._handlers, self._limits, self._evaluations = handlers, limits, evaluations
        self._program, self._requests = program, requests
        self._worker: _Worker | None = None

    def answer(self, requests: list[bytes], seconds: float, alone: bool) -> list[bytes]:
        """The reply to each request: its status (one letter), and the answer."""
        outcomes: list[bytes] = []
        while not alone and len(outcomes) < len(requests):
            outcomes += self._in_turn(requests[len(outcomes) :], seconds)
        return [
            self._alone(request, seconds)
            if outcome is None or outcome[1:] == _MORE_THAN_AN_EXPRESSION
            else outcome
            for request, outcome in zip_longest(requests, outcomes)
        ]

    def _in_turn(self, requests: list[bytes], seconds: float) -> list[bytes]:
        """Outcomes of the first requests, up to the one on which the worker fails; at least one."""
        if self._worker is None:
            self._worker = self._fork(_REQUESTS_OF_A_WORKER * seconds, Allowed.PURE_EXPRESSIONS)
        worker, outcomes = self._worker, []
        failure = self._hand_over(worker, requests, seconds)
        while failure is None and len(outcomes) < len(requests):
            outcome = self._await(worker, seconds)
            outcomes.append(outcome)
            failure = None if outcome[:1] == ANSWERED else outcome
        worker.requests += len(outcomes)
        if failure is not None or worker.requests >= _REQUESTS_OF_A_WORKER:
            self.end()
        return outcomes or [failure]

    def _alone(self, request: bytes, seconds: float) -> bytes:
        worker = self._fork(seconds, Allowed.EXPRESSIONS)
        try:
            return self._hand_over(worker, [request], seconds) or self._await(worker, seconds)
        finally:
            worker.end()

    def end(self) -> None:
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def _hand_over(self, worker: _Worker, requests: list[bytes], seconds: float) -> bytes | None:
        try:
            send(worker.requests_to, pack(requests), time.monotonic() + seconds)
        except TimeoutError:
            return LATE
        except Disconnected:
            return DIED
        return None

    def _await(self, worker: _Worker, seconds: float) -> bytes:
        longest = self._limits.longest_answer
        try:
            return ANSWERED + receive(
                worker.replies_from, time.monotonic() + seconds, longest, closes=self._requests
            )
        except TimeoutError:
            return LATE
        except Disconnected:
            return DIED
        except ValueError:
            return TOO_LONG

    def _fork(self, seconds: float, allowed: Allowed) -> _Worker:
        their_requests, requests_to = os.pipe()
        replies_from, their_replies = os.pipe()
        supervisor = os.getpid()
        process = os.fork()
        if process == 0:
            # Everything below ends in os._exit: the worker must never return into its parent's loop.
            try:
                _close_all_but(their_requests, their_replies)
                os.set_blocking(their_requests, False)
                os.set_blocking(their_replies, False)
                confine_worker(seconds, self._program, supervisor)
                self._work(their_requests, their_replies, allowed)
            finally:
                os._exit(1)
        os.close(their_requests)
        os.close(their_replies)
        os.set_blocking(requests_to, False)
        os.set_blocking(replies_from, False)
        return _Worker(process, requests_to, replies_from)

    def _work(self, requests: int, replies: int, allowed: Allowed) -> NoReturn:
        while True:
            for request in unpack(receive(requests, _FOREVER, LONGEST_REQUEST)):
                name, *arguments = pickle.loads(request)
                send(replies, self._handle(name, arguments, allowed), _FOREVER)

    def _handle(self, name: str, arguments: list[Any], allowed: Allowed) -> bytes:
        evaluations = self._evaluations
        if evaluations is not None:
            evaluations.refused, evaluations.allowed = False, allowed
        try:
            answer = {"value": self._handlers[name](*arguments)}
        except BaseException as error:  # `exit()` in an answer, a Rust panic, a raised KeyboardInterrupt
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        if evaluations is not None:
            evaluations.allowed = Allowed.EVERYTHING
            if evaluations.refused and allowed is Allowed.PURE_EXPRESSIONS:
                return _MORE_THAN_AN_EXPRESSION
        return json.dumps(answer).encode()


@dataclass
class _Worker:
    process: int
    requests_to: int
    replies_from: int
    requests: int = 0

    def end(self) -> None:
        """Kill the worker, which has no descendants."""
        os.close(self.requests_to)
        os.close(self.replies_from)
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)


def _close_all_but(*kept: int) -> None:
    """Close all inherited descriptors except the standard ones (connected to /dev/null) and `kept`."""
    start = 3
    for descriptor in sorted(kept):
        os.closerange(start, descriptor)
        start = descriptor + 1
    os.closerange(start, max(start, 4096))
