"""Verifiers: how right a response is, in [0, 1].

``verify(prompt, response)`` applies the verifier named by the prompt. A verifier that fails never stops a
run: the score is then `None`, and ``accuracy`` says how many there were, so that a broken parser does not
pass for a bad model. All of them look at the final answer only: what follows ``</think>``, and inside
``<answer>`` tags if any.

What a model writes may be arithmetic that takes forever inside one C call (9**9**9 hangs several verifiers),
which no signal and no thread can interrupt. Answers that could do so are scored in a second process, which
can be killed.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from megatron_mopd.config import ConfigError, nearest
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.scoring import SCORES
from megatron_mopd.data.scoring_process import ScoringProcess

TIMEOUT_SECONDS = 5.0
"""How long one response may take to score."""

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
# Powers, factorials, shifts, calls, LaTeX, large exponents, anything long: what could take forever.
_MAY_NOT_END = re.compile(r"[*^!\\~]|<<|\w\s*\(|\d[eE]\+?\d{3}|.{2000}", re.DOTALL)


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


def verify(prompt: Prompt, response: str) -> float | None:
    """The score of `response` in [0, 1]; `None` when the verifier failed or there is no answer to compare."""
    return score(prompt, response).raw


def score(prompt: Prompt, response: str) -> Score:
    """Judge `response`; never raises, works on any thread and takes at most about `TIMEOUT_SECONDS`."""
    if not has_verdict(prompt):
        return Score(None)
    request = scoring_request(prompt, response)
    try:
        if prompt.verifier != "exact_match" and _MAY_NOT_END.search(request[1]):
            raw = _scoring_process(os.getpid()).score(request, TIMEOUT_SECONDS)
        else:
            raw = SCORES[prompt.verifier](*request[1:])
    except Exception:
        raw = None
    return to_score(raw)


def has_verdict(prompt: Prompt) -> bool:
    """Whether there is anything to judge a response by."""
    return prompt.entry is not None or prompt.answer is not None


def scoring_request(prompt: Prompt, response: str) -> tuple[Any, ...]:
    """What a scoring process is asked: (verifier, final answer, reference answer, entry)."""
    return prompt.verifier, final_answer(response), prompt.answer, prompt.entry


def to_score(raw: float | None) -> Score:
    """The `Score` for what a verifier returned; `None` when it failed or took too long."""
    if raw is None or not math.isfinite(raw):
        return Score(None, crashed=True)
    return Score(min(max(float(raw), 0.0), 1.0))


def accuracy(scores: Iterable[Score]) -> Accuracy:
    """Accuracy of `scores`: failures of the verifier are left out of the mean, and counted."""
    scores = list(scores)
    verdicts = [s.correct for s in scores if s.raw is not None]
    mean = sum(verdicts) / len(verdicts) if verdicts else None
    return Accuracy(mean, len(verdicts), sum(s.crashed for s in scores))


def check_verifier(name: str, where: str) -> None:
    """Raise `ConfigError` naming the nearest verifier when there is none called `name`."""
    if name not in SCORES:
        raise ConfigError(f"{where}: unknown verifier {name!r}{nearest(str(name), SCORES)}")


def final_answer(response: str) -> str:
    """The part of `response` that is judged: after `</think>`, inside the last `<answer>` tags, stripped."""
    response = response.rpartition("</think>")[2]
    tagged = _ANSWER.findall(response)
    return (tagged[-1] if tagged else response).strip()


@functools.lru_cache(maxsize=1)
def _scoring_process(process_id: int) -> ScoringProcess:
    """The scoring process of this process; a forked child gets its own, since a pipe has one reader."""
    return ScoringProcess()
