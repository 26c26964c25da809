"""Distributed checkpoints on disk: Megatron's directory convention, written atomically, loaded at any layout.

    checkpoints/
      latest_checkpointed_iteration.txt      the newest complete iteration
      iter_0000010/                          torch_dist files, under megatron-core's canonical keys
        model.json                           architecture and tokenizer fingerprint
        tokenizer/                           the tokenizer that the model speaks

A directory named `iter_*` is always complete: it is written under another name and renamed at the end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.config import ConfigError, ModelConfig, model_config_from_dict, to_dict

TRACKER = "latest_checkpointed_iteration.txt"
MODEL_FILE = "model.json"
TOKENIZER_DIRECTORY = "tokenizer"


def iteration_directory(directory: str | Path, iteration: int) -> Path:
    """`directory/iter_0000010` for iteration 10."""
    return Path(directory) / f"iter_{iteration:07d}"


def find_checkpoint(path: str | Path, where: str) -> Path:
    """The newest complete checkpoint under `path`, or `path` itself when it is one.

    `where` is the configuration key shown in the `ConfigError` raised when there is none.
    """
    path = Path(path)
    if (path / MODEL_FILE).exists():
        return path
    if not path.is_dir():
        raise ConfigError(f"{where}: checkpoint directory not found: {path}")
    newest = latest_iteration(path)
    if newest is None:
        raise ConfigError(f"{where}: no complete checkpoint (no {TRACKER}) in {path}")
    return iteration_directory(path, newest)


def latest_iteration(directory: str | Path) -> int | None:
    """The newest complete iteration under a checkpoint directory, or `None` when there is none yet."""
    directory = Path(directory)
    try:
        iteration = int((directory / TRACKER).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        # A foreign or damaged tracker; complete directories speak for themselves.
        names = [re.fullmatch(r"iter_(\d{7})", entry.name) for entry in directory.iterdir()]
        return max((int(match[1]) for match in names if match), default=None)
    return iteration if (iteration_directory(directory, iteration) / MODEL_FILE).exists() else None


def read_model_config(checkpoint: Path, where: str) -> tuple[ModelConfig, str]:
    """Architecture and tokenizer fingerprint of a checkpoint; `ConfigError` when damaged."""
    try:
        description = json.loads((checkpoint / MODEL_FILE).read_text())
        return model_config_from_dict(description["model"], where), description["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: {checkpoint / MODEL_FILE} is not readable: {error}") from None


def model_state(chunks: list[torch.nn.Module], groups: ParallelGroups) -> dict[str, Any]:
    """Sharded state dict of this rank's chunks (unwrapped models), under canonical keys."""
    metadata = {"dp_cp_group": groups.collection.dp_cp}
    return {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}


def load_weights(chunks: list[torch.nn.Module], checkpoint: Path, groups: ParallelGroups, where: str) -> None:
    """Load a checkpoint's weights into this rank's chunks, whatever layout it was saved at.

    Collective over all ranks. Raises `ConfigError` (prefix `where`) when tensors are missing or of another
    shape.
    """
    try:
        loaded = dist_checkpointing.load(model_state(chunks, groups), str(checkpoint))
    except (
        dist_checkpointing.core.CheckpointingException,
        OSError,
        KeyError,
        RuntimeError,
        ValueError,
    ) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"{where}: cannot load {checkpoint}: {first_line}") from None
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{i}"], strict=True)


def write_checkpoint(
    directory: str | Path,
    iteration: int,
    state: dict[str, Any],
    model: ModelConfig,
    tokenizer_fingerprint: str,
    save_tokenizer: Callable[[Path], None],
) -> Path:
    """Write `state` (a sharded state dict) as `iter_*` and point the tracker at it. Collective over all
    ranks.

    The directory appears under its name only when it is complete and on disk; a crash at any moment leaves
    the previous checkpoint as the newest one.
    """
    directory = Path(directory)
    final = iteration_directory(directory, iteration)
    partial = final.with_name(f".{final.name}.incomplete")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state, str(partial))
    dist.barrier()
    if dist.get_rank() == 0:
        save_tokenizer(partial / TOKENIZER_DIRECTORY)
        architecture = {key: value for key, value in to_dict(model).items() if key != "load"}
        description = {"model": architecture, "tokenizer": tokenizer_fingerprint}
        (partial / MODEL_FILE).write_text(json.dumps(description, indent=2))
        _flush_to_disk(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        tracker = directory / TRACKER
        tracker.with_suffix(".tmp").write_text(str(iteration))
        tracker.with_suffix(".tmp").replace(tracker)
        _sync(directory)
    dist.barrier()
    return final


def _flush_to_disk(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
