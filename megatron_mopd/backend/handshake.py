"""The protocol by which rank 0 and another rank authenticate each other as members of one job.

    rank 0: nonce                       32 bytes, to every connection
    rank k: rank, world size, nonce, HELLO
    rank 0: WELCOME                     only to a missing rank with a valid HELLO
    rank k: JOINED                      from now on, a closed connection means that a rank died
    either: GOODBYE; rank 0: DIED

Every word is an HMAC-SHA256 (RFC 2104) under a per-connection key, which is derived from the job's key, both
nonces, rank, world size, and rank 0's address as seen from each end. A word is therefore invalid on another
connection, in the other direction, or for another rank. A relay between two ranks is refused, because rank k
has then connected to an address other than rank 0's. An attacker who controls the network between them can
still cut the connection, which looks like a death.
"""

from __future__ import annotations

import contextlib
import enum
import hmac
import secrets
import socket
import struct
import time
from collections.abc import Collection

from megatron_mopd.backend.job_secret import JOB_SECRET

_PURPOSE = b"megatron_mopd lifeline 1"
_NONCE_BYTES = _WORD_BYTES = 32
_HELLO = struct.Struct(f"!II{_NONCE_BYTES}s{_WORD_BYTES}s")


class Word(enum.Enum):
    """The messages of the protocol, each with its sender."""

    HELLO = b"rank k: hello"
    WELCOME = b"rank 0: welcome"
    JOINED = b"rank k: joined"
    GOODBYE = b"rank k: goodbye"
    GOODBYE_OF_RANK_0 = b"rank 0: goodbye"
    DIED = b"rank 0: another rank died"


class Session:
    """Creates and recognizes the words of one connection."""

    def __init__(
        self, key: bytes, address: tuple, rank: int, world_size: int, nonce_of_rank_0: bytes, nonce: bytes
    ):
        """address: host and port of rank 0's end, as reported by the socket."""
        facts = struct.pack("!II", rank, world_size) + nonce_of_rank_0 + nonce
        facts += f"{address[0]} {address[1]}".encode()
        self._key = hmac.digest(key, _PURPOSE + facts, "sha256")

    def say(self, word: Word) -> bytes:
        return hmac.digest(self._key, word.value, "sha256")

    def hear(self, said: bytes, words: Collection[Word]) -> Word | None:
        """Which of `words` was received; `None` for anything else."""
        return next((word for word in words if hmac.compare_digest(self.say(word), said)), None)


class Visitor:
    """Rank 0's end of an accepted connection. Never blocks."""

    def __init__(
        self, connection: socket.socket, key: bytes, world_size: int, missing: Collection[int], seconds: float
    ):
        """missing: the ranks that may still join, updated by the caller. seconds: time limit for joining."""
        self.connection, self.rank, self.deadline = connection, None, time.monotonic() + seconds
        self._key, self._world_size, self._missing = key, world_size, missing
        self._nonce, self._session = secrets.token_bytes(_NONCE_BYTES), None
        self._received, self._has_joined = b"", False
        connection.setblocking(False)
        connection.sendall(self._nonce)  # fits into a new connection's empty buffer, as all words do

    def say(self, word: Word) -> None:
        self.connection.sendall(self._session.say(word))

    def hear(self) -> Word | None:
        """`JOINED` or `GOODBYE` once completely received, else `None`. After `JOINED`, other data is ignored.

        Raises `OSError` if the connection has ended, or must be closed because its other end is not a rank.
        """
        size = _HELLO.size if self._session is None else _WORD_BYTES
        try:
            part = self.connection.recv(size - len(self._received))
        except BlockingIOError:
            return None
        if not part:
            raise ConnectionError("closed")
        self._received += part
        if len(self._received) < size:
            return None
        said, self._received = self._received, b""
        if self._session is None:
            self._welcome(*_HELLO.unpack(said))
            return None
        if self._has_joined:
            return self._session.hear(said, [Word.GOODBYE])
        if self._session.hear(said, [Word.JOINED]) is None or self.rank not in self._missing:
            raise ConnectionError("refused")
        self._has_joined = True
        return Word.JOINED

    def _welcome(self, rank: int, world_size: int, nonce: bytes, hello: bytes) -> None:
        address = self.connection.getsockname()
        session = Session(self._key, address, rank, world_size, self._nonce, nonce)
        is_ours = session.hear(hello, [Word.HELLO]) is not None
        if not is_ours or world_size != self._world_size or rank not in self._missing:
            raise ConnectionError("refused")
        self.rank, self._session = rank, session
        self.say(Word.WELCOME)


def introduce(connection: socket.socket, key: bytes, rank: int, world_size: int, seconds: float) -> Session:
    """Rank `rank`'s end: authenticate to rank 0, and authenticate rank 0. The caller then sends `JOINED`.

    Raises `OSError` if the other end is not rank 0 of this job, or did not send all of its bytes within
    `seconds`.
    """
    deadline, address = time.monotonic() + seconds, connection.getpeername()
    nonce, nonce_of_rank_0 = secrets.token_bytes(_NONCE_BYTES), _receive(connection, _NONCE_BYTES, deadline)
    session = Session(key, address, rank, world_size, nonce_of_rank_0, nonce)
    connection.sendall(_HELLO.pack(rank, world_size, nonce, session.say(Word.HELLO)))
    welcome = _receive(connection, _WORD_BYTES, deadline)
    if session.hear(welcome, [Word.WELCOME]) is None:
        host, port = address[:2]
        raise ConnectionError(
            f"{host}:{port} is not rank 0, or does not know this rank; is {JOB_SECRET} the same everywhere?"
        )
    return session


def hear(connection: socket.socket, session: Session) -> Word | None:
    """Rank k's end, after joining: wait for rank 0's next word; `None` if the connection has ended."""
    with contextlib.suppress(OSError):
        while said := _receive(connection, _WORD_BYTES):
            if word := session.hear(said, [Word.GOODBYE_OF_RANK_0, Word.DIED]):
                return word
    return None


def _receive(connection: socket.socket, size: int, deadline: float | None = None) -> bytes:
    """The next `size` bytes, or none if the connection ends first. Raises `TimeoutError` at `deadline`."""
    received = b""
    while len(received) < size:
        if deadline is not None:
            if (left := deadline - time.monotonic()) <= 0:
                raise TimeoutError("rank 0 did not answer in time")
            connection.settimeout(left)
        try:
            part = connection.recv(size - len(received))
        except ConnectionError:
            part = b""
        if not part:
            return b""
        received += part
    return received
