"""Reads distributed checkpoints written by Megatron-LM (`torch_dist`), with weights under megatron-core's
keys.

They are in `iter_0000010/` or `release/`, as named by the tracker next to them, and have no `model.json`: the
architecture comes from the configuration and is compared with the saved Megatron-LM arguments
(`megatron_arguments`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mopd.backend.agreement import first_problem
from megatron_mopd.backend.model_files import read_limited
from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.config import ConfigError, ModelConfig
from megatron_mopd.model.directory_kinds import DESCRIPTION, DISTRIBUTED, TRACKER
from megatron_mopd.model.initialize import sharded_tensors
from megatron_mopd.model.megatron_arguments import NEEDED
from megatron_mopd.model.pickled_files import is_weight

_PREFIXES = ("", "model.", "module.", "model.module.")
_FIRST_WEIGHT = "embedding.word_embeddings.weight"


def is_megatron_lm(checkpoint: Path) -> bool:
    """Whether a directory is a distributed checkpoint without our `model.json`."""
    return (checkpoint / DISTRIBUTED).exists() and not (checkpoint / DESCRIPTION).exists()


def newest_of_megatron_lm(directory: Path) -> Path | None:
    """The checkpoint that a directory's tracker names, if Megatron-LM wrote it."""
    try:
        named = read_limited(directory, TRACKER, 100).decode().strip()
    except (OSError, ValueError):
        return None
    if named != "release" and not (named.isascii() and named.isdecimal() and len(named) < 20):
        return None
    checkpoint = directory / (named if named == "release" else f"iter_{int(named):07d}")
    return checkpoint if is_megatron_lm(checkpoint) else None


def require_architecture(checkpoint: Path, given: ModelConfig | None, where: str) -> ModelConfig:
    """The architecture given in the configuration; `ConfigError` (prefix `where`) if there is none."""
    missing = [key for key in NEEDED if given is None or key not in given.transformer]
    if missing:
        raise ConfigError(
            f"{where}: {checkpoint} was written by Megatron-LM ({DESCRIPTION} is missing), so its "
            f"architecture is not known; load it as student.load and give {', '.join(missing)} and the rest "
            "under student"
        )
    return given


def key_prefix(keys: dict[str, Any]) -> str:
    """The prefix of megatron-core's names in a checkpoint's keys."""
    found = (prefix for prefix in _PREFIXES if prefix + _FIRST_WEIGHT in keys)
    return next(found, "")


def has_key_per_layer(keys: dict[str, Any]) -> bool:
    """Whether each layer has separate tensors (an option of Megatron-LM) instead of one tensor over all
    layers."""
    return any(f"{key_prefix(keys)}decoder.layers.0." in key for key in keys)


def require_same_tensors(
    state: dict[str, Any], listed: dict[str, Any], vocab_size: int, groups: ParallelGroups, what: str
) -> None:
    """Raise `ConfigError` (prefix `what`) on every rank unless a checkpoint lists exactly the tensors of a
    sharded state.

    Collectives: one gather of a few thousand names within each pipeline, one flag over all ranks.
    """
    problem, wanted = None, {}
    for tensor in sharded_tensors(state):
        shape = list(tensor.global_shape)
        found = list(listed[tensor.key].size) if tensor.key in listed else None
        is_padded = tensor.allow_shape_mismatch and found is not None
        if is_padded and found[1:] == shape[1:] and found[0] >= vocab_size:
            found = shape
        if found != shape and problem is None:
            problem = f"{tensor.key} is missing"
            if found is not None:
                problem = f"{tensor.key} has shape {found}, not {shape}"
        wanted[tensor.key] = None
    gathered: list[Any] = [None] * groups.pp_size
    dist.all_gather_object(gathered, (problem, list(wanted)), group=groups.pp)
    known = {key for _, keys in gathered for key in keys}
    problems = [problem for problem, _ in gathered if problem]
    if left := sorted(key for key in listed if is_weight(key) and key not in known):
        problems.append(f"{left[0]} is not part of the model")
    if found := first_problem(problems[0] if problems else None):
        raise ConfigError(f"{what} does not match the configured model: {found.text}")
