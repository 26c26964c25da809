"""What is wrong with a configuration, in one line; the known name that is nearest to an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A user's mistake, found before training starts: what is wrong, where, and what to do, in one line."""


def closest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known name that `name` may be a misspelling of. cutoff: least similarity, from 0 to 1."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest known name, or the list of known ones when nothing is close."""
    known = sorted(known)
    if (close := closest(name, known)) is not None:
        return f"; did you mean {close!r}?"
    return f"; known: {', '.join(known)}" if known and len(known) <= 40 else ""
