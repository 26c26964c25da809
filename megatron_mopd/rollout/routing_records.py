"""Expert choices of sampled tokens, kept by the rank that sampled until they go to the rank that trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mopd.data.exchange import Wanted, exchange
from megatron_mopd.data.trajectory import Trajectory


@dataclass
class RoutingRecords:
    """Expert choices of this rank's rollouts, for its pipeline stage and its share of the trajectories.

    A record is [tokens - 1, layers, k] in host memory: every token except the last went through the model. A
    choice takes one byte for up to 256 experts, two beyond: 128 trajectories of 8192 tokens through 48 layers
    with k = 8 are 0.4 GB over all data-parallel ranks.
    """

    records: Mapping[int, Tensor]
    """By trajectory index."""
    record_shape: tuple[int, int]
    """(layers of this stage, k)."""
    dtype: torch.dtype

    def renumbered(self, index_of: Mapping[int, int]) -> RoutingRecords:
        """The same records under other trajectory indices."""
        records = {index_of[index]: record for index, record in self.records.items()}
        return RoutingRecords(records, self.record_shape, self.dtype)

    def exchange(
        self,
        trajectories: Sequence[Trajectory],
        wanted: Wanted,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> dict[int, Tensor]:
        """The records of the sampled trajectories that this rank trains on; `wanted` lists them for every
        rank of the data-parallel group. Collective over it: see `data.exchange.exchange`.
        """
        sampled = {t.index: t for t in trajectories if t.sampled_by is not None}
        layers, k = self.record_shape
        if group.size() == 1:
            return {index: self.records[index] for index in wanted[0] if index in sampled}
        size = layers * k * self.dtype.itemsize
        received = exchange(
            wanted,
            {index: t.sampled_by for index, t in sampled.items()},
            {index: (len(t) - 1) * size for index, t in sampled.items()},
            lambda index: [self.records[index]],
            group,
            device,
        )
        return {
            index: piece.clone().view(self.dtype).view(-1, layers, k) for index, piece in received.items()
        }
