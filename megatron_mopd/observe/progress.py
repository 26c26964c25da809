"""Progress on the terminal: a bar for anything that takes more than a moment, and one line per training step.

Only rank 0 prints. If output goes to a file or a pipe there are no bars and no colours: at most one plain
line per phase, and the step lines.
"""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from megatron_mopd.backend.messages import visible
from megatron_mopd.observe.formats import format_count, format_seconds
from megatron_mopd.observe.metrics import flatten, is_main_rank

Item = TypeVar("Item")

_BAR_AFTER_SECONDS = 0.7
_LINE_AFTER_SECONDS = 3.0
_DOMAINS_SHOWN = 3
_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 8
_MOST_MEANS = 512


def progress(iterable: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Iterate with a progress bar on standard error; `total` defaults to `len(iterable)`.

    The bar appears after a moment, so that short phases do not flicker, and disappears at the end. Without a
    terminal, a phase of more than a few seconds prints one line with its duration. Ranks other than 0 print
    nothing. Within a `phase`, the phase's bar counts instead: a terminal has room for one.
    """
    if not is_main_rank():
        yield from iterable
        return
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    start, count = time.monotonic(), 0
    bar = _bar() if is_terminal() and not _phases else None
    task = None
    try:
        for item in iterable:
            yield item
            count += 1
            if bar is not None and task is None and time.monotonic() - start > _BAR_AFTER_SECONDS:
                task = bar.add_task(visible(description), total=total)
                bar.start()
            if task is not None:
                bar.update(task, completed=count)
            elif total is not None:
                advance(count, total)
    finally:
        if task is not None:
            bar.stop()
    seconds = time.monotonic() - start
    if seconds > _LINE_AFTER_SECONDS:
        line = f"{visible(description)}: {count} in {format_seconds(seconds)}"
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def phase(description: str, often: bool = False) -> Iterator[None]:
    """Show that an operation is running, like `progress`; it counts only when the operation calls `advance`.

    often: the operation runs every few steps, so without a terminal it prints no line.
    """
    if not is_main_rank():
        yield
        return
    start = time.monotonic()
    shown = _Phase(description) if is_terminal() else None
    if shown is not None:
        _phases.append(shown)
    try:
        yield
    finally:
        if shown is not None:
            _phases.remove(shown)
            shown.end()
    seconds = time.monotonic() - start
    if seconds > _LINE_AFTER_SECONDS and not often:
        print(f"{visible(description)}: {format_seconds(seconds)}", file=sys.stderr, flush=True)


def advance(done: int, total: int) -> None:
    """Update the innermost `phase`; a no-op if none is shown, so it may be called often."""
    if _phases:
        _phases[-1].advance(done, total)


class _Phase:
    """The bar of a phase, shown after a short delay until `end`."""

    def __init__(self, description: str):
        self._description = description
        self._done, self._total = 0, None
        self._bar: Progress | None = None
        self._lock, self._ended = threading.Lock(), False
        self._timer = threading.Timer(_BAR_AFTER_SECONDS, self._show)
        self._timer.daemon = True
        self._timer.start()

    def _show(self) -> None:
        with self._lock:
            if not self._ended:
                self._bar = _bar(counted=self._total is not None)
                self._bar.add_task(visible(self._description), completed=self._done, total=self._total)
                self._bar.start()

    def advance(self, done: int, total: int) -> None:
        with self._lock:
            self._done, self._total = done, total
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], completed=done, total=total)

    def end(self) -> None:
        self._timer.cancel()
        with self._lock:
            self._ended = True
            if self._bar is not None:
                self._bar.stop()


_phases: list[_Phase] = []
"""The active phases, the innermost last; empty without a terminal."""


def say(text: str) -> None:
    """Print one line on rank 0's standard output, with terminal control characters escaped."""
    if is_main_rank():
        print(visible(text), flush=True)


class StepLine:
    """Prints one line per training step: learning metrics, speed, and the time left."""

    def __init__(self, total: int, first_iteration: int = 0):
        """total: iterations of the whole run. first_iteration: how many of them were done before it was
        resumed."""
        self._total = total
        self._first = first_iteration
        self._start = time.monotonic()
        self._console = Console(highlight=False, soft_wrap=True)
        self._kl: dict[str, _Course] = {}

    def record(self, metrics: Mapping[str, Any]) -> None:
        """Record a step's KL of every domain for the curves; called for every step, also those not shown."""
        for name, value in flatten(metrics).items():
            if name.startswith("kl/") and _is_finite(value):
                self._kl.setdefault(name.removeprefix("kl/"), _Course()).append(value)

    def show(self, iteration: int, metrics: Mapping[str, Any]) -> None:
        """Print the line of `iteration`, the number of steps done so far; metrics are named as in
        `metrics.py`.
        """
        if is_main_rank():
            self._console.print(self.render(iteration, metrics))

    def render(self, iteration: int, metrics: Mapping[str, Any]) -> Text:
        """The line as text; parts whose metric is missing are omitted."""
        flat = flatten(metrics)
        line = Text()
        line.append(f"step {iteration:>{len(str(self._total))}}/{self._total}", style="bold")
        for part, style in self._parts(iteration, flat):
            line.append("  ")
            line.append(visible(part), style=style)
        return line

    def _parts(self, iteration: int, flat: dict[str, Any]) -> Iterator[tuple[str, str]]:
        for name in ("kl", "loss"):  # with a KL objective the loss is the same number
            if flat.get(name) is not None:
                yield f"{name} {flat[name]:.4g}", "cyan"
                break
        domains = {k.removeprefix("kl/"): v for k, v in flat.items() if k.startswith("kl/") and v is not None}
        if domains:
            yield f"({self._largest(domains)})", "dim"
        rewards = [flat["reward"]] if _is_finite(flat.get("reward")) else []
        rewards = rewards or [v for k, v in flat.items() if k.startswith("reward/") and _is_finite(v)]
        if rewards:
            yield f"reward {sum(rewards) / len(rewards):.3f}", "green"
        if flat.get("accuracy") is not None:
            yield f"accuracy {flat['accuracy']:.1%}", "green"
        if flat.get("grad_norm") is not None:
            yield f"grad {flat['grad_norm']:.3g}", ""
        if flat.get("response_length") is not None:
            yield f"len {flat['response_length']:.1f}", ""
        if flat.get("tokens_per_second") is not None:
            yield f"{format_count(flat['tokens_per_second'])} tok/s", ""
        times = {
            k.removeprefix("time/"): v for k, v in flat.items() if k.startswith("time/") and v is not None
        }
        if flat.get("tflops") is not None:
            share = f" ({flat['mfu']:.0%})" if flat.get("mfu") is not None else ""
            yield f"{flat['tflops']:.3g} TFLOP/s{share}", ""
        idle = [v for k, v in flat.items() if k.startswith("idle/") and _is_finite(v)]
        if idle:
            yield f"idle {sum(idle) / len(idle):.0%}", ""
        whole = sum(times.values())
        if whole > 0:
            split = " ".join(f"{name} {seconds / whole:.0%}" for name, seconds in times.items())
            yield f"{format_seconds(whole)}: {split}", "dim"
        done = iteration - self._first
        if done > 0 and iteration < self._total:
            each = (time.monotonic() - self._start) / done
            yield f"ETA {format_seconds(each * (self._total - iteration))}", "magenta"

    def _largest(self, domains: dict[str, float]) -> str:
        """The domains furthest from their teachers with their curves, and the number of others."""
        worst = sorted(domains.items(), key=lambda item: -item[1])[:_DOMAINS_SHOWN]
        curves = {name: sparkline(self._kl[name].means) if name in self._kl else "" for name, _ in worst}
        text = " ".join(f"{name} {value:.3g}{curves[name]}" for name, value in worst)
        return text if len(domains) <= _DOMAINS_SHOWN else f"{text} +{len(domains) - _DOMAINS_SHOWN} lower"


class _Course:
    """A series of any length, stored as at most 512 means over equally many neighbours."""

    def __init__(self):
        self.means: list[float] = []
        self._each, self._sum, self._count = 1, 0.0, 0

    def append(self, value: float) -> None:
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self._each:
            return
        self.means.append(self._sum / self._each)
        self._sum, self._count = 0.0, 0
        if len(self.means) == _MOST_MEANS:
            self.means = [(a + b) / 2 for a, b in zip(self.means[::2], self.means[1::2])]
            self._each *= 2


def sparkline(values: Sequence[float]) -> str:
    """A sparkline of positive values in up to eight blocks, on a logarithmic scale; empty for fewer than two
    values, or if the output cannot show blocks.
    """
    values = [value for value in values if value > 0]
    if len(values) < 2 or not (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf"):
        return ""
    count = min(_SPARK_WIDTH, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    heights = [math.log(sum(values[a:b]) / (b - a)) for a, b in zip(edges, edges[1:])]
    low, span = min(heights), max(heights) - min(heights)
    return "".join(_BLOCKS[round(7 * (h - low) / span) if span > 1e-9 else 0] for h in heights)


def is_terminal() -> bool:
    """Whether both standard streams are terminals."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _bar(counted: bool = True) -> Progress:
    columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False)]
    if counted:
        columns += [BarColumn(bar_width=32), MofNCompleteColumn(), TimeElapsedColumn()]
        columns += [TextColumn("left"), TimeRemainingColumn()]
    else:
        columns += [TimeElapsedColumn()]
    return Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
    )
