"""Log a run's metrics to Weights & Biases, an optional package, if `log.wandb_project` is set."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mopd.backend.messages import visible
from megatron_mopd.config import Config, ConfigError, to_dict
from megatron_mopd.config.schema import LogConfig
from megatron_mopd.observe.metrics import flatten


def check_tracking(log: LogConfig) -> None:
    """Raise `ConfigError`, on every rank, if Weights & Biases is requested but not installed."""
    if log.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "log.wandb_project: the package wandb is not installed; pip install wandb, or remove the key"
        )


class WeightsAndBiases:
    """One Weights & Biases run per run directory: a resumed run continues the same one.

    Metrics keep their names (`kl/gcd`), which Weights & Biases groups by their first part.
    """

    def __init__(self, config: Config):
        import wandb

        directory = Path(config.run_dir).resolve()
        self._run = wandb.init(
            project=str(config.log.wandb_project),
            name=str(config.log.wandb_name or directory.name),
            id=hashlib.sha256(str(directory).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(directory),
            config=to_dict(config),
        )

    def log(self, iteration: int, metrics: Mapping[str, Any]) -> None:
        """Send the finite numbers among a step's metrics."""
        numbers = {
            visible(name): value
            for name, value in flatten(metrics).items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        }
        self._run.log(numbers, step=iteration)

    def close(self) -> None:
        """Send the remaining metrics."""
        self._run.finish()
