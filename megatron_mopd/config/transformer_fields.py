"""Fields of megatron-core's `TransformerConfig`, which `student` accepts under their own names.

Values are checked against the types that megatron-core declares, if these are numbers, strings, choices or
lists of them; megatron-core itself checks values of its own classes.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

from megatron.core.transformer.transformer_config import MLATransformerConfig
from pydantic import ConfigDict, GetPydanticSchema, TypeAdapter, ValidationError
from pydantic_core import core_schema

from megatron_mopd.backend.messages import shown
from megatron_mopd.config.value_types import as_number, type_name

TRANSFORMER_FIELDS = tuple(item.name for item in dataclasses.fields(MLATransformerConfig))
_DECLARED = typing.get_type_hints(MLATransformerConfig) | {
    "q_lora_rank": int | None,  # declared as an integer, but megatron-core uses null for "not compressed"
    "activation_func": str,  # declared as a function; `model/build.py` maps the names
}


def transformer_fields(owned_elsewhere: Mapping[str, str]) -> GetPydanticSchema:
    """Annotation of a mapping whose keys are fields of `TransformerConfig`.

    owned_elsewhere: fields that other keys set (field -> those keys), so that the two cannot disagree.
    """
    fields = {}
    for name in TRANSFORMER_FIELDS:
        check = partial(_as_declared, name, owned_elsewhere.get(name))
        validator = core_schema.no_info_plain_validator_function(check)
        fields[name] = core_schema.typed_dict_field(validator, required=False)
    schema = core_schema.typed_dict_schema(fields, extra_behavior="forbid")
    return GetPydanticSchema(lambda source, handler: schema)


def _as_declared(name: str, owner: str | None, value: Any) -> Any:
    hint = _DECLARED[name]
    if owner is not None:
        raise ValueError(f"set {owner} instead")
    if value is not None and ("Callable" in str(hint) or "Context" in str(hint)):
        raise ValueError("is a function of megatron-core's, which a configuration cannot name")
    if not _is_plain(hint):
        return value
    for candidate in (value, as_number(value)):
        try:
            _adapter(name).validate_python(candidate)
            return candidate
        except ValidationError:
            continue
    raise ValueError(f"expected {type_name(hint)}, found {shown(value)}")


@cache
def _adapter(name: str) -> TypeAdapter:
    return TypeAdapter(_DECLARED[name], config=ConfigDict(strict=True))


def _is_plain(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType, list):
        return all(map(_is_plain, typing.get_args(hint)))
    return origin is typing.Literal or hint in (int, float, bool, str, type(None))
