"""Pictures of a run: `report.png` from its metrics, and the see-saw of experts against the merged student."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from megatron_mopd.backend.messages import visible
from megatron_mopd.observe.metrics import MOST_LINES, read_metrics

_INK, _MUTED, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
_MAIN, _GOOD, _WARM = "#1769aa", "#2a9d8f", "#e76f51"
# Space that sets the experts apart from the models they are compared with, and the mean from the domains.
_GAP = 0.35
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.dpi": 130,
    "text.parse_math": False,  # `$` in a name is a `$`
}
_ACCURACY_COLORS = LinearSegmentedColormap.from_list(
    "accuracy", ["#fbf7f0", "#d8e8e0", "#93c9b9", "#3f9c94", "#16686f", "#0b3c49"]
)


def draw_report(run_dir: str | Path) -> Path | None:
    """Draw `report.png` in `run_dir` from its `metrics.jsonl` and return its path.

    Shows what the metrics contain: loss or KL, KL and accuracy of each domain, response length, gradient norm
    and where the time of a step went. Returns `None` when there is nothing to draw.
    """
    lines = read_metrics(run_dir, most=MOST_LINES)
    series = _series(lines)
    domains = sorted({name.split("/", 1)[1] for name in series if name.startswith(("kl/", "accuracy/"))})
    colors = dict(zip(domains, _domain_colors(len(domains))))
    kl, accuracy, times = (_below(series, prefix) for prefix in ("kl/", "accuracy/", "time/"))
    total = "kl" if "kl" in series else "loss"
    title = {"kl": "Reverse KL to the teachers (nats per token)", "loss": "Loss"}[total]
    panels = []
    if total in series:
        panels.append((_draw_line, series[total], title, _MAIN, True))
    if kl:
        panels.append((_draw_domains, kl, colors, "KL by domain (nats per token)", True))
    if accuracy:
        panels.append((_draw_accuracy, accuracy, series.get("accuracy"), colors))
    if "response_length" in series:
        panels.append((_draw_line, series["response_length"], "Response length (tokens)", _GOOD))
    if "grad_norm" in series:
        panels.append((_draw_line, series["grad_norm"], "Gradient norm", _GOOD, True))
    if times:
        panels.append((_draw_times, times))
    if not panels:
        return None
    with matplotlib.rc_context(_STYLE):
        columns = min(3, len(panels))
        rows = math.ceil(len(panels) / columns)
        figure = _figure(5.6 * columns, 3.7 * rows + 0.5)
        figure.suptitle(
            visible(Path(run_dir).resolve().name), x=0.01, ha="left", fontsize=14, fontweight="bold"
        )
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes, (draw, *arguments) in zip(grid, panels):
            draw(axes, *arguments)
            axes.set_xlabel("iteration", color=_MUTED)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True))
        for axes in grid:  # `zip` left the cells that no panel needs
            axes.set_visible(False)
        path = Path(run_dir) / "report.png"
        figure.savefig(path)
    return path


def draw_seesaw(
    matrix: Sequence[Sequence[float]],
    row_names: Sequence[str],
    column_names: Sequence[str],
    path: str | Path,
    headroom: Mapping[str, float],
    home: Mapping[str, str] | None = None,
) -> Path:
    """Draw who is good at what: accuracies of models (rows) by domain (columns), and the headroom recovered.

    `matrix` holds accuracies in [0, 1], NaN where a model was not evaluated. `headroom` maps domains (and
    optionally `mean`) to (student - base) / (expert - base). `home` maps an expert's row to its own column,
    which is outlined; by default that is the column of the same name. A column with each row's mean is added.
    """
    values = np.asarray(matrix, dtype=float)
    assert values.shape == (len(row_names), len(column_names)), values.shape
    if home is None:
        home = {name: name for name in row_names if name in column_names}
    with matplotlib.rc_context(_STYLE | {"axes.grid": False}):
        width = max(8.0, 0.72 * len(column_names) + 4.2)
        height = 0.46 * len(row_names) + 2.2
        figure = _figure(width, height + 2.9)
        upper, lower = figure.subplots(2, 1, height_ratios=[height, 2.9])
        _draw_heat_map(upper, values, row_names, column_names, home)
        _draw_headroom(lower, column_names, headroom)
        figure.savefig(path)
    return Path(path)


def _figure(width: float, height: float) -> Figure:
    # Made without pyplot: no global list of figures, no display, whatever backend the user has chosen.
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _series(lines: list[dict[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> (iterations, values) of every numeric metric; gaps and null values are left out."""
    points: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "iteration" and isinstance(value, (int, float)) and not isinstance(value, bool):
                points.setdefault(name, []).append((line["iteration"], value))
    return {name: tuple(np.array(column, dtype=float) for column in zip(*p)) for name, p in points.items()}


def _below(series: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in series.items() if name.startswith(prefix)}


def _domain_colors(count: int) -> list[Any]:
    """Colours that stay apart: hues around the circle, alternating in lightness."""
    palette = matplotlib.colormaps["turbo"]
    hues = [palette(0.06 + 0.88 * i / max(1, count - 1)) for i in range(count)]
    return [tuple(c * (0.72 if i % 2 else 0.95) for c in hue[:3]) for i, hue in enumerate(hues)]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over about a twentieth of the run; shorter windows at the ends, so nothing is
    lost.
    """
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _log_if_wide(axes: Axes, values: np.ndarray) -> None:
    """A logarithmic axis where values span more than a factor of ten."""
    positive = values[values > 0]
    if len(positive) == len(values) and len(values) > 1 and positive.max() > 10 * positive.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1, 2, 5) if positive.max() < 1e3 * positive.min() else (1,))
        )
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_line(axes: Axes, points: tuple, title: str, color: str, log: bool = False) -> None:
    iterations, values = points
    smooth = _smooth(values)
    axes.plot(
        iterations, values, color=color, alpha=0.3, linewidth=1, marker="o" if len(values) == 1 else None
    )
    axes.plot(iterations, smooth, color=color, linewidth=2)
    axes.annotate(
        f"{smooth[-1]:.3g}",
        (iterations[-1], smooth[-1]),
        (5, 0),
        textcoords="offset points",
        color=color,
        va="center",
        fontweight="bold",
        fontsize=9,
        annotation_clip=False,
    )
    axes.set_title(title)
    if log:
        _log_if_wide(axes, values)


def _draw_domains(
    axes: Axes, domains: dict[str, tuple], colors: dict[str, Any], title: str, log: bool = False
) -> None:
    for name, (iterations, values) in sorted(domains.items()):
        marker = "o" if len(values) < 15 else None
        axes.plot(
            iterations,
            _smooth(values),
            color=colors[name],
            linewidth=1.6,
            label=visible(name),
            marker=marker,
            ms=3.5,
        )
    axes.set_title(title)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.2, labelspacing=0.35)
    if log:
        _log_if_wide(axes, np.concatenate([values for _, values in domains.values()]))


def _draw_accuracy(axes: Axes, domains: dict[str, tuple], mean: tuple | None, colors: dict[str, Any]) -> None:
    if mean is not None:
        axes.plot(*mean, color=_INK, linewidth=2.6, label="mean", marker="o", ms=4.5, zorder=5)
    _draw_domains(axes, domains, colors, "Accuracy on held-out prompts")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(-0.02, 1.02)


def _draw_times(axes: Axes, times: dict[str, tuple]) -> None:
    iterations = np.unique(np.concatenate([points[0] for points in times.values()]))
    stack = []
    for own, values in times.values():
        row = np.zeros(len(iterations))
        row[np.searchsorted(iterations, own)] = values
        stack.append(_smooth(row))
    shades = [_MAIN, _GOOD, "#e9c46a", _WARM, "#9d8ec7", "#8d99ae", "#b56576", "#6c757d"]
    colors = [shades[i % len(shades)] for i in range(len(stack))]
    labels = [f"{visible(name)} ({np.mean(values):.2f} s)" for name, (_, values) in times.items()]
    if len(iterations) == 1:
        bottoms = np.cumsum([0.0] + [row[0] for row in stack[:-1]])
        for row, bottom, color, label in zip(stack, bottoms, colors, labels):
            axes.bar(iterations, row, bottom=bottom, color=color, label=label, width=0.5)
    else:
        axes.stackplot(iterations, stack, colors=colors, labels=labels, alpha=0.9)
    axes.set_title("Time of a step (seconds)")
    axes.set_ylim(bottom=0)
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.0)


def _draw_heat_map(
    axes: Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], home: Mapping[str, str]
) -> None:
    centers = _centers(len(columns))
    experts = [name in home for name in rows]
    tops, top = [], 0.0
    for i in range(len(rows)):
        top += _GAP if i and experts[i] != experts[i - 1] else 0.0
        tops.append(top)
        top += 1.0
    means = [np.nanmean(row) if np.isfinite(row).any() else math.nan for row in values]
    for i, name in enumerate(rows):
        for j in range(len(columns) + 1):
            value = values[i, j] if j < len(columns) else means[i]
            left = centers[j] - 0.5
            color = _ACCURACY_COLORS(value) if math.isfinite(value) else "#f0f0f0"
            axes.add_patch(
                Rectangle((left, tops[i]), 1, 1, facecolor=color, edgecolor="white", linewidth=1.2)
            )
            text = f"{100 * value:.0f}" if math.isfinite(value) else "–"
            own = j < len(columns) and home.get(name) == columns[j]
            axes.text(
                left + 0.5,
                tops[i] + 0.52,
                text,
                ha="center",
                va="center",
                fontsize=9.5,
                color="white" if math.isfinite(value) and _is_dark(color) else _INK,
                fontweight="bold" if own or j == len(columns) or not experts[i] else "normal",
            )
            if own:
                axes.add_patch(
                    Rectangle(
                        (left + 0.05, tops[i] + 0.05), 0.9, 0.9, fill=False, edgecolor=_WARM, linewidth=2.2
                    )
                )
    axes.set_xlim(0, centers[-1] + 0.5)
    axes.set_ylim(top, 0)
    axes.set_xticks(
        centers, [*map(visible, columns), "mean"], rotation=38, ha="left", rotation_mode="anchor", color=_INK
    )
    axes.set_yticks([t + 0.5 for t in tops], [*map(visible, rows)], color=_INK)
    for label, expert in zip(axes.get_yticklabels(), experts):
        label.set_fontweight("normal" if expert else "bold")
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("Accuracy on held-out prompts (%)   ", pad=14)
    axes.set_xlabel("Outlined: each expert on its own domain", color=_WARM, loc="left", fontsize=9)


def _is_dark(color: Sequence[float]) -> bool:
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] < 0.55


def _draw_headroom(axes: Axes, columns: Sequence[str], headroom: Mapping[str, float]) -> None:
    # Each bar stands under its column of the heat map, the mean under the mean.
    shares = np.array([headroom.get(name, math.nan) for name in columns], dtype=float)
    mean = headroom.get("mean", np.nanmean(shares) if np.isfinite(shares).any() else math.nan)
    shares = np.append(shares, mean)
    centers = _centers(len(columns))
    # A domain where the expert hardly gained can give any ratio: the bar is cut, its number is not.
    heights = np.clip(np.nan_to_num(shares), -0.3, 1.3)
    colors = [*(_GOOD if share >= 0 else _WARM for share in shares[:-1]), _MAIN]
    axes.bar(centers, heights, width=0.74, color=colors)
    for center, height, share in zip(centers, heights, shares):
        text = f"{100 * share:.0f}" if math.isfinite(share) else "–"
        inside = height > 0.2
        axes.annotate(
            text,
            (center, height),
            (0, -11 if inside else -3 if height < 0 else 3),
            textcoords="offset points",
            ha="center",
            va="top" if inside or height < 0 else "bottom",
            color="white" if inside else _INK,
            fontweight="bold",
            fontsize=9.5,
        )
    axes.axhline(1.0, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.axhline(0.0, color=_MUTED, linewidth=1)
    title = "Headroom recovered by the student (%): (student - base) / (expert - base)"
    axes.set_title(title, pad=12)
    axes.set_xlim(0, centers[-1] + 0.5)
    axes.set_ylim(min(0.0, heights.min() - 0.14), max(1.08, heights.max() + 0.03))
    axes.set_yticks([0.0, 0.5, 1.0], ["base  0", "50", "expert  100"], color=_INK)
    axes.set_xticks(
        centers, [*map(visible, columns), "mean"], rotation=38, ha="right", rotation_mode="anchor", color=_INK
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _centers(columns: int) -> list[float]:
    """Where the columns of the see-saw stand: the domains side by side, and the mean a little apart."""
    return [j + 0.5 for j in range(columns)] + [columns + _GAP + 0.5]
