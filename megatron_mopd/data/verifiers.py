"""Verifiers: score the correctness of a response, in [0, 1].

``score(prompt, response)`` applies the verifier named by the prompt. A failing verifier never stops a run:
there is no verdict then, and failures are counted, so that a broken parser is not mistaken for a bad model.
All verifiers score only the final answer: the part outside ``<think>``, and inside ``<answer>`` tags if there
are any. A response that never stops thinking has no answer, and scores 0 with every verifier.

Exact matches are computed here. Every other verifier parses or evaluates model output, so it runs in a
confined process (`confinement`), with time and memory limits for answers and references.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from megatron_mopd.backend.messages import shown
from megatron_mopd.config import ConfigError, nearest
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.scoring_process import ScoringProcess

TIMEOUT_SECONDS = 5.0
"""Time limit for scoring one response."""

SCORED_AT_ONCE = 16
"""Number of responses that one process takes at a time: few enough that a hanging one delays few others."""
VERIFIERS = ("exact_match", "math_verify", "reasoning_gym")
_OPEN, _CLOSE = "<answer>", "</answer>"
_THINK, _THOUGHT = "<think>", "</think>"


class Score(NamedTuple):
    """The score of one response."""

    raw: float | None
    """The verifier's own score in [0, 1], including partial credit; `None` if there is no verdict."""
    crashed: bool = False
    """The verifier failed or timed out; otherwise, no verdict means that the prompt has no answer."""

    @property
    def correct(self) -> bool | None:
        """Whether accuracy counts the response as correct: only if `raw` is at least 1."""
        return None if self.raw is None else self.raw >= 1.0


def score(prompt: Prompt, response: str) -> Score:
    """Score `response`; never raises, works on any thread and takes at most about `TIMEOUT_SECONDS`."""
    return next(score_all([(prompt, response)]))


def score_all(responses: Sequence[tuple[Prompt, str]]) -> Iterator[Score]:
    """Score (prompt, response) pairs in order, as `score` does."""
    for start in range(0, len(responses), SCORED_AT_ONCE):
        batch = responses[start : start + SCORED_AT_ONCE]
        yield from judge(batch, _scoring_process(os.getpid()), TIMEOUT_SECONDS)


def judge(responses: Sequence[tuple[Prompt, str]], process: ScoringProcess, seconds: float) -> list[Score]:
    """Scores of (prompt, response) pairs, computed in `process` unless nothing must be parsed; never raises.

    A pair whose verifier crashes or takes longer than `seconds` gets `Score(None, crashed=True)`.
    """
    confined = [pair for pair in responses if _has_to_be_asked(*pair)]
    try:
        raw = process.score([scoring_request(*pair) for pair in confined], seconds) if confined else []
    except Exception:  # an entry cannot be pickled: score one by one, so that only its own response fails
        if len(responses) > 1:
            return [score for pair in responses for score in judge([pair], process, seconds)]
        raw = [None]
    scores = map(to_score, raw)
    return [
        next(scores) if _has_to_be_asked(prompt, response) else _judge_here(prompt, response)
        for prompt, response in responses
    ]


def exact_match(prompt: Prompt, response: str) -> Score:
    """1 if both consist of the same words: runs of whitespace count as one space. Nothing is parsed."""
    if prompt.answer is None:
        return Score(None, crashed=True)
    found = final_answer(response, prompt.opens_thinking)
    return Score(float(found is not None and found.split() == prompt.answer.split()))


def _judge_here(prompt: Prompt, response: str) -> Score:
    if not has_verdict(prompt):
        return Score(None)
    if is_confined(prompt):
        return Score(0.0)  # there is no answer to score
    return exact_match(prompt, response)


def _has_to_be_asked(prompt: Prompt, response: str) -> bool:
    return is_confined(prompt) and final_answer(response, prompt.opens_thinking) is not None


def is_confined(prompt: Prompt) -> bool:
    """Whether responses to `prompt` are scored in a confined process."""
    return prompt.verifier != "exact_match" and has_verdict(prompt)


def has_verdict(prompt: Prompt) -> bool:
    """Whether responses to `prompt` can be scored."""
    return prompt.entry is not None or prompt.answer is not None


def scoring_request(prompt: Prompt, response: str) -> tuple[Any, ...]:
    """The request to a `ScoringProcess`: (verifier, final answer, reference answer, entry)."""
    return prompt.verifier, final_answer(response, prompt.opens_thinking), prompt.answer, prompt.entry


def to_score(raw: float | None) -> Score:
    """The `Score` for a verifier's result, which is `None` if it failed or timed out."""
    if raw is None or not math.isfinite(raw):
        return Score(None, crashed=True)
    return Score(min(max(float(raw), 0.0), 1.0))


def check_verifier(name: str, where: str) -> None:
    """Raise `ConfigError` with the nearest verifier if there is none called `name`."""
    if name not in VERIFIERS:
        raise ConfigError(f"{where}: unknown verifier {shown(name)}{nearest(str(name), VERIFIERS)}")


def final_answer(response: str, opens_thinking: bool = False) -> str | None:
    """The part of `response` that is scored: outside `<think>`, inside the last `<answer>` tags, stripped.

    `None` if there is none because `response` ends inside `<think>`. With `opens_thinking` it also begins
    there.
    """
    _, thought, said = response.rpartition(_THOUGHT)
    if not thought and opens_thinking:
        return None
    said, thinking, _ = said.partition(_THINK)
    if thinking and not said.strip():
        return None
    found, end = said, 0
    # Not a regular expression: with many unclosed tags it would scan to the end once for each.
    while (start := said.find(_OPEN, end)) >= 0 and (end := said.find(_CLOSE, start)) >= 0:
        found = said[start + len(_OPEN) : end]
    return found.strip()


def is_thinking(text: str) -> bool:
    """Whether `text` ends inside `<think>`."""
    return text.rfind(_THINK) > text.rfind(_THOUGHT)


@functools.lru_cache(maxsize=1)
def _scoring_process(process_id: int) -> ScoringProcess:
    """The scoring process of this process; a forked child gets its own, because a pipe has one reader."""
    return ScoringProcess()
