"""The see-saw chart of experts and the merged student: accuracy by model and domain, and headroom
recovered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

from megatron_mopd.backend.messages import visible
from megatron_mopd.observe.charts import STYLE, Chart
from megatron_mopd.observe.palette import ACCURACY, INK, LINE, MUTED, SHADES, WARM

# Gaps that separate the experts from the other models, and the mean from the domains.
_GAP = 0.35
_COLORS = LinearSegmentedColormap.from_list("accuracy", ACCURACY)


@rc_context(STYLE)
def seesaw_chart(
    matrix: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    home: Mapping[str, str],
    headroom: Mapping[str, float],
) -> Chart:
    """Accuracies of models (rows) by domain (columns) as a heat map, and below it the headroom recovered.

    `matrix` holds accuracies in [0, 1], NaN where a model was not evaluated. `headroom` maps domains (and
    optionally `mean`) to (student - base) / (expert - base). `home` maps an expert's row to its own column,
    which is outlined. A column with each row's mean is added.
    """
    values = np.asarray(matrix, dtype=float)
    assert values.shape == (len(rows), len(columns)), values.shape
    height, lowest = 0.36 * len(rows) + 1.9, 2.4
    width = max(8.0, 0.6 * len(columns) + 4.2)
    chart = Chart(96 * width, 96 * (height + lowest), layout="constrained")
    upper, lower = chart.subplots(2, 1, height_ratios=[height, lowest])
    _draw_heat_map(upper, values, rows, columns, home)
    _draw_headroom(lower, columns, headroom)
    for axes, ends in ((upper, "left"), (lower, "right")):
        names = [*map(visible, columns), "mean"]
        axes.set_xticks(_centers(columns), names, rotation=38, ha=ends, rotation_mode="anchor", color=INK)
        axes.set_xlim(0, len(columns) + _GAP + 1)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return chart


def _draw_heat_map(
    axes: Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], home: Mapping[str, str]
) -> None:
    experts = [name in home for name in rows]
    apart = [_GAP * (i > 0 and experts[i] != experts[i - 1]) for i in range(len(rows))]
    tops = np.arange(len(rows)) + np.cumsum(apart)
    cells, colors, hints = [], [], []
    for name, top, is_expert, row in zip(rows, tops, experts, values):
        for center, where, value in zip(_centers(columns), [*columns, "mean"], [*row, _mean(row)]):
            is_known, is_own = math.isfinite(value), home.get(name) == where
            colors.append(_COLORS(value) if is_known else LINE)
            left, right, bottom = center - 0.48, center + 0.48, top + 0.95
            cells.append([(left, top + 0.05), (right, top + 0.05), (right, bottom), (left, bottom)])
            text = f"{100 * value:.0f}" if is_known else "–"
            hints.append(f"{name} on {where}: {text}%")
            # Not INK on a light cell: the page's dark theme would turn it light.
            color = MUTED if not is_known else "white" if _is_dark(colors[-1]) else ACCURACY[-1]
            weight = "normal" if is_expert and not is_own and where != "mean" else "bold"
            axes.text(
                center, top + 0.52, text, ha="center", va="center", fontsize=9.5, color=color, weight=weight
            )
            if is_own:
                outline = Rectangle((left, top + 0.05), 0.96, 0.9, fill=False, edgecolor=WARM, linewidth=2.2)
                axes.add_patch(outline)
    axes.figure.hint(axes.add_collection(PolyCollection(cells, facecolors=colors, linewidths=0)), hints)
    axes.set_ylim(tops[-1] + 1, 0)
    axes.set_yticks(tops + 0.5, [*map(visible, rows)], color=INK)
    for label, is_expert in zip(axes.get_yticklabels(), experts):
        label.set_fontweight("normal" if is_expert else "bold")
    axes.xaxis.tick_top()
    axes.set_title("Accuracy on held-out prompts (%)   ", pad=14)
    axes.set_xlabel("Outlined: each expert on its own domain", color=WARM, loc="left", fontsize=9)


def _draw_headroom(axes: Axes, columns: Sequence[str], headroom: Mapping[str, float]) -> None:
    # Each bar is below its column of the heat map, the mean below the mean.
    shares = np.array([headroom.get(name, math.nan) for name in columns], dtype=float)
    shares = np.append(shares, headroom.get("mean", _mean(shares)))
    # A domain where the expert hardly gained can give any ratio: the bar is clipped, its number is not.
    heights = np.clip(np.nan_to_num(shares), -0.3, 1.3)
    colors = [*(SHADES[3] if share < 0 else SHADES[1] for share in shares[:-1]), SHADES[0]]
    bars = axes.bar(_centers(columns), heights, width=0.74, color=colors)
    for bar, where, height, share in zip(bars, [*columns, "mean"], heights, shares):
        text = f"{100 * share:.0f}" if math.isfinite(share) else "–"
        axes.figure.hint(bar, [f"headroom recovered on {where}: {text}%"])
        inside = height > 0.2
        below = inside or height < 0
        x = bar.get_x() + bar.get_width() / 2
        y = min(height, 1.0) - 0.05 if below else height + 0.04  # never on the expert's line
        color, va = "white" if inside else INK, "top" if below else "bottom"
        axes.text(x, y, text, ha="center", va=va, color=color, weight="bold", fontsize=9.5)
    axes.axhline(1.0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.axhline(0.0, color=MUTED, linewidth=1)
    axes.set_title("Headroom recovered by the student (%): (student - base) / (expert - base)", pad=12)
    axes.set_ylim(min(0.0, heights.min() - 0.14), max(1.08, heights.max() + 0.03))
    axes.set_yticks([0.0, 0.5, 1.0], ["base  0", "50", "expert  100"], color=INK)


def _is_dark(color: Sequence[float]) -> bool:
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] < 0.55


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan


def _centers(columns: Sequence[str]) -> list[float]:
    """Positions of the columns: the domains side by side, and the mean slightly apart."""
    return [j + 0.5 for j in range(len(columns))] + [len(columns) + _GAP + 0.5]
