"""Attributes of models that have other values for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

_INHERITED = object()


@contextlib.contextmanager
def overridden(values: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set (owner, attribute, value), and restore every one on exit, exceptions included.

    An attribute that the owner had from its class, such as a module's `forward`, is inherited again.
    """
    previous = [(owner, name, vars(owner).get(name, _INHERITED)) for owner, name, _ in values]
    try:
        for owner, name, value in values:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(previous):
            if value is _INHERITED:
                vars(owner).pop(name, None)
            else:
                setattr(owner, name, value)
