"""Charts drawn by matplotlib, for files (`report.png`) and for the page (`svg.py`)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from megatron_mopd.backend.messages import visible
from megatron_mopd.observe.formats import format_number
from megatron_mopd.observe.palette import INK, LINE, MUTED

Points = Sequence[tuple[float, float]]
_STEPS = [1, 2, 5, 10]

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.xmargin": 0.015,
    "grid.color": LINE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.bottom": False,
    "ytick.left": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.dpi": 130,
    "text.parse_math": False,  # a `$` in a name is literal
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "megatron_mopd",  # equal pictures give equal files
}
"""Charts are created and drawn in `matplotlib.rc_context(STYLE)`."""


class Line(NamedTuple):
    """One curve of a chart, or one part of a stack."""

    name: str
    points: Points
    color: str
    strong: bool = False
    alpha: float = 1.0


class Chart(Figure):
    """A figure of `width` x `height` CSS pixels (1/96 inch) whose marks can have tooltips on the page.

    Created without pyplot: no global list of figures and no display, whatever the user's backend.
    """

    def __init__(self, width: float, height: float, **options):
        super().__init__(figsize=(width / 96, height / 96), **options)
        self.hints: dict[str, Sequence[str]] = {}

    def draw(self, renderer) -> None:
        with warnings.catch_warnings():
            # If names are longer than the chart, it is drawn without a layout.
            warnings.filterwarnings("ignore", message="constrained_layout not applied")
            super().draw(renderer)

    def hint(self, artist: Artist, texts: Sequence[str]) -> None:
        """Add tooltips: one text for `artist`, or for a collection one for each of its paths."""
        artist.set_gid(f"hint-{len(self.hints)}")
        self.hints[artist.get_gid()] = texts


def draw_lines(axes: Axes, lines: Sequence[Line], *, log: bool = False, percent: bool = False) -> None:
    """Curves over the iterations, each with at least one point; on a logarithmic axis where `log` is set and
    the values are positive and span more than a factor of ten. `percent`: shares of 1.
    """
    values = np.array([y for line in lines for _, y in line.points], dtype=float)
    low, high = _scale(axes, values[np.isfinite(values)], log, percent)
    for line in lines:
        x, y = np.array(line.points, dtype=float).T
        few = {"marker": "o", "markersize": 3.5} if len(x) < 15 else {}
        width, order = (2.4, 3) if line.strong else (1.5, 2)
        look = {"color": line.color, "alpha": line.alpha, "linewidth": width, "zorder": order} | few
        (curve,) = axes.plot(x, np.clip(y, low, high), label=visible(line.name), **look)
        axes.figure.hint(curve, [line.name])
    _iterations(axes)


def _scale(axes: Axes, values: np.ndarray, log: bool, percent: bool) -> tuple[float, float]:
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    locator, formatter = MaxNLocator(5, steps=_STEPS), FuncFormatter(lambda value, _: format_number(value))
    if log and low > 0 and high > 10 * low:
        low = max(low, 1e-4 * high)  # a teacher that still equals the student would flatten all other curves
        axes.set_yscale("log")
        locator = LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,))
        low, high = low / 1.15, 1.15 * high
    elif percent:
        low, high, formatter = -0.02, 1.02, PercentFormatter(1.0)
    else:
        low = 0.0 if 0 <= low < 0.5 * high else low
        margin = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
        low, high = low - margin if low else 0.0, high + margin
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(formatter)
    return low, high


def draw_areas(axes: Axes, lines: Sequence[Line]) -> None:
    """Parts of a whole over the iterations, stacked; every line has the same iterations."""
    x = np.array([x for x, _ in lines[0].points], dtype=float)
    parts = np.array([[y for _, y in line.points] for line in lines], dtype=float)
    if len(x) == 1:
        x, parts = np.array([x[0] - 0.25, x[0] + 0.25]), np.repeat(parts, 2, axis=1)
    edges = np.vstack([np.zeros(len(x)), np.cumsum(parts, axis=0)])
    # A single long step (the first, an evaluation) would flatten all others.
    ceiling = min(1.6 * np.quantile(edges[-1], 0.9, method="lower"), edges[-1].max()) or 1.0
    edges = np.minimum(edges, ceiling)
    for line, below, above in zip(lines, edges, edges[1:]):
        look = {"color": line.color, "alpha": 0.9, "linewidth": 0}
        area = axes.fill_between(x, below, above, label=visible(line.name), **look)
        axes.figure.hint(area, [line.name])
    axes.set_ylim(0, ceiling)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
    _iterations(axes)


def _iterations(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=_STEPS, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.grid(axis="y")
