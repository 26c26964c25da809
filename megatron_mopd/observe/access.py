"""Restrict read access to a run's files to the owner and, if the umask allows it, the owner's group.

A run writes prompts, answers and samples into many files, some of them through libraries (TensorBoard,
checkpoints, pictures). A umask covers all of them, and a stricter umask of the user is kept.
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
    """Context manager (also a decorator) in which files and directories are created without permissions for
    others.

    A process has a single umask: it also applies to its other threads, and to processes that it starts.
    """
    before = os.umask(_OTHERS)
    os.umask(before | _OTHERS)
    try:
        yield
    finally:
        os.umask(before)


def others_may_enter(directory: Path) -> str | None:
    """One sentence if an existing directory lets others read or enter it, else `None`."""
    try:
        mode = stat.S_IMODE(directory.stat().st_mode)
    except OSError:
        return None
    if not mode & _OTHERS:
        return None
    return (
        f"run_dir: others may enter {directory} (mode {mode:04o}); they cannot read the files of this start, "
        f"but can read earlier ones until you run chmod -R o-rwx {directory}"
    )
