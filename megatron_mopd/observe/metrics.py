"""The metrics of a run: `metrics.jsonl` (one object a step) and TensorBoard.

Names are paths, and TensorBoard groups by their first part: ``loss``, ``kl`` and ``kl/<domain>``,
``accuracy`` and ``accuracy/<domain>``, ``response_length``, ``grad_norm``, ``lr``, ``tokens_per_second``, and
``time/<phase>`` in seconds. The pictures and the step line read these names; any other is written all the
same.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed
from torch.utils.tensorboard import SummaryWriter

from megatron_mopd.backend.messages import visible
from megatron_mopd.observe.journal import METRICS_FILE, Journal, read_journal


def is_main_rank() -> bool:
    """Whether this process speaks for the job: rank 0, or the only one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"  # started by torchrun, ranks not yet connected


class MetricsWriter:
    """Writes the metrics of every step on rank 0; on other ranks every method does nothing.

    `resumed_iteration` is the last iteration that the checkpoint contains: what an interrupted run wrote
    beyond it is removed, so that no step appears twice. `None` starts the files afresh.
    """

    def __init__(self, run_dir: str | Path, tensorboard: bool = True, resumed_iteration: int | None = None):
        self._file = self._tensorboard = None
        if not is_main_rank():
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = Journal(run_dir / METRICS_FILE, resumed_iteration)
        if tensorboard:
            purge_step = 0 if resumed_iteration is None else resumed_iteration + 1
            self._tensorboard = SummaryWriter(str(run_dir), purge_step=purge_step)

    def log(self, iteration: int, metrics: Mapping[str, Any]) -> None:
        """Append one line and flush it; nested mappings become paths (`{"kl": {"gcd": 1}}` is `kl/gcd`).

        Values are numbers, zero-dimensional tensors, text or `None`. JSON has no NaN: a value that is not
        finite is written as null, and its name and value go under `nonfinite`.
        """
        if self._file is None:
            return
        flat = flatten(metrics)
        nonfinite = {k: repr(v) for k, v in flat.items() if isinstance(v, float) and not math.isfinite(v)}
        line = {**flat, **dict.fromkeys(nonfinite)}
        if nonfinite:
            line["nonfinite"] = nonfinite
        self._file.write(iteration, line)
        if self._tensorboard is not None:
            for name, value in flat.items():
                if isinstance(value, (int, float)):
                    self._tensorboard.add_scalar(visible(name), value, iteration)
            self._tensorboard.flush()

    def close(self) -> None:
        """Close the files; safe to call twice."""
        for writer in (self._file, self._tensorboard):
            if writer is not None:
                writer.close()
        self._file = self._tensorboard = None


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping from paths to plain numbers, text or `None`."""
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = value.item() if hasattr(value, "item") else value
    return flat


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Every complete line of a run's `metrics.jsonl`; a line torn by a crash is left out."""
    return read_journal(Path(run_dir) / METRICS_FILE)
