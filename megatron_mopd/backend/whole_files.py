"""Atomic writes of small files, and messages for full disks."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

_NO_ROOM = {
    errno.ENOSPC: "no space is left on its disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file may not grow any further",
    errno.EROFS: "its file system has become read-only",
    errno.EIO: "its disk fails (input/output error)",
    errno.ESTALE: "its network file system is gone",
}


def write_whole(path: str | Path, text: str) -> None:
    """Replace the file `path` atomically: a reader always sees either the old text or the new one.

    Raises `OSError` with the file's name; the old text is then unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with naming(path):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add this file's name to an `OSError` without one, such as those from writing to an open file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def disk_problem(error: BaseException | None) -> str | None:
    """A one-line message if `error` or one of its causes means that a disk is not writable, else `None`."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            if error.filename is None:
                return error.strerror or _NO_ROOM[error.errno]
            return f"{os.fsdecode(error.filename)}: {_NO_ROOM[error.errno]}"
        error = error.__cause__ or error.__context__
    return None
