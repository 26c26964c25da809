"""Kills a tiny run on two ranks at many random points, and compares it with an undisturbed run.

    python -m tests.faults.kill_points [--kills 100] [--seed 0] [--kills-per-run 5] [--directory DIR]

Each death is `kill -9` of a random rank at a random moment of start-up, sampling, training or saving; the run
is then restarted, and again after the next death, until it finishes. Its last checkpoint's tensors must be
identical to those of the undisturbed run in every byte, and so must its metrics; metrics computed from the
log-probs of responses that were continued from the rollout log agree up to rounding, which the run's line
reports. Prints the tally; exits with status 1 if a run differs.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests import _runs
from tests.faults import harness


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--kills-per-run", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", help="default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(options.directory or temporary)
        harness.write_inputs(directory)
        started = time.monotonic()
        job = harness.Job(harness.arguments(directory, "reference")).wait()
        assert job.statuses == [0] * harness.RANKS, job.printed
        seconds = time.monotonic() - started
        rng, tally, runs, equal = random.Random(options.seed), harness.Tally(), 0, 0
        while tally.deaths < options.kills:
            name = f"run_{runs}"
            kills = min(options.kills_per_run, options.kills - tally.deaths)
            harness.survive(directory, name, kills, rng, seconds, tally, say)
            runs += 1
            found, expected = (_runs.comparable(directory / run) for run in (name, "reference"))
            same = harness.fingerprint(directory / name) == harness.fingerprint(directory / "reference")
            same &= harness.agree(found, expected)
            equal += same
            verdict = "DIFFERENT" if not same else "equal" if found == expected else "equal, metrics to 1e-6"
            say(
                f"{name}: {verdict}; {tally.deaths} deaths so far ({tally.during_a_save} of them during a "
                f"save), the job's end at most {tally.slowest:.1f} s after ({tally.late} times over "
                f"{harness.TIME_TO_END:g} s); {equal} of {runs} runs equal"
            )
    sys.exit(0 if equal == runs and not tally.late else 1)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
