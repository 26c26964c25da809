"""Detects the death of another rank's process: `kill -9`, the kernel's out-of-memory killer, a lost machine.

Every rank holds a TCP connection to rank 0. The kernel closes it when the process ends, for whatever reason,
and a keep-alive probe closes it when the machine is lost. No traffic is needed in normal operation, and a
rank that is merely slow, stopped or inside a long call does not count as dead. Without this, the others would
wait in a collective or for the rendezvous until its timeout.

Both ends of a connection prove that they know the job's key (`handshake`), so connections from anything but
ranks have no effect.
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
"""Store key for rank 0's address, its port, and the location of the job's key."""
_IN_THE_ENVIRONMENT = "environment"
_JOIN_SECONDS = 60.0
"""Time limit for all of a rank's attempts to join, once rank 0 has announced its address."""
_BETWEEN_ATTEMPTS = 1.0
_THE_FAILING_SPEAK = 6.0
"""Seconds in which failing ranks can report the reason, before this rank exits without an error message."""
_RANK_0_SPEAKS = 1.0
LIFELINE_NOTICES = 1.0
"""Seconds within which this rank detects a death that has made a collective fail."""


class Lifeline:
    """The connections of one rank, from construction to `release`. No collectives; the store holds rank 0's
    address.

    If a rank ends without having been released, every other rank exits with status 1 within a second of the
    kernel closing the connection; unless that rank reported the reason, the first to detect it prints which
    rank died. If the network does not let ranks connect, this is reported once but is not an error: a death
    is then detected by the launcher or by a collective's timeout.

    Rank 0 listens on one address, loopback if all ranks are on its host, until all have joined. The job's key
    is `MOPD_JOB_SECRET`; without it, the key is in a private file of rank 0 on a single host, or in the store
    on several hosts, for which rank 0 prints a warning. Raises `ConfigError` for a secret that is too short.
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
        # A separate connection, because a store holds its lock while it waits.
        self._store = store.clone()
        launch = read_launch(os.environ)
        if rank == 0:
            self._receive(launch)
        else:
            threading.Thread(target=self._hold, args=(launch,), name="lifeline", daemon=True).start()
        atexit.register(self.release)
        # A forked helper process would keep the connections open after its parent's death.
        os.register_at_fork(
            before=self._lock.acquire, after_in_parent=self._lock.release, after_in_child=self._close
        )

    def connected(self) -> None:
        """torch.distributed is initialized: failures are now recorded in its store
        (`failure.FIRST_FAILURE`)."""
        if self._store is not None:
            self._store = dist.distributed_c10d._get_default_store().clone()

    def release(self) -> None:
        """Declare that this rank has finished and may exit before the others. Safe to call twice."""
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
        """Close all sockets in a forked process, which holds the lock acquired before the fork."""
        self._released.set()
        sockets = self._reception.sockets if self._reception is not None else {self._connection}
        for connection in sockets - {None}:
            connection.close()
        self._lock.release()

    def _receive(self, launch: Launch) -> None:
        """Rank 0: publish its address and accept the other ranks."""
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
                f"warning: {JOB_SECRET} is not set: any process that reaches the rendezvous can impersonate "
                "a rank and end this job; set it to the same random text on every node (docs/cluster.md)",
                flush=True,
            )
        host, port = self._reception.address
        self._store.set(_ADDRESS, f"{host} {port} {place}")
        arguments = (self._remove_key_file, self._end)
        threading.Thread(target=self._reception.serve, args=arguments, name="lifeline", daemon=True).start()

    def _hold(self, launch: Launch) -> None:
        """Every other rank: join rank 0 and wait for a word that never comes in normal operation."""
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
            raise ValueError(f"rank 0 has {JOB_SECRET} but this rank does not; set it on every node")
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
            text = f"rank {self._rank}: failures of other ranks will not be detected: {why}"
            print(visible(text), flush=True)

    def _remove_key_file(self) -> None:
        path, self._key_file = self._key_file, None
        if path is not None:
            with contextlib.suppress(OSError):
                os.unlink(path)

    def _end(self, dead: int | None) -> None:
        """End this process because rank `dead` died; `None` if rank 0 knows which rank and reports it."""
        self._remove_key_file()
        what = f"rank {dead} exited (killed, or out of memory), unless it reports another reason itself"
        try:
            is_told = self._store.check([FIRST_FAILURE])
            what = (
                f"rank {dead} exited without an error message (killed, or out of memory: see its machine's "
                "kernel log)"
            )
        except RuntimeError:
            is_told = False  # the store's owner has exited
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
