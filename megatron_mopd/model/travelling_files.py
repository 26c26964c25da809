"""Selects the files that travel with a model, that is, are copied with it: configuration, tokenizer and
texts.

Weight files do not travel, and neither do executable files (scripts, libraries, pickles) or files that are
merely stored next to a model (weights of other programs, optimizer states, archives, logs). A travelling file
is copied by content, so a symbolic link out of the model's directory would copy its target: such links are
refused (see `backend.model_files` for the links that are followed).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_mopd.backend.model_files import open_file, real_path
from megatron_mopd.config import ConfigError

TRAVELLING_LIMIT = 100 * 10**6
"""Maximum size of a travelling file in bytes; the largest tokenizers of published models have about 35 MB."""
_SUFFIXES = (".json", ".txt", ".md", ".jinja", ".model", ".tiktoken", ".bpe", ".spm")
_LARGE_SUFFIXES = (".model", ".tiktoken", ".bpe", ".spm", ".safetensors.index.json")
_LARGE_NAMES = ("tokenizer", "vocab", "merges", "added_tokens", "special_tokens", "dict")
_SMALL = 10**6
"""Maximum size in bytes of a travelling file that is neither a tokenizer file nor an index: a larger JSON or
text file is a log, a training record or data."""
_TEXTS = ("license", "licence", "notice", "readme", "copying", "copyright", "authors", "citation")
_INDEX_SUFFIX = ".index.json"
_MOST_FILES = 1000


def travels(name: str) -> bool:
    """Whether a file with this name (without directory) travels with a model; case-insensitive."""
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
    """The travelling files, relative to `directory`, sorted. Directory links are not followed, and logs and
    data (`_SMALL`) are skipped.

    Raises `ConfigError` (prefix `where`) for a file that is a link out of the directory, not a regular file,
    or too large.
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
                f"{where}: {path} has {size} bytes, the limit is {TRAVELLING_LIMIT} for files copied with a "
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
    """Copy the content of one file of a model directory to `target`, following permitted links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_file(directory, name) as source, open(target, "wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)


def link_or_copy(directory: Path, name: str, target: Path) -> None:
    """Hard-link the file to save space, or copy it if that fails; these files are never modified."""
    try:
        os.link(real_path(directory, name), target, follow_symlinks=False)
    except OSError:
        copy_file(directory, name, target)
