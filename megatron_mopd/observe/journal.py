"""Append-only files of a run, one JSON object with an `iteration` a line: what a reader may see half-written.

A line that a crash tore is left out when the file is read, and what an interrupted run wrote beyond the
checkpoint that it resumes from is removed, so that no iteration appears twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS_FILE, ALARMS_FILE, SAMPLES_FILE = "metrics.jsonl", "alarms.jsonl", "samples.jsonl"
FACTS_FILE = "run.json"


class Journal:
    """A file that is only written where there is something to say; the caller decides which rank speaks."""

    def __init__(self, path: str | Path, resumed_iteration: int | None = None):
        """`resumed_iteration` is the last one that the checkpoint contains; `None` starts afresh."""
        self._path, self._file = Path(path), None
        if self._path.exists():
            keep_until(self._path, -1 if resumed_iteration is None else resumed_iteration)

    def write(self, iteration: int, entry: Mapping[str, Any]) -> None:
        """Append one line and flush it; values are what JSON knows, and finite."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "a", encoding="utf-8")
        self._file.write(json.dumps({"iteration": iteration, **entry}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; safe to call twice."""
        if self._file is not None:
            self._file.close()
        self._file = None


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """Every complete line that is an object with an integer `iteration`; `OSError` without the file."""
    lines = []
    with open(path, "rb") as file:
        for line in file:
            try:
                values = json.loads(line)
            except ValueError:
                continue
            if isinstance(values, dict) and isinstance(values.get("iteration"), int):
                lines.append(values)
    return lines


def keep_until(path: Path, last: int) -> None:
    """Remove the lines of iterations after `last`, in one step: a crash here must not lose the history."""
    kept = [line for line in read_journal(path) if line["iteration"] <= last]
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
