"""The report of a run: one self-contained HTML page, also available during the run.

`write_page(run_dir)` reads the run's files so far (`recorded_run.py`), draws them (`svg.py`) and fills in the
page (`page_template.py`). Missing parts are omitted, and the page says why.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

import megatron_mopd
from megatron_mopd.backend.messages import visible
from megatron_mopd.backend.whole_files import write_whole
from megatron_mopd.observe import svg
from megatron_mopd.observe.charts import Line
from megatron_mopd.observe.formats import format_count, format_number, format_seconds
from megatron_mopd.observe.journal import ALARMS_FILE
from megatron_mopd.observe.page_samples import samples_part
from megatron_mopd.observe.page_template import PAGE
from megatron_mopd.observe.palette import INK, MAIN, SHADES, THEME, hue
from megatron_mopd.observe.recorded_run import RunRecord, read_run
from megatron_mopd.observe.seesaw import seesaw_chart
from megatron_mopd.observe.traces import read_panels

PAGE_FILE = "report.html"
_PER_DOMAIN = (
    ("kl", "KL to the teacher", True),
    ("rollout_entropy", "entropy of the rollout", False),
    ("length", "response length", False),
    ("reward", "reward", False),
)
_ALARMS_SHOWN = 100
PagePart = dict[str, Any]


def write_page(
    run_dir: str | Path,
    output: str | Path | None = None,
    *,
    base: str | Path | None = None,
    experts: Mapping[str, str | Path] | None = None,
) -> Path:
    """Write `report.html` into the run directory (or to `output`) atomically, and return its path.

    Raises `ReportError` if there is nothing to report yet; see `read_run` for `base` and `experts`.
    """
    record = read_run(run_dir, base, experts)
    path = Path(output) if output is not None else record.directory / PAGE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, render(record))
    return path


def render(record: RunRecord) -> str:
    """Render the page as HTML."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.ChainableUndefined, finalize=_to_read)
    parts = [part for part in _parts(record) if part]
    for part in parts:
        part.setdefault("anchor", "".join(c if c.isalnum() else "-" for c in part["title"].lower()))
    return environment.from_string(PAGE).render(
        name=_name(record),
        status=_status(record),
        tiles=_tiles(record),
        parts=parts,
        theme=THEME,
        written=time.strftime("%Y-%m-%d %H:%M:%S"),
        version=megatron_mopd.__version__,
        directory=record.directory,
    )


def _to_read(value: Any) -> Any:
    """Escape control characters in texts; jinja2 escapes markup afterwards."""
    is_text = isinstance(value, (str, Path)) and not hasattr(value, "__html__")
    return visible(value, keep_lines=True) if is_text else value


def _parts(record: RunRecord) -> Iterator[PagePart | None]:
    yield _alarms(record)
    yield _seesaw(record)
    yield _training(record)
    yield _domains(record)
    yield _teachers(record)
    yield _times(record)
    yield _timeline(record)
    yield samples_part(record.samples)
    yield _configuration(record)
    yield _provenance(record)


def _name(record: RunRecord) -> str:
    path = record.directory.absolute()
    return f"{path.parent.name}/{path.name}"


def _status(record: RunRecord) -> str:
    total = record.total
    if total is not None and record.last >= total:
        return f"Finished: {record.last} of {total} iterations."
    done = f"Iteration {record.last}" + (f" of {total}" if total else "")
    ago = format_seconds(record.seconds_since_last_line)
    return f"{done}; the last line was written {ago} before this page."


def _tiles(record: RunRecord) -> list[dict[str, str]]:
    tiles = []

    def tile(label: str, value: str) -> None:
        tiles.append({"label": label, "value": value})

    domains = record.below("kl")
    if domains:
        first, last = (sum(p[k][1] for p in domains.values()) / len(domains) for k in (0, -1))
        tile(
            "KL per token, mean of domains, first to last", f"{format_number(first)} → {format_number(last)}"
        )
    accuracy = record.series("accuracy")
    if accuracy:
        tile("accuracy, mean of domains", f"{accuracy[-1][1]:.1%}")
    if record.seesaw is not None and "mean" in record.seesaw.headroom:
        tile("headroom recovered", f"{record.seesaw.headroom['mean']:.0%}")
    speed = record.series("tokens_per_second")
    if speed:
        recent = [value for _, value in speed[-20:]]
        tile("tokens per second (recent)", format_count(sum(recent) / len(recent)))
    utilization = record.series("mfu")
    if utilization:
        tile("model FLOPs utilization", f"{utilization[-1][1]:.1%}")
    seconds = _step_seconds(record)
    if seconds:
        tile("time per step", format_seconds(seconds))
        if record.total is not None and record.last < record.total:
            tile("time left (estimate)", format_seconds(seconds * (record.total - record.last)))
    tile("alarms", str(len(record.alarms)))
    return tiles


def _step_seconds(record: RunRecord) -> float:
    recent = record.metrics[-40:]
    sums = [
        sum(value for name, value in line.items() if name.startswith("time/") and _is_number(value))
        for line in recent
    ]
    return sum(sums) / len(sums)


def _alarms(record: RunRecord) -> PagePart | None:
    if not record.alarms:
        return None
    entries = [
        {
            "when": f"iteration {line['iteration']}" if line["iteration"] else "at the start",
            "message": str(line.get("message", "")),
        }
        for line in record.alarms
    ]
    left_out = len(entries) - 2 * _ALARMS_SHOWN
    if left_out > 0:
        entries = entries[:_ALARMS_SHOWN] + entries[-_ALARMS_SHOWN:]
    note = f"The first and the newest {_ALARMS_SHOWN}; {ALARMS_FILE} has {left_out} more in between."
    return {"title": "Alarms", "alarms": entries, "note": note if left_out > 0 else ""}


def _seesaw(record: RunRecord) -> PagePart | None:
    seesaw = record.seesaw
    if seesaw is None:
        return None
    chart = seesaw_chart(seesaw.values, seesaw.rows, seesaw.columns, seesaw.home, seesaw.headroom)
    return {
        "title": "Who is good at what",
        "note": "Each expert gains on its own domain and loses on others; the student should keep all gains.",
        "wide": [("", svg.inline(chart, "accuracy of every model on every domain (%)"))],
    }


def _training(record: RunRecord) -> PagePart | None:
    domains = record.below("kl") or record.below("accuracy")
    colors = {name: hue(i, len(domains)) for i, name in enumerate(domains)}
    charts = []

    def curves(title: str, prefix: str, log: bool = False, percent: bool = False) -> None:
        lines = [
            Line(name, points, colors.get(name, SHADES[5])) for name, points in record.below(prefix).items()
        ]
        mean = record.series(prefix)
        if mean:
            lines.append(Line("all", mean, INK, strong=True))
        if any(len(line.points) > 1 for line in lines):  # a single evaluation is in the table of the domains
            charts.append((title, svg.line_chart(lines, log=log, percent=percent, label=title)))

    def curve(title: str, name: str, log: bool = False) -> None:
        points = record.series(name)
        if points:
            line = Line(title, points, MAIN)
            charts.append((title, svg.line_chart([line], log=log, label=title)))

    curve("Loss", "loss", log=True)
    curves("KL to the teachers by domain (nats per token)", "kl", log=True)
    curves("Accuracy on held-out prompts", "accuracy", percent=True)
    for k in sorted({name.split("/")[0] for line in record.metrics for name in line if "pass_at_" in name}):
        curves(f"pass@{k.removeprefix('pass_at_')}", k, percent=True)
    curves("Entropy of the rollout by domain (nats per token)", "rollout_entropy")
    curves("Response length by domain (tokens)", "length")
    curves("Reward by domain", "reward")
    curve("Gradient norm", "grad_norm", log=True)
    curve("Learning rate", "lr")
    curve("Tokens per second", "tokens_per_second")
    if not charts:
        return None
    return {"title": "Training", "charts": charts, "legend": list(colors.items())}


def _domains(record: RunRecord) -> PagePart | None:
    series = {prefix: record.below(prefix) for prefix, *_ in _PER_DOMAIN}
    accuracies = record.below("accuracy")
    names = sorted(set().union(*series.values(), accuracies))
    if not names:
        return None
    columns = [(p, title, log) for p, title, log in _PER_DOMAIN if series[p]]
    routing = _section(record.config, "routing")
    head = ["domain", "teacher", *(title for _, title, _ in columns)] + (["accuracy"] if accuracies else [])
    rows = []
    for number, name in enumerate(names):
        color = hue(number, len(names))
        cells: list[dict[str, Any]] = [{"text": name}, {"text": _teacher(routing, name)}]
        for prefix, _, log in columns:
            points = series[prefix].get(name, [])
            text = format_number(points[-1][1]) if points else ""
            cells.append({"svg": f"{svg.spark(points, color, log=log)}<span class='muted'>{text}</span>"})
        if accuracies:
            points = accuracies.get(name)
            cells.append({"text": f"{points[-1][1]:.1%}" if points else "", "right": True})
        rows.append(cells)
    note = (
        "From the first iteration to the last; the number is the last value. KL has a logarithmic scale "
        "where it spans a factor of ten."
    )
    return {"title": "Domains", "note": note, "table": {"head": head, "rows": rows}}


def _teacher(routing: Mapping[str, Any], domain: str) -> str:
    entry = routing.get(domain, routing.get("default", ""))
    if isinstance(entry, dict):
        return ", ".join(
            f"{name} {weight:g}" if _is_number(weight) else f"{name}" for name, weight in entry.items()
        )
    return str(entry)


def _teachers(record: RunRecord) -> PagePart | None:
    names = sorted({n.split("/")[1] for line in record.metrics for n in line if n.startswith("teacher/")})
    if not names:
        return None
    head = [
        "teacher",
        "KL",
        "last",
        "tokens per step",
        "scoring, s per step",
        "loads",
        "load time, s",
        "hidden",
    ]
    rows = []
    for number, name in enumerate(names):
        values = {
            key: record.series(f"teacher/{name}/{key}")
            for key in ("kl", "tokens", "score_seconds", "loads", "load_seconds", "load_hidden")
        }
        means = {key: sum(v for _, v in points) / len(points) for key, points in values.items() if points}
        kl = values["kl"]
        cells: list[dict[str, Any]] = [
            {"text": name},
            {"svg": svg.spark(kl, hue(number, len(names)), log=True)},
            {"text": format_number(kl[-1][1]) if kl else "", "right": True},
        ]
        for key in ("tokens", "score_seconds", "loads", "load_seconds"):
            cells.append({"text": format_number(means[key]) if key in means else "", "right": True})
        hidden = means.get("load_hidden")
        cells.append({"text": "" if hidden is None else f"{hidden:.0%}", "right": True})
        rows.append(cells)
    return {
        "title": "Teachers",
        "note": "Hidden: the share of a teacher's loading time that overlapped with computation. Several "
        "names together are the weighted teachers of one sample.",
        "table": {"head": head, "rows": rows},
    }


def _times(record: RunRecord) -> PagePart | None:
    times = record.times()
    if not times:
        return None
    iterations = sorted({x for points in times.values() for x, _ in points})
    lines, shares = [], []
    whole = sum(y for points in times.values() for _, y in points) or 1.0
    for number, (name, points) in enumerate(times.items()):
        values = dict(points)
        color = SHADES[number % len(SHADES)]
        lines.append(Line(name, [(x, values.get(x, 0.0)) for x in iterations], color))
        shares.append((name, sum(values.values()) / whole, color))
    charts = [("Seconds per step", svg.stacked_areas(lines, label="seconds per step"))]
    idle = record.below("idle")
    if idle:
        curves = [Line(n, p, hue(i, len(idle))) for i, (n, p) in enumerate(idle.items())]
        title = "Idle share of each pipeline stage"
        charts.append((title, svg.line_chart(curves, percent=True, label=title)))
    legend = [
        (f"{name} {share:.0%}, {format_seconds(share * whole / len(iterations))} per step", color)
        for name, share, color in shares
    ]
    return {
        "title": "Time",
        "legend": legend,
        "wide": [("", svg.split_bar(shares))],
        "charts": charts,
    }


def _timeline(record: RunRecord) -> PagePart | None:
    panels, legend = read_panels(record.timeline)
    if not panels:
        return None
    end = max(box.end for panel in panels for box in panel.boxes)
    titles = [f"{p.title}: stages compute nothing {p.mean_idle:.1%} of the time" for p in panels]
    return {
        "title": "Pipeline",
        "note": "The last optimizer steps as planned and as measured, on the same time axis.",
        "legend": list(legend.items()),
        "wide": list(zip(titles, (svg.timeline(panel, end) for panel in panels))),
    }


def _configuration(record: RunRecord) -> PagePart | None:
    if record.config is None:
        return None
    text = yaml.safe_dump(record.config, sort_keys=False, allow_unicode=True)
    return {"title": "Configuration", "texts": [("The resolved configuration (config.yaml)", text)]}


def _provenance(record: RunRecord) -> PagePart:
    facts, rows = record.facts, []
    manifest = _section(facts, "manifest")
    for name, prints in _section(manifest, "teachers").items():
        prints = prints if isinstance(prints, dict) else {}
        cells = [{"text": str(name)}]
        cells += [{"mono": str(prints.get(key, ""))[:16]} for key in ("weights", "architecture", "tokenizer")]
        rows.append(cells)
    start = [
        f"{key.replace('_', ' ')}: {facts[key]}"
        for key in ("started", "resumed_from", "ranks", "device")
        if key in facts
    ]
    versions = [f"{name} {version}" for name, version in _section(facts, "versions").items()]
    lines = [", ".join(found) for found in (start, versions) if found]
    part: PagePart = {"title": "Provenance", "lines": lines + record.missing}
    if rows:
        part["table"] = {"head": ["teacher", "weights (SHA-256)", "architecture", "tokenizer"], "rows": rows}
    return part


def _section(values: Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    found = (values or {}).get(name)
    return found if isinstance(found, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
