"""Verifiers: what share of a response is right, in [0, 1].

``verify(prompt, response)`` applies the verifier named by the prompt. A verifier that fails never stops a
run: the score is then `None`, and ``accuracy`` says how many there were, so that a broken parser does not
pass for a bad model. All of them look at the final answer only: what follows ``</think>``, and inside
``<answer>`` tags if any.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import logging
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import math_verify
import reasoning_gym

from megatron_mopd.config import ConfigError, nearest
from megatron_mopd.data.prompt import Prompt

TIMEOUT_SECONDS = 5.0
"""How long one response may take to score."""

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
# It warns that timeouts are off (ours are used) and about every expression that it cannot read.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)


class Score(NamedTuple):
    """How one response was judged."""

    raw: float | None
    """The verifier's own score in [0, 1], partial credit included; `None` when there is no verdict."""
    crashed: bool = False
    """The verifier failed or took too long; without it, no verdict means that the prompt has no answer."""

    @property
    def correct(self) -> bool | None:
        """Accuracy counts a response only with full marks: `raw` of at least 1."""
        return None if self.raw is None else self.raw >= 1.0


class Accuracy(NamedTuple):
    """Accuracy of a group of responses."""

    mean: float | None
    """Share of correct responses among those with a verdict; `None` when there are none."""
    count: int
    """Responses with a verdict."""
    crashes: int
    """Responses on which the verifier failed."""


class _Timeout(BaseException):
    """Raised inside a verifier by `_deadline`; no Exception, so that no library's fallback swallows it."""


def verify(prompt: Prompt, response: str) -> float | None:
    """The score of `response` in [0, 1]; `None` when the verifier failed or there is no answer to compare."""
    return score(prompt, response).raw


def score(prompt: Prompt, response: str) -> Score:
    """Judge `response`; never raises, works on any thread and takes at most about `TIMEOUT_SECONDS`."""
    if prompt.entry is None and prompt.answer is None:
        return Score(None)
    try:
        with _deadline(TIMEOUT_SECONDS):
            raw = float(VERIFIERS[prompt.verifier](prompt, final_answer(response)))
    except (Exception, _Timeout):
        return Score(None, crashed=True)
    return Score(min(max(raw, 0.0), 1.0)) if math.isfinite(raw) else Score(None, crashed=True)


def accuracy(scores: Iterable[Score]) -> Accuracy:
    """Accuracy of `scores`: failures of the verifier are left out of the mean, and counted."""
    scores = list(scores)
    verdicts = [s.correct for s in scores if s.raw is not None]
    mean = sum(verdicts) / len(verdicts) if verdicts else None
    return Accuracy(mean, len(verdicts), sum(s.crashed for s in scores))


def check_verifier(name: str, where: str) -> None:
    """Raise `ConfigError` naming the nearest verifier when there is none called `name`."""
    if name not in VERIFIERS:
        raise ConfigError(f"{where}: unknown verifier {name!r}{nearest(str(name), VERIFIERS)}")


def final_answer(response: str) -> str:
    """The part of `response` that is judged: after `</think>`, inside the last `<answer>` tags, stripped."""
    response = response.rpartition("</think>")[2]
    tagged = _ANSWER.findall(response)
    return (tagged[-1] if tagged else response).strip()


def _exact_match(prompt: Prompt, answer: str) -> float:
    """1 when both are the same words: runs of white space count as one space."""
    return float(answer.split() == prompt.answer.split())


def _math_verify(prompt: Prompt, answer: str) -> float:
    """1 when `answer` equals the reference as mathematics (fractions, sets, intervals, LaTeX or plain)."""
    gold = _parse(prompt.answer, raise_on_error=True) if "\\boxed" in prompt.answer else None
    gold = gold or _parse(f"\\boxed{{{prompt.answer}}}", raise_on_error=True)
    if not gold:
        raise ValueError(f"{prompt.origin}: math_verify cannot read the answer {prompt.answer!r}")
    found = _parse(answer)
    if not found and "\n" not in answer:  # a bare formula, without the signs that mark one
        found = _parse(f"\\boxed{{{answer}}}")
    return float(math_verify.verify(gold, found, timeout_seconds=None, raise_on_error=True))


def _parse(text: str, raise_on_error: bool = False) -> list:
    return math_verify.parse(text, parsing_timeout=None, raise_on_error=raise_on_error)


def _reasoning_gym(prompt: Prompt, answer: str) -> float:
    """The task's own score; many tasks give part of a point to answers that are close or badly formatted."""
    entry = prompt.entry
    task = _task(entry["metadata"]["source_dataset"], json.dumps(entry["params"], sort_keys=True))
    return task.score_answer(answer, entry)


@functools.lru_cache(maxsize=256)
def _task(name: str, params: str) -> reasoning_gym.dataset.ProceduralDataset:
    # The scores of some tasks depend on their parameters and word lists, which cost much more than a score.
    return reasoning_gym.create_dataset(name, **json.loads(params), seed=0, size=1)


VERIFIERS: dict[str, Callable[[Prompt, str], float]] = {
    "exact_match": _exact_match,
    "math_verify": _math_verify,
    "reasoning_gym": _reasoning_gym,
}


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise `_Timeout` in this thread when the body runs longer than `seconds`.

    math-verify's own timeout is SIGALRM: it fails off the main thread and cancels alarms that others have
    set. Like a signal, this acts between two bytecodes, so one very long C call is only interrupted when it
    returns.
    """
    thread = ctypes.c_ulong(threading.get_ident())
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    lock = threading.Lock()
    over = False

    def expire() -> None:
        with lock:
            if not over:
                raise_in(thread, ctypes.py_object(_Timeout))

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            over = True
            raise_in(thread, None)  # one that was sent but has not arrived yet
        timer.cancel()
