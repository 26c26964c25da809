"""A long run: does its memory, or its number of open files or threads, grow?

    python -m tests.faults.soak [--minutes 60] [--save-interval 20]

Trains the tiny configuration of the harness on two ranks, which save, log and sample all the time, and
measures each rank every two seconds. Prints for each rank the first and last value after a warm-up of a
quarter of the time, and the least-squares slope per hour. Exits with status 1 if files or threads grew, or
memory grew by more than `--megabytes-per-hour`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from tests.faults import harness


def watch(job: harness.Job, seconds: float) -> list[list[tuple[float, float, int, int]]]:
    """Sample (seconds, resident megabytes, open files, threads) of each rank every two seconds."""
    samples: list[list[tuple[float, float, int, int]]] = [[] for _ in job.processes]
    ranks = [psutil.Process(process.pid) for process in job.processes]
    started = time.monotonic()
    while time.monotonic() - started < seconds and all(process.is_alive() for process in job.processes):
        for rank, found in zip(ranks, samples):
            with rank.oneshot():
                memory = rank.memory_info().rss / 2**20
                found.append((time.monotonic() - started, memory, rank.num_fds(), rank.num_threads()))
        time.sleep(2)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--save-interval", type=int, default=20)
    parser.add_argument("--megabytes-per-hour", type=float, default=20.0)
    options = parser.parse_args()
    has_grown = False
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        harness.write_inputs(directory)
        command = harness.arguments(
            directory,
            "soak",
            schedule={"train_iters": 10**6},
            checkpoint={"save_interval": options.save_interval, "keep_last": 2},
        )
        job = harness.Job(command)
        samples = watch(job, 60 * options.minutes)
        is_alive = all(process.is_alive() for process in job.processes)
        for process in job.processes:
            process.kill()
            process.join()
        steps = sum(1 for _ in open(directory / "soak" / "metrics.jsonl"))
    print(f"{options.minutes:g} minutes, {steps} steps, a checkpoint every {options.save_interval}")
    for rank, found in enumerate(samples):
        kept = np.array(found[len(found) // 4 :])
        for column, (name, limit) in enumerate(
            (("resident MB", options.megabytes_per_hour), ("open files", 0.5), ("threads", 0.5)), start=1
        ):
            slope = 3600 * np.polyfit(kept[:, 0], kept[:, column], 1)[0]
            grown = slope > limit and kept[-1, column] > kept[0, column]
            has_grown |= bool(grown)
            print(
                f"  rank {rank}: {name} {kept[0, column]:.1f} -> {kept[-1, column]:.1f}, "
                f"slope {slope:+.2f} an hour{' GROWS' if grown else ''}"
            )
    sys.exit(1 if has_grown or not is_alive else 0)


if __name__ == "__main__":
    main()
