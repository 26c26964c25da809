"""Named types and ranges of configuration values, for the annotations of the schema.

The sections are plain dataclasses: pydantic checks the user's input once, when it is read (`loading.py`).
Objects that the program itself constructs or changes with `dataclasses.replace` are not checked again.
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
from pydantic_core import CoreSchema

from megatron_mopd.backend.messages import shown


class Section:
    """Base of the dataclasses: refuses unknown keys and does not convert values of other types."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        # Only the fields are strict: a strict dataclass would accept its own instances but no mapping.
        handler.resolve_ref_schema(schema)["strict"] = False
        return schema


def as_number(value: Any) -> Any:
    """`value`, or the number that it represents: YAML reads 1e-4 (without a dot) as a string."""
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
"""Use this instead of `str`: pydantic's `str` would convert an `EnvironmentText` to its value, which must not
be written anywhere, and lose its spelling in the configuration."""
Name = Annotated[str, BeforeValidator(str)]
"""Key of a mapping with user-defined keys: `1:` is a valid name."""
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
# At most one year: timers and the process groups' timeouts overflow after a few centuries.
Minutes = Annotated[Real, Field(gt=0, le=525_600)]
MinutesOrZero = Annotated[Real, Field(ge=0, le=525_600)]
Seconds = Annotated[Real, Field(gt=0, le=31_536_000)]

_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def allowed_range(hint: Any) -> str:
    """`at least 0 and below 1`: the range of one of the annotations above, or "" if it has none."""
    bounds = [bound for item in getattr(hint, "__metadata__", ()) for bound in getattr(item, "metadata", ())]
    stated = [
        f"{word} {getattr(b, name)}" for name, word in _BOUNDS.items() for b in bounds if hasattr(b, name)
    ]
    return " and ".join(stated)


def type_name(hint: Any) -> str:
    """Name of a type in messages and documentation: `int (at least 1) or null`, `list of int`."""
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


def without_null(hint: Any) -> Any:
    """`X` for `X | None`."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint)[0] if is_union else hint
