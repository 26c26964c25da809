"""Which files of a model directory travel with the model: configuration, tokenizer and texts, nothing else.

Weights do not travel as files, and neither does what could be run (scripts, libraries, pickles) or what is
merely stored beside a model (weights of other programs, optimizer states, archives, logs). A file that
travels is copied by its content, so a symbolic link that leaves the model's directory would carry away what
it leads to: it is refused by name (`backend.model_files` says which links are followed).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_mopd.backend.model_files import open_file, real_path
from megatron_mopd.config import ConfigError

TRAVELLING_LIMIT = 100 * 10**6
"""Bytes of the largest file that travels; the largest tokenizers of published models have about 35 MB."""
_SUFFIXES = (".json", ".txt", ".md", ".jinja", ".model", ".tiktoken", ".bpe", ".spm")
_LARGE_SUFFIXES = (".model", ".tiktoken", ".bpe", ".spm", ".safetensors.index.json")
_LARGE_NAMES = ("tokenizer", "vocab", "merges", "added_tokens", "special_tokens", "dict")
_SMALL = 10**6
"""Bytes of the largest file that travels without being a tokenizer's or an index: a larger JSON or text file
is a log, a record of training or data."""
_TEXTS = ("license", "licence", "notice", "readme", "copying", "copyright", "authors", "citation")
_INDEX_SUFFIX = ".index.json"
_MOST_FILES = 1000


def travels(name: str) -> bool:
    """Whether a file of this name (no directory) travels with a model, judged in any case of letters."""
    name = name.lower()
    stem, suffix = os.path.splitext(name)
    if name.startswith(".") or (
        name.endswith(_INDEX_SUFFIX) and not name.endswith(f".safetensors{_INDEX_SUFFIX}")
    ):
        return False
    return suffix in _SUFFIXES or (not suffix and stem in _TEXTS)


def _may_be_large(name: str) -> bool:
    return name.endswith(_LARGE_SUFFIXES) or name.startswith(_LARGE_NAMES)


def travelling_files(directory: Path, where: str) -> list[Path]:
    """The files that travel, relative to `directory`, in order. Directories behind links are not entered, and
    logs and data (`_SMALL`) are left out.

    Raises `ConfigError` (prefix `where`) for one that is a link out of the directory, is not a regular file,
    or is too large.
    """
    found = []
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or not travels(path.name) or (path.is_dir() and not path.is_symlink()):
            continue
        try:
            real = real_path(directory, relative)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        if not real.is_file():
            raise ConfigError(f"{where}: {path} is not a file; remove it, or put the file there")
        if (size := real.stat().st_size) > TRAVELLING_LIMIT:
            raise ConfigError(
                f"{where}: {path} has {size} bytes, the limit is {TRAVELLING_LIMIT} for what travels with a "
                "model; move it out of the model's directory"
            )
        if size > _SMALL and not _may_be_large(path.name.lower()):
            continue
        found.append(relative)
    if len(found) > _MOST_FILES:
        raise ConfigError(
            f"{where}: {directory} holds {len(found)} files besides weights; give the directory of one model"
        )
    return found


def copy_file(directory: Path, name: str | Path, target: Path) -> None:
    """Copy one file of a model directory to `target` by its content, its links followed as allowed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_file(directory, name) as source, open(target, "wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)


def link_or_copy(directory: Path, name: str, target: Path) -> None:
    """`copy_file` that takes no space where the file system can share: nobody writes to these files again."""
    try:
        os.link(real_path(directory, name), target, follow_symlinks=False)
    except OSError:
        copy_file(directory, name, target)
