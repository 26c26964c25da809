"""Converts YAML and ``a.b=c`` overrides to a checked `Config`, and back.

Pydantic checks the schema's annotations; the first error becomes a one-line `ConfigError` with the key, what
was expected and what was found.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from megatron_mopd.backend.messages import shown
from megatron_mopd.backend.whole_files import write_whole
from megatron_mopd.config.errors import ConfigError, closest, nearest
from megatron_mopd.config.files import read_tree
from megatron_mopd.config.interpolation import as_written, resolve
from megatron_mopd.config.objective_schema import DomainKeys
from megatron_mopd.config.objectives import check_objectives
from megatron_mopd.config.recipes import with_recipe
from megatron_mopd.config.schema import Config, ModelConfig, ObjectiveConfig
from megatron_mopd.config.transformer_fields import TRANSFORMER_FIELDS
from megatron_mopd.config.value_types import allowed_range, without_null


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``a.b=c`` overrides and return the checked configuration.

    In increasing precedence: the `recipe`, included files (`include: FILE`), the file, the overrides.

    Raises `ConfigError` naming the file and the key for anything that is not a known key of the right type.
    """
    return config_from_dict(read_tree(Path(path) if path is not None else None, overrides))


def config_from_dict(values: dict[str, Any]) -> Config:
    """Build and check a `Config` from nested dictionaries, `${...}` included (`interpolation.py`);
    `ConfigError` names the offending key.
    """
    values = resolve(values)
    sections = {item.name for item in dataclasses.fields(Config)}
    for key, value in values.items():  # a misspelled section is reported as such, whatever it contains
        if key in sections:
            _refuse_unwritable(value, str(key))
    config = _build(Config, with_recipe(values), "")
    _check(config)
    return config


def model_config_from_dict(values: dict[str, Any], where: str) -> ModelConfig:
    """Build a `ModelConfig` from the dictionary in a checkpoint; `where` names the file in errors."""
    _refuse_unwritable(values, where)
    return _build(ModelConfig, values, where)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dictionaries as a user writes them: TransformerConfig fields directly in their section,
    environment variables by name. `config_from_dict` turns them into the same configuration.
    """
    if isinstance(config, (list, tuple)):
        return [to_dict(item) for item in config]
    if isinstance(config, dict):
        return {key: to_dict(item) for key, item in config.items()}
    if isinstance(config, str):
        return as_written(config)
    if not dataclasses.is_dataclass(config):
        return config
    result = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, ModelConfig):
        result |= result.pop("transformer")
    return result


def save_config(config: Config, path: str | Path) -> None:
    """Write the complete configuration as YAML, atomically, with environment variables by name."""
    write_whole(path, OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))


def _build(cls: type, values: Any, where: str) -> Any:
    """`values` as the dataclass `cls`; `where` is the dotted path that errors begin with."""
    try:
        return _adapter(cls).validate_python(values)
    except ValidationError as error:
        raise ConfigError(_in_one_line(cls, where, error.errors(include_url=False)[0])) from None


@cache
def _adapter(cls: type) -> TypeAdapter:
    return TypeAdapter(cls)


def _refuse_unwritable(value: Any, where: str) -> None:
    """Refuse strings that are not valid Unicode, and integers beyond 64 bits, which Python may not print."""
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_unwritable(key, where)
            _refuse_unwritable(item, f"{where}[{key}]" if isinstance(value, list) else _joined(where, key))
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{where or 'config'}: {shown(value)} is out of range; integers must fit 64 bits")
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"{where or 'config'}: not valid Unicode: half a character at position {error.start} (a lone "
                "surrogate)"
            ) from None


_EXPECTED = {
    "bool_type": "bool",
    "int_type": "int",
    "float_type": "float",
    "is_instance_of": "str",  # `value_types.Text`
    "list_type": "a list",
    "dict_type": "a mapping",
    "dataclass_type": "a section with keys",
}


def _in_one_line(cls: type, where: str, error: ErrorDetails) -> str:
    """Pydantic's error as one line: the key, what was expected, what was found."""
    kind, found = error["type"], error["input"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden", "invalid_key"):
        *section_loc, name = error["loc"]
        key, section = _key_and_type(cls, where, section_loc)
        known = {item.name for item in dataclasses.fields(section)} - {"transformer"}
        known |= set(TRANSFORMER_FIELDS) if section is ModelConfig else set()
        return f"unknown key {_joined(key, name)!r}{nearest(str(name), known)}"
    key, declared = _key_and_type(cls, where, error["loc"])
    if kind == "literal_error":
        choices = typing.get_args(declared)
        close = closest(found, choices) if isinstance(found, str) else None
        hint = f"; did you mean {close!r}?" if close is not None else ""
        return f"{key}: {shown(found)} is not one of {', '.join(choices)}{hint}"
    if kind == "value_error":
        return f"{key}: {error['ctx']['error']}"
    if kind in _EXPECTED:
        # YAML does not read `no`, `on`, 1e3 and 1.10 as strings.
        is_unquoted = kind == "is_instance_of" and isinstance(found, (bool, int, float))
        advice = "; quote it in YAML" if is_unquoted else ""
        return f"{key or 'config'}: expected {_EXPECTED[kind]}, found {shown(found)}{advice}"
    must = f"must be {limits}" if (limits := allowed_range(declared)) else error["msg"]
    return f"{key}: {must}, found {shown(found)}"


def _key_and_type(cls: type, where: str, loc: Sequence[int | str]) -> tuple[str, Any]:
    """The dotted key that a user writes for pydantic's `loc`, and the declared type of its value."""
    key, declared = where, cls
    is_name = bool(loc) and loc[-1] == "[key]"  # pydantic appends this to a mapping's key
    for part in loc[:-2] if is_name else loc:
        if declared is ModelConfig and part == "transformer":
            continue  # users write its keys directly in the section
        key = f"{key}[{part}]" if typing.get_origin(declared) is list else _joined(key, part)
        if dataclasses.is_dataclass(declared):
            declared = without_null(typing.get_type_hints(declared, include_extras=True).get(part))
        else:
            declared = typing.get_args(declared)[-1]
        if declared == DomainKeys:
            declared = ObjectiveConfig
    return key, typing.get_args(declared)[0] if is_name else declared


def _joined(section: str, key: int | str) -> str:
    return f"{section}.{key}" if section else str(key)


def _check(config: Config) -> None:
    """Check rules between keys; those about the layout, prompts or teachers are checked later."""
    steps = config.schedule.steps_per_rollout
    for dotted in ("schedule.train_iters", "checkpoint.save_interval"):
        # A run resumes with a fresh rollout batch, so it may only stop where one ends.
        if (value := attrgetter(dotted)(config)) % steps:
            raise ConfigError(f"{dotted}: {value} is not a multiple of schedule.steps_per_rollout={steps}")
    for key in ("min_lr", "lr_warmup_init"):
        if (value := getattr(config.optimizer, key)) > config.optimizer.lr:
            raise ConfigError(f"optimizer.{key}: {value:g} is above optimizer.lr={config.optimizer.lr:g}")
    check_objectives(config)
    _check_evaluation(config)
    if config.params_dtype == "float64" and config.optimizer.use_distributed_optimizer:
        raise ConfigError("params_dtype: float64 needs optimizer.use_distributed_optimizer=false")
    if not config.run_dir:
        raise ConfigError("run_dir: missing; set it to the directory that the run writes into")


def _check_evaluation(config: Config) -> None:
    evaluation, most = config.evaluation, max(config.evaluation.pass_at, default=0)
    if most and not config.data.eval:
        raise ConfigError(
            "evaluation.pass_at: there is nothing to evaluate; list held-out prompts in data.eval"
        )
    if 0 < evaluation.samples_per_prompt < most:
        raise ConfigError(
            f"evaluation.samples_per_prompt: {evaluation.samples_per_prompt} samples cannot estimate "
            f"pass@{most}; needs at least as many, or 0"
        )
