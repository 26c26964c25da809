"""The interface between the trainer and the engine that samples the student's trajectories."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_mopd.config import RolloutConfig
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.rollout.routing_records import RoutingRecords
from megatron_mopd.rollout.write_ahead import RolloutLog


@dataclass(frozen=True)
class SamplingParams:
    """The distribution that tokens are sampled from, and the conditions that end a response.

    `temperature` divides the logits first; `top_k` and then `top_p` truncate the tempered distribution.
    """

    max_new_tokens: int
    """Maximum response length in tokens, including the stop token."""
    temperature: float = 1.0
    """0 means greedy: always the most likely token."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probabilities sum to this; 1 keeps all."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    stop_token_ids: tuple[int, ...] = ()
    """A response ends with the first of these; if empty, every response runs to its length limit."""
    repetition_stop: int = 0
    """A response also ends, unfinished, when its last tokens repeat one pattern this many times in a row."""
    repetition_max_period: int = 16
    """Maximum length of such a pattern in tokens."""
    allow_not_finite: bool = False
    """Return responses with non-finite log-probs (from damaged weights) instead of raising: the trainer skips
    the steps that would use them."""
    keep_routing: bool = False
    """Record the experts of every token (`RolloutEngine.routing`)."""

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not self.temperature >= 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                "sampling needs temperature >= 0, 0 < top_p <= 1 and top_k >= 0, got "
                f"temperature={self.temperature}, top_p={self.top_p}, top_k={self.top_k}"
            )

    @classmethod
    def from_config(cls, rollout: RolloutConfig, stop_ids: Iterable[int]) -> SamplingParams:
        """The run's sampling parameters: its `rollout` section, and the stop tokens (`StopIds`)."""
        return cls(
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            stop_token_ids=tuple(sorted({*stop_ids, *rollout.stop_token_ids})),
            repetition_stop=rollout.repetition_stop,
            repetition_max_period=rollout.repetition_max_period,
            allow_not_finite=True,
            keep_routing=rollout.routing_replay,
        )

    @property
    def is_truncated(self) -> bool:
        """Whether some tokens of the vocabulary can never be sampled."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


class RolloutEngine(Protocol):
    """Samples responses from the student's current weights."""

    routing: RoutingRecords | None
    """This rank's expert choices of the last `generate` with `keep_routing`."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        seed: int,
        samples_per_prompt: int = 1,
        log: RolloutLog | None = None,
    ) -> list[Trajectory]:
        """Sample `samples_per_prompt` responses to every prompt.

        The full list is the same on every rank, but a rank has the tokens and log-probs only of the responses
        that its data-parallel rank sampled (`Trajectory.sampled_by`); `data.exchange` sends them on.
        Every rank passes the same arguments. The list is in the order of `Trajectory.index`, which is
        position of the prompt x samples_per_prompt + sample. Equal seeds give equal tokens. `log` contains
        the tokens of an interrupted start, which are not sampled again, and records new ones. Raises
        `ValueError` on every rank for a prompt that leaves no room for a response.
        """
