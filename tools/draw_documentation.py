"""Draw the pictures of docs/: the effect of reverse KL, and the terminal output and report of a run.

    python tools/draw_documentation.py                      # the pictures that need no run
    python tools/draw_documentation.py --run runs/demo/mopd # also the terminal and, with Chromium, the report

The report's picture is a screenshot by headless Chromium (`--browser`), which also checks that the page loads
nothing and reports no error.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from megatron_mopd.observe.journal import read_journal
from megatron_mopd.observe.page import write_page
from megatron_mopd.observe.progress import StepLine

IMAGES = Path(__file__).parent.parent / "docs" / "images"


def draw_divergences(path: Path) -> None:
    """A narrow student fitted to a teacher with two modes by forward and by reverse KL, on a grid."""
    x = np.linspace(-6, 6, 1201)

    def normal(mean: float, width: float) -> np.ndarray:
        values = np.exp(-0.5 * ((x - mean) / width) ** 2)
        return values / values.sum()

    teacher = 0.65 * normal(-2, 0.7) + 0.35 * normal(2.2, 0.8)

    def divergence(p: np.ndarray, q: np.ndarray) -> float:
        return float(np.sum(p * (np.log(p + 1e-300) - np.log(q + 1e-300))))

    students = [normal(mean, width) for mean in np.arange(-4, 4, 0.1) for width in np.arange(0.4, 4, 0.1)]
    forward = min(students, key=lambda student: divergence(teacher, student))
    reverse = min(students, key=lambda student: divergence(student, teacher))
    figure = Figure(figsize=(7.5, 2.9), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(x, teacher, color="#c9d3dc", label="teacher")
    axes.plot(x, forward, color="#e76f51", label="best by forward KL: covers everything")
    axes.plot(x, reverse, color="#1769aa", linewidth=2.2, label="best by reverse KL: stays with one mode")
    axes.set_yticks([])
    axes.set_xticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def draw_terminal(run: Path, path: Path, lines: int = 12) -> None:
    """The last lines that a run printed, reconstructed from its metrics."""
    metrics = read_journal(run / "metrics.jsonl")
    total = metrics[-1]["iteration"]
    every = max(1, len(metrics) // 40) | 1  # odd, so as not to hit the same step of every rollout batch
    console = Console(record=True, width=218, file=io.StringIO(), force_terminal=True, highlight=False)
    step_line = StepLine(total)
    elapsed = 0.0
    for number, line in enumerate(metrics, start=1):
        step_line.record(line)
        elapsed += sum(value for name, value in line.items() if name.startswith("time/"))
        step_line._start = time.monotonic() - elapsed  # as if it had run until now
        if number % every == 0 and number > len(metrics) - lines * every:
            console.print(step_line.render(line["iteration"], line), soft_wrap=True)
    text = console.export_svg(title="python -m megatron_mopd.train --config my_run.yaml")
    # Remove fonts loaded from the network, and a comment with a URL.
    text = re.sub(r"@font-face \{.*?\}|<!--.*?-->", "", text, flags=re.DOTALL)
    path.write_text(text, encoding="utf-8")


def draw_page(run: Path, browser: str, path: Path) -> None:
    """A screenshot of the report; raises `SystemExit` if the browser reports a problem."""
    with tempfile.TemporaryDirectory() as directory:
        page = write_page(run, Path(directory) / "report.html")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += ["--enable-logging=stderr", "--v=0", "--window-size=1240,1500", f"--screenshot={path}"]
        outcome = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=300)
    problems = [line for line in outcome.stderr.splitlines() if "CONSOLE" in line or "net_error" in line]
    if outcome.returncode or problems or not path.exists():
        raise SystemExit("the browser reports problems:\n" + "\n".join(problems or [outcome.stderr]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="run directory for the terminal and the report")
    parser.add_argument("--browser", help="Chromium executable; default: the first one on PATH")
    parser.add_argument("--output", type=Path, default=IMAGES)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    draw_divergences(options.output / "reverse_kl.png")
    if options.run is None:
        return
    draw_terminal(options.run, options.output / "terminal.svg")
    names = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")
    browser = options.browser or next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit("no Chromium on PATH: the report's picture was not drawn; pass one with --browser")
    draw_page(options.run, browser, options.output / "report_page.png")


if __name__ == "__main__":
    main()
