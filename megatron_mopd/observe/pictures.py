"""Pictures of a run: `report.png` from its metrics, and the see-saw chart of experts and the merged
student."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes

from megatron_mopd.backend.messages import visible
from megatron_mopd.observe.charts import STYLE, Chart, Line, Points, draw_areas, draw_lines
from megatron_mopd.observe.metrics import MOST_LINES, read_metrics
from megatron_mopd.observe.palette import GOOD, INK, MAIN, MUTED, SHADES, hue
from megatron_mopd.observe.recorded_run import RunRecord
from megatron_mopd.observe.seesaw import seesaw_chart


def draw_report(run_dir: str | Path) -> Path | None:
    """Draw `report.png` in `run_dir` from its `metrics.jsonl` and return its path.

    It shows what the metrics contain: loss or KL, KL and accuracy of each domain, response length, gradient
    norm and the time breakdown of a step. Returns `None` if there is nothing to draw.
    """
    panels = _panels(RunRecord(Path(run_dir), read_metrics(run_dir, most=MOST_LINES)))
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with rc_context(STYLE):
        chart = Chart(96 * 5.6 * columns, 96 * (3.7 * rows + 0.5), layout="constrained")
        name = visible(Path(run_dir).resolve().name)
        chart.suptitle(name, x=0.01, ha="left", fontsize=14, fontweight="bold")
        grid = chart.subplots(rows, columns, squeeze=False).flat
        for axes, (title, draw) in zip(grid, panels.items()):
            draw(axes)
            axes.set_title(title)
            axes.set_xlabel("iteration", color=MUTED)
        for axes in grid:  # the remaining cells have no panel
            axes.set_visible(False)
        path = Path(run_dir) / "report.png"
        chart.savefig(path)
    return path


def draw_seesaw(
    matrix: Sequence[Sequence[float]],
    row_names: Sequence[str],
    column_names: Sequence[str],
    path: str | Path,
    headroom: Mapping[str, float],
    home: Mapping[str, str] | None = None,
) -> Path:
    """Write `seesaw_chart` into a file and return its path. By default, an expert's home is the column with
    the row's name.
    """
    if home is None:
        home = {name: name for name in row_names if name in column_names}
    with rc_context(STYLE):
        seesaw_chart(matrix, row_names, column_names, home, headroom).savefig(path)
    return Path(path)


def _panels(record: RunRecord) -> dict[str, Callable[[Axes], None]]:
    """Title -> function that draws the panel."""
    kl, accuracy, times = record.below("kl"), record.below("accuracy"), record.times()
    names = sorted({*kl, *accuracy})
    colors = {name: hue(i, len(names)) for i, name in enumerate(names)}
    panels: dict[str, Callable[[Axes], None]] = {}

    def curve(title: str, name: str, color: str, log: bool = True) -> None:
        if points := record.series(name):
            panels[title] = partial(_draw_line, points=points, color=color, log=log)

    def curves(title: str, found: dict[str, Points], first: Sequence[Line] = (), **options: bool) -> None:
        if found:
            lines = [Line(name, _smoothed(points), colors[name]) for name, points in found.items()]
            panels[title] = partial(_draw_domains, lines=[*first, *lines], **options)

    curve("Reverse KL to the teachers (nats per token)", "kl", MAIN)
    if not panels:
        curve("Loss", "loss", MAIN)
    curves("KL by domain (nats per token)", kl, log=True)
    mean = record.series("accuracy")
    first = [Line("mean", mean, INK, strong=True)] if mean else []
    curves("Accuracy on held-out prompts", accuracy, first, percent=True)
    curve("Response length (tokens)", "response_length", GOOD, log=False)
    curve("Gradient norm", "grad_norm", GOOD)
    if times:
        panels["Time per step (seconds)"] = partial(_draw_times, times=times)
    return panels


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over about a twentieth of the run, with shorter windows at the ends."""
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _smoothed(points: Points) -> Points:
    iterations, values = np.array(points, dtype=float).T
    return list(zip(iterations, _smooth(values)))


def _draw_line(axes: Axes, points: Points, color: str, log: bool = False) -> None:
    smooth = _smoothed(points)
    draw_lines(axes, [Line("", points, color, alpha=0.3), Line("", smooth, color, strong=True)], log=log)
    x, y = smooth[-1]
    axes.text(x, y, f"  {y:.3g}", color=color, va="center", fontweight="bold", fontsize=9)


def _draw_domains(axes: Axes, lines: Sequence[Line], log: bool = False, percent: bool = False) -> None:
    draw_lines(axes, lines, log=log, percent=percent)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.2, labelspacing=0.35)


def _draw_times(axes: Axes, times: dict[str, Points]) -> None:
    iterations = sorted({iteration for points in times.values() for iteration, _ in points})
    lines = []
    for i, (name, points) in enumerate(times.items()):
        values = dict(points)
        mean = sum(values.values()) / len(values)
        row = [(iteration, values.get(iteration, 0.0)) for iteration in iterations]
        lines.append(Line(f"{name} ({mean:.2f} s)", _smoothed(row), SHADES[i % len(SHADES)]))
    draw_areas(axes, lines)
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.0)
