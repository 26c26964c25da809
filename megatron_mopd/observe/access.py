"""Who may read what a run writes: its owner, the owner's group where the umask allows it, nobody else.

A run writes prompts, answers and samples into many files, some of them by way of libraries (TensorBoard,
checkpoints, pictures). One umask for all of them leaves none out, and a stricter one of the user's stays.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

_OTHERS = stat.S_IRWXO


@contextlib.contextmanager
def closed_to_others() -> Iterator[None]:
    """Within this (also as a decorator), files and directories are made without any right for others.

    A process has one umask: other threads of it, and processes that it starts, have it too.
    """
    before = os.umask(_OTHERS)
    os.umask(before | _OTHERS)
    try:
        yield
    finally:
        os.umask(before)


def others_may_enter(directory: Path) -> str | None:
    """One sentence when a directory of before lets others read or enter it; `None` when it does not."""
    try:
        mode = stat.S_IMODE(directory.stat().st_mode)
    except OSError:
        return None
    if not mode & _OTHERS:
        return None
    return (
        f"run_dir: others may enter {directory} (mode {mode:04o}); they cannot read what this start writes, "
        f"but what was there before, until you chmod -R o-rwx {directory}"
    )
