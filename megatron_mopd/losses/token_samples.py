"""Per-token disagreement of student and teacher in a few responses of a step, for people to inspect."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.data.tokenizer import Tokenizer
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.losses.response_tokens import ResponseTokens

MOST_TOKENS = 256
"""Leading tokens of a response that are kept."""
_MOST_PROMPT_CHARACTERS = 600
_CONTEXT = 8
"""Preceding tokens that a token's text may depend on (spaces, bytes of one character)."""


class TokenSamples:
    """The divergence on every token of the first `per_domain` responses of each domain of a global batch.

    The choice depends only on the batch, so it is the same on every rank. Each rank of the last stage writes
    its divergences on these responses to `values`, and the first context-parallel rank that trains on them
    the token ids and log-probs, so that the sum over data- and context-parallel ranks is complete. It is
    reduced with the step's other sums and needs no separate collective.
    """

    def __init__(self, batch: Sequence[Trajectory], per_domain: int, groups: ParallelGroups):
        """`batch` has the tokens of the trajectories that this rank trains on."""
        taken: dict[str, int] = {}
        self._places: dict[int, tuple[Trajectory, int, int]] = {}
        size = 0
        for trajectory in batch:
            number = taken.get(trajectory.domain, 0)
            if number < per_domain and trajectory.response_length:
                taken[trajectory.domain] = number + 1
                length = min(trajectory.response_length, MOST_TOKENS)
                self._places[trajectory.index] = trajectory, size, length
                size += length
        values = torch.zeros(3, size, dtype=torch.float64)
        if groups.cp.rank() == 0:
            for trajectory, start, length in self._places.values():
                if trajectory.has_tokens:
                    here = slice(start, start + length)
                    values[1, here] = torch.from_numpy(trajectory.response_ids[:length]).double()
                    if trajectory.is_sampled:
                        values[2, here] = torch.from_numpy(trajectory.logprobs[:length]).double()
        self.values = values.flatten().to(groups.device)
        """[3 x tokens of the chosen responses]: divergences of one response after another, then token ids,
        then log-probs under the sampler (0 without sampler)."""

    def add(self, tokens: ResponseTokens, per_token: Tensor) -> None:
        """Record this rank's divergences [n] on consecutive trajectories."""
        first_row = first_token = 0
        for trajectory, count, length in zip(tokens.trajectories, tokens.counts, tokens.lengths):
            if trajectory.index in self._places and count:
                _, start, kept = self._places[trajectory.index]
                rows = slice(first_row, first_row + count)
                position = tokens.index[rows] - first_token
                inside = position < kept
                self.values[start + position[inside]] = per_token[rows][inside].detach().double()
            first_row += count
            first_token += length

    def lines(self, tokenizer: Tokenizer) -> Iterator[tuple[int, dict[str, Any]]]:
        """Index and entry of each response: prompt, and for each token its text, divergence and log-prob
        under the sampler. Requires `values` to be summed over all ranks.
        """
        divergences, ids, logprobs = self.values.view(3, -1).tolist()
        for trajectory, start, length in self._places.values():
            here = slice(start, start + length)
            yield (
                trajectory.index,
                {
                    "domain": trajectory.domain,
                    "prompt": _shortened(trajectory.prompt.text),
                    "answer": trajectory.prompt.answer,
                    "tokens": token_texts(list(map(int, ids[here])), tokenizer),
                    "kl": _rounded(divergences[here]),
                    "logprobs": _rounded(logprobs[here]) if trajectory.is_sampled else None,
                    "finished": trajectory.finished,
                    "left_out": trajectory.response_length - length,
                },
            )


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text that each token adds to the preceding ones; joined, the response."""
    texts = []
    for end in range(1, len(ids) + 1):
        before = tokenizer.decode(ids[max(0, end - 1 - _CONTEXT) : end - 1])
        whole = tokenizer.decode(ids[max(0, end - 1 - _CONTEXT) : end])
        if whole.startswith(before):
            texts.append(whole[len(before) :])
        else:  # the bytes of one character, spread over tokens
            texts.append(tokenizer.decode(ids[end - 1 : end]))
    return texts


def _rounded(values: Iterable[float]) -> list[float | None]:
    return [round(value, 6) if math.isfinite(value) else None for value in values]


def _shortened(text: str | Sequence[dict[str, str]]) -> str:
    if not isinstance(text, str):
        text = "\n".join(f"{turn['role']}: {turn['content']}" for turn in text)
    if len(text) <= _MOST_PROMPT_CHARACTERS:
        return text
    half = _MOST_PROMPT_CHARACTERS // 2
    return f"{text[:half]} … {text[-half:]}"
