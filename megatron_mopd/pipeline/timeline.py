"""Draws pipeline timelines as a picture, and writes them as a trace for Perfetto or chrome://tracing. No
torch.

A timeline is a list of `Event`s, planned (from `simulate(..., record=True)`) or measured (recorded by the
runtime); one picture can show both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.patches import Patch

from megatron_mopd.backend.messages import visible
from megatron_mopd.observe import traces
from megatron_mopd.observe.charts import STYLE, Chart
from megatron_mopd.pipeline.instructions import LoadHead, LoadTeacher, OptimizerStep
from megatron_mopd.pipeline.simulate import Event


def is_load(event: Event) -> bool:
    """True for copies, which overlap computation and do not make a stage busy."""
    return isinstance(event.instruction, LoadTeacher | LoadHead)


def idle_shares(events: Sequence[Event], stages: int) -> list[float]:
    """Per stage, the idle share of the whole timeline (empty timeline: all zero)."""
    return traces.idle_shares(((e.stage, e.start, e.end) for e in events if not is_load(e)), stages)


def idle_share(events: Sequence[Event]) -> float:
    """The idle share of one stage's measured step. The optimizer step is excluded, because a single stage
    cannot tell how much of it is waiting for other stages.
    """
    timed = [event for event in events if not is_load(event)]
    if not timed:
        return 0.0
    optimizer = sum(e.end - e.start for e in timed if isinstance(e.instruction, OptimizerStep))
    busy = sum(event.end - event.start for event in timed) - optimizer
    span = max(event.end for event in timed) - min(event.start for event in timed) - optimizer
    return 1 - busy / span if span > 0 else 0.0


def without_waiting(events: Sequence[Event]) -> list[Event]:
    """The measured events of one optimizer step on all stages; the optimizer step starts when the last stage
    has arrived at it.
    """
    arrival = max((e.start for e in events if isinstance(e.instruction, OptimizerStep)), default=0.0)
    return [
        event._replace(start=max(arrival, event.start))
        if isinstance(event.instruction, OptimizerStep)
        else event
        for event in events
    ]


@rc_context(STYLE)
def draw_timeline(
    panels: Mapping[str, Sequence[Event]], path: str | os.PathLike, *, unit: str = "student forwards"
) -> None:
    """Write a picture with one panel per timeline (title -> events), one row per stage, and each row's idle
    share.

    Panels share the time axis, so a planned and a measured timeline can be compared by eye. Raises ValueError
    if there are no events.
    """
    drawn, legend = traces.read_panels(chrome_events(panels))
    if not drawn:
        raise ValueError("there are no events to draw")
    heights = [max(1.6, 0.34 * len(panel.idle) + 0.9) for panel in drawn]
    figure = Chart(96 * 16, 96 * (sum(heights) + 0.5), layout="constrained")
    rows = figure.subplots(len(drawn), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    end = max(box.end for panel in drawn for box in panel.boxes)
    for axes, panel in zip(rows, drawn):
        traces.draw_panel(axes, panel, end, labels=True)
        axes.set_title(f"{visible(panel.title)} (mean idle share {panel.mean_idle:.1%})", fontsize=9)
        axes.tick_params(labelsize=7)
    rows[-1].set_xlabel(f"time ({unit})")
    handles = [Patch(color=color, label=visible(meaning)) for meaning, color in legend.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(7, len(handles)))
    figure.savefig(path, dpi=110)


def write_chrome_trace(
    panels: Mapping[str, Sequence[Event]], path: str | os.PathLike, *, seconds_per_unit: float = 1.0
) -> None:
    """Write the timelines as Chrome trace JSON; see `chrome_events`."""
    trace = {"traceEvents": chrome_events(panels, seconds_per_unit), "displayTimeUnit": "ms"}
    Path(path).write_text(json.dumps(trace))


def chrome_events(
    panels: Mapping[str, Sequence[Event]], seconds_per_unit: float = 1.0
) -> list[dict[str, Any]]:
    """The timelines as Chrome trace events, in microseconds: one process per panel, one thread per stage and
    per copy engine.
    """
    entries: list[dict[str, Any]] = []
    for process, (title, events) in enumerate(panels.items()):
        entries.append({"name": "process_name", "ph": "M", "pid": process, "args": {"name": title}})
        for stage, load in sorted({(event.stage, is_load(event)) for event in events}):
            thread = {"ph": "M", "pid": process, "tid": 2 * stage + load}
            name = f"stage {stage}" + (" loads" if load else "")
            entries.append(thread | {"name": "thread_name", "args": {"name": name}})
            entries.append(thread | {"name": "thread_sort_index", "args": {"sort_index": thread["tid"]}})
        for event in events:
            name, kind = str(event.instruction), type(event.instruction).__name__
            entry = {"name": name, "cat": kind, "ph": "X", "pid": process}
            entry |= {"tid": 2 * event.stage + is_load(event), "ts": event.start * seconds_per_unit * 1e6}
            entries.append(entry | {"dur": (event.end - event.start) * seconds_per_unit * 1e6})
    return entries
