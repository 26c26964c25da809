"""Messages over pipes with deadlines in both directions: a four-byte length, then the message."""

from __future__ import annotations

import os
import select
import struct
import time
from collections.abc import Sequence

_HEADER = struct.Struct("<I")
_AT_ONCE = 1 << 16


class Disconnected(Exception):
    """The other end of the pipe is closed."""


def send(descriptor: int, message: bytes, deadline: float) -> None:
    """Write a message; the descriptor must not block.

    Raises `TimeoutError` if the other side has not read it by `deadline` (of `time.monotonic`), and
    `Disconnected`.
    """
    rest = memoryview(_HEADER.pack(len(message)) + message)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest[:_AT_ONCE]) :]
        except BlockingIOError:
            _wait(descriptor, select.POLLOUT, deadline)
        except OSError:
            raise Disconnected from None


def receive(descriptor: int, deadline: float, longest: int, closes: int | None = None) -> bytes:
    """Read a message of at most `longest` bytes; the descriptor must not block.

    Raises `TimeoutError`, `Disconnected` (also if the other end of `closes`, a pipe to read from, is closed
    meanwhile), and `ValueError` for a message that is too long.
    """
    (length,) = _HEADER.unpack(_exactly(descriptor, _HEADER.size, deadline, closes))
    if length > longest:
        raise ValueError(f"a message of {length} bytes, expected at most {longest}")
    return _exactly(descriptor, length, deadline, closes)


def pack(messages: Sequence[bytes]) -> bytes:
    """Several messages as one."""
    return b"".join(_HEADER.pack(len(message)) + message for message in messages)


def unpack(packed: bytes) -> list[bytes]:
    """The messages passed to `pack`. Raises `ValueError` for other input."""
    messages, start = [], 0
    while start < len(packed):
        try:
            (length,) = _HEADER.unpack_from(packed, start)
        except struct.error:
            raise ValueError("a message ends within its length field") from None
        start += _HEADER.size + length
        messages.append(packed[start - length : start])
    if start > len(packed):
        raise ValueError("a message is shorter than its length field says")
    return messages


def _exactly(descriptor: int, count: int, deadline: float, closes: int | None) -> bytes:
    parts, left = [], count
    while left:
        try:
            part = os.read(descriptor, min(left, _AT_ONCE))
        except BlockingIOError:
            _wait(descriptor, select.POLLIN, deadline, closes)
            continue
        except OSError:
            raise Disconnected from None
        if not part:
            raise Disconnected
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _wait(descriptor: int, event: int, deadline: float, closes: int | None = None) -> None:
    poll = select.poll()  # not select: descriptors may be above 1024
    poll.register(descriptor, event)
    if closes is not None:
        poll.register(closes, 0)  # only to detect that it is closed
    seconds = deadline - time.monotonic()
    ready = dict(poll.poll(None if deadline == float("inf") else max(0.0, 1e3 * seconds)))
    if not ready:
        raise TimeoutError
    if descriptor not in ready:
        raise Disconnected
