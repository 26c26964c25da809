"""Writes and reads distributed checkpoints (`torch_dist`) one tensor at a time.

megatron-core saves and loads the tensors of a model in memory. A conversion has no model: tensors are
produced as they are written and consumed as they are read, so only a few are in memory at a time, whatever
the model's size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_mopd.backend.checked_loading import CheckedReader
from megatron_mopd.config import ConfigError
from megatron_mopd.model.pickled_files import check

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """A box of a checkpoint tensor, and a function that creates its values."""

    key: str
    global_shape: Shape
    offsets: Shape
    sizes: Shape
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.sizes).numel() * self.dtype.itemsize


def share_of(sizes: Sequence[int], rank: int, ranks: int) -> range:
    """The consecutive items of one rank, so that all ranks get nearly equal sums of `sizes`.

    Every item belongs to exactly one rank: the one whose share of the total contains the item's midpoint.
    """
    total, start, mine = max(1, sum(sizes)), 0, []
    for index, size in enumerate(sizes):
        if min(ranks - 1, int((start + size / 2) * ranks / total)) == rank:
            mine.append(index)
        start += size
    return range(mine[0], mine[-1] + 1) if mine else range(0)


def write_chunks(directory: Path, chunks: Sequence[Chunk]) -> None:
    """Write a `torch_dist` checkpoint of these chunks. All ranks pass the same list, and each writes its
    share.

    Collective over all ranks: PyTorch gathers the plans, a few hundred bytes per chunk. Raises `RuntimeError`
    on every rank if one could not write.
    """
    mine = share_of([chunk.nbytes for chunk in chunks], dist.get_rank(), dist.get_world_size())
    planner = _ProducingPlanner([chunks[index] for index in mine])
    try:
        dcp.save({}, storage_writer=dcp.FileSystemWriter(str(directory)), planner=planner)
    except CheckpointException as error:  # derives from BaseException
        rank, (problem, _) = next(iter(error.failures.items()))
        raise RuntimeError(f"rank {rank} could not write {directory}: {problem}") from problem
    if dist.get_rank() == 0:
        torch.save({}, directory / COMMON_STATE_FNAME)
        save_config(CheckpointingConfig("torch_dist", 1), str(directory))


class _ProducingPlanner(SavePlanner):
    """Tells PyTorch what this rank will write, and creates each tensor on request."""

    def __init__(self, chunks: Sequence[Chunk]):
        self._chunks = {(chunk.key, chunk.offsets): chunk for chunk in chunks}

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(chunk) for chunk in self._chunks.values()])

    def create_global_plan(self, all_plans):
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        chunk = self._chunks[write_item.index.fqn, tuple(write_item.index.offset)]
        return chunk.make().to(chunk.dtype).reshape(chunk.sizes)


def _write_item(chunk: Chunk) -> WriteItem:
    box = ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
    properties = TensorProperties(dtype=chunk.dtype)
    return WriteItem(
        index=MetadataIndex(chunk.key, box.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(box, properties, torch.Size(chunk.global_shape)),
    )


class ChunkReader:
    """Reads boxes of the tensors of a `torch_dist` checkpoint written at any parallel layout."""

    def __init__(self, directory: Path, where: str):
        self._directory, self._where = directory, where
        try:
            metadata = check(directory).metadata
        except ConfigError as error:
            raise ConfigError(f"{where}: {directory}: {error}") from None
        self._reader = CheckedReader(directory, metadata)
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }

    def shape(self, key: str) -> Shape | None:
        """Global shape of a tensor, or `None` if there is no tensor with this name."""
        return tuple(self._tensors[key].size) if key in self._tensors else None

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].properties.dtype

    def read(self, key: str, offsets: Shape, sizes: Shape) -> Tensor:
        """The box of tensor `key` at `offsets` with shape `sizes`; only the files that hold it are read."""
        target = torch.empty(sizes, dtype=self.dtype(key))
        box = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, self._tensors[key], [box])
        covered = sum(torch.Size(item.lengths).numel() for item in items)
        if covered != target.numel():
            raise ConfigError(f"{self._where}: {self._directory} holds only a part of {key}")
        try:
            self._reader.read_data(LoadPlan(items), _FillingPlanner(target))
        except Exception as error:  # torch may raise anything for a damaged file
            first_line = next(iter(str(error).splitlines()), type(error).__name__)
            raise ConfigError(f"{self._where}: {self._directory}: {key} is damaged: {first_line}") from None
        return target


class _FillingPlanner(LoadPlanner):
    """Reads into one tensor."""

    def __init__(self, target: Tensor):
        self._target = target

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
        pass

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([])

    def create_global_plan(self, global_plan):
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value) -> None:
        raise AssertionError("only tensors are asked for")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        index = tuple(slice(o, o + n) for o, n in zip(read_item.dest_offsets, read_item.lengths))
        return self._target[index]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass
