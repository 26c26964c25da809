"""Charts as inline SVG for the report page, which has no scripts and no network access.

Matplotlib's output is adapted to the page: colours of the theme become the style sheet's custom properties,
so that a chart fits a light and a dark page; text uses the page's font; ids and all references to them are
removed; and a mark has a `<title>`, which browsers show as a tooltip.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from xml.etree import ElementTree

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from megatron_mopd.backend.messages import visible
from megatron_mopd.observe.charts import STYLE, Chart, Line, Points, draw_areas, draw_lines
from megatron_mopd.observe.formats import format_number
from megatron_mopd.observe.palette import DRAWN, MUTED, THEME
from megatron_mopd.observe.traces import Panel, draw_panel

_SVG, _HREF = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_KEPT = ("d", "style", "transform", "x", "y")
_NOT_XML = re.compile("[\ufffe\uffff]")
_LONG = re.compile(r"\d+\.\d{3,}")
_NO_CHANGE = re.compile(r"font-family: [^;]*(; |$)|rotate\(-?0 .*\)")
_PROPERTY = {THEME[name][0]: f"var(--{name})" for name in DRAWN}
_THEME_COLOR = re.compile("|".join(_PROPERTY))


@rc_context(STYLE)
def inline(chart: Chart, label: str) -> str:
    """The chart as one `<svg>` element on one line. `label` describes it for screen readers."""
    root = _drawn(chart)
    known = {element.get("id"): element for element in root.iter()}
    for element in list(root.iter()):
        for definitions in element.findall(f"{_SVG}defs"):
            element.remove(definitions)
    for use in root.iter(f"{_SVG}use"):  # a marker, defined once and placed many times
        mark = known[use.get(_HREF).removeprefix("#")]
        use.tag = f"{_SVG}path"
        use.set("d", mark.get("d"))
        use.set("style", f"{mark.get('style', '')}; {use.get('style', '')}")
        use.set("transform", f"translate({use.attrib.pop('x')} {use.attrib.pop('y')})")
    for name, texts in chart.hints.items():
        group = known[name]
        marks = [group] if len(texts) == 1 else list(group.iter(f"{_SVG}path"))
        for mark, text in zip(marks, texts, strict=True):
            title = ElementTree.Element(f"{_SVG}title")
            title.text = visible(text)
            mark.insert(0, title)
    width, height = (96 * inches for inches in chart.get_size_inches())
    picture = ElementTree.Element("svg", viewBox=root.get("viewBox"), role="img")
    picture.attrib |= {"width": f"{width:g}", "height": f"{height:g}", "aria-label": visible(label)}
    picture.set("style", f"--drawn:{width:g}px")
    for mark in _marks(root):
        for element in mark.iter():
            element.tag, element.tail = element.tag.removeprefix(_SVG), None
            element.text = element.text if element.tag in ("text", "title") else None
            kept = {name: _tidy(element.get(name)) for name in _KEPT if name in element.attrib}
            element.attrib = {name: value for name, value in kept.items() if value}
        picture.append(mark)
    return ElementTree.tostring(picture, encoding="unicode")


def _drawn(chart: Chart) -> ElementTree.Element:
    for background in [chart.patch, *(axes.patch for axes in chart.axes)]:
        background.set_visible(False)  # the page has its own
    text = io.StringIO()
    with warnings.catch_warnings():
        # The browser chooses the font, and has fallbacks for glyphs that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(chart).print_svg(text, metadata=nothing)
    return ElementTree.fromstring(_NOT_XML.sub("\ufffd", text.getvalue()))


def _marks(element: ElementTree.Element) -> Iterator[ElementTree.Element]:
    """The visible elements: paths, texts, and groups with a title; not the groups around them."""
    for child in element:
        if child.tag == f"{_SVG}g" and child.find(f"{_SVG}title") is None:
            yield from _marks(child)
        elif child.tag in (f"{_SVG}g", f"{_SVG}path", f"{_SVG}text"):
            yield child


def _tidy(value: str) -> str:
    value = _LONG.sub(lambda found: f"{float(found[0]):.2f}", " ".join(value.split()))
    return _THEME_COLOR.sub(lambda found: _PROPERTY[found[0]], _NO_CHANGE.sub("", value))


def thin(points: Points, most: int = 160) -> list[tuple[float, float]]:
    """Means over at most `most` groups of neighbours: as much as a chart of a long run can show."""
    size = max(1, math.ceil(len(points) / most))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


@rc_context(STYLE | {"font.size": 8})
def line_chart(lines: Sequence[Line], *, log: bool = False, percent: bool = False, label: str = "") -> str:
    """Curves over the iterations; see `draw_lines`."""
    chart, axes = _chart()
    lines = [line._replace(points=thin(line.points)) for line in lines if line.points]
    if lines:
        draw_lines(axes, lines, log=log, percent=percent)
    else:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no data yet", color=MUTED, ha="center")
    return inline(chart, label)


@rc_context(STYLE | {"font.size": 8})
def stacked_areas(lines: Sequence[Line], *, label: str = "") -> str:
    """Parts of a whole over the iterations, at least one; see `draw_areas`."""
    chart, axes = _chart()
    draw_areas(axes, [line._replace(points=thin(line.points)) for line in lines])
    return inline(chart, label)


@rc_context(STYLE | {"font.size": 8})
def timeline(panel: Panel, end: float) -> str:
    """The timeline of every stage, on an axis of `end` seconds; see `draw_panel`."""
    chart, axes = _chart(1120, 26 * len(panel.idle) + 40, left=110)
    draw_panel(axes, panel, end)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{format_number(value)} s"))
    return inline(chart, "timeline of every stage")


def _chart(width: int = 560, height: int = 230, left: int = 58) -> tuple[Chart, Axes]:
    # Fixed margins: computing them takes longer than drawing.
    chart = Chart(width, height)
    share = (left / width, 26 / height, (width - left - 12) / width, (height - 36) / height)
    return chart, chart.add_axes(share)


@rc_context(STYLE)
def spark(points: Points, color: str, *, log: bool = False) -> str:
    """A word-sized curve, with its first and last value in the label.

    Without axes, which take ten times as long to draw as the curve: a page may have hundreds of these.
    """
    points = thin(points, 75)
    if not points:
        return ""
    x, y = np.array(points, dtype=float).T
    name = f"{format_number(y[0])} to {format_number(y[-1])}, "
    name += f"between {format_number(y.min())} and {format_number(y.max())}"
    if log and y.min() > 0 and y.max() > 10 * y.min():
        y = np.log(y)
    x, y = (
        low + (values - values.min()) / (np.ptp(values) or 1.0) * (high - low)
        for values, low, high in ((x, 0.02, 0.97), (y, 0.12, 0.88))
    )
    chart = Chart(150, 34)
    curve = Line2D(x, y, color=color, linewidth=1.1, marker="o", markersize=3.5, markevery=[-1])
    chart.hint(chart.add_artist(curve), [name])
    return inline(chart, name)


@rc_context(STYLE)
def split_bar(shares: Sequence[tuple[str, float, str]], *, width: int = 1120) -> str:
    """One bar split into parts (name, share of the whole, colour)."""
    chart, left = Chart(width, 26), 0.0
    for name, share, color in shares:
        part = Rectangle((left, 0), share, 1, color=color, linewidth=0, transform=chart.transFigure)
        chart.hint(chart.add_artist(part), [f"{name} {share:.1%}"])
        if share * width > 70:
            text = f"{visible(name)} {100 * share:.0f}%"
            chart.text(left + 6 / width, 0.5, text, color="white", fontsize=8.5, va="center")
        left += share
    return inline(chart, "time breakdown")
