"""The scoring functions themselves, and the loop that runs them in a process of their own.

Nothing of megatron-core is imported here, so that ``python -m megatron_mopd.data.scoring`` starts in about
two seconds. Each function takes the response, the reference answer and the reasoning-gym entry, and returns a
score; it may raise anything and take forever: ``verifiers`` deals with both.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import pickle
import sys
from collections.abc import Callable
from typing import Any

import math_verify
import reasoning_gym

from megatron_mopd.data.confinement import confine

# It warns that timeouts are off (the process is killed instead) and about every expression it cannot read.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)

_MEMORY_BYTES = 8 << 30


def exact_match(response: str, answer: str, entry: dict[str, Any] | None) -> float:
    """1 when both are the same words: runs of white space count as one space."""
    return float(response.split() == answer.split())


def math_equal(response: str, answer: str, entry: dict[str, Any] | None) -> float:
    """1 when both are equal as mathematics: numbers, fractions, sets, intervals, in LaTeX or plain."""
    gold = _parse(answer if "\\boxed" in answer else f"\\boxed{{{answer}}}", raise_on_error=True)
    if not gold:
        raise ValueError(f"math_verify cannot read the reference answer {answer!r}")
    found = _parse(response)
    if not found and "\n" not in response:  # a bare formula, without the signs that mark one
        found = _parse(f"\\boxed{{{response}}}")
    return float(math_verify.verify(gold, found, timeout_seconds=None, raise_on_error=True))


def reasoning_gym_score(response: str, answer: str | None, entry: dict[str, Any]) -> float:
    """The task's own score; many tasks give part of a point to answers that are close or badly formatted."""
    task = _task(entry["metadata"]["source_dataset"], json.dumps(entry["params"], sort_keys=True))
    return float(task.score_answer(response, entry))


SCORES: dict[str, Callable[[str, str | None, dict[str, Any] | None], float]] = {
    "exact_match": exact_match,
    "math_verify": math_equal,
    "reasoning_gym": reasoning_gym_score,
}


def _parse(text: str, raise_on_error: bool = False) -> list:
    return math_verify.parse(text, parsing_timeout=None, raise_on_error=raise_on_error)


@functools.lru_cache(maxsize=256)
def _task(name: str, params: str) -> reasoning_gym.dataset.ProceduralDataset:
    # Some scores depend on the task's parameters and word lists, which take much longer to load than to use.
    return reasoning_gym.create_dataset(name, **json.loads(params), seed=0, size=1)


def _serve() -> None:
    """Answer pickled (verifier, response, answer, entry) with a line of JSON, a score or null, until input
    ends. Not with a pickle: a response that takes this process over must not reach the one that reads.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not end up between the replies
    confine(_MEMORY_BYTES)
    print('"ready"', file=replies, flush=True)
    while True:
        try:
            name, *arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            score = SCORES[name](*arguments)
        except Exception:
            score = None
        print(json.dumps(score if isinstance(score, float) else None), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
