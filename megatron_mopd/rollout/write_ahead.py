"""Write sampled tokens to disk during a rollout, so that a killed run does not sample them again.

A log is a directory with one append-only file per data-parallel rank and start. A file consists of a magic
word and records of [length, CRC-32, payload]; the first record identifies what the tokens were sampled from,
each further one contains pieces of responses. Reading stops at the first truncated or damaged record.
"""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.data.arrays import BYTES_PER_ID, EqualByValue, id_array
from megatron_mopd.data.exchange import exchange
from megatron_mopd.observe.progress import say

_MAGIC = b"MOPDLOG1"
_FRAME = struct.Struct("<II")
_BYTES_PER_TOKEN = BYTES_PER_ID + 8
CONTINUES, STOPPED, CUT = 0, 1, 2
"""State of a response after a piece: continues, ended by a stop token, ended by a limit."""
FLUSH_SECONDS = 10.0
"""The maximum number of seconds of sampling lost when a run is killed."""


@dataclass(frozen=True, eq=False)
class Piece(EqualByValue):
    """Consecutive tokens of one response."""

    index: int
    start: int
    """Number of response tokens before these."""
    token_ids: np.ndarray
    """[n] int32."""
    logprobs: np.ndarray
    """[n] float64."""
    state: int

    def __post_init__(self):
        _set_arrays(self)


@dataclass(frozen=True, eq=False)
class Known(EqualByValue):
    """The part of one response that a log contains, from its first token on."""

    token_ids: np.ndarray | None
    """[n] int32; `None`, like the log-probs, on ranks that do not hold them."""
    logprobs: np.ndarray | None
    """[n] float64."""
    state: int
    length: int = 0
    """n; taken from `token_ids` where there are any."""

    def __post_init__(self):
        if self.token_ids is not None:
            _set_arrays(self)
            object.__setattr__(self, "length", len(self.token_ids))

    @property
    def is_complete(self) -> bool:
        return self.state != CONTINUES


def _set_arrays(tokens: Piece | Known) -> None:
    object.__setattr__(tokens, "token_ids", id_array(tokens.token_ids))
    object.__setattr__(tokens, "logprobs", np.asarray(tokens.logprobs, dtype=np.float64))


class RolloutLog:
    """The tokens of a rollout batch from an earlier start, and the log for this start's tokens.

    identity: everything that determines the tokens; files with a different identity are not used. Rank 0
    reads. Collective over all ranks: two broadcasts, 24 bytes per response that a log contains; `deliver`
    sends the tokens.
    """

    def __init__(self, directory: Path, identity: str, groups: ParallelGroups):
        self._directory, self._identity = directory, identity
        self._file: int | None = None
        self._last = time.monotonic()
        self._groups = groups
        # Every rank of a pipeline, and of its tensor- and context-parallel groups, sees the same tokens.
        self._writes = groups.replica_rank == 0
        self._name = f"{groups.dp.rank():05d}-{time.time_ns()}.log"
        known: dict[int, Known] = {}
        if dist.get_rank() == 0:
            paths = sorted(directory.glob("*.log"))
            known = join(piece for path in paths for piece in read(path, identity))
        self.known: dict[int, Known] = _broadcast_lengths(known, groups.device) | known
        """By `Trajectory.index`, in that order; with tokens on rank 0 only, and after `deliver` where they
        are needed."""

    def deliver(self, owners: Mapping[int, int]) -> None:
        """Send each known response to all ranks of one data-parallel rank, and drop it on the others.

        `owners`: by `Trajectory.index`, the data-parallel rank. Collectives: one all-to-all over the
        data-parallel group of rank 0, and one broadcast over each of the tensor-, context- and
        pipeline-parallel groups: 12 bytes per token that the rank needs, in each that it takes part in.
        """
        if dist.get_world_size() == 1:
            return
        groups, known = self._groups, self.known
        wanted = [[i for i in known if owners[i] == rank] for rank in range(groups.dp_size)]
        mine = wanted[groups.dp.rank()]
        num_bytes = {i: _BYTES_PER_TOKEN * known[i].length for i in known}
        received = torch.empty(sum(num_bytes[i] for i in mine), dtype=torch.uint8, device=groups.device)
        if groups.replica_rank == 0:
            pieces = exchange(
                wanted, dict.fromkeys(known, 0), num_bytes, self._parts, groups.dp, groups.device
            )
            received = torch.cat([pieces[i] for i in mine]).to(groups.device) if mine else received
        for group in (groups.tp, groups.cp, groups.pp):  # the last one's sources have it from the others
            if len(received):
                dist.broadcast(received, src=dist.get_process_group_ranks(group)[0], group=group)
        data, at = received.cpu().numpy(), 0
        self.known = {i: replace(one, token_ids=None, logprobs=None) for i, one in known.items()}
        for i in mine:
            middle, end = at + BYTES_PER_ID * known[i].length, at + num_bytes[i]
            ids, logprobs = data[at:middle].view(np.int32), data[middle:end].view(np.float64)
            self.known[i] = replace(known[i], token_ids=ids.copy(), logprobs=logprobs.copy())
            at = end

    def _parts(self, index: int) -> Iterator[torch.Tensor]:
        known = self.known[index]
        return map(torch.from_numpy, (known.token_ids, known.logprobs))

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
    tokens = np.concatenate([p.token_ids for p in pieces]).astype("<i4", copy=False)
    logprobs = np.concatenate([p.logprobs for p in pieces]).astype("<f8", copy=False)
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
    tokens = np.frombuffer(payload, "<i4", total, 4 + 32 * count)
    logprobs = np.frombuffer(payload, "<f8", total, 4 + 32 * count + 4 * total)
    pieces, at = [], 0
    for index, start, length, state in heads:
        end = at + length
        pieces.append(Piece(index, start, tokens[at:end], logprobs[at:end], state))
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
    parts: dict[int, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    lengths: dict[int, int] = defaultdict(int)
    states: dict[int, int] = {}
    for piece in sorted(pieces, key=lambda piece: (piece.index, piece.start, len(piece.token_ids))):
        index, new = piece.index, lengths[piece.index] - piece.start
        if states.get(index, CONTINUES) != CONTINUES or new < 0 or new >= len(piece.token_ids):
            continue
        if not np.isfinite(piece.logprobs).all():
            continue
        parts[index].append((piece.token_ids[new:], piece.logprobs[new:]))
        lengths[index] += len(piece.token_ids) - new
        states[index] = piece.state
    return {
        index: Known(*map(np.concatenate, zip(*arrays, strict=True)), states[index])
        for index, arrays in parts.items()
    }


def _broadcast_lengths(known: Mapping[int, Known], device: torch.device) -> dict[int, Known]:
    """What rank 0 knows, without tokens, on every rank."""
    rows = torch.tensor([(i, one.length, one.state) for i, one in known.items()], dtype=torch.long)
    if dist.get_world_size() > 1:
        count = torch.tensor([len(rows)], device=device)
        dist.broadcast(count, src=0)
        if count := int(count):
            rows = rows.to(device) if known else torch.zeros(count, 3, dtype=torch.long, device=device)
            dist.broadcast(rows, src=0)
    return {i: Known(None, None, state, length) for i, length, state in rows.view(-1, 3).tolist()}
