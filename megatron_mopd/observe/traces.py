"""Charts of the Chrome traces that `pipeline/timeline.py` writes: a panel for each process of the trace (one
planned, one measured), a row for each stage.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection

from megatron_mopd.observe.palette import LINE, LOAD, OPTIMIZER, STUDENT, TEACHERS

_WORK = re.compile(
    r"(student forward|student backward|teacher forward (?P<teacher>.+)) micro-batch (?P<microbatch>\d+)"
    r"( chunk (?P<chunk>\d{1,9}))?( of step \+(?P<ahead>\d{1,9}))?",
    re.DOTALL,
)
_MOST_LABELS = 1200


class Box(NamedTuple):
    """One event of a stage, in seconds from the first event."""

    stage: int
    start: float
    end: float
    color: str
    name: str
    label: str
    is_load: bool
    """A copy, concurrent with the computation."""


class Panel(NamedTuple):
    """One timeline, and the share of it in which each stage computed nothing."""

    title: str
    boxes: list[Box]
    idle: list[float]

    @property
    def mean_idle(self) -> float:
        return sum(self.idle) / len(self.idle)


def idle_shares(busy: Iterable[tuple[int, float, float]], stages: int) -> list[float]:
    """Per stage, the share of the whole timeline in which it was not busy, from (stage, start, end). Zero
    everywhere in an empty timeline.
    """
    busy = list(busy)
    span = max((end for _, _, end in busy), default=0.0) - min((start for _, start, _ in busy), default=0.0)
    times = [0.0] * stages
    for stage, start, end in busy:
        times[stage] += end - start
    return [1 - time / span if span else 0.0 for time in times]


def read_panels(events: Sequence[dict[str, Any]]) -> tuple[list[Panel], dict[str, str]]:
    """The panels of a trace that have events, and its legend: meaning -> colour."""
    titles, spans = {}, []
    for event in events:
        if event.get("ph") == "M" and event.get("name") == "process_name":
            titles[event.get("pid")] = str(event.get("args", {}).get("name", ""))
        elif event.get("ph") == "X" and {"ts", "dur", "tid", "pid", "name"} <= event.keys():
            spans.append(event)
    origin = min((event["ts"] for event in spans), default=0.0)
    works = [_WORK.fullmatch(event["name"]) for event in spans]
    teachers = sorted({work["teacher"] for work in works if work and work["teacher"]})
    colors = {name: TEACHERS[i % len(TEACHERS)] for i, name in enumerate(teachers)}
    boxes: dict[Any, list[Box]] = {}
    for event, work in zip(spans, works):
        box = _box(event, work, colors, origin)
        boxes.setdefault(event["pid"], []).append(box)
    panels = []
    for process in sorted(boxes):
        mine = boxes[process]
        busy = [(box.stage, box.start, box.end) for box in mine if not box.is_load]
        idle = idle_shares(busy, 1 + max(box.stage for box in mine))
        panels.append(Panel(titles.get(process, f"panel {process}"), mine, idle))
    legend = {
        "student forward": STUDENT["StudentForward"][0],
        "student backward": STUDENT["StudentBackward"][0],
    }
    legend |= {f"teacher {name}": color for name, color in colors.items()}
    return panels, legend | {"optimizer step": OPTIMIZER, "loading a teacher": LOAD}


def _box(event: dict[str, Any], work: re.Match | None, teachers: dict[str, str], origin: float) -> Box:
    stage, is_load = divmod(event["tid"], 2)
    start, seconds = (event["ts"] - origin) / 1e6, event["dur"] / 1e6
    kind, parts = event.get("cat"), work.groupdict(default="") if work else {}
    if is_load:
        color = LOAD
    elif parts.get("teacher"):
        color = teachers[parts["teacher"]]
    elif kind in STUDENT:
        color = STUDENT[kind][int(parts.get("chunk") or 0) % 2]
    else:
        color = OPTIMIZER if kind == "OptimizerStep" else "none"  # synchronization is not drawn
    letter = {"TeacherForward": "T", "StudentForward": "F", "StudentBackward": "B"}.get(kind, "")
    label = f"{letter}{parts.get('microbatch', '')}" + "+" * min(int(parts.get("ahead") or 0), 3)
    if kind == "OptimizerStep":
        label = "opt"
    name = f"{event['name']}, {seconds:.4f} s"
    return Box(stage, start, start + seconds, color, name, label, bool(is_load))


def draw_panel(axes: Axes, panel: Panel, end: float, *, labels: bool = False) -> None:
    """Draw one timeline on an axis of `end` seconds, with copies as thin lines below the work; with `labels`,
    boxes are labelled unless there are too many.
    """
    boxes = [box for box in panel.boxes if box.color != "none"]
    corners = []
    for box in boxes:
        top, bottom = (0.43, 0.5) if box.is_load else (-0.42, 0.42)
        right = max(box.end, box.start + end / 3000)  # even the shortest must be visible
        top, bottom = box.stage + top, box.stage + bottom
        corners.append([(box.start, top), (right, top), (right, bottom), (box.start, bottom)])
        if labels and len(boxes) <= _MOST_LABELS and not box.is_load and box.end > box.start:
            middle = (box.start + box.end) / 2
            axes.text(middle, box.stage, box.label, ha="center", va="center", fontsize=5, clip_on=True)
    if boxes:
        colors = [box.color for box in boxes]
        marks = PolyCollection(corners, facecolors=colors, edgecolors=LINE, linewidths=0.3)
        axes.figure.hint(axes.add_collection(marks), [box.name for box in boxes])
    stages = [f"stage {number}  idle {share:.0%}" for number, share in enumerate(panel.idle)]
    axes.set_yticks(range(len(stages)), stages)
    axes.set_ylim(len(stages) - 0.4, -0.6)
    axes.set_xlim(0, end * 1.002 or 1)
