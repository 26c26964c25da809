"""The response tokens of a micro-batch: the rows of their hidden states, and the responses they belong to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch import Tensor

from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.data.batching import MicroBatch
from megatron_mopd.data.trajectory import Trajectory


def response_hidden(hidden: Tensor, micro_batch: MicroBatch, groups: ParallelGroups) -> Tensor:
    """The rows whose next token is a response token: [s(/tp), b, h] -> [n, h].

    Under sequence parallelism: one all-gather over TP of s x b x h elements; its backward is a reduce-scatter
    that expects each rank's partial gradient (`reduce_hidden_grad=False` in the objectives).
    """
    if groups.config.sequence_parallel:
        hidden = tensor_parallel.gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=True, group=groups.tp
        )
    return hidden.flatten(0, 1).index_select(0, micro_batch.loss_index)


class ResponseTokens:
    """Consecutive trajectories of a micro-batch: their whole responses, and this rank's share of the tokens.

    Under context parallelism a rank holds part of every response. Quantities that need whole responses (mean
    ratios, sums to the end) are computed on concatenated whole responses [sum |y|], from which every rank
    selects its own rows [n]. Without context parallelism the two are the same.
    """

    def __init__(
        self,
        trajectories: Sequence[Trajectory],
        rows: slice,
        positions: Tensor,
        counts: Sequence[int],
        groups: ParallelGroups,
    ):
        """`rows` are the rows among the micro-batch's response tokens, `positions` their positions in their
        own documents [n], `counts` the number of them per trajectory on this rank."""
        self.trajectories, self.rows, self.counts = trajectories, rows, counts
        self.lengths = [t.response_length for t in trajectories]
        self._groups = groups
        start, offsets = 0, []
        for trajectory, length in zip(trajectories, self.lengths):
            offsets.append(start - (len(trajectory.prompt.token_ids) - 1))
            start += length
        self.total = start
        offset = torch.tensor(offsets, dtype=torch.long).repeat_interleave(torch.tensor(counts))
        self.index = positions + offset.to(positions.device)
        """[n], the index of each row in the concatenated responses."""

    def place(self, row: int) -> tuple[Trajectory, int]:
        """The trajectory of a row in [0, n), and the position of its token in the response."""
        first = token = 0
        for trajectory, count, length in zip(self.trajectories, self.counts, self.lengths):
            if row < first + count:
                return trajectory, int(self.index[row]) - token
            first, token = first + count, token + length
        raise IndexError(row)

    @property
    def held(self) -> list[int]:
        """`Trajectory.index` of the trajectories with tokens on this rank."""
        return [t.index for t, count in zip(self.trajectories, self.counts) if count]

    def whole(self, values: Tensor) -> Tensor:
        """This rank's values [n] -> those of the whole responses [sum |y|], detached.

        Collective under context parallelism: one all-reduce of sum |y| elements over CP, which every rank of
        the group must enter, even without any rows.
        """
        result = values.new_zeros(self.total).index_copy_(0, self.index, values.detach())
        if self._groups.cp_size > 1:
            dist.all_reduce(result, group=self._groups.cp)
        return result

    def mine(self, whole: Tensor) -> Tensor:
        """Values of the whole responses [sum |y|] -> those of this rank [n]."""
        return whole.index_select(0, self.index)

    def behaviour_logprobs(self, like: Tensor) -> Tensor:
        """log mu(y_t) of the whole responses [sum |y|], as the sampler recorded them."""
        values = np.concatenate([t.logprobs for t in self.trajectories])
        return torch.from_numpy(values).to(like.dtype).to(like.device)

    def per_response(self, values: Sequence[float], like: Tensor) -> Tensor:
        """One number per response, repeated for each of its tokens: [sum |y|]."""
        counts = torch.tensor(self.lengths)
        spread = torch.tensor(values, dtype=torch.float64).repeat_interleave(counts)
        return spread.to(like.dtype).to(like.device)


def row_positions(micro_batch: MicroBatch) -> Tensor:
    """Position of every response row [n] in its own document (prompt and response)."""
    rows = micro_batch.position_ids.expand(micro_batch.tokens.shape)
    return rows.transpose(0, 1).flatten().index_select(0, micro_batch.loss_index)
