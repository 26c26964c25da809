"""Fingerprints of files and checkpoints, cheap enough for hundreds of gigabytes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import IO

from megatron_mopd.backend.model_files import JSON_LIMIT, open_file, read_limited
from megatron_mopd.model.checksums import CHECKSUM_FILE

_BLOCK = 1 << 20
_WHOLE = 64
"""Files up to this many MiB are read whole; of larger files this many evenly spaced blocks are read."""

_END = 4096
"""Bytes read at the end of a file, which belong to its last tensor."""

_WEIGHTS = ("*.distcp", "*.safetensors")
_DESCRIPTIONS = ("model.json", "config.json", "*.index.json")


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file's size and content.

    Of a file larger than 64 MiB, only 64 evenly spaced blocks of 1 MiB are hashed, including the first and
    the last: further training changes every block, but a flipped bit between them is not detected.
    """
    with open(path, "rb") as stream:
        return _fingerprint(stream)


def _fingerprint(stream: IO[bytes]) -> str:
    size = os.fstat(stream.fileno()).st_size
    digest = hashlib.sha256(str(size).encode())
    if size <= _WHOLE * _BLOCK:
        while block := stream.read(_BLOCK):
            digest.update(block)
    else:
        for number in range(_WHOLE):
            stream.seek((size - _BLOCK) * number // (_WHOLE - 1))
            digest.update(stream.read(_BLOCK))
    return digest.hexdigest()


def checkpoint_fingerprints(path: Path) -> dict[str, str]:
    """`architecture` and `weights` of a checkpoint directory (torch_dist or Hugging Face), as SHA-256.

    Raises `ConfigError` for a link that leads out of the directory and for anything that is not a regular
    file.
    """
    architecture = hashlib.sha256()
    for file in _files(path, _DESCRIPTIONS):
        architecture.update(file.name.encode() + read_limited(path, file.name, JSON_LIMIT))
    weights = hashlib.sha256()
    for file in _files(path, _WEIGHTS):
        with open_file(path, file.name) as stream:
            weights.update(f"{file.name} {_fingerprint(stream)}".encode())
    return {"architecture": architecture.hexdigest(), "weights": weights.hexdigest()}


def quick_fingerprint(path: Path) -> str:
    """SHA-256 of the names, sizes and last bytes of a checkpoint's files, and of their checksum list.

    Cheap enough for every rank; distinguishes different checkpoints but does not detect a flipped bit. Raises
    `ConfigError` like `checkpoint_fingerprints`.
    """
    digest = hashlib.sha256()
    for file in _files(path, (*_WEIGHTS, *_DESCRIPTIONS, CHECKSUM_FILE)):
        with open_file(path, file.name) as stream:
            size = os.fstat(stream.fileno()).st_size
            stream.seek(max(0, size - (_END if file.name != CHECKSUM_FILE else JSON_LIMIT)))
            digest.update(f"{file.name} {size} ".encode() + stream.read())
    return digest.hexdigest()


def _files(path: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({file for pattern in patterns for file in path.glob(pattern)})
