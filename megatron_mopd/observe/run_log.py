"""The log of a run: metrics, the line of each step, alarms, samples, and facts about the run.

metrics.jsonl    one object per step (`metrics.py`); older ones are compressed next to it (`journal.py`)
alarms.jsonl     every alarm with its iteration, 0 for those before the first step
samples.jsonl    at intervals, a few responses with the divergence of every token
run.json         versions of packages, teachers' manifest, ranks and device of the last start, and how answers
                 were confined on the first host
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import megatron_mopd
from megatron_mopd.backend.whole_files import write_whole
from megatron_mopd.config import Config
from megatron_mopd.confinement.kernel import Confinement
from megatron_mopd.observe.journal import ALARMS_FILE, FACTS_FILE, SAMPLES_FILE, Journal
from megatron_mopd.observe.metrics import MetricsWriter, is_main_rank
from megatron_mopd.observe.progress import StepLine, say
from megatron_mopd.observe.weights_and_biases import WeightsAndBiases

_PACKAGES = (
    "torch",
    "megatron-core",
    "transformers",
    "safetensors",
    "triton",
    "transformer-engine",
    "apex",
    "flash-attn",
    "numpy",
    "reasoning-gym",
    "math-verify",
    "pyseccomp",
)

_MOST_SAMPLE_PARTS = 16
"""Number of compressed parts of samples that are kept: the first and the newest."""


class RunLog:
    """Writes on rank 0; on other ranks every method does nothing."""

    def __init__(self, config: Config, first: int):
        """`first` iterations are already done: later lines of an interrupted run are removed."""
        self._config, self._first, self._last = config, first, config.schedule.train_iters
        self._is_main = is_main_rank()
        resumed = first or None
        self._metrics = MetricsWriter(
            config.run_dir, config.log.tensorboard, resumed_iteration=resumed, last=self._last, say=say
        )
        self._line = StepLine(self._last, first_iteration=first)
        self._alarms = self._samples = self._tracker = None
        if self._is_main:
            if config.log.wandb_project is not None:
                self._tracker = WeightsAndBiases(config)
            self._alarms = Journal(Path(config.run_dir) / ALARMS_FILE, resumed, say=say)
            path = Path(config.run_dir) / SAMPLES_FILE
            self._samples = Journal(path, resumed, say=say, most_parts=_MOST_SAMPLE_PARTS)

    def started(
        self,
        manifest: Mapping[str, Any],
        world_size: int,
        device: torch.device,
        confinement: Confinement | None = None,
    ) -> None:
        """Write `run.json`."""
        if not self._is_main:
            return
        facts = {
            "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "resumed_from": self._first,
            "ranks": world_size,
            "device": device_name(device),
            "versions": versions(),
            "confinement": None if confinement is None else confinement.to_dict(),
            "manifest": manifest,
        }
        text = json.dumps(facts, indent=1, default=str) + "\n"
        write_whole(Path(self._config.run_dir) / FACTS_FILE, text)

    def step(self, iteration: int, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of `iteration` (steps done), and print its line if it is due."""
        self._metrics.log(iteration, metrics)
        self._line.record(metrics)
        if self._tracker is not None:
            self._tracker.log(iteration, metrics)
        interval = self._config.log.log_interval
        if iteration > self._first and (iteration == self._last or iteration % interval == 0):
            self._line.show(iteration, metrics)

    def alarm(self, iteration: int, message: str) -> None:
        """Record an alarm that was raised after `iteration` steps."""
        if self._alarms is not None:
            self._alarms.write(iteration, {"message": message})

    def samples(self, iteration: int, entries: Iterable[Mapping[str, Any]]) -> None:
        """Record samples of the responses that step `iteration` trained on; consumed on rank 0 only."""
        if self._samples is not None:
            for entry in entries:
                self._samples.write(iteration, entry)

    def close(self) -> None:
        """Close every file; safe to call twice."""
        for file in (self._metrics, self._alarms, self._samples, self._tracker):
            if file is not None:
                file.close()


def versions() -> dict[str, str]:
    """Versions of this package, Python and the packages that may affect the results; missing packages are
    omitted.
    """
    found = {"megatron_mopd": megatron_mopd.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def device_name(device: torch.device) -> str:
    """The compute device: the GPU's name, or the CPU architecture and this process's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads a rank)"
