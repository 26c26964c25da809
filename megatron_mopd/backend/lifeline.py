"""Noticing that another rank's process is gone: `kill -9`, the kernel's out-of-memory killer, a lost machine.

Every rank holds a TCP connection to rank 0. The kernel closes it with the process, however that ends, and a
keep-alive probe closes it when the machine is gone; nothing has to be sent while all is well, and a rank that
is merely slow, stopped or inside one long call is not taken for dead. Without this the others would wait in a
collective or for the rendezvous until its timeout.

Only ranks count: both ends of a connection prove that they know the job's key (`handshake`). Whatever anybody
else connects, says or closes has no effect.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import sys
import threading
import time

import torch.distributed as dist

from megatron_mopd.backend import handshake
from megatron_mopd.backend.failure import FIRST_FAILURE, is_first_to_fail
from megatron_mopd.backend.handshake import Session, Word
from megatron_mopd.backend.job_secret import (
    JOB_SECRET,
    new_key,
    read_private_file,
    take_job_secret,
    write_private_file,
)
from megatron_mopd.backend.launch_environment import Launch, read_launch
from megatron_mopd.backend.messages import visible
from megatron_mopd.backend.network import loopback_address, own_address
from megatron_mopd.backend.reception import HANDSHAKE_SECONDS, Reception, notice_a_lost_machine

_ADDRESS = "megatron_mopd/lifeline"
"""Key of the store: rank 0's address, its port, and where the job's key is."""
_IN_THE_ENVIRONMENT = "environment"
_JOIN_SECONDS = 60.0
"""For all of a rank's attempts to join, once rank 0 has announced itself."""
_BETWEEN_ATTEMPTS = 1.0
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

    Rank 0 listens on one address, loopback when all ranks are on its host, until all have joined. The job's
    key is `MOPD_JOB_SECRET`; without that, on one host, in a private file of rank 0's; on several, in the
    store, and rank 0 says so. Raises `ConfigError` for a secret that is too short.
    """

    def __init__(self, store: dist.Store | None = None, rank: int = 0, world_size: int = 1):
        self._secret = take_job_secret(os.environ)
        self._rank, self._world_size = rank, world_size
        self._released, self._lock = threading.Event(), threading.Lock()
        self._reception: Reception | None = None  # on rank 0
        self._connection: socket.socket | None = None  # on the others
        self._session: Session | None = None  # once this rank has joined
        self._key_file: str | None = None
        self._store: dist.Store | None = None
        if store is None or world_size == 1:
            return
        # A connection of its own: a store waits inside its lock.
        self._store = store.clone()
        launch = read_launch(os.environ)
        if rank == 0:
            self._receive(launch)
        else:
            threading.Thread(target=self._hold, args=(launch,), name="lifeline", daemon=True).start()
        atexit.register(self.release)
        # A forked helper process would hold the connections open after its parent's death.
        os.register_at_fork(
            before=self._lock.acquire, after_in_parent=self._lock.release, after_in_child=self._close
        )

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
        if self._reception is not None:
            self._reception.leave()
        with self._lock, contextlib.suppress(OSError):
            if self._session is not None:
                self._connection.sendall(self._session.say(Word.GOODBYE))
        self._remove_key_file()

    def _close(self) -> None:
        """In a forked process, which has the lock from before the fork."""
        self._released.set()
        sockets = self._reception.sockets if self._reception is not None else {self._connection}
        for connection in sockets - {None}:
            connection.close()
        self._lock.release()

    def _receive(self, launch: Launch) -> None:
        """Rank 0: announce where the others find it, and let them in."""
        key, place = self._secret or new_key(), _IN_THE_ENVIRONMENT
        try:
            if self._secret is None and launch.is_on_one_host:
                place = self._key_file = write_private_file(key)
            host = loopback_address() if launch.is_on_one_host else own_address(launch.master[0], os.environ)
            self._reception = Reception(host, key, self._world_size, self._lock)
        except OSError as error:
            self._say_unnoticed(error)
            return
        if self._secret is None and not launch.is_on_one_host:
            place = key.hex()
            print(
                f"warning: {JOB_SECRET} is not set: whoever reaches the rendezvous can imitate a rank and "
                "end this job; set it to the same random text on every node (docs/cluster.md)",
                flush=True,
            )
        host, port = self._reception.address
        self._store.set(_ADDRESS, f"{host} {port} {place}")
        arguments = (self._remove_key_file, self._end)
        threading.Thread(target=self._reception.serve, args=arguments, name="lifeline", daemon=True).start()

    def _hold(self, launch: Launch) -> None:
        """Every other rank: join rank 0 and wait for a word that never comes while all is well."""
        deadline = None
        while self._session is None and not self._released.is_set():
            try:
                announced = self._store.get(_ADDRESS)
            except RuntimeError as error:  # DistError is one
                self._say_unnoticed(error)
                return
            deadline = deadline or time.monotonic() + _JOIN_SECONDS
            try:
                self._join(announced.decode(), launch)
            except (OSError, ValueError, OverflowError) as error:
                if time.monotonic() > deadline:
                    self._say_unnoticed(error)
                    return
                self._released.wait(_BETWEEN_ATTEMPTS)
        if self._session is None:
            return
        word = handshake.hear(self._connection, self._session)
        if word is not Word.GOODBYE_OF_RANK_0 and not self._released.is_set():
            self._end(None if word is Word.DIED else 0)

    def _join(self, announced: str, launch: Launch) -> None:
        host, port, place = announced.split(maxsplit=2)
        if (key := self._secret) is None and place == _IN_THE_ENVIRONMENT:
            raise ValueError(f"rank 0 has {JOB_SECRET} and this rank has not; set it on every node")
        if key is None:
            key = read_private_file(place) if launch.is_on_one_host else bytes.fromhex(place)
        family, kind, _, _, address = socket.getaddrinfo(
            host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )[0]
        with self._lock:
            connection = self._connection = socket.socket(family, kind)
        try:
            connection.settimeout(HANDSHAKE_SECONDS)
            connection.connect(address)
            session = handshake.introduce(connection, key, self._rank, self._world_size, HANDSHAKE_SECONDS)
            notice_a_lost_machine(connection)
            connection.settimeout(None)
            with self._lock:
                if not self._released.is_set():
                    connection.sendall(session.say(Word.JOINED))
                    self._session = session
        finally:
            if self._session is None:
                with self._lock:
                    connection.close()

    def _say_unnoticed(self, why: Exception) -> None:
        if not self._released.is_set():
            text = f"rank {self._rank}: the death of other ranks will not be noticed: {why}"
            print(visible(text), flush=True)

    def _remove_key_file(self) -> None:
        path, self._key_file = self._key_file, None
        if path is not None:
            with contextlib.suppress(OSError):
                os.unlink(path)

    def _end(self, dead: int | None) -> None:
        """End this process because another is gone. None: rank 0 knows which, and says so."""
        self._remove_key_file()
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


def _leave() -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(1)
