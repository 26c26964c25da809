"""What the trainer asks of whatever samples the student's trajectories."""

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
    """The distribution that tokens are drawn from, and what ends a response.

    `temperature` divides the logits first; `top_k` and then `top_p` cut the tempered distribution.
    """

    max_new_tokens: int
    """Longest response in tokens, the stop token included."""
    temperature: float = 1.0
    """0 is greedy: the most likely token always."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens whose probabilities add up to this; 1 keeps all."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    stop_token_ids: tuple[int, ...] = ()
    """A response ends with the first of these; none means that every response runs to its length limit."""
    repetition_stop: int = 0
    """A response also ends, unfinished, when its last tokens are one pattern this many times in a row."""
    repetition_max_period: int = 16
    """Longest such pattern in tokens."""
    allow_not_finite: bool = False
    """Return responses whose log-probs are not finite, because the model's weights are damaged, instead of
    raising: the trainer leaves out the steps that they would go into."""
    keep_routing: bool = False
    """Take down which experts every token goes to (`RolloutEngine.routing`)."""

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
        """The run's sampling: its `rollout` section, and everything that ends a response (`StopIds`)."""
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
        """Some tokens of the vocabulary can never be drawn."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


class RolloutEngine(Protocol):
    """Samples responses from the student's current weights."""

    routing: RoutingRecords | None
    """Expert choices of the last `generate` with `keep_routing`, as far as this rank made them."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        seed: int,
        samples_per_prompt: int = 1,
        log: RolloutLog | None = None,
    ) -> list[Trajectory]:
        """`samples_per_prompt` responses to every prompt, the same full list on every rank.

        Every rank passes the same arguments. The list is in the order of `Trajectory.index`, which is
        position of the prompt x samples_per_prompt + sample. Equal seeds give equal tokens. `log` has what an
        interrupted start sampled, which is not sampled again, and takes what is sampled now. Raises
        `ValueError`, on every rank, for a prompt that leaves no room for a response.
        """
