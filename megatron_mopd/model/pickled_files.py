"""Restricted reading of pickles in checkpoints.

megatron-core's format stores its list of tensors and a few small objects as pickles, which torch reads
without restriction. Here they are read with a restricted unpickler instead, before torch sees them.

A pickle names classes and functions to call. None is called: those that describe tensors are read as inert
records, and all others are refused. The records' values are validated one by one, and torch gets a
description built from them. Rank 0 reads the file once.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_mopd.backend.model_files import bare_name, open_file, read_limited, read_mapping
from megatron_mopd.backend.plain_values import load_plain
from megatron_mopd.config import ConfigError
from megatron_mopd.model.megatron_arguments import read_arguments

METADATA_FILE = ".metadata"
COMMON_FILE = "common.pt"
FORMAT_FILE = "metadata.json"
_COMMON_OBJECT = "common_state/shard_0_1"
"""The object that megatron-core 0.19 stores instead of `common.pt`."""
_METADATA_LIMIT = 2**30
_OBJECT_LIMIT = 2**30
_LARGEST_SIZE = 2**48
_MOST_DIMENSIONS = 16
_WEIGHT_KEY = re.compile(r"((model|module)\.)*(embedding|decoder|output_layer|mtp)\.")
_OBJECT_KEY = re.compile(r".+/shard_\d+(\.\d+)*(_\d+(\.\d+)*)?")


def is_weight(key: Any) -> bool:
    """Whether a checkpoint's key is that of a model's tensor, with any program's prefix."""
    return type(key) is str and _WEIGHT_KEY.match(key) is not None and "_extra_state" not in key


class _Record:
    """Stands in for an object of a class that a pickle names; holds only its arguments and state."""

    __slots__ = ("arguments", "state")

    def __new__(cls, *arguments: Any) -> _Record:
        record = object.__new__(cls)
        record.arguments, record.state = arguments, None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Mapping(_Record):
    """Stands in for an `OrderedDict`, whose contents are not used."""

    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


# Classes that describe tensors and their locations.
_RECORDS = {
    "torch.distributed.checkpoint.metadata": [
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ],
    "torch.distributed.checkpoint.planner": [
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    ],
    "torch.distributed.checkpoint.filesystem": ["_StorageInfo", "_StoragePrefix"],
    "torch.serialization": ["_get_layout"],
    "torch": ["Size", "device"],
    "collections": ["OrderedDict"],
    "pathlib": ["PosixPath"],
}
_INERT = {
    (module, name): type(name, (_Mapping if name == "OrderedDict" else _Record,), {"__slots__": ()})
    for module, names in _RECORDS.items()
    for name in names
}
_DTYPES = {
    ("torch", name): value for name, value in vars(torch).items() if type(value) is torch.dtype
}  # dtypes have no state
_FIELDS = {
    "Metadata": {"state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version"}
    # Save plans, which megatron-core adds and this module does not read.
    | {"all_local_plans", "mcore_data"},
    "MetadataIndex": {"fqn", "offset", "index"},
    "TensorStorageMetadata": {"properties", "size", "chunks"},
    "BytesStorageMetadata": set(),
    "ChunkStorageMetadata": {"offsets", "sizes"},
    "_StorageInfo": {"relative_path", "offset", "length", "transform_descriptors"},
}


# The pure-Python implementation: the C one allocates memory for every memo number, so a file of 20 bytes can
# make it allocate up to 64 GB.
class _Restricted(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _INERT.get((module, name), _DTYPES.get((module, name)))
        if found is None:
            raise pickle.UnpicklingError(f"it asks for {module[:80]}.{name[:80]}")
        return found


@dataclass(frozen=True)
class Checked:
    """The contents of a checkpoint's pickles, validated and rebuilt; equal on every rank."""

    metadata: Metadata
    common: dict[str, Any]
    """Everything that was saved besides tensors and sharded objects."""


def refuse_code(checkpoint: Path, where: str, weights_only: bool = False) -> Checked:
    """The description of a checkpoint. Raises `ConfigError` (prefix `where`) on every rank if its pickles
    cannot be read or contain anything but descriptions of tensors, tensors and plain values.

    weights_only: see `check`. Rank 0 reads and broadcasts about 150 bytes per tensor of a rank.
    """
    found: list[Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            found = [None, check(checkpoint, weights_only)]
        except ConfigError as error:
            found = [str(error), None]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(found, src=0)
    if found[0] is not None:
        raise ConfigError(f"{where}: checkpoint {checkpoint} is refused: {found[0]}")
    return found[1]


def check(checkpoint: Path, weights_only: bool = False) -> Checked:
    """The description of a checkpoint; `ConfigError` with the reason if it is refused. No collectives.

    weights_only: describe only the model's tensors, and read only Megatron-LM's arguments of the rest
        (`common`), because the objects in its checkpoints contain its own classes.
    """
    name = FORMAT_FILE
    try:
        if (checkpoint / name).exists():
            _check_format(read_mapping(checkpoint, name, name))
        name = METADATA_FILE
        record = _Restricted(io.BytesIO(read_limited(checkpoint, name, _METADATA_LIMIT))).load()
        metadata = _metadata(record, weights_only)
        _check_places(checkpoint, metadata)
        if weights_only:
            return Checked(metadata, read_arguments(_common_bytes(checkpoint, metadata)))
        name, common = COMMON_FILE, {}
        if (checkpoint / name).exists():
            common = load_plain(io.BytesIO(read_limited(checkpoint, name, _OBJECT_LIMIT)))
        for index, place in metadata.storage_data.items():
            if type(metadata.state_dict_metadata[index.fqn]) is BytesStorageMetadata:
                name = f"{index.fqn} in {place.relative_path}"
                value = _object(checkpoint, place)
                if index.fqn == _COMMON_OBJECT and not (checkpoint / COMMON_FILE).exists():
                    common = value[0] if type(value) is list and value else None
        name = COMMON_FILE
        if type(common) is not dict:
            raise ValueError(f"it is a {type(common).__name__}, not a mapping")
    # A damaged or hostile file may make the reader raise anything.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ConfigError(f"{name} cannot be read as tensors and plain values: {reason[:300]}") from None
    return Checked(metadata, common)


def _check_format(written: dict[str, Any]) -> None:
    for key, known in (("sharded_backend", "torch_dist"), ("common_backend", "torch")):
        if written.get(key, known) != known:
            raise ValueError(f"{key} is {str(written[key])[:80]!r}, not {known}")


def _common_bytes(checkpoint: Path, metadata: Metadata) -> bytes:
    """The common state as written by `torch.save`; its location depends on the release of megatron-core."""
    if (checkpoint / COMMON_FILE).exists():
        return read_limited(checkpoint, COMMON_FILE, _OBJECT_LIMIT)
    place = metadata.storage_data.get(MetadataIndex(_COMMON_OBJECT))
    if place is None or place.length > _OBJECT_LIMIT:
        return b""
    with open_file(checkpoint, place.relative_path) as stream:
        stream.seek(place.offset)
        return stream.read(place.length)


def _object(checkpoint: Path, place: _StorageInfo) -> Any:
    if place.length > _OBJECT_LIMIT:
        raise ValueError(f"it has {place.length} bytes; the limit is {_OBJECT_LIMIT}")
    with open_file(checkpoint, place.relative_path) as stream:
        stream.seek(place.offset)
        return load_plain(io.BytesIO(stream.read(place.length)))


def _metadata(record: Any, weights_only: bool) -> Metadata:
    """torch's description of a checkpoint, built from an inert one; `weights_only`: almost only the model's
    tensors."""
    if _class_of(record) != "Metadata":
        raise ValueError(f"it is not a list of tensors, but a {_class_of(record)}")
    fields = _fields(record, "Metadata")
    listed = {
        _text(key, "a tensor's name"): _entry(key, entry)
        for key, entry in _items(fields.get("state_dict_metadata"), "the list of tensors")
        if not weights_only or is_weight(key) or key == _COMMON_OBJECT
    }
    places = {}
    for index, place in _items(fields.get("storage_data"), "the list of places"):
        key, known = _index(index), len(places)
        if key.fqn not in listed and weights_only:
            continue
        places[key] = _place(place, key.fqn)
        if len(places) == known:
            raise ValueError(f"{key.fqn} is listed with two places")
    _check_complete(listed, places)
    return Metadata(listed, None, places)


def _entry(key: str, record: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if _class_of(record) == "BytesStorageMetadata":
        _fields(record, "BytesStorageMetadata")
        if not _OBJECT_KEY.fullmatch(key):
            raise ValueError(
                f"{key} is listed as bytes, which is only valid for megatron-core's objects (.../shard_0_1)"
            )
        return BytesStorageMetadata()
    fields = _fields(record, "TensorStorageMetadata")
    size, chunks = _shape(fields.get("size"), key), fields.get("chunks")
    if type(chunks) is not list:
        raise ValueError(f"{key} has no list of parts")
    parts = [_chunk(chunk, size, key) for chunk in chunks]
    if size and sum(math.prod(part.sizes) for part in parts) != math.prod(size):
        raise ValueError(f"{key}: its parts overlap, or do not make up its shape {list(size)}")
    return TensorStorageMetadata(_properties(fields.get("properties"), key), size, parts)


def _chunk(record: Any, size: torch.Size, key: str) -> ChunkStorageMetadata:
    fields = _fields(record, "ChunkStorageMetadata")
    offsets, sizes = _shape(fields.get("offsets"), key), _shape(fields.get("sizes"), key)
    if not len(offsets) == len(sizes) == len(size) or any(
        o + n > whole for o, n, whole in zip(offsets, sizes, size)
    ):
        raise ValueError(f"{key}: a part of {list(sizes)} at {list(offsets)} is not inside {list(size)}")
    return ChunkStorageMetadata(offsets, sizes)


def _properties(record: Any, key: str) -> TensorProperties:
    """Only the dtype is kept: the other four properties are deprecated in torch, and our loaders do not use
    them."""
    state = record.state if _class_of(record) == "TensorProperties" and not record.arguments else None
    if type(state) is not tuple or len(state) != 5 or type(state[0]) is not torch.dtype:
        raise ValueError(f"{key} has no dtype")
    if _class_of(state[1]) != "_get_layout" or state[1].arguments != ("torch.strided",):
        raise ValueError(f"{key} is not a dense tensor")
    if not type(state[2]) is type(state[4]) is bool or _class_of(state[3]) != "_MEM_FORMAT_ENCODING":
        raise ValueError(f"{key} has properties that are not a tensor's")
    return TensorProperties(dtype=state[0])


def _place(record: Any, key: str) -> _StorageInfo:
    fields = _fields(record, "_StorageInfo")
    offset, length = fields.get("offset"), fields.get("length")
    if not type(offset) is type(length) is int or offset < 0 or length < 0:
        raise ValueError(f"{key} is listed without a place in a file")
    if fields.get("transform_descriptors") not in (None, (), []):
        raise ValueError(f"{key} is stored compressed or encrypted, which is not supported")
    name = fields.get("relative_path")
    if type(name) is str and "/" in name:
        raise ValueError(f"{key}: the file {name[:80]!r} is outside the checkpoint")
    return _StorageInfo(bare_name(name, key), offset, length)


def _index(record: Any) -> MetadataIndex:
    fields = _fields(record, "MetadataIndex")
    key, offset = _text(fields.get("fqn"), "a tensor's name"), fields.get("offset")
    return MetadataIndex(key, None if offset is None else _shape(offset, key))


def _check_complete(listed: dict[str, Any], places: dict[MetadataIndex, _StorageInfo]) -> None:
    """Raise `ValueError` unless every part has a place that is large enough, and every place has a part."""
    wanted = {}
    for key, entry in listed.items():
        if type(entry) is BytesStorageMetadata:
            wanted[MetadataIndex(key)] = 0
            continue
        for chunk in entry.chunks:
            nbytes = math.prod(chunk.sizes) * entry.properties.dtype.itemsize
            wanted[MetadataIndex(key, chunk.offsets)] = nbytes
    for index, nbytes in wanted.items():
        if index not in places:
            raise ValueError(f"{index.fqn} is listed without a place in a file")
        if places[index].length < nbytes:
            raise ValueError(
                f"{index.fqn} has {nbytes} bytes by its shape, {places[index].length} in its file"
            )
    for index in places:
        if index not in wanted:
            raise ValueError(f"{index.fqn} has a place in a file for a part that is not listed")


def _check_places(checkpoint: Path, metadata: Metadata) -> None:
    """Raise `ValueError` unless all places are within their files and do not overlap."""
    by_file = defaultdict(list)
    for index, place in metadata.storage_data.items():
        by_file[place.relative_path].append((place.offset, place.length, index.fqn))
    for name, places in by_file.items():
        with open_file(checkpoint, name) as stream:
            size, end = os.fstat(stream.fileno()).st_size, 0
        for offset, length, key in sorted(places):
            if offset < end:
                raise ValueError(f"{key} overlaps with another tensor in {name}")
            end = offset + length
            if end > size:
                raise ValueError(f"{name} is damaged: {key} ends at byte {end}, the file at {size}")


def _class_of(value: Any) -> str:
    return type(value).__name__


def _fields(record: Any, expected: str) -> dict[str, Any]:
    """The attributes of an inert dataclass; `ValueError` for a different class or unknown attributes."""
    if not isinstance(record, _Record) or _class_of(record) != expected or record.arguments:
        raise ValueError(f"it has a {_class_of(record)} instead of a {expected}")
    state = {} if record.state is None else record.state
    if type(state) is not dict or not all(type(name) is str for name in state):
        raise ValueError(f"it has a {expected} without fields")
    if extra := sorted(state.keys() - _FIELDS[expected]):
        raise ValueError(f"it has a {expected} with an unknown attribute {extra[0][:80]!r}")
    return state


def _items(value: Any, what: str) -> Any:
    if type(value) is not dict:
        raise ValueError(f"{what} is a {_class_of(value)}, not a plain dictionary")
    return value.items()


def _text(value: Any, what: str) -> str:
    if type(value) is not str or not value.isprintable():
        raise ValueError(f"{what} is a {_class_of(value)}, or not printable")
    return value


def _shape(record: Any, key: str) -> torch.Size:
    arguments = record.arguments if _class_of(record) == "Size" and isinstance(record, _Record) else ()
    numbers = arguments[0] if len(arguments) == 1 and record.state is None else None
    if type(numbers) not in (tuple, list) or len(numbers) > _MOST_DIMENSIONS:
        raise ValueError(f"{key} has no shape, or one of too many dimensions")
    if not all(type(number) is int and 0 <= number <= _LARGEST_SIZE for number in numbers):
        raise ValueError(f"{key} has a shape or an offset that is not a list of sizes: {str(numbers)[:80]}")
    return torch.Size(numbers)
