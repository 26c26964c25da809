"""Allow one run at a time in a run directory: a second start is rejected, a dead run's lock is taken over.

Rank 0 holds a POSIX lock on `run.lock`, which the kernel releases however the process ends, and touches the
file every few seconds. If both starts run on the same kernel, the lock decides at once. Locks of network file
systems may be visible to one host only, so a file written by another host is also watched: as long as it is
touched, that run is alive, and after `SILENCE_SECONDS` without a touch it is dead. Times are those of the
file system, which all hosts share, not of a host's clock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mopd.backend.messages import shown
from megatron_mopd.config import ConfigError
from megatron_mopd.observe.progress import say

LOCK_FILE = "run.lock"
BEAT_SECONDS = 5.0
"""Seconds between two touches of a held lock."""
SILENCE_SECONDS = 45.0
"""A lock of another host that has not been touched for this long belongs to a dead run."""
_HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN)
_MOST_BYTES = 4096


class RunLostError(RuntimeError):
    """Another run has taken this run's directory, because this run appeared to be dead."""


@dataclass(frozen=True)
class Holder:
    """The process that wrote a lock file."""

    host: str
    process: int
    boot: str
    """Boot id of the kernel: equal for containers on one machine, different after a reboot."""
    nonce: str
    started: float
    """In seconds since the epoch, by the file system's clock."""

    def __str__(self) -> str:
        return f"process {self.process} on host {shown(self.host)}"


class RunLock(contextlib.AbstractContextManager):
    """Holds `directory` from construction to `release`. One process of a job creates it; no collectives.

    Raises `ConfigError` if another run holds it. This may take up to `SILENCE_SECONDS` if the file was left
    by a run on another host that touched it recently.
    """

    def __init__(self, directory: Path):
        self._path = Path(directory) / LOCK_FILE
        self._ended, self._lost = threading.Event(), False
        self._file = self._opened()
        try:
            while not self._is_free():  # a run that just ended has removed the opened file
                os.close(self._file)
                self._file = self._opened()
            self._own = Holder(
                socket.gethostname(), os.getpid(), _boot(), secrets.token_hex(8), self._file_system_time()
            )
            self._write(json.dumps(self._own.__dict__).encode())
        except OSError as error:
            os.close(self._file)
            raise ConfigError(f"run_dir: cannot write {self._path}: {error.strerror}") from None
        except BaseException:
            os.close(self._file)
            raise
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise `RunLostError` if another run has taken the directory."""
        if self._lost:
            raise RunLostError(
                f"another run has taken {self._path.parent}: {self._path} no longer belongs to this run"
            )

    def release(self) -> None:
        """Release the directory. Safe to call twice."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()  # it must not touch another file that reuses the descriptor's number
        with contextlib.suppress(OSError):
            if not self._lost and self._is_in_place():
                os.unlink(self._path)
        os.close(self._file)

    def __exit__(self, *exception) -> None:
        self.release()

    def _opened(self) -> int:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise ConfigError(f"run_dir: cannot write {self._path}: {error.strerror}") from None

    def _is_free(self) -> bool:
        """Whether no run holds the open file; `False` if another file has replaced it."""
        knows_all = self._lock()
        before = self._read()
        if before is not None and not (knows_all and before.boot == _boot()):
            self._wait_for_silence(before)
        return self._is_in_place()

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self._path, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def _lock(self) -> bool:
        """Take the POSIX lock; returns whether this file system supports such locks.

        Unlike a `flock` lock, a forked process does not inherit it, so helpers that outlive rank 0 do not
        hold it.
        """
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in _HELD_BY_ANOTHER:
                self._refuse(self._read())
            return False

    def _refuse(self, holder: Holder | None) -> None:
        who, since = "another run", ""
        if holder is not None:
            who = str(holder)
            with contextlib.suppress(OSError):
                since = f", started {_duration(self._file_system_time() - holder.started)} ago"
        raise ConfigError(
            f"run_dir: {self._path.parent} is in use: {who}{since}; stop it, or name another run_dir"
        )

    def _wait_for_silence(self, holder: Holder) -> None:
        """Return once the file has not been touched for `SILENCE_SECONDS`; raise if it is touched."""
        last = os.fstat(self._file).st_mtime
        age = self._file_system_time() - last
        left = SILENCE_SECONDS - max(0.0, age)
        if left > 0:
            say(f"run_dir: {self._path.parent} was left by {holder}; waiting {left:.0f} s to see if it runs")
        deadline = time.monotonic() + left
        while time.monotonic() < deadline:
            time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))
            if not self._is_in_place():
                return
            if os.fstat(self._file).st_mtime != last or self._read() != holder:
                self._refuse(self._read() or holder)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a disk that is briefly unavailable, or a removed directory
                if self._read() != self._own:
                    self._lost = True
                    return
                os.utime(self._file)

    def _read(self) -> Holder | None:
        """The process that wrote the file; `None` if it was released, or is not a lock file."""
        try:
            values: dict[str, Any] = json.loads(os.pread(self._file, _MOST_BYTES, 0))
            return Holder(
                str(values["host"]),
                int(values["process"]),
                str(values["boot"]),
                str(values["nonce"]),
                float(values["started"]),
            )
        except (ValueError, KeyError, TypeError, OverflowError):
            return None

    def _write(self, content: bytes) -> None:
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, content, 0)
        os.fsync(self._file)

    def _file_system_time(self) -> float:
        """The current time by the file system's clock. Touches a separate file."""
        probe = self._path.with_name(f".{LOCK_FILE}.{secrets.token_hex(4)}")
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            return os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
            os.unlink(probe)


def claim(directory: Path) -> RunLock | None:
    """Lock a job's directory: returns the lock on rank 0, `None` on the other ranks.

    Raises the same `ConfigError` on every rank if another run holds it. Collective: one broadcast of a string
    from rank 0 to all ranks.
    """
    lock, problem = None, [None]
    if dist.get_rank() == 0:
        try:
            lock = RunLock(directory)
        except ConfigError as error:
            problem = [str(error)]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(problem)
    if problem[0] is not None:
        raise ConfigError(problem[0])
    return lock


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _duration(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{max(0.0, seconds):.0f} seconds"
