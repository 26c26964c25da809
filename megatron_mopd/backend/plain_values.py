"""Loads only tensors and plain values from files written by `torch.save`.

`torch.load(weights_only=True)` calls no function of the file's choice, but its result may still have
attributes set by the file (an `OrderedDict` with a different `items`, a tensor with a different `narrow`).
Everything is therefore rebuilt.
"""

from __future__ import annotations

import contextlib
import io
from collections import OrderedDict
from collections.abc import Iterator
from typing import IO, Any

import torch

_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_DEEPEST = 100


def load_plain(stream: IO[bytes]) -> Any:
    """The contents of a `torch.save` file, on the CPU, rebuilt from exact types; `ValueError` for others.

    Raises whatever `torch.load` raises for a file that is damaged or contains other classes.
    """
    if stream.read(2) != b"PK":
        raise ValueError("it is not a file written by torch.save")
    stream.seek(0)
    with _no_other_classes():
        loaded = torch.load(stream, map_location="cpu", weights_only=True)
    return _plain(loaded, {}, 0)


@contextlib.contextmanager
def _no_other_classes() -> Iterator[None]:
    """Unregister the classes that megatron-core registers with torch on import (`OptimizerConfig`, numpy's
    arrays): none of them may be in a file that we read.
    """
    registered = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([io.BytesIO])  # Transformer Engine's statistics
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(registered)


def require_tensor(value: Any, dtype: torch.dtype, shape: tuple[int, ...], what: str) -> torch.Tensor:
    """`value` if it is a plain dense tensor of this dtype and shape, else a `ValueError` about `what`."""
    _require_plain(value, what)
    if value.dtype != dtype or tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{what} is a {value.dtype} tensor of shape {list(value.shape)}, listed as {dtype} {list(shape)}"
        )
    return value


def _require_plain(value: Any, what: str) -> None:
    if type(value) is not torch.Tensor or value.layout != torch.strided or value.is_quantized:
        raise ValueError(f"{what} holds a {type(value).__name__} instead of a dense tensor")
    if value.__dict__ or value.device.type != "cpu":
        raise ValueError(f"{what} holds a tensor with extra attributes")


_UNDER_WAY = object()


def _plain(value: Any, built: dict[int, Any], depth: int) -> Any:
    """`value` rebuilt. built: rebuilt values by the identity of the original, which preserves sharing."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is torch.Tensor:
        _require_plain(value, "it")
        return value
    if id(value) in built:
        if built[id(value)] is _UNDER_WAY:
            raise ValueError("it holds a value that contains itself")
        return built[id(value)]
    if depth > _DEEPEST:
        raise ValueError("it is nested too deeply")
    built[id(value)] = _UNDER_WAY
    if kind in (dict, OrderedDict):
        if kind is OrderedDict and value.__dict__:
            raise ValueError("it holds an OrderedDict with extra attributes")
        pairs = dict.items(value)
        new: Any = kind((_plain(k, built, depth + 1), _plain(v, built, depth + 1)) for k, v in pairs)
    elif kind in (list, tuple, set):
        new = kind(_plain(item, built, depth + 1) for item in kind.__iter__(value))
    elif kind is torch.Size:
        new = torch.Size(tuple.__iter__(value))
    elif kind is bytearray:
        new = bytearray(value)
    elif kind is io.BytesIO and not value.__dict__:
        new = io.BytesIO(io.BytesIO.getvalue(value))
    else:
        raise ValueError(f"it holds a {kind.__module__}.{kind.__qualname__}")
    built[id(value)] = new
    return new
