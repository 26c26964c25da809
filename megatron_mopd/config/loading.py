"""From YAML and ``a.b=c`` overrides to a checked `Config`, and back.

Every key is known and of the right type, or a `ConfigError` names it and the nearest known one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import difflib
import types
import typing
from operator import attrgetter
from pathlib import Path
from typing import Any

from megatron.core.transformer.transformer_config import MLATransformerConfig
from omegaconf import OmegaConf

from megatron_mopd.backend.messages import shown
from megatron_mopd.backend.whole_files import write_whole
from megatron_mopd.config.files import read_tree
from megatron_mopd.config.interpolation import as_written, resolve
from megatron_mopd.config.objectives import GLOBAL_KEYS, check_objectives
from megatron_mopd.config.recipes import with_recipe
from megatron_mopd.config.schema import Config, ConfigError, ModelConfig, ObjectiveConfig, ParallelConfig


def load_config(path: str | Path | None, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``a.b=c`` overrides and return the checked configuration.

    From the bottom up: the `recipe`, files that it includes (`include: FILE`), the file, the overrides.

    Raises `ConfigError` naming the file and the key for anything that is not a known key of the right type.
    """
    return config_from_dict(read_tree(Path(path) if path is not None else None, overrides))


def config_from_dict(values: dict[str, Any]) -> Config:
    """Build and check a `Config` from nested dictionaries, `${...}` included (`interpolation.py`);
    `ConfigError` names the offending key.
    """
    values = resolve(values)
    _refuse_huge_numbers(values, "")
    config = _build(Config, with_recipe(values), "")
    _check(config)
    return config


def model_config_from_dict(values: dict[str, Any], where: str) -> ModelConfig:
    """Build a `ModelConfig` from the dictionary kept with a checkpoint; `where` names the file in errors."""
    _refuse_huge_numbers(values, where)
    return _build(ModelConfig, values, where)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dictionaries as a user writes them: TransformerConfig fields back in their section,
    environment variables by their names. For `config_from_dict` they are the same configuration.
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
    """Write the configuration as YAML: complete, with environment variables by their names; in one step."""
    write_whole(path, OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """' (did you mean 'x'?)' for the closest known name, or the list of known ones when nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known and len(known) <= 40 else ""


# Fields of TransformerConfig that other sections own: naming them twice would let two truths disagree.
_OWNED_ELSEWHERE = {f.name: f"parallel.{f.name}" for f in dataclasses.fields(ParallelConfig)}
_OWNED_ELSEWHERE |= dict.fromkeys(("params_dtype", "bf16", "fp16", "pipeline_dtype"), "params_dtype")
_OWNED_ELSEWHERE |= {"calculate_per_token_loss": "objective.reduction"}
_TRANSFORMER_FIELDS = {f.name for f in dataclasses.fields(MLATransformerConfig)}
_TRANSFORMER_HINTS = typing.get_type_hints(MLATransformerConfig)
_CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "params_dtype": ("float32", "bfloat16", "float64"),
    "teacher_storage.mode": ("host", "host_sharded", "mmap"),
    "teacher_storage.dtype": (None, "int8", "fp8"),
    "teacher_storage.hidden_cache_device": ("host", "device"),
    "teacher_storage.hidden_cache_dtype": (None, "bfloat16", "float16", "float32", "float64"),
    "student.position_embedding_type": ("rope", "none"),
    "schedule.kind": ("bubble_fill", "back_to_back", "serial", "megatron"),
    "optimizer.lr_decay_style": ("constant", "linear", "cosine", "inverse-square-root", "WSD"),
}
_AT_LEAST_ONE = """
    objective.chunk_size schedule.global_batch_size schedule.micro_batch_size schedule.steps_per_rollout
    data.seq_length rollout.samples_per_prompt rollout.max_new_tokens
    rollout.repetition_max_period rollout.max_batch_size
    log.log_interval rewards.workers parallel.tensor_model_parallel_size parallel.pipeline_model_parallel_size
    parallel.context_parallel_size parallel.expert_model_parallel_size
    student.make_vocab_size_divisible_by
""".split()


def _refuse_huge_numbers(value: Any, where: str) -> None:
    """Whole numbers beyond 64 bits, which no float, tensor or file takes, and Python may not even print."""
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            place = f"[{key}]" if isinstance(value, list) else f".{key}" if where else str(key)
            _refuse_huge_numbers(item, where + place)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{where}: {shown(value)} is out of range; at most 63 bits are of use")


def _check(config: Config) -> None:
    """Values that types alone do not rule out; other rooms check what involves them (layout, routing)."""
    for dotted, choices in _CHOICES.items():
        if (value := attrgetter(dotted)(config)) not in choices:
            names = ", ".join("null" if choice is None else choice for choice in choices)
            raise ConfigError(f"{dotted}: {shown(value)} is not one of {names}")
    for dotted in _AT_LEAST_ONE:
        if (value := attrgetter(dotted)(config)) < 1:
            raise ConfigError(f"{dotted}: must be at least 1, found {value}")
    steps = config.schedule.steps_per_rollout
    for dotted in ("schedule.train_iters", "checkpoint.save_interval"):
        # A run resumes with a fresh rollout batch, so it may only stop where one ends.
        if (value := attrgetter(dotted)(config)) % steps:
            raise ConfigError(f"{dotted}: {value} is not a multiple of schedule.steps_per_rollout={steps}")
    if config.rollout.batches_ahead < 0:
        raise ConfigError(f"rollout.batches_ahead: must be at least 0, found {config.rollout.batches_ahead}")
    if config.rollout.temperature < 0 or not 0 < config.rollout.top_p <= 1 or config.rollout.top_k < 0:
        raise ConfigError("rollout: needs temperature >= 0, 0 < top_p <= 1 and top_k >= 0")
    if config.rollout.repetition_stop == 1 or config.rollout.repetition_stop < 0:
        raise ConfigError(
            "rollout.repetition_stop: every token is a pattern once; needs at least 2, or 0 for never"
        )
    for dotted in (
        "checkpoint.save_interval",
        "checkpoint.keep_last",
        "checkpoint.keep_every",
        "log.sample_interval",
        "log.samples_per_domain",
        "guard.max_skipped_steps",
        "guard.hang_timeout_minutes",
    ):
        if not (value := attrgetter(dotted)(config)) >= 0:  # NaN is not either
            raise ConfigError(f"{dotted}: must be at least 0, found {value}")
    for dotted in ("optimizer.adam_beta1", "optimizer.adam_beta2"):
        if not 0 <= (value := attrgetter(dotted)(config)) < 1:
            raise ConfigError(f"{dotted}: must be at least 0 and below 1, found {value}")
    if config.optimizer.min_lr > config.optimizer.lr:
        raise ConfigError(
            f"optimizer.min_lr: {config.optimizer.min_lr:g} is above optimizer.lr={config.optimizer.lr:g}"
        )
    if (value := config.parallel.expert_tensor_parallel_size) is not None and value < 1:
        raise ConfigError(f"parallel.expert_tensor_parallel_size: must be at least 1, found {value}")
    if (day := config.data.date) is not None:
        try:
            datetime.date.fromisoformat(day)
        except ValueError:
            raise ConfigError(f"data.date: {shown(day)} is not a day, YYYY-MM-DD") from None
    check_objectives(config)
    _check_evaluation(config)
    if not config.rewards.timeout_seconds > 0:
        raise ConfigError(f"rewards.timeout_seconds: must be above 0, found {config.rewards.timeout_seconds}")
    if config.params_dtype == "float64" and config.optimizer.use_distributed_optimizer:
        raise ConfigError("params_dtype: float64 needs optimizer.use_distributed_optimizer=false")
    if config.teacher_storage.hidden_cache_bytes is not None and config.schedule.kind == "megatron":
        raise ConfigError(
            "teacher_storage.hidden_cache_bytes: megatron-core's schedules score a whole batch before they "
            "train on it; take another schedule.kind (bubble_fill, back_to_back), or no budget"
        )
    if not config.run_dir:
        raise ConfigError("run_dir: missing; name the directory that the run writes into")


def _check_evaluation(config: Config) -> None:
    evaluation = config.evaluation
    if any(k < 1 for k in evaluation.pass_at):
        raise ConfigError(f"evaluation.pass_at: every k must be at least 1, found {evaluation.pass_at}")
    if evaluation.pass_at and not config.data.eval:
        raise ConfigError(
            "evaluation.pass_at: there is nothing to evaluate; name held-out prompts in data.eval"
        )
    if evaluation.samples_per_prompt < 0 or (
        evaluation.samples_per_prompt and evaluation.samples_per_prompt < max(evaluation.pass_at, default=0)
    ):
        raise ConfigError(
            f"evaluation.samples_per_prompt: {evaluation.samples_per_prompt} samples say nothing about "
            f"pass@{max(evaluation.pass_at, default=0)}; needs at least as many, or 0"
        )
    if not evaluation.temperature > 0 or not 0 < evaluation.top_p <= 1:
        raise ConfigError("evaluation: needs temperature > 0 and 0 < top_p <= 1")


def _build(cls: type, values: Any, where: str) -> Any:
    """Check `values` against the dataclass `cls`; `where` is the dotted path shown in errors."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where or 'config'}: expected a section with keys, found {shown(values)}")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    built: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{where}.{key}" if where else str(key)
        if key in known and not (cls is ModelConfig and key == "transformer"):
            built[key] = _convert(hints[key], value, dotted)
        elif cls is ModelConfig and key in _OWNED_ELSEWHERE:
            raise ConfigError(f"{dotted}: set {_OWNED_ELSEWHERE[key]} instead")
        elif cls is ModelConfig and key in _TRANSFORMER_FIELDS:
            extra[key] = _check_transformer_field(key, value, dotted)
        else:
            candidates = known - {"transformer"} | (_TRANSFORMER_FIELDS if cls is ModelConfig else set())
            raise ConfigError(f"unknown key {dotted!r}{nearest(str(key), candidates)}")
    if extra:
        built["transformer"] = extra
    if cls is ObjectiveConfig:
        built["per_domain"] = _build_overrides(built.get("per_domain", {}), f"{where}.per_domain")
    return cls(**built)


def _check_transformer_field(key: str, value: Any, where: str) -> Any:
    """`value` when it fits the type that megatron-core declares; of enumerations, megatron-core's own check
    is left.
    """
    hint = _TRANSFORMER_HINTS[key]
    if key != "activation_func" and value is not None and ("Callable" in str(hint) or "Context" in str(hint)):
        raise ConfigError(f"{where}: is a function of megatron-core's, which a configuration cannot name")
    allowed = _plain_types(hint)
    if key == "q_lora_rank":  # declared an integer, but null is how megatron-core spells "not compressed"
        allowed = {int, type(None)}
    elif key == "activation_func":  # declared a function; `model/build.py` knows the names
        allowed = {str}
    if allowed is None or _fits(value, allowed):
        return value
    if float in allowed and isinstance(value, str):
        with contextlib.suppress(ConfigError):  # 1e-4, which YAML reads as a string
            return _convert(float, value, where)
    names = ", ".join(sorted("null" if kind is type(None) else _name(kind) for kind in allowed))
    raise ConfigError(f"{where}: expected {names}, found {shown(value)}")


def _plain_types(hint: Any) -> set[Any] | None:
    """The types that a hint allows: classes, `list[...]`s, choices; `None` when it names anything else."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        parts = [_plain_types(part) for part in arguments]
        return None if None in parts else set().union(*parts)
    if hint in (int, float, bool, str, type(None)) or origin in (list, typing.Literal):
        return {hint}
    return None


def _fits(value: Any, allowed: set[Any]) -> bool:
    for hint in allowed:
        if typing.get_origin(hint) is typing.Literal:
            fits = value in typing.get_args(hint)
        elif typing.get_origin(hint) is list:
            inner = _plain_types(typing.get_args(hint)[0])
            fits = isinstance(value, list) and (inner is None or all(_fits(item, inner) for item in value))
        elif hint is float:
            fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        else:
            fits = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
        if fits:
            return True
    return False


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)


def _build_overrides(values: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """The keys that each domain sets itself, checked and converted like those of the section."""
    overrides = {}
    for domain, own in values.items():
        dotted = f"{where}.{domain}"
        if isinstance(own, str):  # `math: sampled_token` for `math: {kind: sampled_token}`
            own = {"kind": own}
        converted = _build(ObjectiveConfig, own, dotted)
        for key in own:
            if key in GLOBAL_KEYS:
                raise ConfigError(f"{dotted}.{key}: belongs to the whole run; set objective.{key}")
        overrides[domain] = {key: getattr(converted, key) for key in own}
    return overrides


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as type `hint`, or a ConfigError; integers pass as floats, never the other way round."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{where}: expected a list, found {shown(value)}")
        return [_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected a mapping, found {shown(value)}")
        for key in value:
            _require_unicode(str(key), where)
        return {str(key): _convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if hint is Any:
        return value
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:  # YAML reads 1e-4 (no dot) as a string
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        # YAML reads `no`, `on`, 1e3 and 1.10 as something else than text.
        advice = "; quote it in YAML" if hint is str and isinstance(value, (bool, int, float)) else ""
        raise ConfigError(f"{where}: expected {hint.__name__}, found {shown(value)}{advice}")
    if isinstance(value, str):
        _require_unicode(value, where)
    return value


def _require_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where}: no Unicode text: half a character at position {error.start} (a lone surrogate)"
        ) from None
