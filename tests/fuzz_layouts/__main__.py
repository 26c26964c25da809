"""Compares random layouts with one rank: losses, gradients and weights must be the same.

    python -m tests.fuzz_layouts [--count 1000] [--seed 0] [--ranks 8] [--workers 1]
    python -m tests.fuzz_layouts --replay FILE.json      # rerun one case
    python -m tests.fuzz_layouts --shrink FILE.json      # find a smaller case that fails in the same way

A case is a student, its teachers, objectives of all kinds and two steps' samples, trained on a random layout
of up to `--ranks` ranks (TP, PP, virtual stages, CP, EP, ETP, DP) with a random schedule, batching, teacher
storage, recomputation and optimizer. The reference is one rank in float64 with micro-batches of one sample,
megatron-core's schedule and no limits; `tests/training/test_oracle.py` checks that against formulas. A case
depends on its seed alone. Cases that fail are shrunk and stored in `--keep`, where
`tests/fuzz_layouts/test_fuzz_layouts.py` replays them. Exits with status 1 if there was a failure.
"""

from __future__ import annotations

import argparse
import collections
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import megatron_mopd.commands  # noqa: F401  (silences messages of the dependencies)
from megatron_mopd.observe.progress import progress
from tests.fuzz_layouts.case import Case
from tests.fuzz_layouts.draw import draw_case
from tests.fuzz_layouts.judge import Pools, Verdict, judge
from tests.fuzz_layouts.shrink import shrink

CASES = Path(__file__).parent / "cases"


@dataclass(frozen=True)
class Result:
    seed: int
    case: Case
    verdict: Verdict
    kept: Path | None = None
    """Path of the shrunk case if it failed."""


def run_seeds(options: argparse.Namespace) -> Iterator[Result]:
    """Yield the results of `options.count` cases as they finish in several processes.

    Cases with many ranks come first, so that a process forks its ranks only once for each size, and all
    processes stay busy until the end.
    """
    seeds = range(options.seed, options.seed + options.count)
    ordered = sorted(seeds, key=lambda seed: -draw_case(seed, options.ranks).ranks)
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(options.workers, context, _start_worker, (options,)) as executor:
        futures = [executor.submit(_run_seed, seed) for seed in ordered]
        for future in as_completed(futures):
            yield future.result()


_worker: tuple[argparse.Namespace, Pools] | None = None
"""The state of a worker process: its options and pools."""


def _start_worker(options: argparse.Namespace) -> None:
    global _worker
    _worker = options, Pools(options.seconds)


def _run_seed(seed: int) -> Result:
    options, pools = _worker
    case = draw_case(seed, options.ranks)
    verdict = judge(case, pools)
    if verdict.is_fine:
        return Result(seed, case, verdict)
    small = shrink(case, verdict, partial(judge, pools=pools), options.shrink_minutes)
    options.keep.mkdir(parents=True, exist_ok=True)
    path = options.keep / f"{verdict.kind}_{seed}.json"
    small.save(path)
    return Result(seed, case, verdict, path)


def fuzz(options: argparse.Namespace) -> int:
    """Run the cases, print failures as they occur and a tally at the end; returns the number of failures."""
    started, tally = time.monotonic(), collections.Counter()
    for result in progress(run_seeds(options), "layouts", options.count):
        tally[result.verdict.kind] += 1
        if options.verbose or not result.verdict.is_fine:
            print(f"{result.seed} {result.verdict.kind}: {result.case}", flush=True)
        if not result.verdict.is_fine:
            print(f"    {result.verdict.last_line[:300]}\n    kept as {result.kept}", flush=True)
    minutes = (time.monotonic() - started) / 60
    said = ", ".join(f"{count} {kind}" for kind, count in tally.most_common())
    print(f"{said} in {minutes:.1f} min ({tally.total() / minutes:.1f} cases a minute)")
    return tally["wrong"] + tally["failed"] + tally["hangs"]


def replay(path: Path, shrink_minutes: float, pools: Pools) -> int:
    """Run one case, and shrink it if it fails and `shrink_minutes` allows; returns 1 if it fails."""
    case = Case.load(path)
    verdict = judge(case, pools)
    print(f"{case}\n{verdict.kind}\n{verdict.detail}".rstrip())
    if shrink_minutes and not verdict.is_fine:
        small = shrink(case, verdict, partial(judge, pools=pools), shrink_minutes)
        target = path.with_suffix(".small.json")
        small.save(target)
        print(f"shrunk to {target}: {small}")
    return int(not verdict.is_fine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case, then one more each")
    parser.add_argument("--ranks", type=int, default=8, help="ranks of the largest layout")
    workers = max(1, (os.cpu_count() or 1) // 2)
    parser.add_argument("--workers", type=int, default=workers, help="cases at a time")
    parser.add_argument("--seconds", type=float, default=150, help="time limit for one case")
    parser.add_argument("--shrink-minutes", type=float, default=4, help="time to shrink each failing case")
    parser.add_argument("--keep", type=Path, default=CASES, help="where failed cases are written")
    parser.add_argument("--verbose", action="store_true", help="a line for every case")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run only this case")
    parser.add_argument("--shrink", type=Path, metavar="FILE", help="run this case and find a smaller one")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if path := options.replay or options.shrink:
        with Pools(options.seconds) as pools:
            sys.exit(replay(path, options.shrink_minutes if options.shrink else 0.0, pools))
    sys.exit(min(fuzz(options), 1))


if __name__ == "__main__":
    main()
