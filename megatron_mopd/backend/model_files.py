"""Safely opens files of untrusted models and checkpoints: restricts symbolic links, limits sizes, and parses
JSON strictly.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import IO, Any

from megatron_mopd.config import ConfigError

JSON_LIMIT = 100 * 10**6
"""Maximum size of a JSON file in bytes; the largest index of a published model has about 10 MB."""


def bare_name(name: object, what: str) -> str:
    """`name` if it is a bare file name: no directory, not hidden, no control characters.

    Otherwise raises `ConfigError` that begins with `what`.
    """
    if type(name) is not str or not name or name.startswith(".") or "/" in name or "\\" in name:
        raise ConfigError(
            f"{what} names {str(name)[:80]!r}, which is not the name of a file in its directory"
        )
    if not name.isprintable() or len(name.encode(errors="replace")) > 255:
        raise ConfigError(f"{what} names {name[:80]!r}, which is not a file name")
    return name


def real_path(directory: Path, name: str | Path) -> Path:
    """The real path of file `name` of a model directory, after following symbolic links.

    A link may point into the directory itself. In a snapshot of the Hugging Face Hub's cache
    (`REPOSITORY/snapshots/REVISION/...`) it may also point to a file directly in `REPOSITORY/blobs`. Raises
    `ConfigError` for any other link, without opening its target. The file need not exist.
    """
    root = Path(os.path.realpath(directory))
    try:
        real = Path(os.path.realpath(root / name))
    except ValueError as error:  # a NUL byte
        raise ConfigError(f"{directory}: {str(name)[:80]!r} is not a file name: {error}") from None
    if real.is_relative_to(root):
        return real
    for parent in (root, *root.parents):
        # `blobs` is not resolved: it must be a directory, not a link to another one.
        if parent.parent.name == "snapshots" and real.parent == parent.parent.parent / "blobs":
            return real
    raise ConfigError(
        f"{Path(directory) / name} leads out of the model's directory, to {real}; copy the model with cp -rL "
        "if that file belongs to it"
    )


def open_file(directory: Path, name: str | Path) -> IO[bytes]:
    """Open a regular file of a model directory for reading; links are restricted as in `real_path`.

    Raises `ConfigError` for a link out of the directory and for anything that is not a regular file (a pipe,
    a device); `OSError` if the file cannot be opened.
    """
    path = real_path(directory, name)
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigError(f"{Path(directory) / name} is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_limited(directory: Path, name: str | Path, limit: int) -> bytes:
    """The contents of a regular file of at most `limit` bytes; `ConfigError` for a larger one."""
    with open_file(directory, name) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise ConfigError(f"{Path(directory) / name} has {size} bytes; the limit is {limit}")
        data = stream.read(limit + 1)
    if len(data) > limit:  # the file grew while it was read
        raise ConfigError(f"{Path(directory) / name} has more than {limit} bytes")
    return data


def read_mapping(directory: Path, name: str, where: str) -> dict[str, Any]:
    """The mapping in a JSON file of a model directory.

    Raises `FileNotFoundError` if it is missing, and `ConfigError` (prefix `where`) for any other problem.
    """
    try:
        return parse_mapping(read_limited(directory, name, JSON_LIMIT))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ConfigError and UnicodeDecodeError are ValueErrors
        raise ConfigError(f"{where}: {Path(directory) / name} is not readable: {_one_line(error)}") from None


def parse_mapping(text: str | bytes) -> dict[str, Any]:
    """The mapping in a JSON text; `ValueError` for text that is not JSON, another kind of value, a duplicate
    key, NaN, and excessive nesting.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if type(value) is not dict:
        raise ValueError(f"expected a mapping, found a {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice[:80]!r} is given twice")
    return values


def _constant(name: str) -> float:
    """Accept Python's non-standard infinities, because the `time_step_limit` of Mamba models is infinite."""
    if name == "NaN":
        raise ValueError("NaN is not a number of JSON")
    return float(name)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
