"""Loads a distributed checkpoint according to metadata that was already checked, instead of the checkpoint's
own metadata files.

torch unpickles `.metadata`, and its planners unpickle objects, without restriction, and megatron-core chooses
the readers itself. Here it is given readers that open only the files of tensors and objects, and accept only
tensors that match the metadata and plain values.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import megatron.core
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    TorchDistLoadShardedStrategy,
)
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from megatron_mopd.backend.model_files import open_file
from megatron_mopd.backend.plain_values import load_plain, require_tensor


class CheckedReader(FileSystemReader):
    """Reads the entries of a checked `Metadata`. Does not open the file `.metadata`."""

    def __init__(self, directory: Path, metadata: Metadata):
        super().__init__(str(directory))
        self._directory, self._metadata = Path(directory), metadata
        self.storage_data = metadata.storage_data

    def read_metadata(self) -> Metadata:
        """The checked metadata. Takes no keyword arguments, so that torch cannot request another file."""
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read every item of `plan`, one file after another.

        Raises `ValueError` for a tensor that does not match the metadata, and for an object that is not
        plain.
        """
        per_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            per_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in per_file.items():
            with open_file(self._directory, name) as stream:
                for item in items:
                    view = self._slice_file(stream, self.storage_data[item.storage_index])
                    if item.type == LoadItemType.BYTE_IO:
                        planner.load_bytes(item, view)
                        continue
                    part = narrow_tensor_by_index(
                        self._tensor(item, view), item.storage_offsets, item.lengths
                    )
                    target = planner.resolve_tensor(item).detach()
                    if target.size() != part.size():
                        raise ValueError(f"{item.storage_index.fqn} does not fit its target")
                    target.copy_(part)
                    planner.commit_tensor(item, target)
        done: Future = Future()
        done.set_result(None)
        return done

    def _tensor(self, item: ReadItem, stream: IO[bytes]) -> Tensor:
        key = item.storage_index.fqn
        listed = self._metadata.state_dict_metadata[key]
        shape = next(c.sizes for c in listed.chunks if c.offsets == item.storage_index.offset)
        return require_tensor(load_plain(stream), listed.properties.dtype, shape, key)


class _Planner(MCoreLoadPlanner):
    """megatron-core's planner, restricted to unpickling plain values."""

    def load_bytes(self, read_item: ReadItem, value: IO[bytes]) -> None:
        name, loaded = read_item.dest_index.fqn, load_plain(value)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded


class _Strategy(TorchDistLoadShardedStrategy):
    """megatron-core's torch_dist strategy with our reader and planner."""

    def __init__(self, metadata: Metadata):
        super().__init__()
        self._metadata = metadata

    def load(
        self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path, *settings: Any
    ) -> dict[str, Any]:
        for wanted in nested_values(sharded_state_dict):
            is_object = isinstance(wanted, ShardedObject)
            key = wanted.unique_key if is_object else wanted.key
            listed = self._metadata.state_dict_metadata.get(key)
            if listed is None:
                raise KeyError(f"{key} is missing")
            if isinstance(listed, TensorStorageMetadata) is is_object:
                raise ValueError(f"{key} is listed as {'a tensor' if is_object else 'bytes, not a tensor'}")
        load = _bound(
            TorchDistLoadShardedStrategy.load,
            _get_filesystem_reader=lambda *args, **kwargs: CheckedReader(checkpoint_dir, self._metadata),
            MCoreLoadPlanner=_Planner,
        )
        return load(self, sharded_state_dict, checkpoint_dir, *settings)


def load_checked(
    state: dict[str, Any], directory: Path, metadata: Metadata, common: dict[str, Any]
) -> dict[str, Any]:
    """`dist_checkpointing.load` of a sharded state dict, with the given metadata and common state.

    Opens only those files in `directory` that `metadata` names. Collective over all ranks. Raises whatever
    megatron-core raises, and `RuntimeError` in place of torch's `CheckpointException`.
    """
    strategy = _Strategy(metadata)
    own = {
        # 0.16: both strategies come from here.
        "verify_checkpoint_and_load_strategy": lambda *args: (strategy, _Common(common)),
        # 0.19: the common state comes from here.
        "verify_checkpoint": lambda *args: None,
        "load_common_state_dict": lambda *args: copy.deepcopy(common),
    }
    used = {name: own[name] for name in own if name in dist_checkpointing.load.__code__.co_names}
    if not used.keys() & {"verify_checkpoint_and_load_strategy", "load_common_state_dict"}:
        raise _unknown_release("load")
    try:
        return _bound(dist_checkpointing.load, **used)(state, str(directory), strategy)
    except CheckpointException as error:  # derives from BaseException, so `except Exception` would miss it
        problem = next(iter(error.failures.values()))[0]
        raise RuntimeError(" ".join(str(problem).split()) or type(problem).__name__) from None


class _Common:
    """Replaces megatron-core 0.16's reader of `common.pt`."""

    def __init__(self, common: dict[str, Any]):
        self._common = common

    def load_common(self, checkpoint_dir: str) -> dict[str, Any]:
        return copy.deepcopy(self._common)


def _bound(function: Callable[..., Any], **names: Any) -> Callable[..., Any]:
    """A copy of `function` with some of the global names it uses bound to other values. `RuntimeError` if it
    does not use one of them, as in an unsupported release.
    """
    if function.__closure__ or not names.keys() <= set(function.__code__.co_names):
        raise _unknown_release(function.__qualname__)
    scope = {**function.__globals__, **names}
    bound = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
    bound.__kwdefaults__ = function.__kwdefaults__
    return bound


def _unknown_release(function: str) -> RuntimeError:
    return RuntimeError(
        f"megatron-core {megatron.core.__version__} reads checkpoints in an unknown way "
        f"({function}); install a supported release"
    )
