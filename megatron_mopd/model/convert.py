"""Converts Hugging Face directories to distributed checkpoints and back, tensor by tensor, on all ranks.

A converted checkpoint stores in `hugging_face/` everything that its own format cannot represent:
configuration, tokenizer, chat template and all other small files, the headers of the weight files (so that
the conversion back writes identical files), and tensors that we do not train.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mopd.backend.model_files import read_mapping
from megatron_mopd.config import ConfigError
from megatron_mopd.data.tokenizer import load_tokenizer
from megatron_mopd.model.checkpoint import (
    HUGGING_FACE_DIRECTORY,
    MODEL_FILE,
    TOKENIZER_DIRECTORY,
    find_checkpoint,
    publish_checkpoint,
    read_architecture,
)
from megatron_mopd.model.companions import (
    copy_companion_files,
    read_companions,
    write_companions,
    write_untrained,
)
from megatron_mopd.model.families import Weight, matching_family
from megatron_mopd.model.hugging_face import CONFIG, HuggingFaceCheckpoint
from megatron_mopd.model.megatron_lm import is_megatron_lm
from megatron_mopd.model.safetensors_files import FilePlan, FileWriter, TensorInfo
from megatron_mopd.model.streamed_checkpoint import Chunk, ChunkReader, share_of, write_chunks
from megatron_mopd.model.weight_files import INDEX, SINGLE_FILE
from megatron_mopd.model.weight_source import Companions, WeightSource
from megatron_mopd.observe.progress import phase, progress

DEFAULT_SHARD_SIZE = 5 * 10**9


def require_empty(
    directory: Path, overwrite: bool, flag: str = "--output", source: str | Path | None = None
) -> None:
    """Raise `ConfigError` if `directory` is not empty and may not be overwritten, or if it contains `source`,
    the model to be read."""
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{flag}: {directory} is a file")
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise ConfigError(f"{flag}: {directory} is not empty; choose another directory, or add --overwrite")
    if source is not None and Path(source).resolve().is_relative_to(directory.resolve()):
        raise ConfigError(f"{flag}: {directory} contains the model to be read; choose another directory")


def write_megatron(source: WeightSource, output: Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write a model as iteration 0 under `output`; returns the checkpoint's directory.

    `dtype` casts the weights; `None` keeps each tensor's dtype. Collective over all ranks, which divide
    layers and experts among themselves and must see the same file system.
    """

    def write(partial: Path) -> None:
        with phase("converting"):
            write_chunks(partial, [_chunk(source, weight, dtype) for weight in source.weights])
        write_companions(source.companions, source.family, partial / HUGGING_FACE_DIRECTORY)

    fingerprint, save_tokenizer = "none", None
    if (directory := source.tokenizer_directory()) is not None:
        with contextlib.suppress(ConfigError):  # a model without a tokenizer can be converted too
            tokenizer = load_tokenizer(directory)
            fingerprint, save_tokenizer = tokenizer.fingerprint(), tokenizer.save
    return publish_checkpoint(output, 0, write, source.model, fingerprint, save_tokenizer)


def _chunk(source: WeightSource, weight: Weight, dtype: torch.dtype | None) -> Chunk:
    return Chunk(
        key=weight.key,
        global_shape=(*weight.axes, *weight.shape),
        offsets=(*weight.offsets, *(0 for _ in weight.shape)),
        sizes=(*(1 for _ in weight.axes), *weight.shape),
        dtype=_cast(weight.key, source.dtype(weight), dtype),
        make=lambda: source.whole(weight),
    )


def _cast(name: str, found: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    # The router's expert bias changes in steps of 0.001, which bfloat16 would round away.
    return found if wanted is None or name.endswith(("expert_bias", "correction_bias")) else wanted


class MegatronCheckpoint(WeightSource):
    """A distributed checkpoint whose every tensor is accounted for by a family's rules.

    The family is the one that the model was converted from, or, if it was not converted, the first one that
    can express its architecture. Raises `ConfigError` (prefix `where`) if there is none, and for tensors that
    are missing or of a different shape.
    """

    def __init__(self, path: Path, where: str):
        self.path, self._where = path, where
        self.model = read_architecture(path, where)
        found = read_companions(path / HUGGING_FACE_DIRECTORY, where)
        self.companions, self.family = found or (Companions(), matching_family(self.model, where))
        self.weights = self.family.weights(self.model)
        self._reader = ChunkReader(path, where)
        for weight in self.weights:
            found, expected = self._reader.shape(weight.key), (*weight.axes, *weight.shape)
            padded = weight.rule.kind == "vocabulary" and found is not None and found[0] >= expected[0]
            if found != expected and not padded:
                problem = "is missing" if found is None else f"has shape {list(found)}, not {list(expected)}"
                raise ConfigError(f"{where}: {weight.key} {problem} in {path}")

    def dtype(self, weight: Weight) -> torch.dtype:
        return self._reader.dtype(weight.key)

    def slice_of(self, weight: Weight, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        sizes = (*(1 for _ in weight.axes), *size)
        return self._reader.read(weight.key, (*weight.offsets, *start), sizes).reshape(size)

    def tokenizer_directory(self) -> Path | None:
        directory = self.path / TOKENIZER_DIRECTORY
        return directory if directory.is_dir() else None


def open_checkpoint(path: str | Path, where: str) -> WeightSource:
    """Open a model on disk, in either format; `ConfigError` (prefix `where`) if it is missing or damaged."""
    found = find_checkpoint(path, where)
    if (found / MODEL_FILE).exists() or is_megatron_lm(found):
        return MegatronCheckpoint(found, where)
    return HuggingFaceCheckpoint.open(found, where)


def write_hugging_face(
    source: WeightSource,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
) -> Path:
    """Write a model as a Hugging Face directory, which gets its final name only when it is complete.

    Without `dtype` and `max_shard_size`, a model that was converted from Hugging Face files gets files with
    the same names, tensors, dtypes and order. Collective over all ranks, which divide layers and experts
    among themselves and must see the same file system.
    """
    partial = output.with_name(f".{output.name}.incomplete")
    companions = source.companions
    tensors = _tensors_to_write(source, dtype)
    plans = _original_plans(companions, tensors) if dtype is None and max_shard_size is None else None
    is_original = plans is not None
    plans = plans or _plan_files(tensors, max_shard_size or DEFAULT_SHARD_SIZE)
    writer = FileWriter(partial, plans)
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        writer.create()
        _write_small_files(source, partial, dtype, plans, is_original)
    dist.barrier()
    copies = {original: copy for copy, original in companions.aliases.items()}
    sizes = [torch.Size(weight.shape).numel() * source.dtype(weight).itemsize for weight in source.weights]
    for index in progress(share_of(sizes, dist.get_rank(), dist.get_world_size()), "converting"):
        for name, tensor in source.hugging_face_tensors(source.weights[index]):
            writer.write(name, tensor)
            if name in copies:
                writer.write(copies[name], tensor)
    write_untrained(companions, writer)
    writer.close()
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(output, ignore_errors=True)
        partial.rename(output)
    dist.barrier()
    return output


def _tensors_to_write(source: WeightSource, dtype: torch.dtype | None) -> dict[str, TensorInfo]:
    """Every tensor of the directory in layer order."""
    tensors = {}
    for weight in source.weights:
        for name, shape in zip(weight.hugging_face, weight.rule.shapes, strict=True):
            tensors[name] = TensorInfo(_cast(name, source.dtype(weight), dtype), tuple(shape))
    extra = source.companions.aliases.keys() | source.companions.untrained.keys()
    unknown = sorted(set(source.companions.aliases.values()) - tensors.keys())
    if problem := unknown or sorted(extra & tensors.keys()):
        raise ConfigError(
            f"{source.companions.directory}: tensor {problem[0]} is recorded as one that this model does "
            "not have; copy the record from the original checkpoint"
        )
    for copy, original in source.companions.aliases.items():
        tensors[copy] = tensors[original]
    for name, info in source.companions.untrained.items():
        tensors[name] = TensorInfo(_cast(name, info.dtype, dtype), info.shape)
    return tensors


def _original_plans(companions: Companions, tensors: dict[str, TensorInfo]) -> list[FilePlan] | None:
    """Plans of the files from which the model was converted, if it still has the same tensors."""
    if not companions.headers:
        return None
    plans = [FilePlan.from_header(name, header, name) for name, header in companions.headers.items()]
    shapes = {name: info.shape for plan in plans for name, info in plan.infos.items()}
    return plans if shapes == {name: info.shape for name, info in tensors.items()} else None


def _plan_files(tensors: dict[str, TensorInfo], max_shard_size: int) -> list[FilePlan]:
    """Files with at most `max_shard_size` bytes of tensors each (a larger tensor gets its own file)."""
    shards: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for name, info in tensors.items():
        if shards[-1] and filled + info.nbytes > max_shard_size:
            shards.append({})
            filled = 0
        shards[-1][name] = info
        filled += info.nbytes
    if len(shards) == 1:
        return [FilePlan.of(SINGLE_FILE, shards[0])]
    count = len(shards)
    return [
        FilePlan.of(f"model-{number:05d}-of-{count:05d}.safetensors", shard)
        for number, shard in enumerate(shards, 1)
    ]


def _write_small_files(
    source: WeightSource,
    directory: Path,
    dtype: torch.dtype | None,
    plans: Sequence[FilePlan],
    is_original: bool,
) -> None:
    """Write configuration, tokenizer and index."""
    companions = source.companions
    if companions.directory is not None:
        copy_companion_files(companions.directory, directory)
    elif (tokenizer := source.tokenizer_directory()) is not None:
        copy_companion_files(tokenizer, directory)
    if companions.config is not None or companions.directory is None or dtype is not None:
        (directory / CONFIG).write_text(json.dumps(_config(source, plans), indent=2) + "\n")
    if is_original:
        return
    (directory / INDEX).unlink(missing_ok=True)
    if len(plans) > 1:
        weight_map = {name: plan.name for plan in plans for name in plan.infos}
        total = sum(info.nbytes for plan in plans for info in plan.infos.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _config(source: WeightSource, plans: Sequence[FilePlan]) -> dict[str, Any]:
    companions = source.companions
    if companions.config is not None:
        config = dict(companions.config)
    elif companions.directory is not None:
        config = read_mapping(companions.directory, CONFIG, "config.json")
    else:
        config = source.family.hugging_face_config(source.model)
    largest = max((info for plan in plans for info in plan.infos.values()), key=lambda info: info.nbytes)
    config.pop("torch_dtype", None)  # the old name
    return config | {"dtype": str(largest.dtype).removeprefix("torch.")}
