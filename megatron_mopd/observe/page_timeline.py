"""The pipeline's timeline on the report's page, planned above measured, from a run's `timeline.json`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from megatron_mopd.observe import svg

_COLORS = {"StudentForward": "#4878b0", "StudentBackward": "#3f8f5f", "OptimizerStep": "#5b6570"}
_LOAD = "#bbbbbb"
_TEACHERS = (
    "#f2a541",
    "#d1495b",
    "#a06cb0",
    "#e3c23c",
    "#b5651d",
    "#e58bb1",
    "#c9743f",
    "#7d4f9b",
    "#d98880",
)
_TEACHER = re.compile(r"teacher forward (\S+) micro-batch")


def timeline_part(events: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """One picture a panel of the Chrome trace that the pipeline writes; `None` without events."""
    titles, spans = {}, []
    for event in events:
        if event.get("ph") == "M" and event.get("name") == "process_name":
            titles[event.get("pid")] = str(event.get("args", {}).get("name", ""))
        elif event.get("ph") == "X" and {"ts", "dur", "tid", "pid", "name"} <= event.keys():
            spans.append(event)
    if not spans:
        return None
    teachers = sorted({match[1] for event in spans if (match := _TEACHER.match(event["name"]))})
    colors = {name: _TEACHERS[i % len(_TEACHERS)] for i, name in enumerate(teachers)}
    whole = max(event["ts"] + event["dur"] for event in spans) / 1e6
    pictures = []
    for process in sorted({event["pid"] for event in spans}):
        mine = [event for event in spans if event["pid"] == process]
        picture, idle = _panel(mine, colors, whole)
        title = titles.get(process, f"panel {process}")
        pictures.append((f"{title}: stages compute nothing {idle:.1%} of the time", picture))
    legend = [
        ("student forward", _COLORS["StudentForward"]),
        ("student backward", _COLORS["StudentBackward"]),
    ]
    legend += [(f"teacher {name}", color) for name, color in colors.items()]
    legend += [("optimizer step", _COLORS["OptimizerStep"]), ("loading a teacher", _LOAD)]
    return {
        "title": "Pipeline",
        "note": "The last optimizer steps as planned and as measured; the same time axis for both.",
        "legend": legend,
        "wide": pictures,
    }


def _panel(events: list[dict[str, Any]], colors: dict[str, str], whole: float) -> tuple[str, float]:
    """Picture, and the mean share of the timeline in which a stage computed nothing."""
    stages = 1 + max(event["tid"] // 2 for event in events)
    boxes, busy, computed = [], [0.0] * stages, []
    for event in events:
        stage, is_load = divmod(event["tid"], 2)
        start, end = event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6
        match = _TEACHER.match(event["name"])
        color = _LOAD if is_load else colors[match[1]] if match else _COLORS.get(event.get("cat"))
        if color is None:
            continue
        if not is_load:
            busy[stage] += end - start
            computed += [start, end]
        boxes.append(
            svg.Box(stage, start, end, color, f"{event['name']}, {end - start:.4f} s", bool(is_load))
        )
    span = max(computed) - min(computed) if computed else 0.0
    idle = [1 - time / span if span else 0.0 for time in busy]
    rows = [f"stage {number}, idle {share:.0%}" for number, share in enumerate(idle)]
    return svg.timeline(boxes, rows, whole), sum(idle) / len(idle)
