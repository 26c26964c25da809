"""Read everything that a run directory records about its run, finished or not, from this version or an older
one."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_mopd.observe.journal import (
    ALARMS_FILE,
    FACTS_FILE,
    METRICS_FILE,
    SAMPLES_FILE,
    read_journal,
)
from megatron_mopd.observe.metrics import MOST_LINES

_PHASES = "rollout score train other evaluate save"


class ReportError(ValueError):
    """A report cannot be written; the message says what is missing and what to do, in one sentence."""


@dataclass
class SeeSaw:
    """Accuracies in [0, 1] of models (rows) by domain (columns), NaN where missing."""

    rows: list[str]
    columns: list[str]
    values: list[list[float]]
    home: dict[str, str]
    """Row of an expert -> its own domain."""
    headroom: dict[str, float]
    """Domain -> (student - base) / (expert - base), for domains whose expert is better than the base; and
    `mean`."""


@dataclass
class RunRecord:
    """The record of one run, read from its files."""

    directory: Path
    metrics: list[dict[str, Any]]
    config: dict[str, Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """`run.json`; empty in runs of older versions."""
    alarms: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    timeline: list[dict[str, Any]] = field(default_factory=list)
    """Events of `timeline.json`, a Chrome trace; empty until the run's end and with a single stage."""
    seesaw: SeeSaw | None = None
    seconds_since_last_line: float = 0.0
    missing: list[str] = field(default_factory=list)
    """What the run lacks and the possible reason, one sentence each."""

    @property
    def last(self) -> int:
        return self.metrics[-1]["iteration"]

    @property
    def total(self) -> int | None:
        """Iterations of the whole run, if the configuration exists."""
        schedule = (self.config or {}).get("schedule")
        return schedule.get("train_iters") if isinstance(schedule, dict) else None

    def series(self, name: str) -> list[tuple[float, float]]:
        """(iteration, value) of a metric where it is a finite number."""
        return [
            (line["iteration"], line[name])
            for line in self.metrics
            if isinstance(line.get(name), (int, float)) and math.isfinite(line[name])
        ]

    def below(self, prefix: str) -> dict[str, list[tuple[float, float]]]:
        """`series` of every metric `prefix/...`, keyed by the rest of the name, in order of first
        appearance."""
        names = {name for line in self.metrics for name in line if name.startswith(f"{prefix}/")}
        found = {name.removeprefix(f"{prefix}/"): self.series(name) for name in sorted(names)}
        return {name: points for name, points in found.items() if points}

    def times(self) -> dict[str, list[tuple[float, float]]]:
        """Seconds of every phase of a step, in the order of a step."""
        found = self.below("time")
        return {name: found[name] for name in sorted(found, key=lambda name: (_PHASES.find(name) % 99, name))}


def read_run(
    directory: str | Path, base: str | Path | None = None, experts: Mapping[str, str | Path] | None = None
) -> RunRecord:
    """Read a run directory, or the `mopd` run of a demo's directory.

    `base` and `experts` (domain -> run) are run directories with evaluations on the same prompts, for the
    see-saw chart; those of a demo are found automatically. Raises `ReportError`.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ReportError(f"{directory} is not a directory; name the run_dir of a run")
    if not (directory / METRICS_FILE).exists() and (directory / "mopd" / METRICS_FILE).exists():
        directory = directory / "mopd"
    try:
        metrics = read_journal(directory / METRICS_FILE, most=MOST_LINES)
    except OSError:
        others = sorted(str(path.parent) for path in directory.glob(f"*/{METRICS_FILE}"))[:3]
        hint = f"; did you mean {' or '.join(others)}?" if others else ""
        raise ReportError(
            f"{directory} has no {METRICS_FILE}: name the run_dir of a run that has done its first "
            f"iteration{hint}"
        ) from None
    if not metrics:
        raise ReportError(
            f"{directory / METRICS_FILE} has no complete line yet: try again after the run's first iteration"
        )
    missing: list[str] = []
    config = _yaml(directory / "config.yaml", missing)
    record = RunRecord(
        directory=directory,
        metrics=metrics,
        config=config,
        facts=_json(directory / FACTS_FILE),
        alarms=_journal(directory / ALARMS_FILE),
        samples=_journal(directory / SAMPLES_FILE),
        timeline=_trace(directory / "timeline.json"),
        seesaw=_seesaw(directory, metrics, base, experts or {}),
        seconds_since_last_line=max(0.0, time.time() - (directory / METRICS_FILE).stat().st_mtime),
        missing=missing,
    )
    _note_missing(record)
    return record


def _note_missing(record: RunRecord) -> None:
    say = record.missing.append
    if record.last - record.metrics[0]["iteration"] >= MOST_LINES:
        say("The run is long: curves and means use every n-th step; all evaluations are shown.")
    if not record.facts:
        say(
            f"No {FACTS_FILE}: the run is from an older version; versions and teachers' manifest are unknown."
        )
    if not record.samples:
        say(
            f"No {SAMPLES_FILE}: the run has no teachers, log.sample_interval is 0, or it is from an older "
            "version."
        )
    if not record.timeline:
        say("No timeline.json: it is written at the end of a run with several pipeline stages.")
    if record.seesaw is None:
        say(
            "No see-saw: it needs evaluations of this run, of the base and of the experts (--base RUN, "
            "--expert DOMAIN=RUN)."
        )


def _seesaw(
    directory: Path,
    metrics: list[dict[str, Any]],
    base: str | Path | None,
    experts: Mapping[str, str | Path],
) -> SeeSaw | None:
    parent, others = directory.parent, {}
    if base is None and (parent / "base" / METRICS_FILE).exists():
        base = parent / "base"
        if (parent / "average" / METRICS_FILE).exists():
            others["weight average"] = _accuracies(parent / "average")
    if not experts:
        experts = {path.parent.name: path.parent for path in sorted(parent.glob(f"experts/*/{METRICS_FILE}"))}
    student = _accuracies_in(metrics)
    if base is None or not student:
        return None
    columns = sorted(student)
    rows = {"base": _accuracies(base)}
    if not rows["base"].keys() & student.keys():
        return None
    home = {}
    for domain, path in experts.items():
        if accuracies := _accuracies(path):
            rows[f"{domain} expert"], home[f"{domain} expert"] = accuracies, domain
    columns.sort(key=lambda name: (name not in home.values(), name))
    rows |= {name: accuracies for name, accuracies in others.items() if accuracies}
    rows[f"{directory.name} (student)"] = student
    headroom = {}
    for row, domain in home.items():
        low, high, now = (r.get(domain, math.nan) for r in (rows["base"], rows[row], student))
        if high > low:
            headroom[domain] = (now - low) / (high - low)
    if headroom:
        headroom["mean"] = sum(headroom.values()) / len(headroom)
    values = [[accuracies.get(domain, math.nan) for domain in columns] for accuracies in rows.values()]
    return SeeSaw(list(rows), columns, values, home, headroom)


def _accuracies(directory: str | Path) -> dict[str, float]:
    path = Path(directory) / METRICS_FILE
    try:
        return _accuracies_in(read_journal(path, most=MOST_LINES))
    except OSError:
        raise ReportError(f"{directory} has no {METRICS_FILE} to read accuracies from") from None


def _accuracies_in(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracies of the last evaluation, by domain."""
    for line in reversed(metrics):
        found = {
            name.removeprefix("accuracy/"): value
            for name, value in line.items()
            if name.startswith("accuracy/") and isinstance(value, (int, float))
        }
        if found:
            return found
    return {}


def _yaml(path: Path, missing: list[str]) -> dict[str, Any] | None:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        missing.append(f"{path.name} cannot be read ({type(error).__name__}): the configuration is unknown.")
        return None
    return loaded if isinstance(loaded, dict) else None


def _json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _journal(path: Path) -> list[dict[str, Any]]:
    try:
        return read_journal(path)
    except OSError:
        return []


def _trace(path: Path) -> list[dict[str, Any]]:
    events = _json(path).get("traceEvents", [])
    return events if isinstance(events, list) else []
