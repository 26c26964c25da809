"""Write sampled tokens to disk during a rollout, so that a killed run does not sample them again.

A log is a directory with one append-only file per data-parallel rank and start. A file consists of a magic
word and records of [length, CRC-32, payload]; the first record identifies what the tokens were sampled from,
each further one contains pieces of responses. Reading stops at the first truncated or damaged record.
"""

from __future__ import annotations

import math
import os
import struct
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.observe.progress import say

_MAGIC = b"MOPDLOG1"
_FRAME = struct.Struct("<II")
CONTINUES, STOPPED, CUT = 0, 1, 2
"""State of a response after a piece: continues, ended by a stop token, ended by a limit."""
FLUSH_SECONDS = 10.0
"""The maximum number of seconds of sampling lost when a run is killed."""


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one response."""

    index: int
    start: int
    """Number of response tokens before these."""
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    state: int


@dataclass(frozen=True)
class Known:
    """The part of one response that a log contains, from its first token on."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    state: int

    @property
    def is_complete(self) -> bool:
        return self.state != CONTINUES


class RolloutLog:
    """The tokens of a rollout batch from an earlier start, and the log for this start's tokens.

    identity: everything that determines the tokens; files with a different identity are not used. Collective
    over all ranks: rank 0 reads, and broadcasts 16 bytes per token.
    """

    def __init__(self, directory: Path, identity: str, groups: ParallelGroups):
        self._directory, self._identity = directory, identity
        self._file: int | None = None
        self._last = time.monotonic()
        # Every rank of a pipeline, and of its tensor- and context-parallel groups, sees the same tokens.
        peers = (groups.tp, groups.cp, groups.pp)
        self._writes = all(group.rank() == 0 for group in peers)
        self._name = f"{groups.dp.rank():05d}-{time.time_ns()}.log"
        known: list[Mapping[int, Known]] = [{}]
        if dist.get_rank() == 0:
            known = [
                join(piece for path in sorted(directory.glob("*.log")) for piece in read(path, identity))
            ]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(known, src=0)
        self.known = known[0]
        """By `Trajectory.index`; the same on every rank."""

    def is_due(self) -> bool:
        """Whether it is time to write the sampled tokens."""
        return self._writes and time.monotonic() - self._last >= FLUSH_SECONDS

    def append(self, pieces: Iterable[Piece]) -> None:
        """Write pieces; a no-op on ranks whose tokens another rank writes. A disk error ends the log, not the
        run."""
        self._last = time.monotonic()
        if not self._writes or not (pieces := list(pieces)):
            return
        try:
            if self._file is None:
                self._directory.mkdir(parents=True, exist_ok=True)
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
                self._file = os.open(self._directory / self._name, flags, 0o644)
                self._write(_MAGIC + _frame(self._identity.encode()))
            self._write(_frame(encode(pieces)))
        except OSError as error:
            self._writes = False
            say(
                f"rollout log {self._directory}: {error.strerror}; a killed run would sample this batch again"
            )

    def close(self) -> None:
        """Flush everything appended to disk."""
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            self._file = None

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._file, data) :]


def _frame(payload: bytes) -> bytes:
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def encode(pieces: list[Piece]) -> bytes:
    """Encode pieces as bytes: their number; index, start, length and state of each; all tokens; all
    log-probs."""
    heads = np.array([(p.index, p.start, len(p.token_ids), p.state) for p in pieces], dtype="<i8")
    tokens = np.array([token for p in pieces for token in p.token_ids], dtype="<i4")
    logprobs = np.array([value for p in pieces for value in p.logprobs], dtype="<f8")
    return struct.pack("<I", len(pieces)) + heads.tobytes() + tokens.tobytes() + logprobs.tobytes()


def decode(payload: bytes) -> list[Piece]:
    """The inverse of `encode`. Raises `ValueError` for anything else."""
    if len(payload) < 4:
        raise ValueError("too short")
    (count,) = struct.unpack_from("<I", payload)
    if len(payload) < 4 + 32 * count:
        raise ValueError("too short")
    heads = np.frombuffer(payload, "<i8", 4 * count, 4).reshape(count, 4).tolist()
    total = sum(length for _, _, length, _ in heads)
    if any(min(head) < 0 for head in heads) or len(payload) != 4 + 32 * count + 12 * total:
        raise ValueError("lengths do not add up")
    tokens = np.frombuffer(payload, "<i4", total, 4 + 32 * count).tolist()
    logprobs = np.frombuffer(payload, "<f8", total, 4 + 32 * count + 4 * total).tolist()
    pieces, at = [], 0
    for index, start, length, state in heads:
        end = at + length
        pieces.append(Piece(index, start, tuple(tokens[at:end]), tuple(logprobs[at:end]), state))
        at = end
    return pieces


def read(path: Path, identity: str) -> Iterator[Piece]:
    """The pieces of one file, up to the first incomplete record; none if its identity differs."""
    try:
        data = path.read_bytes()
    except OSError:
        return
    at, is_first = len(_MAGIC), True
    if data[:at] != _MAGIC:
        return
    while at + _FRAME.size <= len(data):
        length, checksum = _FRAME.unpack_from(data, at)
        at += _FRAME.size
        payload = data[at : at + length]
        at += length
        if len(payload) != length or zlib.crc32(payload) != checksum:
            return
        if is_first:
            if payload != identity.encode():
                return
            is_first = False
            continue
        try:
            yield from decode(payload)
        except ValueError:
            return


def join(pieces: Iterable[Piece]) -> dict[int, Known]:
    """Join pieces from any files into responses; a piece after a gap is dropped, and so is one with a
    non-finite log-prob: the weights may no longer be damaged."""
    known: dict[int, Known] = {}
    for piece in sorted(pieces, key=lambda piece: (piece.index, piece.start, len(piece.token_ids))):
        before = known.get(piece.index, Known((), (), CONTINUES))
        new = len(before.token_ids) - piece.start
        if before.is_complete or new < 0 or new >= len(piece.token_ids):
            continue
        if not math.isfinite(sum(piece.logprobs)):
            continue
        known[piece.index] = Known(
            before.token_ids + piece.token_ids[new:], before.logprobs + piece.logprobs[new:], piece.state
        )
    return known
