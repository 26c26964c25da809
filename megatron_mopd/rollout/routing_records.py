"""Expert choices of sampled tokens, sent from the rank that sampled to the rank that trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class RoutingRecords:
    """Expert choices of this rank's rollouts, for its pipeline stage and its share of the trajectories.

    A record is [tokens - 1, layers, k] in host memory: every token except the last went through the model. A
    choice takes one byte for up to 256 experts, two beyond: 128 trajectories of 8192 tokens through 48 layers
    with k = 8 are 0.4 GB over all data-parallel ranks.
    """

    records: Mapping[int, Tensor]
    """By trajectory index."""
    tokens: dict[int, int]
    """Number of tokens of every trajectory of the batch, on any rank."""
    record_shape: tuple[int, int]
    """(layers of this stage, k)."""
    dtype: torch.dtype

    def renumbered(self, index_of: Mapping[int, int], tokens: dict[int, int]) -> RoutingRecords:
        """The same records under other trajectory indices."""
        records = {index_of[index]: record for index, record in self.records.items()}
        return RoutingRecords(records, tokens, self.record_shape, self.dtype)

    def exchange(
        self, wanted: Sequence[Sequence[int]], group: dist.ProcessGroup, device: torch.device
    ) -> dict[int, Tensor]:
        """The records of the trajectories that this rank trains on; `wanted` lists them for every rank.

        Collectives over the data-parallel group: an all-reduce of one integer per trajectory and one
        all-to-all that sends every record at most once.
        """
        mine = [index for index in wanted[group.rank()] if index in self.tokens]
        if group.size() == 1:
            return {index: self.records[index] for index in mine}
        known = sorted(self.tokens)
        place = {index: i for i, index in enumerate(known)}
        owner = torch.zeros(len(known), dtype=torch.int32, device=device)
        for index in self.records:
            owner[place[index]] = group.rank()
        dist.all_reduce(owner, group=group)
        owner = owner.tolist()

        layers, k = self.record_shape
        size = layers * k * self.dtype.itemsize

        def bytes_of(indices: Sequence[int]) -> int:
            return sum((self.tokens[index] - 1) * size for index in indices)

        outgoing = [
            [i for i in share if i in self.tokens and owner[place[i]] == group.rank()] for share in wanted
        ]
        incoming = [[i for i in mine if owner[place[i]] == rank] for rank in range(group.size())]
        flat = [self.records[i].reshape(-1).view(torch.uint8) for share in outgoing for i in share]
        sent = torch.cat(flat) if flat else torch.zeros(0, dtype=torch.uint8)
        received = torch.empty(sum(map(bytes_of, incoming)), dtype=torch.uint8, device=device)
        dist.all_to_all_single(
            received,
            sent.to(device),
            output_split_sizes=[bytes_of(indices) for indices in incoming],
            input_split_sizes=[bytes_of(indices) for indices in outgoing],
            group=group,
        )
        found, start, received = {}, 0, received.cpu()
        for index in (i for indices in incoming for i in indices):
            end = start + bytes_of([index])
            found[index] = received[start:end].clone().view(self.dtype).view(-1, layers, k)
            start = end
        return found
