"""Rank 0's end of the lifeline: accepts the other ranks, rejects everything else, and detects lost ranks."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable

from megatron_mopd.backend.handshake import Visitor, Word

HANDSHAKE_SECONDS = 10.0
"""Time limit for the whole handshake of one connection, at either end."""
_STRANGERS = 64
"""Connections that have not joined may outnumber ranks by this many; then the oldest is closed."""
_ACCEPTED_IN_A_TURN = 64


class Reception:
    """Listens on one address until every rank has joined. One thread serves all connections without blocking
    on any."""

    def __init__(self, host: str, key: bytes, world_size: int, lock: threading.Lock):
        """lock: held while the set of open sockets changes. Raises `OSError` if `host` is not this host."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=world_size + _STRANGERS)
        self._listener.setblocking(False)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self.sockets = {self._listener}
        self._key, self._world_size, self._lock = key, world_size, lock
        self._missing, self._finished = set(range(1, world_size)), set()
        self._strangers: dict[socket.socket, Visitor] = {}  # the oldest first
        self._ranks: dict[socket.socket, Visitor] = {}
        self._has_left = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    def serve(self, all_joined: Callable[[], None], lost: Callable[[int], None]) -> None:
        """Runs forever. Calls `all_joined` once; calls `lost` with the number of a rank whose connection
        ended although neither it nor rank 0 had finished, after notifying the others."""
        while True:
            self.take_turn(all_joined, lost)

    def take_turn(self, all_joined: Callable[[], None], lost: Callable[[int], None]) -> None:
        """Wait for the next event and handle it."""
        oldest = next(iter(self._strangers.values()), None)
        left = None if oldest is None else max(0.0, oldest.deadline - time.monotonic())
        ready = {key.fileobj for key, _ in self._selector.select(left)}
        for connection in ready - {self._listener}:
            if visitor := self._ranks.get(connection):
                self._hear_rank(visitor, lost)
            elif visitor := self._strangers.get(connection):  # not closed in this turn
                self._hear_stranger(visitor, all_joined)
        if self._listener in ready and self._missing:
            self._accept()
        while self._strangers:
            oldest = next(iter(self._strangers.values()))
            if oldest.deadline > time.monotonic():
                break
            self._drop(oldest.connection)

    def leave(self) -> None:
        """Declare that rank 0 has finished and may exit before the others. Callable from any thread."""
        with self._lock:
            self._has_left = True
            self._tell(Word.GOODBYE_OF_RANK_0)

    def _hear_rank(self, visitor: Visitor, lost: Callable[[int], None]) -> None:
        try:
            if visitor.hear() is Word.GOODBYE:
                self._finished.add(visitor.rank)
        except OSError:
            self._drop(visitor.connection)
            if visitor.rank not in self._finished and not self._has_left:
                with self._lock:
                    self._tell(Word.DIED)
                lost(visitor.rank)

    def _hear_stranger(self, visitor: Visitor, all_joined: Callable[[], None]) -> None:
        try:
            if visitor.hear() is not Word.JOINED:
                return
        except OSError:
            self._drop(visitor.connection)
            return
        self._missing.discard(visitor.rank)
        notice_a_lost_machine(visitor.connection)
        with self._lock:
            self._ranks[visitor.connection] = self._strangers.pop(visitor.connection)
            if self._has_left:
                with contextlib.suppress(OSError):
                    visitor.say(Word.GOODBYE_OF_RANK_0)
        if not self._missing:
            for connection in [self._listener, *self._strangers]:
                self._drop(connection)
            all_joined()

    def _accept(self) -> None:
        for _ in range(_ACCEPTED_IN_A_TURN):
            try:
                with self._lock:
                    connection, _ = self._listener.accept()
                    self.sockets.add(connection)
            except BlockingIOError:
                return
            except ConnectionError:
                continue
            except OSError:  # out of file descriptors
                if not self._strangers:
                    time.sleep(0.1)
                    return
                self._drop(next(iter(self._strangers)))
                continue
            self._selector.register(connection, selectors.EVENT_READ)
            try:
                visitor = Visitor(connection, self._key, self._world_size, self._missing, HANDSHAKE_SECONDS)
            except OSError:
                self._drop(connection)
                continue
            self._strangers[connection] = visitor
            if len(self._strangers) > self._world_size + _STRANGERS:
                self._drop(next(iter(self._strangers)))

    def _tell(self, word: Word) -> None:
        for visitor in self._ranks.values():
            with contextlib.suppress(OSError):
                visitor.say(word)

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._strangers.pop(connection, None)
        with self._lock:
            self._ranks.pop(connection, None)
            self.sockets.discard(connection)
            connection.close()


def notice_a_lost_machine(connection: socket.socket) -> None:
    """Make the kernel close the connection about 20 seconds after the other machine stops responding."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
