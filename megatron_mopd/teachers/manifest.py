"""Fingerprints of a run's inputs, which a resumed run compares, and checks that need only fingerprints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mopd.config import ConfigError, ModelConfig, TeacherConfig, to_dict
from megatron_mopd.data.prompts import PromptSet
from megatron_mopd.model.checkpoint import find_checkpoint
from megatron_mopd.teachers.fingerprint import checkpoint_fingerprints
from megatron_mopd.teachers.routing import SELF

Fingerprints = dict[str, str]
"""`architecture`, `tokenizer` (with its chat template) and `weights`: each a SHA-256 or, without a
checkpoint, a text that describes the origin of the weights."""


def model_fingerprints(
    load: str | None, teachers: Sequence[TeacherConfig], student: ModelConfig, tokenizer: str, seed: int
) -> dict[str, Fingerprints]:
    """Fingerprints of the initial student ("") and of every teacher, by name.

    load: `student.load`. student: its resolved architecture. tokenizer: fingerprint of the run's tokenizer.
    Rank 0 reads and broadcasts a few hundred bytes per teacher. Raises `ConfigError` on all ranks.
    """
    result: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            result[0] = _read_fingerprints(load, teachers, student, tokenizer, seed)
        except ConfigError as error:
            result[0] = error
    dist.broadcast_object_list(result)
    if isinstance(result[0], ConfigError):
        raise result[0]
    return result[0]


def _read_fingerprints(
    load: str | None, teachers: Sequence[TeacherConfig], student: ModelConfig, tokenizer: str, seed: int
) -> dict[str, Fingerprints]:
    places = {"": ("student.load", load)}
    for teacher in teachers:
        places[teacher.name] = (
            f"teachers.{teacher.name}.load",
            load if teacher.name == SELF else teacher.load,
        )
    result, read = {}, {}
    for name, (where, place) in places.items():
        if place is None:
            architecture = json.dumps(to_dict(student), sort_keys=True, default=str)
            result[name] = {
                "architecture": hashlib.sha256(architecture.encode()).hexdigest(),
                "weights": f"drawn from seed {seed}",
            }
        else:
            path = find_checkpoint(place, where)
            if path not in read:
                read[path] = _fingerprints_of(path, where)
            result[name] = dict(read[path])
        result[name]["tokenizer"] = tokenizer
    return result


def _fingerprints_of(path: Path, where: str) -> Fingerprints:
    try:
        return checkpoint_fingerprints(path)
    except OSError as error:
        raise ConfigError(f"{where}: cannot read {error.filename}: {error.strerror}") from None


def run_manifest(tokenizer: str, prompts: PromptSet, fingerprints: dict[str, Fingerprints]) -> dict[str, Any]:
    """Fingerprints of a run's tokenizer, prompts (by source), initial student and teachers; stored in its
    checkpoints.
    """
    return {
        "tokenizer": tokenizer,
        "prompts": prompts.source_fingerprints(),
        "student": fingerprints[""]["weights"],
        "teachers": {name: prints for name, prints in fingerprints.items() if name},
    }


def with_tokenizer(manifest: dict[str, Any], tokenizer: str) -> dict[str, Any]:
    """A saved manifest with the tokenizer fingerprint replaced, for a tokenizer that is equivalent or whose
    change is allowed."""
    teachers = {
        name: prints | {"tokenizer": tokenizer} for name, prints in manifest.get("teachers", {}).items()
    }
    return manifest | {"tokenizer": tokenizer, "teachers": teachers}


def changed_teachers(saved: dict[str, Fingerprints], current: dict[str, Fingerprints]) -> list[str]:
    """One phrase for every teacher that differs from the saved run: `math (weights)`, `code (new)`."""
    phrases = []
    for name in sorted(saved.keys() | current.keys()):
        if name not in saved:
            phrases.append(f"{name} (new)")
        elif name not in current:
            phrases.append(f"{name} (removed)")
        else:
            before, now = saved[name], current[name]
            parts = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
            if parts:
                phrases.append(f"{name} ({', '.join(parts)})")
    return phrases


def start_alarms(fingerprints: dict[str, Fingerprints]) -> list[str]:
    """Alarm messages about teachers whose checkpoint is the same as the student's or another teacher's.

    `self` is excluded, because it is the student by definition.
    """
    alarms, seen = [], {}
    student = fingerprints.get("", {}).get("weights")
    for name, prints in fingerprints.items():
        if name in ("", SELF):
            continue
        weights = prints["weights"]
        if weights == student:
            alarms.append(f"teacher {name!r} equals the student: it has the weights of student.load")
        elif weights in seen:
            alarms.append(f"teachers {seen[weights]!r} and {name!r} have the same weights")
        seen.setdefault(weights, name)
    return alarms
