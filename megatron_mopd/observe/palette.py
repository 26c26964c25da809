"""The colours of all pictures and of the report page."""

from __future__ import annotations

import colorsys

THEME = {
    "ink": ("#1f2933", "#e6e9ed"),
    "muted": ("#66727f", "#9aa5b1"),
    "line": ("#e4e7eb", "#323f4b"),
    "back": ("#f7f8fa", "#14191f"),
    "card": ("#ffffff", "#1d242c"),
    "main": ("#1769aa", "#63b3ed"),
    "good": ("#1f7a70", "#5fd0c0"),
    "warm": ("#c2452d", "#ff8a70"),
    "heat": ("217, 72, 47", "255, 120, 90"),
}
"""Custom property of the page's style sheet -> its value on a light and on a dark page."""

DRAWN = ("ink", "muted", "line", "main", "good", "warm")
INK, MUTED, LINE, MAIN, GOOD, WARM = (THEME[name][0] for name in DRAWN)
"""Pictures are drawn in the light theme; `svg.py` replaces these colours by the custom properties, so no
other colour here may equal one of them.
"""

SHADES = ("#2f77b3", "#2a9d8f", "#e9c46a", "#e76f51", "#9d8ec7", "#8d99ae", "#b56576", "#6c757d")
"""Colours for parts of a whole."""

ACCURACY = ("#fbf7f0", "#d8e8e0", "#93c9b9", "#3f9c94", "#16686f", "#0b3c49")
"""Colour map from 0 to 1."""

STUDENT = {"StudentForward": ("#4878b0", "#7fa6d3"), "StudentBackward": ("#3f8f5f", "#80bf99")}
"""Pipeline instruction -> colours of even and odd model chunks."""

TEACHERS = ("#f2a541", "#d1495b", "#a06cb0", "#e3c23c", "#b5651d", "#e58bb1", "#7d4f9b", "#d98880")
"""Used in turn; distinct from the student's colours."""

OPTIMIZER, LOAD = "#5b6570", "#bbbbbb"


def hue(number: int, count: int) -> str:
    """The colour of item `number` of `count`: hues around the circle, alternating in lightness."""
    angle = (20 + 330 * number / max(1, count)) % 360 / 360
    channels = colorsys.hls_to_rgb(angle, (0.46, 0.58)[number % 2], 0.62)
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)
