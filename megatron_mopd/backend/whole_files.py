"""Small files that are there whole or not at all, and what a full disk is called."""

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
    """Replace the file `path` in one step: whoever reads it, whenever, finds the old text or the new one.

    Raises `OSError`, with the file's name; the old text is then still there.
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
    """Give an `OSError` that does not name a file, as writing to an open one does not, this file's name."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def disk_problem(error: BaseException | None) -> str | None:
    """One line when `error`, or what it was raised from, is a disk that takes no more; `None` otherwise."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            if error.filename is None:
                return error.strerror or _NO_ROOM[error.errno]
            return f"{os.fsdecode(error.filename)}: {_NO_ROOM[error.errno]}"
        error = error.__cause__ or error.__context__
    return None
