"""A table of every fault on a real run of two ranks, and what the user sees.

    python -m tests.faults.table [--write]

Each row is one run (or two: the fault, and the restart after it) of the tiny configuration of the harness,
under a launcher that behaves like torchrun: SIGTERM to the other ranks at the first failure, SIGKILL 30 s
later. The last column says how the restarted run ended, and whether its weights, optimizer state and metrics
equal those of an undisturbed run. --write puts the table into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests import _runs
from tests.faults import harness
from tests.faults.harness import Job, before

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: written by tests/faults/table.py -->", "<!-- faults: end -->"
_WORTH_SHOWING = ("ALARM", "resume:", "WATCHDOG", "error:", "Error:", "asked to stop", "rollout batch")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise RuntimeError("a mistake on one rank")


DURING: list[tuple[str, Callable[[int], None]]] = [
    ("`kill -9` of rank 1 in a step", before("train_step", 4, 1, kill)),
    ("`kill -9` of rank 0 during a save", before("save", 2, 0, harness.kill_after(0.05))),
    ("`kill -9` of rank 1 while sampling", harness.kill_while_sampling(2, 1, 2)),
    ("`kill -STOP` of rank 1", harness.hang(4, 1, 5, lambda: os.kill(os.getpid(), signal.SIGSTOP))),
    ("rank 1 hangs", harness.hang(4, 1, 5)),
    ("rank 1 raises", before("train_step", 4, 1, fail)),
    ("rank 1 is 5 s late", before("train_step", 4, 1, lambda: time.sleep(5))),
    ("SIGUSR1 to rank 1", before("train_step", 4, 1, lambda: os.kill(os.getpid(), signal.SIGUSR1))),
    ("rank 0 cannot write (disk full)", before("save", 2, 0, harness.no_room(8192))),
    ("a gradient is NaN on rank 1", harness.broken_gradients({4})),
    ("the student's logits are NaN on rank 1", harness.broken_logits(4, 1)),
    ("a teacher's logits are NaN on rank 1", harness.broken_teacher(4, 1)),
    ("a weight turns NaN on rank 1 and stays so", harness.damaged_weight(4, 1)),
    ("top exponent bit of a gradient flips", harness.flipped_gradient_bit(4, 1, 30)),
    ("sign bit of a gradient flips", harness.flipped_gradient_bit(4, 1, 31)),
]


def damage_byte(run_dir: Path) -> None:
    path = max((run_dir / "checkpoints" / "iter_0000006").glob("*.distcp"), key=lambda p: p.stat().st_size)
    harness.flip_bit(path, path.stat().st_size // 2)


def truncate(run_dir: Path) -> None:
    path = run_dir / "checkpoints" / "iter_0000006" / "model.json"
    os.truncate(path, path.stat().st_size // 2)


BETWEEN: list[tuple[str, Callable[[Path], None]]] = [
    ("one bit of the newest checkpoint flips", damage_byte),
    ("a file of the newest checkpoint is cut short", truncate),
]


def seen(job: Job) -> str:
    """The lines that tell a user what happened, without duplicates and without directory names."""
    lines = [line for line in job.printed.splitlines() if any(word in line for word in _WORTH_SHOWING)]
    lines = [line for line in lines if "Warning" not in line]
    short = dict.fromkeys(re.sub(r"\S*/(?=[\w.]+)", "", line.strip())[:170] for line in lines)
    return (
        "<br>".join(f"`{line}`".replace("|", "/") for line in list(short)[:2] + list(short)[2:][-1:])
        or "nothing"
    )


def outcome(job: Job, run_dir: Path, reference: Path) -> str:
    if any(job.statuses):
        return f"ends with {job.statuses}"
    if harness.fingerprint(run_dir) != harness.fingerprint(reference):
        left_out = [line for line in _runs.comparable(run_dir) if "skipped_steps" in line]
        return "other weights" + (", a step less" if left_out else "")
    same = _runs.comparable(run_dir) == _runs.comparable(reference)
    return "equal" if same else "weights equal, log-probs of continued responses to rounding"


def rows(directory: Path) -> list[str]:
    harness.write_inputs(directory)
    reference = directory / "reference"
    job = Job(harness.arguments(directory, "reference")).wait()
    assert job.statuses == [0] * harness.RANKS, job.printed
    lines = ["| fault | exit statuses | what is printed | started again |", "|---|---|---|---|"]
    for number, (name, fault) in enumerate(DURING):
        command = harness.arguments(directory, f"run_{number}")
        job = Job(command, fault, as_launcher=True).wait()
        statuses = ", ".join(map(str, job.statuses))
        after = "not needed: " + outcome(job, directory / f"run_{number}", reference)
        if any(job.statuses):
            after = outcome(Job(command).wait(), directory / f"run_{number}", reference)
            statuses += f", {job.seconds_to_end:.1f} s after the first end" if -9 in job.statuses else ""
        lines.append(f"| {name} | {statuses} | {seen(job)} | {after} |")
        print(lines[-1], flush=True)
    for number, (name, damage) in enumerate(BETWEEN):
        run_dir = directory / f"damaged_{number}"
        shutil.copytree(reference, run_dir)
        damage(run_dir)
        job = Job(harness.arguments(directory, run_dir.name)).wait()
        lines.append(f"| {name} | - | {seen(job)} | {outcome(job, run_dir, reference)} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        lines = rows(Path(temporary))
    if options.write:
        text = PAGE.read_text()
        start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
        PAGE.write_text(text[:start] + "\n" + "\n".join(lines) + "\n" + text[end:])


if __name__ == "__main__":
    main()
