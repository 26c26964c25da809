"""The position of a run in its data, also after its batch sizes have changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class DataPosition:
    """The mapping between iterations, rollout batches and prompts, with constant sizes from `iteration` on.

    Iterations, batches and prompts are counted from 0 over the whole run, so that a batch's prompts, seed and
    log do not depend on earlier changes of the sizes.
    """

    steps_per_rollout: int
    """Number of iterations that use one rollout batch."""
    prompts_per_rollout: int
    """Prompts drawn for a rollout batch."""
    iteration: int = 0
    """The first iteration with these sizes."""
    batches: int = 0
    """Rollout batches before it."""
    prompts: int = 0
    """Prompts drawn before it."""

    def batch(self, iteration: int) -> int:
        """The index of the rollout batch that `iteration` trains on."""
        return self.batches + (iteration - self.iteration) // self.steps_per_rollout

    def prompts_before(self, batch: int) -> int:
        """The number of prompts drawn before rollout batch `batch`."""
        return self.prompts + (batch - self.batches) * self.prompts_per_rollout

    def resized(self, iteration: int, steps_per_rollout: int, prompts_per_rollout: int) -> DataPosition:
        """The same position in the data, with new sizes from `iteration` on, where a rollout batch begins."""
        sizes = (steps_per_rollout, prompts_per_rollout)
        if sizes == (self.steps_per_rollout, self.prompts_per_rollout):
            return self
        batch = self.batch(iteration)
        return DataPosition(*sizes, iteration, batch, self.prompts_before(batch))

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> DataPosition:
        return cls(**state)
