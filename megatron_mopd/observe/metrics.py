"""The metrics of a run: `metrics.jsonl` (one object per step) and TensorBoard.

Names are paths, and TensorBoard groups them by their first part: ``loss``, ``kl`` and ``kl/<domain>``,
``accuracy`` and ``accuracy/<domain>``, ``response_length``, ``grad_norm``, ``lr``, ``tokens_per_second``, and
``time/<phase>`` in seconds. The pictures and the step line read these names; any other name is also written.

`metrics.jsonl` has every step (older ones compressed next to it, `journal.py`). TensorBoard has every value
of the first 2048 steps, then for each metric the first of every 2, from step 4096 on of every 4, and so on:
about 1024 points for each doubling of the run, and always the last step.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from megatron_mopd.backend.messages import visible
from megatron_mopd.backend.whole_files import naming
from megatron_mopd.observe.journal import METRICS_FILE, Journal, read_journal

_EVENTS_FILE = "events.out.tfevents.*"
FULL_STEPS = 1024
"""TensorBoard gets about this many values per metric for each doubling of the number of steps."""
MOST_LINES = 5_000
"""For a longer run, pictures show every n-th step."""


def is_main_rank() -> bool:
    """Whether this process is rank 0, or the only one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"  # started by torchrun, process group not initialized yet


class MetricsWriter:
    """Writes the metrics of every step on rank 0; on other ranks every method does nothing.

    `resumed_iteration` is the last iteration that the checkpoint contains: later lines of an interrupted run
    are removed, so that no step appears twice. `None` starts new files. last: the run's last iteration. say:
    called once when the files start to omit or compress values.
    """

    def __init__(
        self,
        run_dir: str | Path,
        tensorboard: bool = True,
        resumed_iteration: int | None = None,
        *,
        last: int | None = None,
        say: Callable[[str], None] | None = None,
    ):
        self._file = self._tensorboard = None
        self._last, self._say, self._thinning = last, say or (lambda _: None), Thinning()
        if not is_main_rank():
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = Journal(run_dir / METRICS_FILE, resumed_iteration, say=say)
        if tensorboard:
            purge_step = 0 if resumed_iteration is None else resumed_iteration + 1
            if resumed_iteration is not None and (run_dir / METRICS_FILE).exists():
                since = purge_step // stride(purge_step) * stride(purge_step)
                for line in read_journal(run_dir / METRICS_FILE, since):
                    numbers = [name for name, value in line.items() if isinstance(value, (int, float))]
                    self._thinning.choose(line["iteration"], [*numbers, *line.get("nonfinite", ())])
            with naming(run_dir / _EVENTS_FILE):
                self._tensorboard = SummaryWriter(str(run_dir), purge_step=purge_step)

    def log(self, iteration: int, metrics: Mapping[str, Any]) -> None:
        """Append one line and flush it; nested mappings become paths (`{"kl": {"gcd": 1}}` is `kl/gcd`).

        Values are numbers, zero-dimensional tensors, strings or `None`. JSON has no NaN: a non-finite value
        is written as null, and its name and value are listed under `nonfinite`.
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
            numbers = {name: value for name, value in flat.items() if isinstance(value, (int, float))}
            chosen = self._thinning.choose(iteration, numbers)
            written = [
                Summary.Value(tag=visible(name), simple_value=numbers[name])
                for name in (numbers if iteration == self._last else chosen)
            ]
            if written:  # one event for all: each `add_scalar` costs a hundred microseconds and 30 bytes
                with naming(Path(self._tensorboard.log_dir) / _EVENTS_FILE):
                    self._tensorboard.file_writer.add_summary(Summary(value=written), iteration)
                    self._tensorboard.flush()
            if iteration == 2 * FULL_STEPS:
                self._say(
                    f"TensorBoard: from iteration {iteration} on it gets every second value of a metric, and "
                    f"half as many whenever the run has doubled; {METRICS_FILE} has all"
                )

    def close(self) -> None:
        """Close the files; safe to call twice."""
        for writer in (self._file, self._tensorboard):
            if writer is not None:
                with contextlib.suppress(OSError):  # a full disk, which `log` has reported
                    writer.close()
        self._file = self._tensorboard = None


class Thinning:
    """Selects which values of a metric are kept: the first in every `stride` iterations. The choice does not
    depend on earlier values, so a resumed run that is given the lines since then continues as if it had never
    stopped.
    """

    def __init__(self):
        self._seen: dict[str, tuple[int, int]] = {}

    def choose(self, iteration: int, names: Iterable[str]) -> list[str]:
        """The subset of `names`, which have values at `iteration`, whose values are kept."""
        step = stride(iteration)
        place = step, iteration // step
        chosen = [name for name in names if self._seen.get(name) != place]
        self._seen |= dict.fromkeys(chosen, place)
        return chosen


def stride(iteration: int) -> int:
    """1 up to twice `FULL_STEPS`, then doubling whenever the iteration doubles."""
    return 1 << max(0, (iteration // FULL_STEPS).bit_length() - 1)


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping from paths to plain numbers, strings or `None`."""
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = value.item() if hasattr(value, "item") else value
    return flat


def read_metrics(run_dir: str | Path, most: int | None = None) -> list[dict[str, Any]]:
    """Every complete line of a run's metrics, including compressed parts; a line truncated by a crash is
    skipped. most: see `read_journal`.
    """
    return read_journal(Path(run_dir) / METRICS_FILE, most=most)
