"""Append-only files of a run, with one JSON object with an `iteration` per line; the last may be incomplete.

A line truncated by a crash is skipped when the file is read, and the lines that an interrupted run wrote
after the checkpoint that it resumes from are removed, so that no iteration appears twice. The file contains
the recent lines: older ones are moved, whole iterations at a time, into `NAME-FIRST-LAST.jsonl.gz` next to
it. `read_journal` reads all of them as if they were one file.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_mopd.backend.whole_files import naming

METRICS_FILE, ALARMS_FILE, SAMPLES_FILE = "metrics.jsonl", "alarms.jsonl", "samples.jsonl"
FACTS_FILE = "run.json"
PART_BYTES = 4 * 2**20
"""Uncompressed size of one compressed part; the file itself is at most twice as large, plus one line."""


class OlderLines(NamedTuple):
    """A compressed file with the lines of iterations `first` to `last`."""

    path: Path
    first: int
    last: int


class Journal:
    """A file that is created only when there is something to write; the caller decides which rank writes."""

    def __init__(
        self,
        path: str | Path,
        resumed_iteration: int | None = None,
        *,
        say: Callable[[str], None] | None = None,
        most_parts: int | None = None,
    ):
        """`resumed_iteration` is the last one that the checkpoint contains; `None` starts a new file.

        say: called when lines are first moved, and when any are first removed. most_parts: beyond this number
        of compressed parts, the oldest except the first is removed.
        """
        self._path, self._file = Path(path), None
        self._say, self._most_parts = say or (lambda _: None), most_parts
        self._was_said = self._was_removal_said = False
        self._size, self._limit = 0, 2 * PART_BYTES
        if self._path.exists() or parts_of(self._path):
            keep_until(self._path, -1 if resumed_iteration is None else resumed_iteration)

    def write(self, iteration: int, entry: Mapping[str, Any]) -> None:
        """Append one line and flush it; values must be JSON values, and finite."""
        line = json.dumps({"iteration": iteration, **entry}, allow_nan=False) + "\n"
        with naming(self._path):
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self._path, "a", encoding="utf-8")
                self._size = self._path.stat().st_size
            self._file.write(line)
            self._file.flush()
        self._size += len(line)  # `json` writes ASCII
        if self._size >= self._limit:
            self._move()

    def close(self) -> None:
        """Close the file; safe to call twice. A write that failed on a full disk is not retried."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # `write` flushes, so it has already raised this
                self._file.close()
        self._file = None

    def _move(self) -> None:
        """Move the older half into a part. If the disk has no room for it, the file keeps growing."""
        self.close()
        self._limit = self._size + PART_BYTES  # the next attempt, if this one fails
        try:
            made = move_older(self._path)
            if not made:
                return
            self._limit = 2 * PART_BYTES
            if not self._was_said:
                self._was_said = True
                moved = f"lines up to iteration {made[-1].last} are in {made[-1].path.name}"
                self._say(f"{self._path.name}: {moved}, more will follow (compressed, none is lost)")
            parts = parts_of(self._path)
            for old in parts[1 : 1 + len(parts) - self._most_parts] if self._most_parts else ():
                old.path.unlink()
                if not self._was_removal_said:
                    self._was_removal_said = True
                    self._say(
                        f"{old.path.name} is removed; {self._path.name} keeps the first and the newest parts"
                    )
        except OSError as error:
            self._say(f"{self._path.name}: older lines cannot be compressed yet: {error.strerror}")


def parts_of(path: Path) -> list[OlderLines]:
    """The compressed parts of a journal, in order."""
    found = []
    for file in path.parent.glob(f"{path.stem}-*{path.suffix}.gz"):
        match = re.fullmatch(rf"{re.escape(path.stem)}-(\d+)-(\d+){re.escape(path.suffix)}\.gz", file.name)
        if match:
            found.append(OlderLines(file, int(match[1]), int(match[2])))
    return sorted(found, key=lambda part: (part.first, part.last))


def read_journal(path: str | Path, since: float = -math.inf, most: int | None = None) -> list[dict[str, Any]]:
    """Every complete line that is an object with an integer `iteration` of at least `since`; raises `OSError`
    if the file does not exist.

    most: if there are more lines than this, only every n-th, the last one, and those of evaluations
    (`accuracy`, `pass_at_k`) are returned: as much as a picture can show of a long run.
    """
    path = Path(path)
    every = 1 if most is None else max(1, -(-_count(path) // most))
    numbers = itertools.count()

    def is_wanted(raw: bytes) -> bool:  # before parsing, which is the slow part
        return next(numbers) % every == 0 or b'"accuracy' in raw or b'"pass_at_' in raw

    # Intern the keys, so that all lines share them: a long run has millions.
    return [
        {sys.intern(key): value for key, value in values.items()}
        for _, values in _lines(path, since, None if every == 1 else is_wanted)
    ]


def keep_until(path: Path, last: int) -> None:
    """Remove the lines of iterations after `last`. A crash here does not lose the history, and the next start
    completes the removal.
    """
    for part in reversed(parts_of(path)):
        if part.first > last:
            part.path.unlink()
        elif part.last > last:  # its beginning is now the most recent
            _replace(path, (raw for raw, values in _of_part(part) if values["iteration"] <= last))
            part.path.unlink()
            return
    kept: list[bytes] = []
    if path.exists():
        with open(path, "rb") as file:
            kept = [raw for raw, values in _recent(file, parts_of(path)) if values["iteration"] <= last]
    _replace(path, kept)


def move_older(path: Path) -> list[OlderLines]:
    """Move the oldest iterations into parts, until less than two parts' worth of lines remains in the file.

    The parts are complete on disk before their lines are removed from the file. In between, the lines exist
    in both, and are read once.
    """
    with open(path, "rb") as file:
        lines = [(raw, values["iteration"]) for raw, values in _recent(file, parts_of(path))]
    left, begin, made = sum(len(raw) for raw, _ in lines), 0, []
    while left >= 2 * PART_BYTES:
        end, size = begin, 0
        while end < len(lines) and (size < PART_BYTES or lines[end][1] == lines[end - 1][1]):
            size += len(lines[end][0])
            end += 1
        if end == len(lines):
            break
        iterations = [iteration for _, iteration in lines[begin:end]]
        first, last = min(iterations), max(iterations)
        part = OlderLines(path.with_name(f"{path.stem}-{first:08d}-{last:08d}{path.suffix}.gz"), first, last)
        _replace(path, [raw for raw, _ in lines[begin:end]], part.path)
        made.append(part)
        left, begin = left - size, end
    if made:
        _replace(path, [raw for raw, _ in lines[begin:]])
    return made


def _replace(path: Path, lines: Iterable[bytes], part: Path | None = None) -> None:
    """Write a journal's file, or a part of it, atomically and durably."""
    temporary, path = path.with_suffix(".tmp"), part or path
    try:
        with open(temporary, "wb") as file:
            if part is not None:
                with gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:
                    packed.writelines(lines)
            else:
                file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lines(
    path: Path, since: float = -math.inf, is_wanted: Callable[[bytes], bool] | None = None
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of all parts and the file, as bytes and values; raises `OSError` if the file does not exist.
    is_wanted: of all other lines, only the last one is returned.
    """
    with open(path, "rb") as file:  # opened first: lines moved from now on stay in it, and are read once
        parts, left_out = parts_of(path), None
        for part in parts:
            if part.last >= since:
                yield from (line for line in _of_part(part, is_wanted) if line[1]["iteration"] >= since)
        for line in _recent(file, parts):
            if line[1]["iteration"] >= since:
                left_out = None if is_wanted is None or is_wanted(line[0]) else line
                if left_out is None:
                    yield line
        if left_out is not None:
            yield left_out


def _of_part(
    part: OlderLines, is_wanted: Callable[[bytes], bool] | None = None
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    # A damaged part is read as far as possible; one removed by a new start is skipped.
    damaged = (EOFError, zlib.error, gzip.BadGzipFile, FileNotFoundError)
    with contextlib.suppress(*damaged), gzip.open(part.path) as file:
        yield from _complete(filter(is_wanted, file))


def _recent(file: Iterable[bytes], parts: list[OlderLines]) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The file's own lines, without those that an interrupted start has already moved into a part."""
    moved = parts[-1].last if parts else -math.inf
    yield from (line for line in _complete(file) if line[1]["iteration"] > moved)


def _complete(file: Iterable[bytes]) -> Iterator[tuple[bytes, dict[str, Any]]]:
    for raw in file:
        try:
            values = json.loads(raw)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("iteration"), int):
            yield raw if raw.endswith(b"\n") else raw + b"\n", values


def _count(path: Path) -> int:
    """The approximate number of lines, assuming one per iteration in the parts."""
    with open(path, "rb") as file:
        lines = sum(1 for _ in file)
    parts = parts_of(path)
    return lines + sum(part.last - part.first + 1 for part in parts)
