"""Verifiers: how right a response is, in [0, 1].

``score(prompt, response)`` applies the verifier named by the prompt. A verifier that fails never stops a run:
there is then no verdict, and failures are counted, so that a broken parser is not mistaken for a bad model.
All verifiers look at the final answer only: what is outside ``<think>``, and inside ``<answer>`` tags if any.
A response that never stops thinking has none, and scores 0 with every verifier.

Exact matches are decided here. Every other verifier parses or evaluates what a model wrote, so it runs in a
confined process (`confinement`), with limits of time and memory for answers and references alike.
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
"""How long one response may take to score."""

SCORED_AT_ONCE = 16
"""Responses that one process takes at a time: few enough that a hanging one holds up little else."""
VERIFIERS = ("exact_match", "math_verify", "reasoning_gym")
_OPEN, _CLOSE = "<answer>", "</answer>"
_THINK, _THOUGHT = "<think>", "</think>"


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


def score(prompt: Prompt, response: str) -> Score:
    """Judge `response`; never raises, works on any thread and takes at most about `TIMEOUT_SECONDS`."""
    return next(score_all([(prompt, response)]))


def score_all(responses: Sequence[tuple[Prompt, str]]) -> Iterator[Score]:
    """Judge (prompt, response) pairs in their order, as `score` does."""
    for start in range(0, len(responses), SCORED_AT_ONCE):
        batch = responses[start : start + SCORED_AT_ONCE]
        yield from judge(batch, _scoring_process(os.getpid()), TIMEOUT_SECONDS)


def judge(responses: Sequence[tuple[Prompt, str]], process: ScoringProcess, seconds: float) -> list[Score]:
    """Scores of (prompt, response) pairs, in `process` unless nothing has to be parsed; never raises.

    A pair whose verifier crashes or takes longer than `seconds` gets `Score(None, crashed=True)`.
    """
    confined = [pair for pair in responses if _has_to_be_asked(*pair)]
    try:
        raw = process.score([scoring_request(*pair) for pair in confined], seconds) if confined else []
    except Exception:  # a prompt's entry that cannot be pickled: one by one, so that it costs no other
        if len(responses) > 1:
            return [score for pair in responses for score in judge([pair], process, seconds)]
        raw = [None]
    scores = map(to_score, raw)
    return [
        next(scores) if _has_to_be_asked(prompt, response) else _judge_here(prompt, response)
        for prompt, response in responses
    ]


def exact_match(prompt: Prompt, response: str) -> Score:
    """1 when both are the same words: runs of white space count as one space. Nothing is parsed."""
    if prompt.answer is None:
        return Score(None, crashed=True)
    found = final_answer(response, prompt.opens_thinking)
    return Score(float(found is not None and found.split() == prompt.answer.split()))


def _judge_here(prompt: Prompt, response: str) -> Score:
    if not has_verdict(prompt):
        return Score(None)
    if is_confined(prompt):
        return Score(0.0)  # there is no answer to ask about
    return exact_match(prompt, response)


def _has_to_be_asked(prompt: Prompt, response: str) -> bool:
    return is_confined(prompt) and final_answer(response, prompt.opens_thinking) is not None


def is_confined(prompt: Prompt) -> bool:
    """Whether responses to `prompt` are scored in a confined process."""
    return prompt.verifier != "exact_match" and has_verdict(prompt)


def has_verdict(prompt: Prompt) -> bool:
    """Whether there is anything to judge a response by."""
    return prompt.entry is not None or prompt.answer is not None


def scoring_request(prompt: Prompt, response: str) -> tuple[Any, ...]:
    """What a `ScoringProcess` is asked: (verifier, final answer, reference answer, entry)."""
    return prompt.verifier, final_answer(response, prompt.opens_thinking), prompt.answer, prompt.entry


def to_score(raw: float | None) -> Score:
    """The `Score` for what a verifier returned; `None` when it failed or took too long."""
    if raw is None or not math.isfinite(raw):
        return Score(None, crashed=True)
    return Score(min(max(float(raw), 0.0), 1.0))


def check_verifier(name: str, where: str) -> None:
    """Raise `ConfigError` naming the nearest verifier when there is none called `name`."""
    if name not in VERIFIERS:
        raise ConfigError(f"{where}: unknown verifier {shown(name)}{nearest(str(name), VERIFIERS)}")


def final_answer(response: str, opens_thinking: bool = False) -> str | None:
    """The part of `response` that is judged: outside of `<think>`, inside the last `<answer>` tags, stripped.

    `None` when there is none because `response` ends thinking. With `opens_thinking` it also begins so.
    """
    _, thought, said = response.rpartition(_THOUGHT)
    if not thought and opens_thinking:
        return None
    said, thinking, _ = said.partition(_THINK)
    if thinking and not said.strip():
        return None
    found, end = said, 0
    # Not a regular expression: many openings without an end would be searched to the end once each.
    while (start := said.find(_OPEN, end)) >= 0 and (end := said.find(_CLOSE, start)) >= 0:
        found = said[start + len(_OPEN) : end]
    return found.strip()


def is_thinking(text: str) -> bool:
    """Whether `text` ends inside `<think>`."""
    return text.rfind(_THINK) > text.rfind(_THOUGHT)


@functools.lru_cache(maxsize=1)
def _scoring_process(process_id: int) -> ScoringProcess:
    """The scoring process of this process; a forked child gets its own, since a pipe has one reader."""
    return ScoringProcess()
