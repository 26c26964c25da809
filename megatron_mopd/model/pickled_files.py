"""What may be pickled in a checkpoint. megatron-core's format keeps its list of tensors and a few small
objects as pickles, which torch reads without a restriction; they are looked at here first, with one.

A pickle names the classes and functions that it wants called. Whatever is not on the list below is refused
before anything is called.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_mopd.config import ConfigError

METADATA_FILE = ".metadata"
COMMON_FILE = "common.pt"

# The description of tensors and where they are: plain records of these modules, and torch's names for types.
_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device", *(name for name, value in vars(torch).items() if type(value) is torch.dtype)},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _RECORDS.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def refuse_code(checkpoint: Path, where: str) -> None:
    """`ConfigError` (prefix `where`), on every rank alike, when a checkpoint's pickles hold anything but the
    description of tensors, tensors and plain values, or cannot be read.

    Rank 0 looks, and tells the others: one broadcast of a line of text.
    """
    problem: list[str | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        problem = [pickle_problem(checkpoint)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise ConfigError(f"{where}: checkpoint {checkpoint} is refused: {problem[0]}")


def pickle_problem(checkpoint: Path) -> str | None:
    """Why a checkpoint's pickles are not to be read, or `None`. No collectives."""
    name = METADATA_FILE
    try:
        with open(checkpoint / name, "rb") as file:
            metadata = _Restricted(file).load()
        if not isinstance(metadata, Metadata):
            return f"{name} is not a list of tensors"
        name = COMMON_FILE
        if (checkpoint / name).exists():
            torch.load(checkpoint / name, map_location="cpu", weights_only=True)
        for index, place in (metadata.storage_data or {}).items():
            if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
                name = f"{index.fqn} in {place.relative_path}"
                _check_object(checkpoint, place)
    # Whatever a damaged or hostile file makes a reader raise.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        return f"{name} cannot be read as tensors and plain values: {reason}"
    return None


def _check_object(checkpoint: Path, place: Any) -> None:
    path = (checkpoint / place.relative_path).resolve()
    if path.parent != checkpoint.resolve():
        raise ValueError("the file is outside the checkpoint")
    with open(path, "rb") as file:
        file.seek(place.offset)
        data = file.read(place.length)
    torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
