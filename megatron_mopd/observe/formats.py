"""Human-readable numbers."""

from __future__ import annotations

import math


def format_seconds(seconds: float) -> str:
    """A human-readable duration: `4.2s`, `3m 05s`, `2h 07m`."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"


def format_count(number: float) -> str:
    """A human-readable count: `950`, `12.3k`, `4.56M`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def format_number(value: float) -> str:
    """A human-readable value with three digits: `0.123`, `12.3k`, `3.0e-07`; `–` unless it is finite."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    size = abs(value)
    if size >= 1e9 or size < 1e-4:
        return f"{value:.1e}"
    for limit, letter in ((1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.3g}{letter}"
    return f"{value:.3g}" if size < 1000 else f"{value:.0f}"
