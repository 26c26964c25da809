"""The alarms that recorded runs would raise under the current rules, without rerunning them.

    python -m tests.faults.replay_alarms RUN_DIR [RUN_DIR ...]

Checks the metrics of each step: divergences, entropies, gradients. Alarms about rewards and truncated
responses are not replayed: a run checks those one by one, and its metrics contain only their means.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_mopd.observe.metrics import read_metrics
from megatron_mopd.run.alarms import Alarms


def replay(run_dir: Path) -> list[tuple[int, str]]:
    """(iteration, message) of every alarm."""
    alarms, found = Alarms(), []
    for line in read_metrics(run_dir):
        numbers = {name: value for name, value in line.items() if isinstance(value, (int, float))}
        found += [(line["iteration"], message) for message in alarms.step(numbers)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", nargs="+", type=Path, help="directories with metrics.jsonl")
    for run_dir in parser.parse_args().run_dir:
        found = replay(run_dir)
        print(f"{run_dir}: {len(read_metrics(run_dir))} steps, {len(found)} alarms")
        for iteration, message in found:
            print(f"  step {iteration}: {message}")


if __name__ == "__main__":
    main()
