"""One-line configuration errors, and suggestions for unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A user error, found before training starts: what is wrong, where, and how to fix it, in one line."""


def closest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known name that `name` is likely a misspelling of. cutoff: minimum similarity, from 0 to 1."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest known name, or the list of known names if none is close."""
    known = sorted(known)
    if (close := closest(name, known)) is not None:
        return f"; did you mean {close!r}?"
    return f"; known: {', '.join(known)}" if known and len(known) <= 40 else ""
