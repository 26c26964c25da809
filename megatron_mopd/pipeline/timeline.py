"""Draws what every pipeline stage did when: as a picture, and as a trace for Perfetto or chrome://tracing. No
torch.

A timeline is a list of `Event`s, planned (from `simulate(..., record=True)`) or measured (recorded by the
runtime), so that both can stand in one picture.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_mopd.backend.messages import visible
from megatron_mopd.pipeline.instructions import (
    LoadHead,
    LoadTeacher,
    OptimizerStep,
    StudentBackward,
    StudentForward,
    Synchronize,
    TeacherForward,
)
from megatron_mopd.pipeline.simulate import Event

# Student colours by (kind, odd chunk); teachers take turns through a palette that avoids both.
_STUDENT = {
    (StudentForward, 0): "#4878b0",
    (StudentForward, 1): "#7fa6d3",
    (StudentBackward, 0): "#3f8f5f",
    (StudentBackward, 1): "#80bf99",
}
_TEACHERS = (
    "#f2a541",
    "#d1495b",
    "#a06cb0",
    "#e3c23c",
    "#b5651d",
    "#e58bb1",
    "#8a8d91",
    "#c9743f",
    "#7d4f9b",
    "#d98880",
)
_OPTIMIZER, _LOAD = "#222222", "#bbbbbb"


def is_load(event: Event) -> bool:
    """True for copies, which run beside the computation and do not make a stage busy."""
    return isinstance(event.instruction, LoadTeacher | LoadHead)


def idle_shares(events: Sequence[Event], stages: int) -> list[float]:
    """Per stage, the share of the whole timeline in which it computed nothing (empty timeline: all zero)."""
    timed = [event for event in events if not is_load(event)]
    if not timed:
        return [0.0] * stages
    span = max(event.end for event in timed) - min(event.start for event in timed)
    busy = [0.0] * stages
    for event in timed:
        busy[event.stage] += event.end - event.start
    return [1 - time / span if span else 0.0 for time in busy]


def idle_share(events: Sequence[Event]) -> float:
    """The share of one stage's measured step in which it computed nothing, the optimizer step left out: how
    much of that is waiting for other stages, one stage alone cannot tell.
    """
    timed = [event for event in events if not is_load(event)]
    if not timed:
        return 0.0
    optimizer = sum(e.end - e.start for e in timed if isinstance(e.instruction, OptimizerStep))
    busy = sum(event.end - event.start for event in timed) - optimizer
    span = max(event.end for event in timed) - min(event.start for event in timed) - optimizer
    return 1 - busy / span if span > 0 else 0.0


def without_waiting(events: Sequence[Event]) -> list[Event]:
    """The measured events of one optimizer step on all stages, with the optimizer step beginning when the
    last stage has arrived at it.
    """
    arrival = max((e.start for e in events if isinstance(e.instruction, OptimizerStep)), default=0.0)
    return [
        event._replace(start=max(arrival, event.start))
        if isinstance(event.instruction, OptimizerStep)
        else event
        for event in events
    ]


def _short_name(event: Event) -> str:
    entry = event.instruction
    if isinstance(entry, TeacherForward):
        return f"T{entry.job.microbatch}" + "+" * min(entry.job.step, 3)
    if isinstance(entry, StudentForward):
        return f"F{entry.microbatch}"
    if isinstance(entry, StudentBackward):
        return f"B{entry.microbatch}"
    return "opt" if isinstance(entry, OptimizerStep) else ""


@rc_context({"text.parse_math": False})  # `$` in a name is a `$`
def draw_timeline(
    panels: Mapping[str, Sequence[Event]],
    path: str | os.PathLike,
    *,
    unit: str = "student forwards",
    width: float = 16.0,
) -> None:
    """Write a picture with one panel per timeline (title -> events), one row per stage, and each row's idle
    share.

    Panels share the time axis, so a planned and a measured timeline can be compared by eye. Raises ValueError
    when there is nothing to draw.
    """
    if not any(panels.values()):
        raise ValueError("there are no events to draw")
    stages = {
        title: 1 + max((event.stage for event in events), default=0) for title, events in panels.items()
    }
    heights = [max(1.6, 0.34 * count + 0.9) for count in stages.values()]
    figure = Figure(figsize=(width, sum(heights) + 0.5), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    teachers = sorted(
        {e.instruction.job.teacher for events in panels.values() for e in events if _is_teacher(e)}
    )
    colour = {teacher: _TEACHERS[i % len(_TEACHERS)] for i, teacher in enumerate(teachers)}
    origin = min(event.start for events in panels.values() for event in events)
    end = max(event.end for events in panels.values() for event in events) - origin
    for axis, (title, events) in zip(axes, panels.items()):
        _draw_panel(axis, title, events, stages[title], colour, origin)
        axis.set_xlim(0, end * 1.002 or 1)
    axes[-1].set_xlabel(f"time ({unit})")
    legend = [
        Patch(color=_STUDENT[StudentForward, 0], label="student forward"),
        Patch(color=_STUDENT[StudentBackward, 0], label="student backward"),
        *(Patch(color=colour[teacher], label=f"teacher {visible(teacher)}") for teacher in teachers[:10]),
        Patch(color=_OPTIMIZER, label="optimizer step"),
    ]
    figure.legend(
        handles=legend, loc="outside lower center", ncols=min(7, len(legend)), frameon=False, fontsize=8
    )
    figure.savefig(path, dpi=110)


def _is_teacher(event: Event) -> bool:
    return isinstance(event.instruction, TeacherForward)


def _draw_panel(
    axis, title: str, events: Sequence[Event], stages: int, colour: Mapping, origin: float
) -> None:
    boxes, fills = [], []
    label = len(events) <= 1200
    for event in events:
        entry, start, end = event.instruction, event.start - origin, event.end - origin
        top, bottom = event.stage - 0.42, event.stage + 0.42
        if is_load(event):
            top, fill = event.stage + 0.43, _LOAD
            bottom = event.stage + 0.5
        elif isinstance(entry, TeacherForward):
            fill = colour[entry.job.teacher]
        elif isinstance(entry, StudentForward | StudentBackward):
            fill = _STUDENT[type(entry), entry.chunk % 2]
        else:
            fill = _OPTIMIZER
            end = max(end, start + 1e-9)
        if isinstance(entry, Synchronize):
            continue
        boxes.append([(start, top), (end, top), (end, bottom), (start, bottom)])
        fills.append(fill)
        if label and not is_load(event) and end > start:
            axis.text(
                (start + end) / 2,
                event.stage,
                _short_name(event),
                ha="center",
                va="center",
                fontsize=5,
                clip_on=True,
            )
    axis.add_collection(PolyCollection(boxes, facecolors=fills, edgecolors="white", linewidths=0.3))
    shares = idle_shares(events, stages)
    axis.set_ylim(stages - 0.4, -0.6)
    axis.set_yticks(
        range(stages), [f"stage {s}  idle {share:.0%}" for s, share in enumerate(shares)], fontsize=7
    )
    mean = sum(shares) / len(shares)
    axis.set_title(f"{visible(title)} (mean idle share {mean:.1%})", fontsize=9, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


def write_chrome_trace(
    panels: Mapping[str, Sequence[Event]], path: str | os.PathLike, *, seconds_per_unit: float = 1.0
) -> None:
    """Write the timelines as Chrome trace JSON: one process per panel, one thread per stage and per copy
    engine.
    """
    entries: list[dict] = []
    for process, (title, events) in enumerate(panels.items()):
        entries.append({"name": "process_name", "ph": "M", "pid": process, "args": {"name": title}})
        threads = sorted({(event.stage, is_load(event)) for event in events})
        for stage, load in threads:
            name = f"stage {stage}" + (" loads" if load else "")
            thread = 2 * stage + load
            entries.append(
                {"name": "thread_name", "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
            )
            entries.append(
                {
                    "name": "thread_sort_index",
                    "ph": "M",
                    "pid": process,
                    "tid": thread,
                    "args": {"sort_index": thread},
                }
            )
        for event in events:
            entries.append(
                {
                    "name": str(event.instruction),
                    "cat": type(event.instruction).__name__,
                    "ph": "X",
                    "pid": process,
                    "tid": 2 * event.stage + is_load(event),
                    "ts": event.start * seconds_per_unit * 1e6,
                    "dur": (event.end - event.start) * seconds_per_unit * 1e6,
                }
            )
    Path(path).write_text(json.dumps({"traceEvents": entries, "displayTimeUnit": "ms"}))
