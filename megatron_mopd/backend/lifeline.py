"""Noticing that another rank's process is gone: `kill -9`, the kernel's out-of-memory killer, a lost machine.

Every rank holds a TCP connection to rank 0. The kernel closes it with the process, however that ends, and a
keep-alive probe closes it when the machine is gone; nothing has to be sent while all is well, and a rank that
is merely slow, stopped or inside one long call is not taken for dead. Without this the others would wait in a
collective or for the rendezvous until its timeout.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading

import torch.distributed as dist

from megatron_mopd.backend.failure import FIRST_FAILURE, is_first_to_fail

_ADDRESS = "megatron_mopd/lifeline"
_TOKEN_BYTES = 16
_CONNECT_SECONDS = 10.0
_GOODBYE = b"g"
_DIED = b"d"
_THE_FAILING_SPEAK = 6.0
"""Seconds for ranks that know of a failure to say so themselves, before this one ends without a word."""
_RANK_0_SPEAKS = 1.0
LIFELINE_NOTICES = 1.0
"""Seconds within which a death is noticed here, once a collective has broken because of it."""


class Lifeline:
    """The connections of one rank, from its making to `release`. No collectives; the store carries rank 0's
    address.

    When a rank ends that has not been released, every other rank ends with status 1, within a second of the
    kernel's closing the connection; unless that rank had said why, the first to notice prints which one it
    was. A network that does not let ranks connect is said once and otherwise no fault: then a death is
    noticed by the launcher or by the collective that waits for it.
    """

    def __init__(self, store: dist.Store | None = None, rank: int = 0, world_size: int = 1):
        self._rank, self._released, self._lock = rank, threading.Event(), threading.Lock()
        self._peers: dict[socket.socket, int] = {}
        self._listener: socket.socket | None = None
        self._gone: set[int] = set()
        self._store: dist.Store | None = None
        if store is None or world_size == 1:
            return
        # A connection of its own: a store waits inside its lock.
        self._store = store.clone()
        if rank == 0:
            self._token = secrets.token_bytes(_TOKEN_BYTES)
            self._listener = socket.create_server(("", 0), backlog=world_size)
            address = f"{_own_address()} {self._listener.getsockname()[1]} {self._token.hex()}"
            self._store.set(_ADDRESS, address)
            threading.Thread(target=self._serve, name="lifeline", daemon=True).start()
        else:
            threading.Thread(target=self._hold, name="lifeline", daemon=True).start()
        atexit.register(self.release)
        # A forked helper process would hold the connections open after its parent's death.
        os.register_at_fork(after_in_child=self._close)

    def connected(self) -> None:
        """torch.distributed is up: from now on failures are told in its store (`failure.FIRST_FAILURE`)."""
        if self._store is not None:
            self._store = dist.distributed_c10d._get_default_store().clone()

    def release(self) -> None:
        """This rank has nothing left to do with the others and may end before them. Safe to call twice."""
        if self._released.is_set():
            return
        self._released.set()
        atexit.unregister(self.release)
        if self._store is None:
            return
        with self._lock:
            for connection in self._peers:
                with contextlib.suppress(OSError):
                    connection.sendall(_GOODBYE)

    def _close(self) -> None:
        self._released.set()
        for connection in filter(None, (self._listener, *self._peers)):
            connection.close()

    def _serve(self) -> None:
        """Rank 0: accept the others, and tell all of them when one is gone."""
        selector = selectors.DefaultSelector()
        selector.register(self._listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is self._listener:
                    if (connection := self._accept()) is not None:
                        selector.register(connection, selectors.EVENT_READ)
                    continue
                rank, word = self._peers[key.fileobj], _receive(key.fileobj)
                if word == _GOODBYE:
                    self._gone.add(rank)
                elif not word:
                    selector.unregister(key.fileobj)
                    with self._lock:
                        del self._peers[key.fileobj]
                        others = list(self._peers)
                    if rank not in self._gone and not self._released.is_set():
                        for other in others:
                            with contextlib.suppress(OSError):
                                other.sendall(_DIED)
                        self._end(rank)

    def _accept(self) -> socket.socket | None:
        connection, _ = self._listener.accept()
        connection.settimeout(_CONNECT_SECONDS)
        try:
            hello = b""
            while len(hello) < _TOKEN_BYTES + 4 and (part := connection.recv(_TOKEN_BYTES + 4 - len(hello))):
                hello += part
        except OSError:
            hello = b""
        if not secrets.compare_digest(hello[:_TOKEN_BYTES], self._token):
            connection.close()  # somebody else's
            return None
        _probe(connection)
        with self._lock:
            self._peers[connection] = int.from_bytes(hello[_TOKEN_BYTES:], "big")
            if self._released.is_set():
                with contextlib.suppress(OSError):
                    connection.sendall(_GOODBYE)
        return connection

    def _hold(self) -> None:
        """Every other rank: connect to rank 0 and wait for a word that never comes while all is well."""
        try:
            host, port, token = self._store.get(_ADDRESS).decode().split()
            connection = socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS)
        except (OSError, RuntimeError, ValueError) as error:  # DistError is a RuntimeError
            if not self._released.is_set():
                print(f"rank {self._rank}: the death of other ranks will not be noticed: {error}", flush=True)
            return
        _probe(connection)
        with self._lock:
            with contextlib.suppress(OSError):
                connection.sendall(bytes.fromhex(token) + self._rank.to_bytes(4, "big"))
                self._peers[connection] = 0
                if self._released.is_set():
                    connection.sendall(_GOODBYE)
        word = _receive(connection)
        if word != _GOODBYE and not self._released.is_set():
            self._end(None if word == _DIED else 0)

    def _end(self, dead: int | None) -> None:
        """End this process because another is gone. None: rank 0 knows which, and says so."""
        what = f"rank {dead} is gone (killed, or out of memory), unless it says why itself"
        try:
            is_told = self._store.check([FIRST_FAILURE])
            what = f"rank {dead} died without a word (killed, or out of memory: see its machine's kernel log)"
        except RuntimeError:
            is_told = False  # whoever kept the store is gone
        if is_told or dead is None:
            if not self._released.wait(_THE_FAILING_SPEAK if is_told else _RANK_0_SPEAKS):
                _leave()
            return
        message = f"error: {what}; the same command continues from the last checkpoint"
        if is_first_to_fail(message, self._store):
            print(message, file=sys.stderr, flush=True)
        _leave()


def _own_address() -> str:
    """Where other ranks reach this one: the interface that leads to the store, or the store's own name when
    it is on this machine."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # of a datagram socket: chooses the interface, sends nothing
        if probe.getsockname()[0] != probe.getpeername()[0]:
            return probe.getsockname()[0]
    return host


def _probe(connection: socket.socket) -> None:
    """Wait for ever, but notice a machine that is gone within about 20 seconds."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1)
    except OSError:
        return b""


def _leave() -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(1)
