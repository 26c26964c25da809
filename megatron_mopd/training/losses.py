"""What the last pipeline stage minimises: student hidden states in, summed loss and per-domain sums out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.config import ObjectiveConfig
from megatron_mopd.data.batching import MicroBatch
from megatron_mopd.objectives import linear_cross_entropy, linear_kl
from megatron_mopd.teachers.bank import TeacherBank
from megatron_mopd.teachers.hidden_cache import HiddenCache
from megatron_mopd.teachers.routing import Routing


def response_hidden(hidden: Tensor, micro_batch: MicroBatch, groups: ParallelGroups) -> Tensor:
    """The rows whose next token is a response token: [s(/tp), b, h] -> [n, h].

    Under sequence parallelism: one all-gather over TP of s x b x h elements; backward is a reduce-scatter,
    which expects each rank's partial gradient (`reduce_hidden_grad=False` in the objectives).
    """
    if groups.config.sequence_parallel:
        hidden = tensor_parallel.gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=True, group=groups.tp
        )
    return hidden.flatten(0, 1).index_select(0, micro_batch.loss_index)


class BatchLoss(ABC):
    """Base of the losses: weights of the global batch, per-domain sums, and the three values megatron-core
    wants.
    """

    def __init__(
        self,
        objective: ObjectiveConfig,
        groups: ParallelGroups,
        vocab_size: int,
        domains: Sequence[str],
        student: Any,
        weights: Mapping[int, float],
    ):
        self.groups = groups
        self.student = student
        self.weights = weights
        self.domain_ids = {domain: i for i, domain in enumerate(domains)}
        self.head_arguments = dict(
            group=groups.tp,
            vocab_size=vocab_size,
            chunk_size=objective.chunk_size,
            reduce_hidden_grad=not groups.config.sequence_parallel,
        )

    def __call__(self, micro_batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        counts = torch.tensor(micro_batch.loss_counts, dtype=torch.long)
        rows = response_hidden(hidden, micro_batch, self.groups)
        statistics = torch.float64 if rows.dtype == torch.float64 else torch.float32
        weights = torch.tensor([self.weights[t.index] for t in micro_batch.trajectories], dtype=statistics)
        token_weight = weights.repeat_interleave(counts).to(rows.device)
        if rows.size(0):
            loss, per_token = self.token_losses(micro_batch, rows, token_weight)
        else:  # an empty micro-batch still runs its backward pass, because other ranks' experts wait for it
            loss, per_token = rows.sum(), rows.new_zeros(0)
        domain = torch.tensor([self.domain_ids[t.domain] for t in micro_batch.trajectories], dtype=torch.long)
        domain = domain.repeat_interleave(counts).to(rows.device)
        sums = torch.zeros(len(self.domain_ids), 2, dtype=torch.float64, device=rows.device)
        sums[:, 0].index_add_(0, domain, per_token.double())
        sums[:, 1].index_add_(0, domain, torch.ones_like(per_token, dtype=torch.float64))
        weighted = (per_token.double() * token_weight).sum()
        num_tokens = torch.tensor(rows.size(0), dtype=torch.int, device=rows.device)
        return loss, num_tokens, {"domain_sums": sums, "weighted_sum": weighted}

    @abstractmethod
    def token_losses(
        self, micro_batch: MicroBatch, rows: Tensor, token_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(sum of weighted token losses, detached token losses [n]) for the response rows [n, h]."""


class SupervisedLoss(BatchLoss):
    """Cross-entropy on the given response tokens (`sft`)."""

    def token_losses(self, micro_batch, rows, token_weight):
        return linear_cross_entropy(
            rows,
            self.student.head_weight(),
            micro_batch.target_ids,
            token_weight=token_weight,
            **self.head_arguments,
        )


class DistillationLoss(BatchLoss):
    """Full-vocabulary reverse KL to each trajectory's teachers on the student's own trajectories
    (`full_vocab_kl`).

    L = sum_t weight_t sum_k w_k KL(student || teacher_k) (DeepSeek-V4, 5.1.2). Trajectories come ordered by
    teacher mixture, so a micro-batch needs few heads, one mixture at a time.
    """

    def __init__(
        self, *args, bank: TeacherBank, cache: HiddenCache, routing: Routing, temperature: float, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.bank, self.cache, self.routing, self.temperature = bank, cache, routing, temperature

    def token_losses(self, micro_batch, rows, token_weight):
        total, per_token, start = torch.zeros_like(token_weight[0]), [], 0
        labelled = [item for item in zip(micro_batch.trajectories, micro_batch.loss_counts) if item[1]]
        for mixture, members in groupby(labelled, key=lambda item: self.routing.mixture(item[0].domain)):
            members = list(members)
            end = start + sum(count for _, count in members)
            names = [name for name, _ in mixture]
            hidden = [torch.cat([self.cache.pop(t.index, name) for t, _ in members]) for name in names]
            loss, token_kl = linear_kl(
                rows[start:end],
                self.student.head_weight(),
                hidden,
                [self.bank.head(name) for name in names],
                token_weight=token_weight[start:end],
                mixture_weight=torch.tensor([weight for _, weight in mixture], device=rows.device),
                temperature=self.temperature,
                **self.head_arguments,
            )
            total = total + loss
            per_token.append(token_kl)
            start = end
        return total, torch.cat(per_token)
