"""Trajectories: the output of a rollout and the input of training."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mopd.data.prompt import Prompt


@dataclass(frozen=True)
class Trajectory:
    """One prompt with one response, sampled by the student or taken from the data (`sft`)."""

    prompt: Prompt
    response_ids: tuple[int, ...]
    """Response tokens, including the stop token if the response is `finished`."""
    index: int
    """Index in the batch of its iteration: the same on every rank and in every parallel layout."""
    logprobs: tuple[float, ...] | None = None
    """log mu(y_t) of every response token under the distribution it was sampled from; `None` for given
    responses."""
    finished: bool = True
    """Ended by a stop token, not by the length limit."""

    @property
    def domain(self) -> str:
        return self.prompt.domain

    @property
    def token_ids(self) -> tuple[int, ...]:
        return (*self.prompt.token_ids, *self.response_ids)

    def __len__(self) -> int:
        return len(self.prompt.token_ids) + len(self.response_ids)
