"""The date that a run uses as today's: recorded at its start, so that its prompts never change."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
import yaml

from megatron_mopd.config import Config

_RECORD = "config.yaml"


def with_date(config: Config) -> Config:
    """The configuration with `data.date` filled in: as given, else as recorded by the run to be resumed, else
    today.

    Always collective: rank 0 decides and broadcasts, because midnight may pass and hosts may be in different
    time zones.
    """
    date = agreed_date(_recorded(config) if dist.get_rank() == 0 else None)
    return replace(config, data=replace(config.data, date=config.data.date or date))


def agreed_date(date: str | None = None) -> str:
    """Rank 0's `date`, by default its today, on every rank. Collective: one broadcast of a few bytes."""
    agreed = [date or datetime.date.today().isoformat()]
    if dist.is_initialized():
        dist.broadcast_object_list(agreed)
    return agreed[0]


def _recorded(config: Config) -> str | None:
    """The date in the run directory's `config.yaml`, if this run resumes that one."""
    if not config.checkpoint.resume:
        return None
    try:
        found = yaml.safe_load((Path(config.run_dir) / _RECORD).read_text())["data"]["date"]
        return datetime.date.fromisoformat(str(found)).isoformat()
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None  # from an earlier release or edited; prompts unlike the checkpoint's are refused anyway
