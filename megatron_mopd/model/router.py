"""megatron-core's router with auxiliary losses weighted by the tokens of the global batch.

A unit u of T_u tokens (a micro-batch for `aux_loss`, a trajectory for `seq_aux_loss`) has the loss of Switch
Transformers (arXiv 2101.03961, equation 4). A step minimizes the mean of these losses over all tokens that go
through the model:

    moe_aux_loss_coeff * sum_u T_u / T * (E * sum_e f_ue P_ue),    T = sum_u T_u
    moe_z_loss_coeff   * 1 / T * sum_t (logsumexp of token t's router logits)^2      (arXiv 2202.08906, eq. 5)

f_ue is the share of the unit's choices that selected expert e, P_ue its mean probability. With units of equal
size this is the mean over micro-batches that the coefficients weight in pretraining. Padding is not counted
as tokens.

megatron-core attaches a multiple of each loss to its graph and divides all gradients by the number of tokens
in the main loss, here the response tokens. A loss is therefore attached with the factor T_u x (response
tokens / all tokens). (megatron-core's own factor, the valid tokens of the rank, assumes that the divisor is
the number of all tokens; 0.16.1 also omits the number of tensor- and context-parallel ranks.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_mopd.data.batching import MicroBatch
from megatron_mopd.model.forward_input import ForwardInput


class RoutedTokens(NamedTuple):
    """The trajectories of the tokens that a rank's routers see in one forward pass."""

    trajectory: Tensor
    """[tokens] index of the trajectory in the micro-batch; `count` for padding."""
    count: int
    response_share: float
    """Response tokens of the global batch divided by all its tokens: the factor for a mean over all tokens
    when gradients are divided by response tokens."""


class BalancedRouter(TopKRouter):
    """A `TopKRouter` with the losses of this module's formulas.

    They are attached inside `balancing`, which provides the routed tokens, if gradients are enabled and the
    model is in training mode. The losses are in float32 (float64 for float64 scores), whatever the model's
    precision.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.routed: ForwardInput[RoutedTokens] = ForwardInput()
        self._tokens: RoutedTokens | None = None

    def routing(self, *args, **kwargs):
        self._tokens = self.routed.next_target()
        return super().routing(*args, **kwargs)

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """No collectives: every rank adds the loss of its own tokens."""
        coefficient, tokens = self.config.moe_z_loss_coeff, self._tokens
        if not coefficient or tokens is None or not (self.training and torch.is_grad_enabled()):
            return logits
        values = _precise(logits).logsumexp(dim=-1).square()
        is_token = tokens.trajectory < tokens.count
        loss = torch.where(is_token, values, torch.zeros_like(values)).sum()
        return self._attach(logits, coefficient * loss)

    def _apply_aux_loss(self, probs, scores_for_aux_loss, routing_map, with_padding_mask=False):
        coefficient, tokens = self.get_aux_loss_coeff("aux_loss"), self._tokens
        if not coefficient or tokens is None:
            return probs
        unit = (tokens.trajectory == tokens.count).long()  # one unit for all tokens, and one for padding
        selected = self._selected(routing_map, unit, 1, self.tp_cp_group)
        loss = self._load_balancing_loss(scores_for_aux_loss, selected, unit)
        return self._attach(probs, coefficient * loss)

    def _apply_seq_aux_loss(
        self, probs, scores_for_aux_loss, routing_map, seq_length, bsz, with_padding_mask=False
    ):
        coefficient, tokens = self.get_aux_loss_coeff("seq_aux_loss"), self._tokens
        if not coefficient or tokens is None:
            return probs
        selected = self._selected(routing_map, tokens.trajectory, tokens.count, self.tp_cp_group)
        loss = self._load_balancing_loss(scores_for_aux_loss, selected, tokens.trajectory)
        return self._attach(probs, coefficient * loss)

    def _apply_global_aux_loss(self, probs, scores_for_aux_loss, routing_map, with_padding_mask=False):
        coefficient, tokens = self.get_aux_loss_coeff("global_aux_loss"), self._tokens
        if not coefficient or tokens is None:
            return probs
        unit = (tokens.trajectory == tokens.count).long()
        # Accumulated over this step's micro-batches so far, and over all ranks (arXiv 2501.11873).
        self.global_tokens_per_expert += self._selected(routing_map, unit, 1, self.tp_dp_cp_group)[0]
        loss = self._load_balancing_loss(scores_for_aux_loss, self.global_tokens_per_expert[None], unit)
        return self._attach(probs, coefficient * loss)

    def _selected(self, routing_map: Tensor, unit: Tensor, units: int, group: dist.ProcessGroup) -> Tensor:
        """[units, experts]: how often each unit selected each expert, over the ranks that share the unit.

        Collective: one all-reduce of units x experts float32 over `group`.
        """
        with torch.no_grad():
            counts = torch.zeros(units + 1, self.num_experts, dtype=torch.float32, device=unit.device)
            counts = counts.index_add_(0, unit, routing_map.float())[:units].contiguous()
            if group.size() > 1:
                dist.all_reduce(counts, group=group)
        return counts

    def _load_balancing_loss(self, scores: Tensor, selected: Tensor, unit: Tensor) -> Tensor:
        """This rank's part of sum_u T_u E sum_e f_ue P_ue; the parts of the ranks that share the tokens add
        up.

        scores [tokens, experts] sum to one, selected [units, experts], unit [tokens].
        """
        units = selected.size(0)
        scores = _precise(scores)
        probability = scores.new_zeros(units + 1, self.num_experts).index_add(0, unit, scores)[:units]
        share = selected / selected.sum(dim=1, keepdim=True).clamp(min=1)
        return self.num_experts * (share.to(scores.dtype) * probability).sum()

    def _attach(self, activation: Tensor, loss: Tensor) -> Tensor:
        return MoEAuxLossAutoScaler.apply(activation, loss * self._tokens.response_share)


@contextlib.contextmanager
def balancing(routers: list[BalancedRouter], micro_batch: MicroBatch) -> Iterator[None]:
    """Context that provides the tokens of `micro_batch` to the routers (all of one model chunk)."""
    routers = [router for router in routers if router.training]
    if not routers:
        yield
        return
    trajectory = micro_batch.trajectory_ids.transpose(0, 1)
    config, tp = routers[0].config, routers[0].tp_group
    if config.sequence_parallel:
        part = trajectory.size(0) // tp.size()
        trajectory = trajectory.narrow(0, tp.rank() * part, part)
    tokens = RoutedTokens(trajectory.flatten(), len(micro_batch.trajectories), micro_batch.response_share)
    try:
        for router in routers:
            router.routed.give(tokens)
        yield
    finally:
        for router in routers:
            router.routed.take_back()


def _precise(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
