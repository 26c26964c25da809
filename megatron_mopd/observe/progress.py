"""Progress on the terminal: a bar for anything that takes a few seconds, and one line per training step.

Only rank 0 speaks. Where output goes to a file or a pipe there are no bars and no colours: at most one plain
line for a phase, and the step lines.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
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

from megatron_mopd.observe.formats import format_count, format_seconds
from megatron_mopd.observe.metrics import flatten, is_main_rank

Item = TypeVar("Item")

_BAR_AFTER_SECONDS = 0.7
_LINE_AFTER_SECONDS = 3.0
_DOMAINS_SHOWN = 3


def progress(iterable: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Iterate with a progress bar on standard error; `total` is taken from `len` when it is not given.

    The bar appears after a moment, so that short phases do not flicker, and is gone at the end. Without a
    terminal a phase of more than a few seconds leaves one line with its duration. Other ranks than 0 print
    nothing.
    """
    if not is_main_rank():
        yield from iterable
        return
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    start, count = time.monotonic(), 0
    bar = _bar() if is_terminal() else None
    task = None
    try:
        for item in iterable:
            yield item
            count += 1
            if bar is not None and task is None and time.monotonic() - start > _BAR_AFTER_SECONDS:
                task = bar.add_task(description, total=total)
                bar.start()
            if task is not None:
                bar.update(task, completed=count)
    finally:
        if task is not None:
            bar.stop()
    seconds = time.monotonic() - start
    if seconds > _LINE_AFTER_SECONDS:
        print(f"{description}: {count} in {format_seconds(seconds)}", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """One line from the job, on rank 0's standard output."""
    if is_main_rank():
        print(text, flush=True)


class StepLine:
    """Prints one line per training step: what is learned, how fast, and when it will be over."""

    def __init__(self, total: int, first_iteration: int = 0):
        """`total` iterations in the whole run, of which `first_iteration` were done before it was resumed."""
        self._total = total
        self._first = first_iteration
        self._start = time.monotonic()
        self._console = Console(highlight=False, soft_wrap=True)

    def show(self, iteration: int, metrics: Mapping[str, Any]) -> None:
        """Print the line of `iteration`, the number of steps done so far, from metrics named as in
        `metrics.py`.
        """
        if is_main_rank():
            self._console.print(self.render(iteration, metrics))

    def render(self, iteration: int, metrics: Mapping[str, Any]) -> Text:
        """The line as text; parts whose metric is missing are left out."""
        flat = flatten(metrics)
        line = Text()
        line.append(f"step {iteration:>{len(str(self._total))}}/{self._total}", style="bold")
        for part, style in self._parts(iteration, flat):
            line.append("  ")
            line.append(part, style=style)
        return line

    def _parts(self, iteration: int, flat: dict[str, Any]) -> Iterator[tuple[str, str]]:
        for name in ("kl", "loss"):  # with a KL objective the loss is the same number
            if flat.get(name) is not None:
                yield f"{name} {flat[name]:.4g}", "cyan"
                break
        domains = {k.removeprefix("kl/"): v for k, v in flat.items() if k.startswith("kl/") and v is not None}
        if domains:
            yield f"({_largest(domains)})", "dim"
        if flat.get("reward") is not None:
            yield f"reward {flat['reward']:.3f}", "green"
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
        if times:
            yield " ".join(f"{name} {seconds:.2f}s" for name, seconds in times.items()), "dim"
        done = iteration - self._first
        if done > 0 and iteration < self._total:
            each = (time.monotonic() - self._start) / done
            yield f"ETA {format_seconds(each * (self._total - iteration))}", "magenta"


def is_terminal() -> bool:
    """Whether a person is watching: both standard streams are terminals."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def _largest(domains: dict[str, float]) -> str:
    """The domains furthest from their teachers, and how many others there are."""
    worst = sorted(domains.items(), key=lambda item: -item[1])[:_DOMAINS_SHOWN]
    text = " ".join(f"{name} {value:.3g}" for name, value in worst)
    return text if len(domains) <= _DOMAINS_SHOWN else f"{text} +{len(domains) - _DOMAINS_SHOWN} lower"


def _bar() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
