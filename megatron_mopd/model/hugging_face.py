"""A Hugging Face checkpoint directory: checked when opened, then read slice by slice.

Only safetensors are read, and no code of the directory is ever executed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig

from megatron_mopd.backend.model_files import bare_name, read_mapping, real_path
from megatron_mopd.config import ConfigError, ModelConfig
from megatron_mopd.model.families import Family, Weight, family_named
from megatron_mopd.model.safetensors_files import SliceReader, TensorInfo, read_header
from megatron_mopd.model.travelling_files import travelling_files
from megatron_mopd.model.weight_source import Companions, WeightSource

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def is_hugging_face(path: str | Path) -> bool:
    """Whether `path` is a Hugging Face model directory (it has a `config.json` with a `model_type`).

    Raises `ConfigError` when that file is a link out of the directory.
    """
    real_path(Path(path), CONFIG)
    try:
        return "model_type" in read_mapping(Path(path), CONFIG, CONFIG)
    except (OSError, ValueError):
        return False


def read_config(path: Path, where: str) -> tuple[Family, PretrainedConfig]:
    """Family and configuration of a directory; `ConfigError` (prefix `where`) for one that is not
    supported."""
    try:
        raw = read_mapping(path, CONFIG, where)
    except FileNotFoundError as error:
        raise ConfigError(f"{where}: {path / CONFIG} is not readable: {error}") from None
    model_type = raw.get("model_type")
    travelling_files(path, where)  # whoever reads a tokenizer or a template next finds regular files
    family = family_named(model_type if isinstance(model_type, str) else repr(model_type)[:80], where)
    try:
        # What was read is handed over: transformers would read the file again, and others that it names.
        config = CONFIG_MAPPING[model_type].from_dict(raw)
    except Exception as error:  # whatever a broken configuration raises, it is the user's to mend
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"{where}: {path / CONFIG}: {first_line}") from None
    return family, config


@dataclass
class HuggingFaceCheckpoint(WeightSource):
    """An opened directory whose every tensor is accounted for."""

    path: Path
    family: Family
    model: ModelConfig
    weights: list[Weight]
    companions: Companions
    tensors: dict[str, TensorInfo]
    """Every tensor of the files, by name, in the order of the files."""
    _reader: SliceReader

    @classmethod
    def open(cls, path: str | Path, where: str) -> HuggingFaceCheckpoint:
        """Read configuration and headers, and check them against the family's table. No collectives.

        Raises `ConfigError` (prefix `where`): unsupported architecture, missing or truncated file, pickled
        weights, unexpected or missing tensor, unexpected shape.
        """
        path = Path(path)
        family, config = read_config(path, where)
        model = family.model_config(config, where)
        headers, tensors = {}, {}
        files, promised = _weight_files(path, where)
        for file in files:
            headers[file], infos = read_header(path / file, where)
            if twice := next(iter(tensors.keys() & infos.keys()), None):
                raise ConfigError(
                    f"{where}: tensor {twice} is in {path / tensors[twice].file} and in {path / file}; which "
                    "one counts is not said: remove one of them"
                )
            tensors |= infos
        weights = family.weights(model)
        expected = {
            name: shape
            for weight in weights
            for name, shape in zip(weight.hugging_face, weight.rule.shapes, strict=True)
        }
        aliases = {}
        if model.share_embeddings_and_output_weights and "lm_head.weight" in tensors:
            aliases["lm_head.weight"] = "model.embed_tokens.weight"
            expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
        untrained = {
            name: info
            for name, info in tensors.items()
            if name not in expected and _is_untrained(name, model)
        }
        _check_index(path, promised, tensors, where)
        _check_tensors(path, expected, tensors, untrained, where)
        reader = SliceReader(path)
        companions = Companions(path, headers, aliases, untrained, reader)
        return cls(path, family, model, weights, companions, tensors, reader)

    def tokenizer_directory(self) -> Path:
        return self.path

    def dtype(self, weight: Weight) -> torch.dtype:
        dtypes = [self.tensors[name].dtype for name in weight.hugging_face]
        result = dtypes[0]
        for dtype in dtypes[1:]:
            result = torch.promote_types(result, dtype)
        return result

    def slice_of(self, weight: Weight, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        result = torch.empty(size, dtype=self.dtype(weight))
        columns = tuple(slice(s, s + n) for s, n in zip(start[1:], size[1:]))
        for tensor, source, target, rows in weight.rule.pieces():
            first, last = max(target, start[0]), min(target + rows, start[0] + size[0])
            if first < last:
                index = (slice(source + first - target, source + last - target), *columns)
                name = weight.hugging_face[tensor]
                part = self._reader.read(self.tensors[name].file, name, index)
                result[first - start[0] : last - start[0]] = part
        return result


def _weight_files(path: Path, where: str) -> tuple[list[str], dict[str, str]]:
    """Names of the weight files, in order, and what the index says of each tensor's file. Opens only the
    index.
    """
    if (path / INDEX).exists():
        what = f"{where}: {path / INDEX}"
        promised = read_mapping(path, INDEX, where).get("weight_map")
        if type(promised) is not dict:
            raise ConfigError(f"{what} is not readable: it has no mapping 'weight_map'")
        for file in promised.values():
            if not bare_name(file, what).endswith(".safetensors"):
                raise ConfigError(f"{what} names {file[:80]!r}, which is not a safetensors file")
        return sorted(set(promised.values())), promised
    if (path / SINGLE_FILE).exists():
        return [SINGLE_FILE], {}
    pickled = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern))
    if pickled:
        raise ConfigError(
            f"{where}: {path / pickled[0]} holds pickled weights, which can execute code when read; "
            "only safetensors are accepted: save the model again with safetensors"
        )
    raise ConfigError(f"{where}: no weights ({SINGLE_FILE} or {INDEX}) in {path}")


def _is_untrained(name: str, model: ModelConfig) -> bool:
    parts = name.split(".")
    beyond = parts[:2] == ["model", "layers"] and parts[2].isdigit()
    return name.endswith("rotary_emb.inv_freq") or (
        beyond and int(parts[2]) >= model.transformer["num_layers"]
    )


def _check_index(path: Path, promised: dict[str, str], tensors: dict[str, TensorInfo], where: str) -> None:
    for name, file in promised.items():
        if name not in tensors or tensors[name].file != file:
            raise ConfigError(f"{where}: {path / INDEX} promises {name} in {file}, which does not have it")


def _check_tensors(path: Path, expected, tensors: dict[str, TensorInfo], untrained: set, where: str) -> None:
    for name, shape in expected.items():
        if name not in tensors:
            raise ConfigError(f"{where}: tensor {name} is missing from {path}")
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
