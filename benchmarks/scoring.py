"""The cost of confinement: answers scored per second, confined and not.

    python benchmarks/scoring.py [--answers 400] [--repeats 5]      # about two minutes

The same answers are scored in four ways, in turn, with medians over the repeats:

direct    by a call in this process, where a hostile answer would run code in it
bare      by an unconfined process that scores answer by answer
confined  as in training and evaluation: in batches, with a worker that continues as long as only pure
          expressions are evaluated
alone     in a separate confined worker for each answer, as for an answer with other expressions
"""

from __future__ import annotations

import argparse
import json
import pickle
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import reasoning_gym

from megatron_mopd.confinement.process import ConfinedProcess
from megatron_mopd.data.scoring import SCORES

Request = tuple[str, str, str, dict | None]
_AT_ONCE = 16
_BARE = """
import json, pickle, sys
from megatron_mopd.data.scoring import SCORES
while True:
    name, *arguments = pickle.load(sys.stdin.buffer)
    print(json.dumps(SCORES[name](*arguments)), flush=True)
"""


def answers(kind: str, count: int) -> list[Request]:
    """Right and wrong answers, alternating."""
    if kind == "math_verify, numbers":
        return [("math_verify", str(i), str(i - i % 2), None) for i in range(count)]
    if kind == "math_verify, LaTeX":
        fractions = [f"\\frac{{{i}}}{{{i + 1}}}" for i in range(count)]
        return [
            ("math_verify", f"so it is ${text}$", fractions[i - i % 2], None)
            for i, text in enumerate(fractions)
        ]
    task = reasoning_gym.create_dataset(kind, seed=1, size=count)
    entries = [{**task[i], "params": {}} for i in range(count)]
    return [
        ("reasoning_gym", str(entries[i - i % 2]["answer"]), entry["answer"], entry)
        for i, entry in enumerate(entries)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    bare = subprocess.Popen(
        [sys.executable, "-c", _BARE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=None
    )
    confined = ConfinedProcess("megatron_mopd.data.scoring")
    print(f"{_processor()}, Python {platform.python_version()}; confined by {confined.start().mechanisms()}")
    print("answers/s                 direct      bare  confined   confined/bare   alone   a separate worker")

    def by_call(requests: list[Request]) -> None:
        for name, *rest in requests:
            SCORES[name](*rest)

    def by_bare(requests: list[Request]) -> None:
        for request in requests:
            pickle.dump(request, bare.stdin)
            bare.stdin.flush()
            json.loads(bare.stdout.readline())

    def by_confined(requests: list[Request]) -> None:
        for start in range(0, len(requests), _AT_ONCE):
            confined.ask_many(requests[start : start + _AT_ONCE], seconds=60)

    def alone(requests: list[Request]) -> None:
        confined.ask_many(requests[:_AT_ONCE], seconds=60, alone=True)

    ways: list[tuple[Callable, int]] = [
        *((way, arguments.answers) for way in (by_call, by_bare, by_confined)),
        (alone, _AT_ONCE),
    ]
    for kind in (
        *("math_verify, numbers", "math_verify, LaTeX"),
        *("gcd", "number_sorting", "countdown", "spiral_matrix"),
    ):
        requests = answers(kind, arguments.answers)
        rates = _rates(ways, requests, arguments.repeats)
        price = 1e3 / rates[3] - 1e3 / rates[2]
        print(
            f"{kind:22}{rates[0]:10.0f}{rates[1]:10.0f}{rates[2]:10.0f}{rates[2] / rates[1]:16.2f}"
            f"{rates[3]:8.0f}   {price:.1f} ms more per answer",
            flush=True,
        )
    confined.close()
    bare.kill()
    bare.communicate()


def _rates(ways: list[tuple[Callable, int]], requests: list[Request], repeats: int) -> list[float]:
    seconds: list[list[float]] = [[] for _ in ways]
    for repeat in range(repeats + 1):
        for (way, _), mine in zip(ways, seconds):
            started = time.perf_counter()
            way(requests)
            if repeat:  # the first is a warm-up
                mine.append(time.perf_counter() - started)
    return [count / statistics.median(mine) for (_, count), mine in zip(ways, seconds)]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
