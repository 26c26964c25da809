"""Limits for downloaded tokenizers, far above any real one, checked before a library that cannot be
interrupted reads the files.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_mopd.backend.model_files import JSON_LIMIT, read_limited, real_path
from megatron_mopd.config import ConfigError

_LARGEST_FILE = JSON_LIMIT
_LONGEST_TOKEN = 1 << 14
"""In characters. A response of 16,384 tokens is then at most 256 MiB of text."""
_LARGEST_GROWTH = 10_000
"""The number of characters that successive replacements may make from one."""
_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")


def check_tokenizer_files(directory: Path) -> None:
    """Raise `ConfigError` if a file of a tokenizer directory is too large, or if `tokenizer.json` makes the
    tokenizer inflate text (by nested replacements that multiply like an XML entity bomb).
    """
    for file in sorted(file for pattern in _FILES for file in directory.glob(pattern)):
        check_size(real_path(directory, file.name))
    path = directory / "tokenizer.json"
    if not path.exists():
        return
    try:
        content = json.loads(read_limited(directory, path.name, _LARGEST_FILE))
        steps = [list(_steps(content.get(part))) for part in ("normalizer", "pre_tokenizer", "decoder")]
        growth = max(math.prod(map(_growth, part)) for part in steps)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"tokenizer.json is not readable ({type(error).__name__})"
        raise ConfigError(f"{directory}: not a usable tokenizer directory: {reason}") from None
    if growth > _LARGEST_GROWTH:
        raise ConfigError(
            f"{path}: replacements turn one character into {growth:.3g}; no real tokenizer does that"
        )


def check_size(file: Path) -> None:
    """Raise `ConfigError` if `file` is not a regular file, or larger than any tokenizer's."""
    try:
        found = file.stat()
    except OSError:
        return  # the reader reports it
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{file} is not a regular file")
    if (size := found.st_size) > _LARGEST_FILE:
        raise ConfigError(f"{file}: {size / 1e6:.0f} MB is too large for a tokenizer file")


def check_tokens(tokens: Iterable[str], where: Path) -> None:
    """Raise `ConfigError` if a token is longer than any real one."""
    longest = max(map(len, tokens), default=0)
    if longest > _LONGEST_TOKEN:
        raise ConfigError(f"{where}: a token of {longest} characters; at most {_LONGEST_TOKEN} are accepted")


def _steps(step: Any) -> Iterator[dict[str, Any]]:
    """A part of the tokenizer and, if it is a sequence, its steps."""
    if step is None:
        return
    yield step
    for name in ("normalizers", "pretokenizers", "decoders"):
        for inner in step.get(name, ()):
            yield from _steps(inner)


def _growth(step: dict[str, Any]) -> float:
    """The number of characters that a step may make from one."""
    if step.get("type") == "Prepend":
        return 1 + len(step.get("prepend", ""))
    if step.get("type") != "Replace":
        return 1
    text = step["pattern"].get("String")  # otherwise a regular expression, which may match the empty string
    return max(1, len(step["content"]) / len(text)) if text else 1 + len(step["content"])
