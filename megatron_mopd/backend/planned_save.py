"""megatron-core's distributed save, split so that training can continue: the collective part comes first, the
slow part is done by `write_part` and `finish`, which may be called on any thread.
"""

from __future__ import annotations

import inspect
import queue
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy


class SaveStrategy(TorchDistSaveShardedStrategy):
    """torch_dist strategy that reuses its plan between saves: a run's checkpoints all have one structure."""

    def __init__(self):
        super().__init__("torch_dist", 1, thread_count=1, cached_metadata=True)
        self.planned: tuple[FileSystemWriterAsync, Any] | None = None

    def _get_save_and_finalize_callbacks(self, writer, planned, *version):
        self.planned = writer, planned[1]
        return super()._get_save_and_finalize_callbacks(writer, planned, *version)


@dataclass
class PlannedSave:
    """A checkpoint whose tensors have been copied into host memory but are not on disk yet."""

    writer: FileSystemWriterAsync
    metadata: Any
    """On rank 0: where every tensor of every rank will be."""
    buckets: list[Any]
    transforms: list[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's tensors."""
        return sum(tensor.nbytes for _, _, (_, tensors) in self.buckets for _, tensor in tensors)

    def write_part(self) -> tuple[list[str], list[Any]]:
        """Write this rank's files and wait until they are on disk. Returns their names and the input of
        `finish`. No collectives."""
        names, written = [], []
        for number, bucket in enumerate(self.buckets):
            results, count = queue.Queue(), queue.Queue()
            count.put(number)
            FileSystemWriterAsync.write_preloaded_data(
                self.transforms,
                local_proc_idx=number,
                write_bucket=bucket,
                results_queue=results,
                count_queue=count,
                use_fsync=True,
            )
            _, outcome = results.get()
            if isinstance(outcome, Exception):
                raise outcome
            names.append(bucket[1])
            written += outcome
        return names, written

    def finish(self, written: list[list[Any]]) -> None:
        """Rank 0: write the list of all tensors. `written`: the results of `write_part` on all ranks."""
        self.writer.finish(self.metadata, written)
        save_config(CheckpointingConfig("torch_dist", 1), str(self.writer.checkpoint_dir))


def plan_save(state: dict[str, Any], directory: Path, strategy: SaveStrategy, is_known: bool) -> PlannedSave:
    """Plan which rank writes which part of a sharded state dict, and copy it into host memory. Collective
    over all ranks.

    is_known: `strategy` has already saved a state of this structure, whose integrity is not checked again.
    Collectives: megatron-core's, which gather every rank's list of tensors the first times.
    """
    version = {}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        version = {"async_strategy": "mcore"}
    dist_checkpointing.save(
        state,
        str(directory),
        strategy,
        validate_access_integrity=not is_known,
        async_sharded_save=True,
        **version,
    )
    writer, metadata = strategy.planned
    strategy.planned = None
    transforms = [writer.transforms] if hasattr(writer, "transforms") else []
    return PlannedSave(writer, metadata, _host_copies(writer.write_buckets or []), transforms)


def _host_copies(buckets: list[Any]) -> list[Any]:
    """The buckets with every tensor copied, because training changes the originals once this returns."""
    copies = []
    for path, name, (objects, tensors) in buckets:
        copied = []
        for item, tensor in tensors:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copied.append((item, host.copy_(tensor.detach(), non_blocking=True)))
        copies.append((path, name, (objects, copied)))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copies
