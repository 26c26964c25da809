"""The secret key with which the ranks of one job authenticate each other.

It never appears in a command line, a log, the configuration or, if avoidable, the rendezvous store, which any
process that reaches its port can read and write.
"""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from collections.abc import MutableMapping

from megatron_mopd.config import ConfigError

JOB_SECRET = "MOPD_JOB_SECRET"
"""Environment variable with the secret of a multi-node job, the same on each node. One node needs none."""
_FEWEST_CHARACTERS = 16
_KEY_BYTES = 32
_FILE_BEGINS = b"megatron_mopd job secret "
"""Prevents another private file of the user, whose text may be known, from being used as a key."""


def take_job_secret(environment: MutableMapping[str, str]) -> bytes | None:
    """The secret set by the launcher, removed from `environment` so that child processes do not inherit it.

    Raises `ConfigError` for a secret that could be guessed.
    """
    text = environment.pop(JOB_SECRET, "").strip()
    if text and len(text) < _FEWEST_CHARACTERS:
        raise ConfigError(
            f"{JOB_SECRET} has {len(text)} characters; it needs at least {_FEWEST_CHARACTERS} random ones, "
            "for example from `openssl rand -hex 32`"
        )
    return os.fsencode(text) or None


def new_key() -> bytes:
    return secrets.token_bytes(_KEY_BYTES)


def write_private_file(key: bytes) -> str:
    """Write `key` to a new file that only this user can read, in memory if possible; returns its path."""
    directory = "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None
    descriptor, path = tempfile.mkstemp(prefix="megatron_mopd_", dir=directory)  # mode 0600
    with open(descriptor, "wb") as file:
        file.write(_FILE_BEGINS + key.hex().encode())
    return path


def read_private_file(path: str) -> bytes:
    """The key in a file written by `write_private_file`. The path is not trusted.

    Raises `OSError` for a file that others can read or could have written, `ValueError` for other contents.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        is_private = status.st_uid == os.geteuid() and not status.st_mode & 0o077
        if not is_private or not stat.S_ISREG(status.st_mode):
            raise PermissionError(f"{path!r} is not a file of this user alone")
        text = file.read(len(_FILE_BEGINS) + 2 * _KEY_BYTES + 1)
    key = text.removeprefix(_FILE_BEGINS)
    if len(text) != len(_FILE_BEGINS) + 2 * _KEY_BYTES or key == text:
        raise ValueError(f"{path!r} does not contain a job's key")
    return bytes.fromhex(key.decode())
