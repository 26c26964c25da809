"""Small pictures as SVG text, for a page without scripts, libraries or a network.

Every function returns one `<svg>` element whose texts and lines take their colours from the page's style
sheet (`page_template.py`), so that they fit a light and a dark page. What a mark means is also said in words
in its `<title>`, which browsers show under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape as escape_markup
from typing import NamedTuple

from megatron_mopd.backend.messages import visible

Points = Sequence[tuple[float, float]]

_MOST_POINTS = 160
_ACCURACY_STOPS = ("#fbf7f0", "#d8e8e0", "#93c9b9", "#3f9c94", "#16686f", "#0b3c49")
SHADES = ("#1769aa", "#2a9d8f", "#e9c46a", "#e76f51", "#9d8ec7", "#8d99ae", "#b56576", "#6c757d")


def escape(text: str) -> str:
    """`text` for an element or an attribute: neither markup nor control characters."""
    return escape_markup(visible(text))


class Line(NamedTuple):
    """One curve of a chart."""

    name: str
    points: Points
    color: str
    strong: bool = False


def hue(number: int, count: int) -> str:
    """The colour of one of `count` things: hues around the circle, alternating in lightness."""
    return f"hsl({(20 + 330 * number / max(1, count)) % 360:.0f} 62% {(46, 58)[number % 2]}%)"


def smooth(points: Points) -> list[tuple[float, float]]:
    """Means of at most 160 neighbouring groups: what a chart of a long run can show."""
    size = max(1, math.ceil(len(points) / _MOST_POINTS))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def number(value: float) -> str:
    """A value to read, three digits of it."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    size = abs(value)
    if size >= 1e9 or size < 1e-4:
        return f"{value:.1e}"
    for limit, letter in ((1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.3g}{letter}"
    return f"{value:.3g}" if size < 1000 else f"{value:.0f}"


class _Axis:
    """Values -> pixels, linear or logarithmic, with readable ticks."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False):
        if high <= low:
            low, high = (low / 2, high * 2) if log else (min(0.0, 2 * low), max(0.0, 2 * high) or 1.0)
        self.log, self.low, self.high, self.start, self.end = log, low, high, start, end

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 5), (1, 3), (1,)):
                values = [step * 10.0**d for d in decades for step in steps]
                values = [v for v in values if self.low <= v <= self.high]
                if len(values) <= most + 1:
                    break
            return values[:: math.ceil(len(values) / (most + 1))] or [self.low, self.high]
        raw = (self.high - self.low) / most
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(s * size for s in (1, 2, 2.5, 5, 10) if s * size >= raw)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def line_chart(
    lines: Sequence[Line],
    *,
    width: int = 560,
    height: int = 230,
    log: bool = False,
    percent: bool = False,
    label: str = "",
) -> str:
    """Curves over the iterations, with axes; a logarithmic one where `log` and the values allow it."""
    lines = [line._replace(points=smooth(line.points)) for line in lines if line.points]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    if not ys:
        return _empty(width, height)
    log = log and min(ys) > 0 and max(ys) > 10 * min(ys)
    low, high = (0.0, 1.0) if percent else (min(ys), max(ys))
    if log:
        low = max(low, 1e-4 * high)  # a teacher that still equals the student would flatten all the rest
    if not log and not percent:
        low = 0.0 if 0 <= low < 0.5 * high else low
    x_axis = _Axis(min(xs), max(xs), 52, width - 12)
    y_axis = _Axis(low, high, height - 26, 10, log)
    parts = []
    for tick in y_axis.ticks():
        y = y_axis(tick)
        text = f"{100 * tick:.0f}%" if percent else number(tick)
        parts.append(f'<line class="grid" x1="52" x2="{width - 12}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="46" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    for tick in x_axis.ticks(6):
        if tick == int(tick):
            parts.append(
                f'<text class="tick" x="{x_axis(tick):.1f}" y="{height - 8}" text-anchor="middle">'
                f"{tick:.0f}</text>"
            )
    for line in sorted(lines, key=lambda line: line.strong):
        parts.append(_curve(line, x_axis, y_axis, 2.6 if line.strong else 1.5))
    return _svg(width, height, parts, label)


def spark(points: Points, color: str, *, log: bool = False, width: int = 150, height: int = 34) -> str:
    """A curve without axes, its first and last value in words."""
    points = smooth(points)
    if not points:
        return ""
    ys = [y for _, y in points]
    log = log and min(ys) > 0 and max(ys) > 10 * min(ys)
    x_axis = _Axis(points[0][0], points[-1][0], 2, width - 4)
    y_axis = _Axis(min(ys), max(ys), height - 4, 4, log)
    name = f"{number(ys[0])} to {number(ys[-1])}, between {number(min(ys))} and {number(max(ys))}"
    x, y = x_axis(points[-1][0]), y_axis(ys[-1])
    dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" fill="{color}"/>'
    return _svg(width, height, [_curve(Line(name, points, color), x_axis, y_axis, 1.5), dot], name)


def stacked_areas(lines: Sequence[Line], *, width: int = 560, height: int = 230, label: str = "") -> str:
    """Parts of a whole over the iterations, on top of each other; every line has the same iterations."""
    lines = [line._replace(points=smooth(line.points)) for line in lines if line.points]
    if not lines:
        return _empty(width, height)
    xs = [x for x, _ in lines[0].points]
    totals = [sum(line.points[i][1] for line in lines) for i in range(len(xs))]
    # A single long step (the first, an evaluation) would flatten all others.
    ceiling = max(1e-9, 1.6 * sorted(totals)[int(0.9 * (len(totals) - 1))])
    x_axis = _Axis(xs[0], xs[-1], 52, width - 12)
    y_axis = _Axis(0.0, min(ceiling, max(totals) or 1.0), height - 26, 10)
    parts, below = [], [0.0] * len(xs)
    for line in lines:
        above = [b + y for b, (_, y) in zip(below, line.points)]
        edge = [(x, min(y, y_axis.high)) for x, y in zip(xs, above)]
        edge += [(x, min(y, y_axis.high)) for x, y in zip(reversed(xs), reversed(below))]
        path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in edge)
        parts.append(
            f'<polygon points="{path}" fill="{line.color}" opacity="0.85">'
            f"<title>{escape(line.name)}</title></polygon>"
        )
        below = above
    for tick in y_axis.ticks(4):
        parts.append(
            f'<text class="tick" x="46" y="{y_axis(tick) + 3.5:.1f}" text-anchor="end">{number(tick)}</text>'
        )
    for tick in x_axis.ticks(6):
        if tick == int(tick):
            parts.append(
                f'<text class="tick" x="{x_axis(tick):.1f}" y="{height - 8}" text-anchor="middle">'
                f"{tick:.0f}</text>"
            )
    return _svg(width, height, parts, label)


def split_bar(shares: Sequence[tuple[str, float, str]], *, width: int = 560) -> str:
    """One bar in parts (name, share of the whole, colour)."""
    parts, left = [], 0.0
    for name, share, color in shares:
        size = share * width
        parts.append(
            f'<rect x="{left:.1f}" y="0" width="{size:.1f}" height="26" fill="{color}">'
            f"<title>{escape(name)} {share:.1%}</title></rect>"
        )
        if size > 70:
            parts.append(
                f'<text class="on" x="{left + 6:.1f}" y="17">{escape(name)} {100 * share:.0f}%</text>'
            )
        left += size
    return _svg(width, 26, parts, "where the time goes")


def heat_map(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    home: Mapping[str, str],
    headroom: Mapping[str, float],
) -> str:
    """Accuracies in [0, 1] (NaN: not evaluated) of models by domain; experts' own domains are outlined, and a
    last row has the headroom recovered.
    """
    left, cell, tall = 30 + 7 * max(map(len, [*rows, "headroom recovered"])), 44, 25
    top = 40 + 5 * max(map(len, [*columns, "mean"]))
    width, height = left + cell * (len(columns) + 1) + 10 + 40, top + tall * (len(rows) + 1) + 14
    parts = []
    for j, name in enumerate([*columns, "mean"]):
        x = left + cell * j + cell / 2 + (6 if j == len(columns) else 0)
        parts.append(
            f'<text class="name" transform="translate({x:.0f} {top - 8}) rotate(-42)">{escape(name)}</text>'
        )
    for i, name in enumerate([*rows, "headroom recovered"]):
        y = top + tall * i + (8 if i == len(rows) else 0)
        strong = "" if name in home else " strong"
        parts.append(
            f'<text class="name{strong}" x="{left - 8}" y="{y + 17}" text-anchor="end">{escape(name)}</text>'
        )
        own = [headroom.get(c, math.nan) for c in columns] if i == len(rows) else list(values[i])
        finite = [value for value in own if math.isfinite(value)]
        mean = sum(finite) / len(finite) if finite else math.nan
        if i == len(rows):
            mean = headroom.get("mean", mean)
        for j, value in enumerate([*own, mean]):
            x = left + cell * j + (6 if j == len(columns) else 0)
            is_known = math.isfinite(value)
            color = _accuracy_color(min(1.0, max(0.0, value))) if is_known else "none"
            dark = is_known and value > 0.55
            outlined = j < len(columns) and home.get(name) == columns[j]
            where = columns[j] if j < len(columns) else "mean"
            text = f"{100 * value:.0f}" if is_known else "–"
            parts.append(
                f'<rect x="{x + 1}" y="{y + 1}" width="{cell - 2}" height="{tall - 2}" rx="3" '
                f'fill="{color}"{" class=own" if outlined else ""}>'
                f"<title>{escape(name)} on {escape(where)}: {text}%</title></rect>"
                f'<text class="{"on" if dark else "off" if is_known else "tick"}" x="{x + cell / 2}" '
                f'y="{y + 17}" text-anchor="middle">{text}</text>'
            )
    return _svg(width, height, parts, "accuracy of every model on every domain, in per cent")


class Box(NamedTuple):
    """One thing that a pipeline stage did."""

    row: int
    start: float
    end: float
    color: str
    name: str
    thin: bool = False
    """Beside the computation (a copy)."""


def timeline(boxes: Sequence[Box], rows: Sequence[str], span: float, *, width: int = 1120) -> str:
    """What each row did when; `span` is the whole time axis."""
    left, tall = 130, 26
    axis = _Axis(0.0, span or 1.0, left, width - 8)
    height = tall * len(rows) + 24
    parts = [
        f'<text class="name" x="{left - 8}" y="{tall * i + 17}" text-anchor="end">{escape(name)}</text>'
        for i, name in enumerate(rows)
    ]
    for box in boxes:
        y = tall * box.row + (21 if box.thin else 2)
        size = max(0.4, axis(box.end) - axis(box.start))
        parts.append(
            f'<rect x="{axis(box.start):.2f}" y="{y}" width="{size:.2f}" height="{4 if box.thin else 19}" '
            f'fill="{box.color}"><title>{escape(box.name)}</title></rect>'
        )
    for tick in axis.ticks(8):
        parts.append(
            f'<text class="tick" x="{axis(tick):.1f}" y="{height - 5}" text-anchor="middle">'
            f"{number(tick)} s</text>"
        )
    return _svg(width, height, parts, "what every stage did when")


def _accuracy_color(value: float) -> str:
    place = value * (len(_ACCURACY_STOPS) - 1)
    lower = min(int(place), len(_ACCURACY_STOPS) - 2)
    first, second = ([int(_ACCURACY_STOPS[lower + k][i : i + 2], 16) for i in (1, 3, 5)] for k in (0, 1))
    mixed = [round(a + (b - a) * (place - lower)) for a, b in zip(first, second)]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _curve(line: Line, x_axis: _Axis, y_axis: _Axis, width: float) -> str:
    places = [(x_axis(x), y_axis(y)) for x, y in line.points]
    title = f"<title>{escape(line.name)}</title>"
    if len(places) == 1:
        x, y = places[0]
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{line.color}">{title}</circle>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{path}" stroke="{line.color}" stroke-width="{width}">{title}</polyline>'


def _empty(width: int, height: int) -> str:
    text = f'<text class="tick" x="{width / 2}" y="{height / 2}" text-anchor="middle">nothing yet</text>'
    return _svg(width, height, [text], "nothing yet")


def _svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'style="--drawn:{width:g}px" '
        f'aria-label="{escape(label)}">' + "".join(parts) + "</svg>"
    )
