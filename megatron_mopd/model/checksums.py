"""Checksums of a checkpoint's files: a list of SHA-256 sums, written last and verified before loading.

Every rank reads its share of the files, so the shared file system is the bottleneck, not a single process.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mopd.backend.model_files import open_file, read_mapping
from megatron_mopd.config import ConfigError

CHECKSUM_FILE = "checksums.json"


def write_checksums(directory: Path) -> None:
    """Write the checksums of all files below `directory` to `checksums.json`. Collective over all ranks.

    Collectives: one all-gather of about 100 bytes per file.
    """
    gathered = _gather({name: sum_up(directory / name) for name in _share(_files(directory))})
    if _rank() == 0:
        write_sums(directory, {name: entry for part in gathered for name, entry in part.items()})


def write_sums(directory: Path, known: dict[str, Any]) -> None:
    """Write `checksums.json` from the `known` entries (of `sum_up`), computing those of all other files.
    Called on one rank.
    """
    sums = known | {name: sum_up(directory / name) for name in _files(directory) if name not in known}
    (directory / CHECKSUM_FILE).write_text(json.dumps(dict(sorted(sums.items())), indent=1))


def sum_up(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def verify_checksums(directory: Path, where: str) -> None:
    """Compare every file with `checksums.json`; raises `ConfigError` on every rank, naming the damaged files.

    A checkpoint without the list (written by another program) passes. Collective over all ranks: one
    all-gather of the names of damaged files.
    """
    if (expected := read_sums(directory, where)) is None:
        return
    mine = [problem for name in _share(sorted(expected)) if (problem := _problem(directory, name, expected))]
    problems = sorted(problem for part in _gather(mine) for problem in part)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"{where}: checkpoint {directory} is damaged: {problems[0]}{more}")


def read_sums(directory: Path, where: str) -> dict[str, tuple[int, str]] | None:
    """Size and SHA-256 of every file according to `checksums.json`; `None` if it does not exist. No
    collectives.

    Raises `ConfigError` (prefix `where`) if the list is damaged or names anything but files below the
    directory.
    """
    what = f"{where}: {directory / CHECKSUM_FILE} is damaged"
    try:
        sums = read_mapping(directory, CHECKSUM_FILE, where)
    except FileNotFoundError:
        return None
    except ConfigError as error:
        raise ConfigError(f"{what}: {str(error).removeprefix(f'{where}: ')}") from None
    expected = {}
    for name, entry in sums.items():
        entry = entry if type(entry) is dict else {}
        size, digest = entry.get("bytes"), entry.get("sha256")
        if not name.isprintable() or not set(name.split("/")).isdisjoint(("", ".", "..")):
            raise ConfigError(f"{what}: {name[:80]!r} is not a file of the checkpoint")
        if type(size) is not int or type(digest) is not str:
            raise ConfigError(f"{what}: no size and SHA-256 of {name[:80]}")
        expected[name] = size, digest
    return expected


def _problem(directory: Path, name: str, expected: dict[str, tuple[int, str]]) -> str | None:
    size, digest = expected[name]
    try:
        with open_file(directory, name) as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            is_same = hashlib.file_digest(file, "sha256").hexdigest() == digest
            return None if is_same else f"{name} differs from its checksum"
    except OSError as error:
        return f"{name}: {error.strerror}"
    except ConfigError as error:
        return str(error)


def _files(directory: Path) -> list[str]:
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name != CHECKSUM_FILE]
    return sorted(str(path.relative_to(directory)) for path in paths)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _share(names: list[str]) -> list[str]:
    return names[_rank() :: dist.get_world_size()] if dist.is_initialized() else names


def _gather(value) -> list:
    if not dist.is_initialized():
        return [value]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
