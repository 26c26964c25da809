"""Scoring functions that parse or evaluate an answer. They run only in a confined process.

Nothing of megatron-core is imported here, so that ``python -m megatron_mopd.data.scoring`` starts in about
two seconds. Each function takes the response, the reference answer and the reasoning-gym entry, and returns a
score; it may raise anything and take forever, and the text that it evaluates is checked
(`confinement.expressions`).
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from typing import Any

import math_verify
import reasoning_gym

from megatron_mopd.confinement.server import WorkerLimits, serve

# It warns that timeouts are off (the process is killed instead) and about every expression it cannot parse.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)


def math_equal(response: str, answer: str, entry: dict[str, Any] | None) -> float:
    """1 when both are equal as mathematics: numbers, fractions, sets, intervals, in LaTeX or plain."""
    gold = _parse(answer if "\\boxed" in answer else f"\\boxed{{{answer}}}", raise_on_error=True)
    if not gold:
        raise ValueError(f"math_verify cannot read the reference answer {answer!r}")
    found = _parse(response)
    if not found and "\n" not in response:  # a bare formula, without math delimiters
        found = _parse(f"\\boxed{{{response}}}")
    return float(math_verify.verify(gold, found, timeout_seconds=None, raise_on_error=True))


def reasoning_gym_score(response: str, answer: str | None, entry: dict[str, Any]) -> float:
    """The task's own score; many tasks give partial credit to answers that are close or badly formatted."""
    task = _task(entry["metadata"]["source_dataset"], json.dumps(entry["params"], sort_keys=True))
    return float(task.score_answer(response, entry))


SCORES: dict[str, Callable[[str, str | None, dict[str, Any] | None], float]] = {
    "math_verify": math_equal,
    "reasoning_gym": reasoning_gym_score,
}


def _parse(text: str, raise_on_error: bool = False) -> list:
    return math_verify.parse(text, parsing_timeout=None, raise_on_error=raise_on_error)


@functools.lru_cache(maxsize=256)
def _task(name: str, params: str) -> reasoning_gym.dataset.ProceduralDataset:
    # Some scores depend on the task's parameters and word lists, which take much longer to load than to use,
    # so datasets are cached.
    return reasoning_gym.create_dataset(name, **json.loads(params), seed=0, size=1)


def _warm_up() -> None:
    """Fill the parsers' caches, which every worker then inherits; otherwise each would take 0.2 s for it."""
    for text in ("$\\frac{1}{2}$", "1/2 + 3**2"):
        math_equal(text, "\\frac{1}{2}", None)


if __name__ == "__main__":
    _warm_up()
    serve(SCORES, WorkerLimits(), checks_evaluation=True)
