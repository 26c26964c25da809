"""Tracks a run's best checkpoint by an evaluation metric.

`checkpoints/best.json` holds the metric's value at every evaluation whose weights were saved:
`{"metric": "accuracy", "evaluation": "4f0c...", "best": 120, "values": {"40": 0.61, "120": 0.8}}`. Only
complete checkpoints count, so the file remains valid when checkpoints are removed, damaged or rewritten. A
run that resumes with a different metric, different held-out prompts or different evaluation settings starts
a new file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from megatron_mopd.backend.whole_files import write_whole
from megatron_mopd.model.checkpoint import complete_iterations

BEST_FILE = "best.json"


def best_iteration(directory: str | Path) -> int | None:
    """The complete checkpoint in `directory` with the highest value, the latest in a tie; `None` if none was
    evaluated.
    """
    values = _read(Path(directory))
    evaluated = [i for i in complete_iterations(directory) if i in values]
    return max(evaluated, key=lambda i: (values[i], i), default=None)


class BestCheckpoint:
    """Maintains `best.json`, with the same state on every rank so that all make the same decisions."""

    def __init__(self, directory: Path, metric: str, resumed_iteration: int = 0, evaluation: str = ""):
        """Discards the values that an earlier start recorded after `resumed_iteration`. evaluation: a digest
        of everything besides the weights that the values depend on. Collective: one broadcast of a few bytes
        per evaluation.
        """
        self._directory, self._metric, self._evaluation = directory, metric, evaluation
        state = [None]
        if dist.get_rank() == 0:
            known = _read(directory, metric, evaluation)
            kept = {i: value for i, value in known.items() if i <= resumed_iteration}
            state = [kept if resumed_iteration else {}]
            if (directory / BEST_FILE).exists():
                self._write(state[0])
        dist.broadcast_object_list(state)
        self._values: dict[int, float] = state[0]

    def is_new(self, metrics: Mapping[str, float]) -> bool:
        """Whether an evaluation is better than those of all earlier checkpoints."""
        value = metrics.get(self._metric)
        return value is not None and math.isfinite(value) and value > max(self._values.values(), default=-1.0)

    def saved(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Record that the weights of `iteration` are being saved; `metrics` may hold their evaluation."""
        value = metrics.get(self._metric)
        if value is None or not math.isfinite(value):
            return
        self._values[iteration] = value
        if dist.get_rank() == 0:
            self._write(self._values)

    def _write(self, values: Mapping[int, float]) -> None:
        best = max(values, key=lambda i: (values[i], i), default=None)
        facts = {"metric": self._metric, "evaluation": self._evaluation, "best": best, "values": values}
        text = json.dumps(facts, indent=1)
        self._directory.mkdir(parents=True, exist_ok=True)
        write_whole(self._directory / BEST_FILE, text + "\n")


def _read(directory: Path, metric: str | None = None, evaluation: str | None = None) -> dict[int, float]:
    """Iteration -> value; empty if the file is missing, damaged, or for another metric or evaluation."""
    try:
        written = json.loads((directory / BEST_FILE).read_text(encoding="utf-8"))
        values = {int(iteration): float(value) for iteration, value in written["values"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    is_same = evaluation in (None, written.get("evaluation", evaluation))
    return values if is_same and metric in (None, written.get("metric")) else {}
