"""Hugging Face checkpoint directories: validated when opened, then read slice by slice.

Only safetensors are read, and no code in the directory is ever executed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig

from megatron_mopd.backend.model_files import read_mapping, real_path
from megatron_mopd.config import ConfigError, ModelConfig
from megatron_mopd.model.directory_kinds import not_a_model, refuse_adapter
from megatron_mopd.model.families import Family, Weight, family_named
from megatron_mopd.model.safetensors_files import SliceReader, TensorInfo
from megatron_mopd.model.travelling_files import travelling_files
from megatron_mopd.model.weight_files import WeightFiles, has_weights, open_weights
from megatron_mopd.model.weight_source import Companions, WeightSource

CONFIG = "config.json"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def is_hugging_face(path: str | Path) -> bool:
    """Whether `path` is a Hugging Face model directory (it has a `config.json` with a `model_type`).

    Raises `ConfigError` if that file is a link out of the directory.
    """
    real_path(Path(path), CONFIG)
    try:
        return "model_type" in read_mapping(Path(path), CONFIG, CONFIG)
    except (OSError, ValueError):
        return False


def read_config(path: Path, where: str) -> tuple[Family, PretrainedConfig]:
    """Family and configuration of a directory; `ConfigError` (prefix `where`) if it is not supported."""
    if not path.is_dir():
        raise not_a_model(path, where)
    try:
        raw = read_mapping(path, CONFIG, where)
    except FileNotFoundError:
        raise not_a_model(path, where) from None
    refuse_adapter(path, where)
    model_type = raw.get("model_type")
    travelling_files(path, where)  # so that reading the tokenizer or template later finds regular files
    family = family_named(model_type if isinstance(model_type, str) else repr(model_type)[:80], where)
    try:
        # Pass the parsed mapping: transformers would read the file again, and others that it names.
        config = CONFIG_MAPPING[model_type].from_dict(raw)
    except Exception as error:  # report anything that an invalid configuration raises as a user error
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"{where}: {path / CONFIG}: {first_line}") from None
    return family, config


def read_model(path: Path, where: str) -> ModelConfig:
    """Architecture of a directory, determined from its configuration and its weights.

    If the configuration ties the output head to the embedding but the files contain a different head, the
    head is not tied, as in transformers. Reads only headers, and in that case the two tensors; without
    weights the configuration alone determines the architecture. Raises `ConfigError` (prefix `where`).
    """
    family, config = read_config(path, where)
    model = family.model_config(config, where)
    if model.share_embeddings_and_output_weights and has_weights(path):
        model = _untied(model, open_weights(path, where))
    return model


def _untied(model: ModelConfig, files: WeightFiles) -> ModelConfig:
    """The model with an untied head if its files contain one that differs from the embedding."""
    both = {_EMBEDDING, _HEAD} <= files.tensors.keys()
    if not model.share_embeddings_and_output_weights or not both or files.are_equal(_EMBEDDING, _HEAD):
        return model
    return replace(model, share_embeddings_and_output_weights=False)


@dataclass
class HuggingFaceCheckpoint(WeightSource):
    """An open directory in which every tensor is accounted for."""

    path: Path
    family: Family
    model: ModelConfig
    weights: list[Weight]
    companions: Companions
    tensors: dict[str, TensorInfo]
    """Every tensor of the files by name, in file order."""
    _names: dict[str, str]
    """Every tensor's name in the family's table -> its name in the files."""
    _reader: SliceReader

    @classmethod
    def open(cls, path: str | Path, where: str) -> HuggingFaceCheckpoint:
        """Read configuration and headers, and validate them against the family's table. No collectives.

        Raises `ConfigError` (prefix `where`) for an unsupported architecture, a missing or truncated file,
        pickled weights, an unexpected or missing tensor, an unexpected shape, or two different copies of a
        tensor.
        """
        path = Path(path)
        family, config = read_config(path, where)
        files = open_weights(path, where)
        tensors = files.tensors
        configured = family.model_config(config, where)
        model = _untied(configured, files)
        weights = family.weights(model)
        names = _names_in_files(family, model, tensors)
        expected = _expected(weights, names)
        aliases = {}
        if model.share_embeddings_and_output_weights and {_EMBEDDING, _HEAD} <= tensors.keys():
            aliases[_HEAD] = _EMBEDDING
            expected[_HEAD] = expected[_EMBEDDING]
        untrained = {
            name: info
            for name, info in tensors.items()
            if name not in expected and _is_untrained(name, model)
        }
        _check_tensors(path, expected, tensors, untrained, where)
        reader = SliceReader(path)
        companions = Companions(path, files.headers, aliases, untrained, reader)
        if model != configured:  # programs that rely on the configuration would drop the head
            companions.config = read_mapping(path, CONFIG, where) | {"tie_word_embeddings": False}
        return cls(path, family, model, weights, companions, tensors, names, reader)

    def tokenizer_directory(self) -> Path:
        return self.path

    def dtype(self, weight: Weight) -> torch.dtype:
        names = (weight.fused,) if weight.fused in self._names else weight.hugging_face
        dtypes = [self.tensors[self._names[name]].dtype for name in names]
        result = dtypes[0]
        for dtype in dtypes[1:]:
            result = torch.promote_types(result, dtype)
        return result

    def slice_of(self, weight: Weight, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        if weight.fused in self._names:
            index = (weight.offsets[-1], *(slice(s, s + n) for s, n in zip(start, size)))
            return self._read(weight.fused, index)
        result = torch.empty(size, dtype=self.dtype(weight))
        columns = tuple(slice(s, s + n) for s, n in zip(start[1:], size[1:]))
        for tensor, source, target, rows in weight.rule.pieces():
            first, last = max(target, start[0]), min(target + rows, start[0] + size[0])
            if first < last:
                index = (slice(source + first - target, source + last - target), *columns)
                part = self._read(weight.hugging_face[tensor], index)
                result[first - start[0] : last - start[0]] = part
        return result

    def _read(self, name: str, index: tuple[int | slice, ...]) -> Tensor:
        name = self._names[name]
        return self._reader.read(self.tensors[name].file, name, index)


def _names_in_files(family: Family, model: ModelConfig, tensors: dict[str, TensorInfo]) -> dict[str, str]:
    """Each tensor's name in the family's table -> its name in the files, which may be an alternative name
    that transformers accepts."""
    names = {name: name for name in tensors}
    for theirs, ours in family.other_names:
        for name in tensors:
            names.setdefault(name.replace(theirs, ours), name)
    if model.share_embeddings_and_output_weights and _HEAD in tensors:
        names.setdefault(_EMBEDDING, _HEAD)  # the files need to contain only one of two tied tensors
    return names


def _expected(weights: list[Weight], names: dict[str, str]) -> dict[str, tuple[int, ...]]:
    """Name in the files -> shape, for every tensor of a model; missing tensors have the family's name."""
    expected = {}
    for weight in weights:
        if weight.fused in names:
            expected[names[weight.fused]] = (weight.axes[-1], *weight.shape)
            continue
        for name, shape in zip(weight.hugging_face, weight.rule.shapes, strict=True):
            expected[names.get(name, name)] = tuple(shape)
    return expected


def _is_untrained(name: str, model: ModelConfig) -> bool:
    parts = name.split(".")
    beyond = parts[:2] == ["model", "layers"] and parts[2].isdigit()
    return name.endswith("rotary_emb.inv_freq") or (
        beyond and int(parts[2]) >= model.transformer["num_layers"]
    )


def _check_tensors(path: Path, expected, tensors: dict[str, TensorInfo], untrained: set, where: str) -> None:
    for name, shape in expected.items():
        if name not in tensors:
            hint = "; if the head is the embedding, set tie_word_embeddings to true in config.json"
            raise ConfigError(f"{where}: tensor {name} is missing from {path}{hint if name == _HEAD else ''}")
        if tensors[name].shape != tuple(shape):
            raise ConfigError(
                f"{where}: tensor {name} in {path / tensors[name].file} has shape "
                f"{list(tensors[name].shape)}, expected {list(shape)}"
            )
        if not tensors[name].dtype.is_floating_point or tensors[name].dtype.itemsize < 2:
            raise ConfigError(
                f"{where}: tensor {name} in {path / tensors[name].file} is quantized "
                f"({tensors[name].dtype}); convert the checkpoint to bfloat16 first"
            )
    for name in tensors:
        if name not in expected and name not in untrained:
            raise ConfigError(f"{where}: unexpected tensor {name} in {path / tensors[name].file}")
