"""Where teacher weights rest: in host memory, divided over data-parallel replicas, or in files.

A store keeps the resting form (see `encoding.py`) of every segment of every teacher of this rank, and brings
one into a destination on the device when it is asked to.
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
"""Bytes read from a file at a time on the way to a CUDA device."""


class TeacherFileError(RuntimeError):
    """A file with teacher weights is gone or is not the one that the run began with."""


class Store(ABC):
    """Interface of the storage modes. Segments are known by a key (teacher, segment name)."""

    blocking = False
    """What `begin` returns occupies a thread."""

    @abstractmethod
    def put(self, key: tuple[str, str], payload: Tensor) -> None:
        """Keep `payload` [bytes] (on the device). Only at start-up."""

    @abstractmethod
    def begin(self, key: tuple[str, str], destination: Tensor) -> Callable[[], None]:
        """Start bringing a payload into `destination` [bytes], which nobody else touches until what this
        returns has run. Both run where arrivals run: on their thread, on CUDA with their stream current."""

    def has(self, key: tuple[str, str], num_bytes: int) -> bool:
        """Whether the payload is already kept, from an earlier start of the run."""
        return False

    def problem(self, keys: list[tuple[str, str]]) -> str | None:
        """What is wrong with the resting place of `keys` as far as a cheap look can tell; `None`: nothing."""
        return None

    @abstractmethod
    def host_bytes(self) -> int:
        """Host memory that this rank keeps for all teachers."""

    def disk_bytes(self) -> int:
        """File space that this rank reads its teachers from."""
        return 0


class HostStore(Store):
    """`host`: each rank keeps its own shard of every teacher, page-locked on CUDA machines."""

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
    """`host_sharded`: each replica of a body segment keeps 1/n of it, and an all-gather puts it together.

    The all-gather (`begin`: n x part bytes over the segment's replicas) is issued by one arrival
    after another. All replicas run the same teachers' forwards, so they issue the same all-gathers in the
    same order. Its groups are its own: the caller's thread has collectives under way at the same time, and on
    CUDA it must not wait behind gradients in their communicators.

    Heads, a hundredth of a large model, stay whole on every rank: which heads a loss needs, and when, depends
    on the samples of a rank, so their arrival cannot be a collective.
    """

    def __init__(self, device: torch.device, replicas: dict[str, dist.ProcessGroup]):
        """`replicas`: the groups by segment; a segment without one stays whole."""
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
            # In place: this replica's part goes where it belongs, the others arrive around it.
            size = part.numel()
            own = destination[group.rank() * size : (group.rank() + 1) * size]
            own.copy_(part, non_blocking=True)
            part = own
        return dist.all_gather_into_tensor(destination, part, group=group, async_op=True).wait

    def host_bytes(self):
        return sum(part.numel() for part in self._parts.values())


class FileStore(Store):
    """`mmap`: payloads rest in files, written once, and are read when a teacher arrives.

    The files are read with ordinary reads into their destination, not through a mapping: a file truncated
    under a mapping ends the process with SIGBUS, a read can say what happened. Pages stay in the kernel's
    cache as long as memory allows, as for a mapping, and are shared by the ranks of a host.
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
                "will be made again"
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
        seal.replace(_seal(path))  # last: a file without a seal is not complete

    def adopt(self, key: tuple[str, str]) -> None:
        """Remember the file as it is now; from here on it must not change."""
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
    """The small file beside a complete one that says what is in it."""
    return path.with_name(f"{path.name}.sha256")
