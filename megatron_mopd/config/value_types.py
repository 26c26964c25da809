"""Types and ranges of configuration values, each named once; pydantic checks those that the schema names.

`schema.py` has plain dataclasses: what the program itself constructs, or changes by `dataclasses.replace`, is
taken as it is, and what a user wrote is checked once, when it is read (`loading.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import types
import typing
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, InstanceOf
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema

from megatron_mopd.backend.messages import shown


class Section:
    """Base of the dataclasses: a mapping without unknown keys; a boolean is no integer, a number no text."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        # Strict are the fields. A strict dataclass itself would be made from nothing but its own instances.
        handler.resolve_ref_schema(schema)["strict"] = False
        return schema


def as_number(value: Any) -> Any:
    """1e-4, which YAML reads as text, as the number it is; everything else unchanged."""
    with contextlib.suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


def _day(text: str) -> str:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{shown(text)} is not a day, YYYY-MM-DD") from None
    return text


def _repetitions(times: int) -> int:
    if times < 0 or times == 1:
        raise ValueError("every token is a pattern once; needs at least 2, or 0 for never")
    return times


Text = InstanceOf[str]
"""Instead of `str`, for which pydantic would turn an `EnvironmentText`, whose value nothing may show, into a
plain text."""
Name = Annotated[str, BeforeValidator(str)]
"""Key of a mapping whose keys are the user's own: `1:` is a name like others."""
Day = Annotated[Text, AfterValidator(_day)]

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Repetitions = Annotated[int, AfterValidator(_repetitions)]

Real = Annotated[float, BeforeValidator(as_number)]
Positive = Annotated[Real, Field(gt=0)]
NonNegative = Annotated[Real, Field(ge=0)]
FinitePositive = Annotated[Real, Field(gt=0, lt=math.inf)]
FiniteNonNegative = Annotated[Real, Field(ge=0, lt=math.inf)]
Share = Annotated[Real, Field(ge=0, le=1)]
PositiveShare = Annotated[Real, Field(gt=0, le=1)]
ShareBelowOne = Annotated[Real, Field(ge=0, lt=1)]

_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def allowed_range(hint: Any) -> str:
    """`at least 0 and below 1`: the range of an annotation above, or "" when it has none."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return allowed_range(typing.get_args(hint)[0])
    bounds = [
        bound
        for item in getattr(hint, "__metadata__", ())
        if isinstance(item, FieldInfo)
        for bound in item.metadata
    ]
    return " and ".join(
        f"{word} {getattr(bound, name)}"
        for name, word in _BOUNDS.items()
        for bound in bounds
        if hasattr(bound, name)
    )


def type_name(hint: Any) -> str:
    """How messages and documentation call a type: `int (at least 1) or null`, `list of int`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        limits = allowed_range(hint)
        return type_name(arguments[0]) + (f" ({limits})" if limits else "")
    if origin is typing.Literal:
        return " or ".join(map(repr, arguments))
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return "mapping"
    if arguments:
        return " or ".join(map(type_name, arguments))
    return "null" if hint is type(None) else "entries" if dataclasses.is_dataclass(hint) else hint.__name__


def bare(hint: Any) -> Any:
    """An annotation without its `Annotated` and its `None`."""
    if typing.get_origin(hint) in (Annotated, typing.Union, types.UnionType):
        return bare(typing.get_args(hint)[0])
    return hint
