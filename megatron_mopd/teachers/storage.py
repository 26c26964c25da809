"""Storage of teacher weights: in host memory, sharded over data-parallel replicas, or in files.

A store holds the stored form (see `encoding.py`) of every segment of every teacher on this rank, and copies
one into a destination on the device on request.
"""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mopd.backend.host_memory import host_buffer
from megatron_mopd.config import ConfigError
from megatron_mopd.teachers.fingerprint import file_fingerprint

_CHUNK = 64 << 20
"""Bytes per read when loading a file to a CUDA device."""


class TeacherFileError(RuntimeError):
    """A file with teacher weights is missing or has changed since the run started."""


class Store(ABC):
    """Interface of the storage modes. A segment's key is (teacher, segment name)."""

    blocking = False
    """Whether the callable that `begin` returns blocks its thread."""

    @abstractmethod
    def put(self, key: tuple[str, str], payload: Tensor) -> None:
        """Store `payload` [bytes] (on the device). Called only at start-up."""

    @abstractmethod
    def begin(self, key: tuple[str, str], destination: Tensor) -> Callable[[], None]:
        """Start copying a payload into `destination` [bytes], and return a callable that completes the copy.
        Nothing else may touch `destination` until it has run. Both run where arrivals run: on their thread,
        and on CUDA with their stream current."""

    def has(self, key: tuple[str, str], num_bytes: int) -> bool:
        """Whether the payload is already stored, from an earlier start of the run."""
        return False

    def problem(self, keys: list[tuple[str, str]]) -> str | None:
        """A problem with the stored payloads of `keys` that a cheap check can find; `None` if there is
        none."""
        return None

    @abstractmethod
    def host_bytes(self) -> int:
        """Host memory that this rank uses for all teachers."""

    def disk_bytes(self) -> int:
        """Size of the files from which this rank reads its teachers."""
        return 0


class HostStore(Store):
    """`host`: each rank stores its own shard of every teacher, page-locked on CUDA machines."""

    def __init__(self, device: torch.device):
        self._device = device
        self._payloads: dict[tuple[str, str], Tensor] = {}

    def put(self, key, payload):
        self._payloads[key] = host_buffer(payload.numel(), self._device)
        self._payloads[key].copy_(payload)

    def begin(self, key, destination):
        payload = self._payloads[key]
        return lambda: destination.copy_(payload, non_blocking=True)

    def host_bytes(self):
        return sum(payload.numel() for payload in self._payloads.values())


class ShardedHostStore(Store):
    """`host_sharded`: each replica of a body segment in a block stores 1/n of it; an all-gather assembles it.

    An arrival issues the all-gather (`begin`: n x part bytes over the segment's replicas), one arrival after
    another. All ranks of a block run the same teachers' forwards, so they issue the same all-gathers in the
    same order. It uses separate process groups: the caller's thread issues collectives at the same time, and
    on CUDA the all-gather must not queue behind gradients in their communicators.

    Heads, about one percent of a large model, stay whole on every rank: which heads a loss needs, and when,
    depends on a rank's samples, so loading them cannot be a collective.
    """

    def __init__(self, device: torch.device, replicas: dict[str, dist.ProcessGroup]):
        """`replicas`: the groups by segment; a segment without a group stays whole."""
        self._device = device
        self._groups = replicas
        self._parts: dict[tuple[str, str], Tensor] = {}

    def put(self, key, payload):
        group = self._groups.get(key[1])
        rank, count = (group.rank(), group.size()) if group else (0, 1)
        size = payload.numel() // count
        self._parts[key] = host_buffer(size, self._device)
        self._parts[key].copy_(payload[rank * size : (rank + 1) * size])

    def begin(self, key, destination):
        group, part = self._groups.get(key[1]), self._parts[key]
        if group is None or group.size() == 1:
            return lambda: destination.copy_(part, non_blocking=True)
        if self._device.type == "cuda":
            # In place: this replica's part is copied to its position, and the gather fills in the others.
            size = part.numel()
            own = destination[group.rank() * size : (group.rank() + 1) * size]
            own.copy_(part, non_blocking=True)
            part = own
        return dist.all_gather_into_tensor(destination, part, group=group, async_op=True).wait

    def host_bytes(self):
        return sum(part.numel() for part in self._parts.values())


class FileStore(Store):
    """`mmap`: payloads are stored in files, written once and read when a teacher is loaded.

    The files are read into their destination with ordinary reads, not through a mapping: truncating a mapped
    file kills the process with SIGBUS, whereas a read can report the error. As with a mapping, pages stay in
    the kernel's page cache as long as memory allows and are shared by the ranks of a host.
    """

    blocking = True

    def __init__(self, device: torch.device, path_of: Callable[[tuple[str, str]], Path]):
        self._device = device
        self._path_of = path_of
        self._identity: dict[tuple[str, str], tuple[int, ...]] = {}
        self._staging: list[Tensor] = []
        if device.type == "cuda":
            self._staging = [host_buffer(_CHUNK, device) for _ in range(2)]
            self._free: list[torch.cuda.Event | None] = [None, None]

    def has(self, key, num_bytes):
        path = self._path_of(key)
        try:
            recorded = _seal(path).read_text().strip()
            size = path.stat().st_size
        except FileNotFoundError:
            return False
        if size != num_bytes or file_fingerprint(path) != recorded:
            raise ConfigError(
                f"teacher_storage.mmap_directory: {path} was changed since it was written; delete it and it "
                "will be rebuilt"
            )
        self._remember(key)
        return True

    def put(self, key, payload):
        path = self._path_of(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.incomplete")
        with open(partial, "wb") as stream:
            for chunk in payload.split(_CHUNK):
                stream.write(chunk.cpu().numpy().data)
            stream.flush()
            os.fsync(stream.fileno())
        seal = _seal(partial)
        seal.write_text(file_fingerprint(partial))
        partial.replace(path)
        seal.replace(_seal(path))  # last: a file without a seal is incomplete

    def adopt(self, key: tuple[str, str]) -> None:
        """Record the file's current identity; from here on it must not change."""
        try:
            self._remember(key)
        except FileNotFoundError:
            raise ConfigError(
                f"teacher_storage.mmap_directory: {self._path_of(key)} was written by another rank and is "
                "not visible here; name a directory that all ranks of a host can see"
            ) from None

    def _remember(self, key: tuple[str, str]) -> None:
        self._identity[key] = _identity(os.stat(self._path_of(key)))

    def problem(self, keys):
        for key in keys:
            path = self._path_of(key)
            try:
                if _identity(os.stat(path)) != self._identity[key]:
                    return f"teacher {key[0]!r}: {path} has changed since the run began"
            except OSError as error:
                return f"teacher {key[0]!r}: {path} cannot be read: {error.strerror}"
        return None

    def begin(self, key, destination):
        return lambda: self._read(key, destination)

    def _read(self, key: tuple[str, str], destination: Tensor) -> None:
        path = self._path_of(key)
        try:
            with open(path, "rb", buffering=0) as stream:
                if _identity(os.fstat(stream.fileno())) != self._identity[key]:
                    raise TeacherFileError(f"teacher {key[0]!r}: {path} has changed since the run began")
                if self._device.type == "cuda":
                    self._read_to_device(stream, destination, path)
                else:
                    _read_fully(stream, destination, path)
        except OSError as error:
            raise TeacherFileError(
                f"teacher {key[0]!r}: {path} cannot be read: {error.strerror}; the run's last checkpoint is "
                "complete, resume from it"
            ) from error

    def _read_to_device(self, stream, destination: Tensor, path: Path) -> None:
        for number, part in enumerate(destination.split(_CHUNK)):
            turn = number % 2
            if self._free[turn] is not None:
                self._free[turn].synchronize()
            staging = self._staging[turn][: part.numel()]
            _read_fully(stream, staging, path)
            part.copy_(staging, non_blocking=True)
            self._free[turn] = torch.cuda.current_stream().record_event()

    def host_bytes(self):
        return sum(buffer.numel() for buffer in self._staging)

    def disk_bytes(self):
        return sum(identity[1] for identity in self._identity.values())


def _read_fully(stream, buffer: Tensor, path: Path) -> None:
    view = memoryview(buffer.numpy())
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])
        if not count:
            raise TeacherFileError(f"{path} ends after {done} of {len(view)} bytes: it was truncated")
        done += count


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _seal(path: Path) -> Path:
    """The small file next to a complete one that contains its fingerprint."""
    return path.with_name(f"{path.name}.sha256")
