"""Reads safetensors files slice by slice and writes them tensor by tensor, without a whole file in memory.

The format: eight bytes with the header's length, the header (JSON: name -> dtype, shape, offsets), the data.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_mopd.backend.model_files import open_file, parse_mapping, real_path
from megatron_mopd.config import ConfigError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

_HEADER_LIMIT = 100 * 10**6
"""Maximum header size in bytes, as defined by the format."""
_LARGEST_SIZE = 2**48

_MAPPED_BYTES = 1 << 28
"""A file is reopened after this many bytes, so that pages already read do not count as our memory."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor on disk."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str = ""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path, where: str) -> tuple[str, dict[str, TensorInfo]]:
    """A file's unmodified header, and its tensors in the order of their data.

    Raises `ConfigError` (prefix `where`) if the file is missing, truncated, not in this format, or a link out
    of its directory.
    """
    try:
        with open_file(path.parent, path.name) as stream:
            found = os.fstat(stream.fileno()).st_size
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > found - 8:
                raise ConfigError(f"{path} is truncated, or not a safetensors file")
            if length > _HEADER_LIMIT:
                raise ConfigError(
                    f"{path} has a header of {length} bytes; the format's limit is {_HEADER_LIMIT}"
                )
            text = stream.read(length).decode()
        plan = FilePlan.from_header(path.name, text, str(path))
    except FileNotFoundError:
        raise ConfigError(f"{where}: {path} is missing") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except (OSError, ValueError, struct.error) as error:
        raise ConfigError(
            f"{where}: {path} is truncated, or not a safetensors file ({type(error).__name__})"
        ) from None
    if found != plan.size:
        raise ConfigError(f"{where}: {path} is truncated: {found} bytes of {plan.size}")
    return text, plan.infos


class SliceReader:
    """Reads slices of the tensors of a directory; keeps one file open."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._name: str | None = None
        self._file = None
        self._read = 0

    def read(self, file: str, name: str, index: tuple[int | slice, ...]) -> Tensor:
        """A copy of `tensor[index]`."""
        if file != self._name or self._read > _MAPPED_BYTES:
            self.close()
            try:
                self._file = safe_open(real_path(self._directory, file), framework="pt")
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{self._directory / file} is not readable: {error}") from None
            self._name, self._read = file, 0
        part = self._file.get_slice(name)[index if index else ...].clone()
        self._read += part.nbytes
        return part

    def close(self) -> None:
        self._file = self._name = None


@dataclass(frozen=True)
class FilePlan:
    """One file to write: its header, and the offset of each tensor's bytes."""

    name: str
    header: bytes
    offsets: dict[str, int]
    infos: dict[str, TensorInfo]
    size: int

    @classmethod
    def from_header(cls, name: str, text: str, what: str) -> FilePlan:
        """The plan of a file with exactly this header; tensors in the order of their data.

        Raises `ConfigError` (prefix `what`) for a header that breaks the format's rules: valid shapes and
        known dtypes, matching byte counts, and data without holes and overlaps.
        """
        try:
            header = text.encode()
            entries = parse_mapping(text)
        except ValueError as error:
            raise ConfigError(f"{what} is truncated, or not a safetensors file: {error}") from None
        metadata = entries.pop("__metadata__", {})
        if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
            raise ConfigError(f"{what} is not a safetensors file: its metadata values are not strings")
        header = struct.pack("<Q", len(header)) + header
        placed = [(tensor, *_placed(tensor, entry, name, what)) for tensor, entry in entries.items()]
        offsets, infos, end = {}, {}, 0
        for tensor, info, start in sorted(placed, key=lambda item: (item[2], item[1].nbytes)):
            if start != end:
                problem = "overlaps with another tensor" if start < end else "starts after a hole"
                raise ConfigError(f"{what}: tensor {tensor[:80]!r} {problem}, at byte {start} of the data")
            offsets[tensor], infos[tensor], end = len(header) + start, info, start + info.nbytes
        return cls(name, header, offsets, infos, len(header) + end)

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, TensorInfo]) -> FilePlan:
        """The plan of a file with these tensors, in the layout of the safetensors library."""
        ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor, info in ordered:
            start, end = end, end + info.nbytes
            entries[tensor] = {
                "dtype": DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(entries, separators=(",", ":"))
        return cls.from_header(name, text + " " * (-len(text.encode()) % 8), name)


def _placed(tensor: str, entry: object, file: str, what: str) -> tuple[TensorInfo, int]:
    """A tensor's info from a header entry, and the offset of its data."""
    what = f"{what}: tensor {tensor[:80]!r}"
    if not tensor.isprintable():
        raise ConfigError(f"{what} has a name that cannot be printed")
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ConfigError(f"{what} is not described by dtype, shape and data_offsets")
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES:
        raise ConfigError(f"{what} has dtype {str(dtype)[:80]!r}, which is not one of {', '.join(DTYPES)}")
    if not _are_sizes(shape):
        raise ConfigError(f"{what} has shape {str(shape)[:80]}, which is not a list of sizes")
    info = TensorInfo(DTYPES[dtype], tuple(shape), file)
    if not _are_sizes(place) or len(place) != 2 or place[1] - place[0] != info.nbytes:
        raise ConfigError(f"{what} is at bytes {str(place)[:80]}; {dtype} {shape} has {info.nbytes} bytes")
    return info, place[0]


def _are_sizes(numbers: object) -> bool:
    return type(numbers) is list and all(type(n) is int and 0 <= n <= _LARGEST_SIZE for n in numbers)


class FileWriter:
    """Writes tensors at their planned offsets; any rank may write any tensor of any file."""

    def __init__(self, directory: Path, plans: Iterable[FilePlan]):
        self._directory = directory
        self._plans = {plan.name: plan for plan in plans}
        self._places: dict[str, list[FilePlan]] = {}
        for plan in self._plans.values():
            for tensor in plan.infos:
                self._places.setdefault(tensor, []).append(plan)
        self._descriptors: dict[str, int] = {}

    def create(self) -> None:
        """Create all files with headers and zeroed data. One rank calls this before any `write`."""
        for plan in self._plans.values():
            with open(self._directory / plan.name, "wb") as stream:
                stream.write(plan.header)
                stream.truncate(plan.size)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one whole tensor, cast to its planned dtype, into every file that contains it."""
        for plan in self._places[name]:
            info = plan.infos[name]
            assert tuple(tensor.shape) == info.shape, f"{name}: {tuple(tensor.shape)} is not {info.shape}"
            if plan.name not in self._descriptors:
                self._descriptors[plan.name] = os.open(self._directory / plan.name, os.O_WRONLY)
            data = tensor.detach().to("cpu", info.dtype).contiguous().flatten().view(torch.uint8).numpy()
            view, offset = memoryview(data), plan.offsets[name]
            while view:  # one call writes at most 2 GiB
                written = os.pwrite(self._descriptors[plan.name], view, offset)
                view, offset = view[written:], offset + written

    def close(self) -> None:
        """Flush all files to disk and close them."""
        for descriptor in self._descriptors.values():
            os.fsync(descriptor)
            os.close(descriptor)
        self._descriptors = {}


def named_dtype(name: str | None, flag: str = "--dtype") -> torch.dtype | None:
    """The dtype for `float32` or `bfloat16` (`None` for `None`); `ConfigError` for any other name."""
    if name not in (None, "float32", "bfloat16"):
        raise ConfigError(f"{flag}: {name!r} is not one of float32, bfloat16")
    return getattr(torch, name) if name else None


def parse_size(text: str | None, flag: str = "--max-shard-size") -> int | None:
    """`5GB`, `500MB`, `1.5GiB` or a number, in bytes; `ConfigError` for anything else."""
    if text is None:
        return None
    number = text.strip().upper()
    unit = next((unit for unit in sorted(_SIZE_UNITS, key=len, reverse=True) if number.endswith(unit)), None)
    try:
        size = float(number.removesuffix(unit) if unit else number) * _SIZE_UNITS.get(unit, 1)
    except ValueError:
        size = 0
    if not 1 <= size < float("inf"):
        raise ConfigError(f"{flag}: {text!r} is not a size such as 5GB or 500MB")
    return int(size)
