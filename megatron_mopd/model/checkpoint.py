"""Distributed checkpoints on disk: Megatron's directory layout, written atomically, loaded at any parallel
layout.

    checkpoints/
      latest_checkpointed_iteration.txt      the newest complete iteration
      iter_0000010/                          torch_dist files, under megatron-core's canonical keys
        model.json                           architecture and tokenizer fingerprint
        checksums.json                       size and SHA-256 of every file, compared before loading
        tokenizer/                           the tokenizer of the model
        hugging_face/                        companion files of a Hugging Face model, for conversion back

A directory named `iter_*` is always complete: it is written under a different name and renamed at the end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping

from megatron_mopd.backend.checked_loading import load_checked
from megatron_mopd.backend.model_files import read_limited, read_mapping
from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.backend.whole_files import write_whole
from megatron_mopd.config import ConfigError, ModelConfig, model_config_from_dict, to_dict
from megatron_mopd.data.tokenizer import load_tokenizer
from megatron_mopd.model.checksums import verify_checksums, write_checksums
from megatron_mopd.model.directory_kinds import DESCRIPTION, TRACKER, not_a_checkpoint
from megatron_mopd.model.hugging_face import HuggingFaceCheckpoint, is_hugging_face, read_model
from megatron_mopd.model.initialize import sharded_tensors
from megatron_mopd.model.megatron_arguments import check_arguments
from megatron_mopd.model.megatron_lm import (
    has_key_per_layer,
    is_megatron_lm,
    key_prefix,
    newest_of_megatron_lm,
    require_architecture,
    require_same_tensors,
)
from megatron_mopd.model.pickled_files import Checked, refuse_code

MODEL_FILE = DESCRIPTION
TOKENIZER_DIRECTORY = "tokenizer"
HUGGING_FACE_DIRECTORY = "hugging_face"
_EXTRA_STATE = re.compile(r"_extra_state\d*$")


def iteration_directory(directory: str | Path, iteration: int) -> Path:
    """`directory/iter_0000010` for iteration 10."""
    return Path(directory) / f"iter_{iteration:07d}"


def find_checkpoint(path: str | Path, where: str) -> Path:
    """The newest complete checkpoint under `path`, or `path` itself if it is a checkpoint or a Hugging Face
    model. Checkpoints written by Megatron-LM are found too.

    `where` is the configuration key shown in the `ConfigError` that is raised if there is none.
    """
    path = Path(path)
    try:
        if (path / MODEL_FILE).exists() or is_hugging_face(path) or is_megatron_lm(path):
            return path
    except ValueError as error:  # a link out of the directory, or a name with a NUL byte
        raise ConfigError(f"{where}: {error}") from None
    newest = latest_iteration(path)
    if newest is not None:
        return iteration_directory(path, newest)
    if (found := newest_of_megatron_lm(path)) is not None:
        return found
    raise not_a_checkpoint(path, where)


def latest_iteration(directory: str | Path) -> int | None:
    """The newest complete iteration under a checkpoint directory, or `None` if there is none yet."""
    directory = Path(directory)
    try:
        iteration = int(read_limited(directory, TRACKER, 100))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        iteration = None
    if iteration is not None and (iteration_directory(directory, iteration) / MODEL_FILE).exists():
        return iteration
    # The tracker is damaged, or the run crashed while the checkpoint was replaced: use complete directories.
    return next(iter(complete_iterations(directory)), None)


def complete_iterations(directory: str | Path) -> list[int]:
    """The iterations of all complete checkpoints under `directory`, newest first."""
    try:
        names = [re.fullmatch(r"iter_(\d{7,})", entry.name) for entry in Path(directory).iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    complete = [m for m in names if m and (Path(directory) / m[0] / MODEL_FILE).exists()]
    return sorted((int(match[1]) for match in complete), reverse=True)


def read_model_config(
    checkpoint: Path, where: str, given: ModelConfig | None = None
) -> tuple[ModelConfig, str | None]:
    """Architecture and tokenizer fingerprint of a checkpoint (ours or Hugging Face); `ConfigError` if it is
    damaged or not supported.

    Megatron-LM's checkpoints have neither: their architecture is `given`, and the fingerprint is `None`.
    """
    if is_megatron_lm(checkpoint):
        return read_architecture(checkpoint, where, given), None
    if (checkpoint / MODEL_FILE).exists():
        return read_architecture(checkpoint, where), _description(checkpoint, where)["tokenizer"]
    return read_architecture(checkpoint, where), load_tokenizer(checkpoint).fingerprint()


def recorded_tokenizer(checkpoint: Path, where: str) -> str | None:
    """The tokenizer fingerprint stored in one of our checkpoints; `None` for a Hugging Face directory, which
    contains the tokenizer itself."""
    if not (checkpoint / MODEL_FILE).exists():
        return None
    return _description(checkpoint, where)["tokenizer"]


def read_architecture(checkpoint: Path, where: str, given: ModelConfig | None = None) -> ModelConfig:
    """Architecture of a checkpoint (ours or Hugging Face; `given` for Megatron-LM's); `ConfigError` if it is
    damaged or not supported."""
    if (checkpoint / MODEL_FILE).exists():
        return model_config_from_dict(_description(checkpoint, where)["model"], where)
    if is_megatron_lm(checkpoint):
        return require_architecture(checkpoint, given, where)
    return read_model(checkpoint, where)


def tokenizer_directory(checkpoint: Path) -> Path:
    """The directory of a checkpoint's tokenizer, if it has one."""
    return checkpoint / TOKENIZER_DIRECTORY if (checkpoint / MODEL_FILE).exists() else checkpoint


def _description(checkpoint: Path, where: str) -> dict[str, Any]:
    try:
        description = read_mapping(checkpoint, MODEL_FILE, where)
    except FileNotFoundError as error:
        raise ConfigError(f"{where}: {checkpoint / MODEL_FILE} is not readable: {error}") from None
    for key, kind in (("model", dict), ("tokenizer", str)):
        if type(description.get(key)) is not kind:
            raise ConfigError(
                f"{where}: {checkpoint / MODEL_FILE} is not readable: no {kind.__name__} under {key!r}"
            )
    return description


def model_state(
    chunks: list[torch.nn.Module], groups: ParallelGroups, *, key_per_layer: bool = False
) -> dict[str, Any]:
    """Sharded state dict of this rank's chunks (unwrapped models), under canonical keys.

    key_per_layer: use separate keys for each layer's tensors, even if all layers are alike.
    """
    metadata = {"dp_cp_group": groups.collection.dp_cp, "non_homogeneous_layers": key_per_layer}
    return {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}


def load_weights(
    chunks: list[torch.nn.Module],
    checkpoint: Path,
    groups: ParallelGroups,
    where: str,
    model: ModelConfig | None = None,
) -> None:
    """Load a checkpoint's weights into this rank's chunks, from any parallel layout.

    `checkpoint` is a result of `find_checkpoint`: one of ours, a Hugging Face model, of which each rank reads
    its own slices, or one of Megatron-LM's. `model` is the chunks' architecture, which a configuration may
    have changed; by default it is the checkpoint's own, which Megatron-LM's checkpoints lack.

    Collectives: those of megatron-core's loading, and a gather of the keys within each pipeline. Raises
    `ConfigError` (prefix `where`) on every rank if tensors are missing, unexpected or of a different shape.
    """
    foreign = is_megatron_lm(checkpoint)
    if not foreign and not (checkpoint / MODEL_FILE).exists():
        load_hugging_face_weights(chunks, checkpoint, where, model)
        return
    if foreign:
        model = require_architecture(checkpoint, model, where)
        description = refuse_code(checkpoint, where, True)
        check_arguments(description.common, model, f"{where}: {checkpoint}")
    else:
        verify_checksums(checkpoint, where)
        description = refuse_code(checkpoint, where)
    keys = description.metadata.state_dict_metadata
    state = without_extra_state(
        model_state(chunks, groups, key_per_layer=foreign and has_key_per_layer(keys))
    )
    if foreign:
        apply_prefix_mapping(state, {"": key_prefix(keys)})
    if model is not None:
        require_same_tensors(state, keys, model.vocab_size, groups, f"{where}: {checkpoint}")
    loaded = load_described(state, checkpoint, Checked(description.metadata, {}), where)
    for i, chunk in enumerate(chunks):
        put_into(chunk, loaded[f"model{i}"], where)
        _clear_padding(chunk, (model or read_architecture(checkpoint, where)).vocab_size)


def load_described(
    state: dict[str, Any], checkpoint: Path, description: Checked, where: str
) -> dict[str, Any]:
    """Load a sharded state dict from a checkpoint whose description has been checked. Collective over all
    ranks; `ConfigError` (prefix `where`) for a tensor that is missing, damaged or of a different shape.
    """
    try:
        return load_checked(state, checkpoint, description.metadata, description.common)
    # torch may raise anything for a damaged file.
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"{where}: cannot load {checkpoint}: {first_line}") from None


def without_extra_state(state: dict[str, Any]) -> dict[str, Any]:
    """Remove Transformer Engine's FP8 statistics from a model's sharded state: the local spec does not have
    them, and Transformer Engine stores them as a pickle in a tensor and unpickles them without restriction.
    """
    for part in state.values():
        for name in [name for name in part if _EXTRA_STATE.search(name)]:
            del part[name]
    return state


def put_into(chunk: torch.nn.Module, loaded: dict[str, Any], where: str) -> None:
    """Load a state dict without extra state into a chunk; its tensors must be exactly the chunk's."""
    missing, unexpected = chunk.load_state_dict(loaded, strict=False)
    missing = [name for name in missing if not _EXTRA_STATE.search(name)]
    assert not missing and not unexpected, f"{where}: {missing} missing, {unexpected} unexpected"


def load_hugging_face_weights(
    chunks: list[torch.nn.Module], directory: Path, where: str, model: ModelConfig | None = None
) -> None:
    """Fill this rank's chunks from a Hugging Face directory, reading only this rank's slices.

    No collectives. Raises `ConfigError` (prefix `where`) for everything that `HuggingFaceCheckpoint.open`
    refuses, for different shapes, and for tensors that `model`, the chunks' architecture, does not use.
    """
    source = HuggingFaceCheckpoint.open(directory, where)
    weights = {(weight.key, weight.offsets): weight for weight in source.weights}
    used = source.family.weights(model) if model is not None else source.weights
    if left := min(weights.keys() - {(weight.key, weight.offsets) for weight in used}, default=None):
        raise ConfigError(
            f"{where}: {directory} does not match the configured model: "
            f"{weights[left].hugging_face[0]} is not part of it"
        )
    for chunk in chunks:
        for sharded in sharded_tensors(chunk.sharded_state_dict()):
            outer = sharded.prepend_axis_num
            weight = weights.get((sharded.key, sharded.global_offset[:outer]))
            if weight is None:
                raise ConfigError(f"{where}: {directory} has nothing for {sharded.key}")
            shape, offset = sharded.global_shape[outer:], sharded.global_offset[outer:]
            size = tuple(sharded.data.shape)
            if weight.rule.kind == "vocabulary":  # only the model's vocabulary is padded
                size = (max(0, min(size[0], weight.shape[0] - offset[0])), *size[1:])
            elif shape != weight.shape:
                raise ConfigError(
                    f"{where}: {sharded.key} has shape {list(shape)} in this layout, {list(weight.shape)} in "
                    f"{directory}"
                )
            with torch.no_grad():
                sharded.data[: size[0]].copy_(source.slice_of(weight, offset, size))
        _clear_padding(chunk, source.model.vocab_size)


@torch.no_grad()
def _clear_padding(chunk: torch.nn.Module, vocab_size: int) -> None:
    """Zero the rows that pad the vocabulary: uninitialized memory may contain NaN."""
    for sharded in sharded_tensors(chunk.sharded_state_dict()):
        if sharded.key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            sharded.data[max(0, vocab_size - sharded.global_offset[0]) :].zero_()


def publish_checkpoint(
    directory: str | Path,
    iteration: int,
    write: Callable[[Path], None],
    model: ModelConfig,
    tokenizer_fingerprint: str,
    save_tokenizer: Callable[[Path], None] | None,
) -> Path:
    """Let `write` fill a directory, complete it, and point the tracker to it. Collective over all ranks.

    The directory gets its final name only when it is complete and on disk; after a crash at any point the
    previous checkpoint is the newest.
    """
    directory = Path(directory)
    partial = partial_directory(directory, iteration)
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    write(partial)
    dist.barrier()
    if dist.get_rank() == 0:
        if save_tokenizer is not None:
            save_tokenizer(partial / TOKENIZER_DIRECTORY)
        describe_checkpoint(partial, model, tokenizer_fingerprint)
    dist.barrier()
    write_checksums(partial)
    if dist.get_rank() == 0:
        put_in_place(partial, directory, iteration)
    dist.barrier()
    return iteration_directory(directory, iteration)


def partial_directory(directory: Path, iteration: int) -> Path:
    """The directory in which an iteration's checkpoint is written before it is complete."""
    return Path(directory) / f".{iteration_directory(directory, iteration).name}.incomplete"


def describe_checkpoint(partial: Path, model: ModelConfig, tokenizer_fingerprint: str) -> None:
    """Write architecture and tokenizer fingerprint. Called on one rank."""
    architecture = {key: value for key, value in to_dict(model).items() if key != "load"}
    description = {"model": architecture, "tokenizer": tokenizer_fingerprint}
    (partial / MODEL_FILE).write_text(json.dumps(description, indent=2))


def put_in_place(partial: Path, directory: Path, iteration: int) -> None:
    """Flush a complete directory to disk, rename it, and point the tracker to it. Called on one rank."""
    _flush_to_disk(partial)
    final = iteration_directory(directory, iteration)
    remove_checkpoint(final)
    partial.rename(final)
    write_whole(directory / TRACKER, str(iteration))
    _sync(directory)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint; its name never refers to an incomplete directory. Called on one rank."""
    leaving = path.with_name(f".{path.name}.removed")
    shutil.rmtree(leaving, ignore_errors=True)
    if path.exists():
        path.rename(leaving)
        shutil.rmtree(leaving, ignore_errors=True)


def companion_places(directory: Path, model: ModelConfig) -> list[Path]:
    """Where to look for a Hugging Face model's companions: the run's last checkpoint, then the initial
    model."""
    places = []
    for root in (directory, model.load):
        if root is not None and (newest := latest_iteration(root)) is not None:
            places.append(iteration_directory(root, newest) / HUGGING_FACE_DIRECTORY)
    if model.load is not None:
        places += [Path(model.load) / HUGGING_FACE_DIRECTORY, Path(model.load)]
    return places


def _flush_to_disk(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
