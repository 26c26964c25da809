"""What a run is made of, in a form that a resumed run can compare."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_mopd.config import Config, to_dict
from megatron_mopd.model.checkpoint import MODEL_FILE, find_checkpoint
from megatron_mopd.model.hugging_face import CONFIG

_SAMPLE = 1 << 20


def checkpoint_fingerprint(path: Path) -> str:
    """SHA-256 over a checkpoint's description, and of every weight file its name, size, first and last
    mebibyte.

    Cheap enough for hundreds of gigabytes, and another training run changes every one of the sampled blocks.
    """
    description = path / MODEL_FILE
    digest = hashlib.sha256((description if description.exists() else path / CONFIG).read_bytes())
    for file in sorted((*path.glob("*.distcp"), *path.glob("*.safetensors"))):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(_SAMPLE))
            stream.seek(max(0, size - _SAMPLE))
            digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()


def run_manifest(config: Config, tokenizer_fingerprint: str) -> dict[str, Any]:
    """Tokenizer, objective, routing and teachers of a run; stored in its checkpoints."""
    teachers = {}
    for teacher in config.teachers:
        source = teacher.load or config.student.load
        where = f"teachers.{teacher.name}.load"
        teachers[teacher.name] = (
            checkpoint_fingerprint(find_checkpoint(source, where)) if source else "initial weights"
        )
    return {
        "tokenizer": tokenizer_fingerprint,
        "objective": json.dumps(to_dict(config.objective), sort_keys=True),
        "routing": json.dumps(to_dict(config.routing), sort_keys=True),
        "teachers": teachers,
    }
