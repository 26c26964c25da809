"""Trajectories: the output of a rollout and the input of training."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_mopd.data.arrays import EqualByValue, id_array, logprob_array
from megatron_mopd.data.prompt import Prompt


@dataclass(frozen=True, eq=False)
class Trajectory(EqualByValue):
    """One prompt with one response, sampled by the student or taken from the data (`sft`).

    Every rank has every trajectory of the batch, but a sampled response's tokens only where they are needed:
    on the data-parallel rank that sampled it, and after `deliver_tokens` on the one that trains on it.
    Everything else is known on all ranks.
    """

    prompt: Prompt
    response_ids: np.ndarray | None
    """[|y|] int32, the response tokens, including the stop token if the response is `finished`; `None` on
    ranks that do not hold them. May be given as any sequence."""
    index: int
    """Index in the batch of its iteration: the same on every rank and in every parallel layout."""
    logprobs: np.ndarray | None = None
    """[|y|] log mu(y_t) of every response token under the distribution it was sampled from, float32, or
    float64 for a float64 student; `None` for given responses, and where `response_ids` is."""
    finished: bool = True
    """Ended by a stop token, not by the length limit."""
    response_length: int = 0
    """|y|; taken from `response_ids` where there are any."""
    logprob_sum: float | None = None
    """Sum of `logprobs` in float64, computed from them if not given; `None` for given responses."""
    sampled_by: int | None = None
    """The data-parallel rank that sampled the response; `None` if every rank was given it."""

    def __post_init__(self):
        if self.response_ids is not None:
            object.__setattr__(self, "response_ids", id_array(self.response_ids))
            object.__setattr__(self, "response_length", len(self.response_ids))
        if self.logprobs is not None:
            object.__setattr__(self, "logprobs", logprob_array(self.logprobs))
            assert len(self.logprobs) == self.response_length, "one log-prob for every token"
            if self.logprob_sum is None:
                object.__setattr__(self, "logprob_sum", sum_of(self.logprobs))

    @property
    def domain(self) -> str:
        return self.prompt.domain

    @property
    def token_ids(self) -> np.ndarray:
        """[len(self)] prompt and response; only where the response's tokens are."""
        return np.concatenate((self.prompt.token_ids, self.response_ids))

    @property
    def has_tokens(self) -> bool:
        """Whether this rank holds the response's tokens."""
        return self.response_ids is not None

    @property
    def is_sampled(self) -> bool:
        """Whether the response has log-probs, on whichever rank."""
        return self.logprob_sum is not None

    def without_tokens(self) -> Trajectory:
        """What every rank knows about it."""
        return replace(self, response_ids=None, logprobs=None)

    def judge(self, ranks: int) -> int:
        """The data-parallel rank, of `ranks`, that judges the response: the one that sampled it, and so has
        its tokens; ranks take turns with responses that all were given."""
        return self.index % ranks if self.sampled_by is None else self.sampled_by

    def __len__(self) -> int:
        return len(self.prompt.token_ids) + self.response_length


def sum_of(logprobs: np.ndarray) -> float:
    """Their sum in float64; NaN or infinite if any of them is."""
    with np.errstate(invalid="ignore"):
        return float(logprobs.sum(dtype=np.float64))
