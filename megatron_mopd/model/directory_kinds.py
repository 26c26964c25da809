"""Error messages for paths without a readable model: what the path is, judged by its file names, and what to
do.

Only directories and one small JSON file are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from megatron_mopd.backend.messages import visible
from megatron_mopd.backend.model_files import read_limited, read_mapping
from megatron_mopd.config import ConfigError

TRACKER = "latest_checkpointed_iteration.txt"
DESCRIPTION = "model.json"
DISTRIBUTED = ".metadata"
"""Lists the tensors of a PyTorch distributed checkpoint, including `torch_dist`."""
_ADAPTER = "adapter_config.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# Patterns of directory entries -> what the directory is and what to do. The first match applies.
_KINDS = (
    ((_ADAPTER, "adapter_model.*"), "it is a LoRA adapter, not a model: {adapter}"),
    (
        ("*.gguf",),
        "{file} is a GGUF file for llama.cpp; use the safetensors of the original model",
    ),
    (
        ("mp_rank_*",),
        "it is a Megatron-LM checkpoint in the old format ({file}); save it again as torch_dist: "
        "--ckpt-convert-format torch_dist",
    ),
    (
        ("zero_to_fp32.py", "global_step*", "zero_pp_rank_*", "bf16_zero_pp_rank_*"),
        "it is a DeepSpeed checkpoint ({file}); convert it with its zero_to_fp32.py and safetensors",
    ),
    (
        ("*.nemo", "model_weights", "model_config.yaml"),
        "it is a NeMo checkpoint ({file}); export it to the Hugging Face format",
    ),
    (("model_index.json",), "it is a pipeline of the library diffusers ({file}), not a language model"),
    (
        ("*.distcp",),
        "it is a distributed checkpoint without .metadata: it is incomplete",
    ),
    (
        _PICKLED,
        "{path} holds pickled weights, which can execute code when read; only safetensors are accepted: save "
        "the model again with safetensors",
    ),
    (
        ("*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.tflite", "*.mlmodel", "*.ot"),
        "{file} is not a PyTorch file; use the model's safetensors",
    ),
    (
        ("*.safetensors",),
        "{file} is neither model.safetensors nor named by an index (model.safetensors.index.json)",
    ),
)


def not_a_checkpoint(path: Path, where: str) -> ConfigError:
    """The error (prefix `where`) for a path that is neither a model nor a directory of checkpoints."""
    if path.is_dir():
        problem = _what_it_is(path)
        return ConfigError(f"{where}: no complete checkpoint in {path}: {problem}")
    if path.is_file():
        return ConfigError(f"{where}: {path} is a file, not a checkpoint directory: {_what_a_file_is(path)}")
    if _HUB_NAME.fullmatch(str(path)) and not path.parent.exists():
        return ConfigError(
            f"{where}: checkpoint directory not found: {path}; if it is a model of the Hugging Face Hub, "
            f"fetch it (hf download {path} --local-dir DIR) and name DIR"
        )
    return ConfigError(f"{where}: checkpoint directory not found: {path}")


def not_a_model(path: Path, where: str) -> ConfigError:
    """The error (prefix `where`) for a path that should be a Hugging Face model but has no `config.json`."""
    if not path.is_dir():
        return not_a_checkpoint(path, where)
    if (path / DESCRIPTION).exists() or next(path.glob(f"iter_*/{DESCRIPTION}"), None):
        problem = f"it is a Megatron checkpoint ({DESCRIPTION}); convert it with convert_megatron_to_hf.py"
    else:
        problem = _what_it_is(path)
    return ConfigError(f"{where}: no Hugging Face model (no config.json) in {path}: {problem}")


def without_weights(directory: Path, where: str) -> ConfigError:
    """The error (prefix `where`) for a Hugging Face configuration without readable weights."""
    problem = _kind_of(directory) or "it has a configuration but no weights"
    return ConfigError(
        f"{where}: no weights (model.safetensors or model.safetensors.index.json) in {directory}: {problem}"
    )


def refuse_adapter(directory: Path, where: str) -> None:
    """Raise `ConfigError` (prefix `where`) for a model next to a LoRA adapter: transformers would load the
    adapter and its base instead."""
    if (directory / _ADAPTER).exists():
        raise ConfigError(
            f"{where}: {directory} has a LoRA adapter ({_ADAPTER}) next to a model: {_merge(directory)}; if "
            f"it is already merged, remove {_ADAPTER}"
        )


def _what_it_is(directory: Path) -> str:
    entries = _names(directory)
    if not entries:
        return "the directory is empty"
    if "config.json" in entries:
        return _problem_of_configuration(directory)
    if (directory / TRACKER).exists():
        return _problem_of_tracker(directory)
    return _kind_of(directory) or _inside(directory, entries) or f"no {TRACKER}, no config.json"


def _problem_of_configuration(directory: Path) -> str:
    try:
        read_mapping(directory, "config.json", "")
    except (OSError, ValueError) as error:
        return str(error).removeprefix(": ")
    if (directory / _ADAPTER).exists():
        return _kind_of(directory)
    return "config.json has no model_type, so it is not a Hugging Face model's"


def _problem_of_tracker(directory: Path) -> str:
    try:
        named = read_limited(directory, TRACKER, 100).decode().strip()
    except (OSError, ValueError):
        return f"{TRACKER} is not readable"
    name = f"iter_{int(named):07d}" if named.isascii() and named.isdecimal() else visible(named)
    target = directory / name
    if not named or "/" in named or not target.is_dir():
        return f"{TRACKER} names {name}, which does not exist"
    return f"{name}: {_kind_of(target) or 'it has no model.json and no .metadata'}"


def _what_a_file_is(path: Path) -> str:
    if path.suffix == ".safetensors":
        return f"name the directory that holds it together with its config.json: {path.parent}"
    if path.name == TRACKER or path.suffix in (".json", ".distcp"):
        return f"name its directory: {path.parent}"
    return _kind([path.name], path.parent) or "name the directory of a model or of checkpoints"


def _kind_of(directory: Path) -> str | None:
    return _kind(_names(directory), directory)


def _kind(names: Iterable[str], directory: Path) -> str | None:
    names = sorted(names)
    for patterns, text in _KINDS:
        for pattern in patterns:
            if found := next((name for name in names if fnmatch(name.lower(), pattern)), None):
                adapter = _merge(directory) if "{adapter}" in text else ""
                return text.format(file=found, path=directory / found, adapter=adapter)
    return None


def _merge(directory: Path) -> str:
    """Advice for an adapter."""
    base = None
    try:
        base = read_mapping(directory, _ADAPTER, "").get("base_model_name_or_path")
    except (OSError, ValueError):
        pass
    base = f" {visible(base[:80])}" if type(base) is str and base else ""
    return f"merge it into its base{base} (peft: merge_and_unload), save the result and name that"


def _inside(directory: Path, names: list[str]) -> str | None:
    """Advice if there is a model one level deeper, or in the Hub's cache layout."""
    if "snapshots" in names:
        revisions = [f"snapshots/{name}" for name in _names(directory / "snapshots")]
        return f"it is the Hub's cache of a model; use {revisions[-1]} in it" if revisions else None
    for name in names:
        for mark in ("config.json", DESCRIPTION, TRACKER, DISTRIBUTED):
            if (directory / name / mark).is_file():
                return f"it holds no model itself; did you mean {visible(directory / name)}?"
    return None


def _names(directory: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in directory.iterdir())
    except OSError:
        return []
