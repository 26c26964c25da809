"""Routing replay: the student trains with the experts that were chosen for its tokens during sampling.

The sampler and the trainer round differently. Near a tie that is enough to route a token to a different
expert, which changes log-probs far more than rounding does (R3). Therefore the routers record their choice
during sampling and replay it during training; the weights of the chosen experts still come from the router,
with its gradient. Only the student uses replay; teachers choose their own experts.

megatron-core's routers call an object `router_replay` for their top-k if it is set. megatron-core's own class
keeps a process-wide list of all routers; ours belongs to a single router.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_mopd.config import ConfigError
from megatron_mopd.model.forward_input import ForwardInput
from megatron_mopd.model.gpt import HiddenStateGPT, unwrap

OWN_CHOICE = -1
"""Marks tokens in a replayed choice that were not sampled (padding, given answers)."""


class RoutingChoice(ForwardInput[Tensor]):
    """The experts [tokens, k] of one router's tokens: the router's own choice, recorded or replayed."""

    def __init__(self, position: int):
        super().__init__()
        self.position = position
        """Index among this rank's mixture-of-experts layers, counted over all its model chunks."""
        self._recorded: Tensor | None = None
        self._recording = False

    def record(self) -> None:
        """Record the choice of the next forward pass."""
        self._recording = True

    def take(self) -> Tensor:
        """The experts [tokens, k] that the last forward pass chose."""
        recorded, self._recorded, self._recording = self._recorded, None, False
        return recorded

    def get_replay_topk(self, scores, topk, num_groups=None, group_topk=None, default_compute_topk=None):
        """(scores [tokens, k], experts [tokens, k]) for router scores [tokens, experts]; megatron-core's
        protocol."""
        values, experts = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self._recording:
            self._recorded = experts.detach()
            return values, experts
        target = self.next_target()
        if target is None:
            return values, experts
        experts = torch.where(target >= 0, target.to(experts.dtype), experts)
        return scores.gather(1, experts), experts


def install_routing_replay(chunks: Sequence[torch.nn.Module]) -> None:
    """Give every router of the student's chunks a `RoutingChoice`; `ConfigError` for routers that do not
    choose top-k experts."""
    position = 0
    for wrapped in chunks:
        chunk = unwrap(wrapped)
        config = chunk.config
        if not config.num_moe_experts:
            raise ConfigError("rollout.routing_replay: the student has no experts (student.num_moe_experts)")
        if config.moe_router_fusion:
            raise ConfigError("rollout.routing_replay: needs student.moe_router_fusion=false")
        if config.moe_router_load_balancing_type in ("sinkhorn", "quantile_balancing"):
            raise ConfigError(
                "rollout.routing_replay: needs a top-k router, student.moe_router_load_balancing_type is "
                f"{config.moe_router_load_balancing_type}"
            )
        chunk.routing_choices = []
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                module.router_replay = RoutingChoice(position)
                chunk.routing_choices.append(module.router_replay)
                position += 1


def compact_dtype(num_experts: int) -> torch.dtype:
    """The smallest integer dtype that can index `num_experts` experts."""
    return torch.uint8 if num_experts <= 256 else torch.int16


def routing_choices(chunk: HiddenStateGPT) -> list[RoutingChoice]:
    """The choices of a chunk's routers in layer order; empty if replay is not installed."""
    return getattr(chunk, "routing_choices", [])


@contextlib.contextmanager
def replaying(chunk: torch.nn.Module, experts: Tensor | None) -> Iterator[None]:
    """Context in which the chunk's routers use `experts` [layers of this rank, s/cp, b, k], except
    `OWN_CHOICE`."""
    model = unwrap(chunk)
    choices = routing_choices(model)
    if experts is None or not choices:
        yield
        return
    if model.config.sequence_parallel:
        tp = model.pg_collection.tp
        part = experts.size(1) // tp.size()
        experts = experts.narrow(1, tp.rank() * part, part)
    try:
        for choice in choices:
            choice.give(experts[choice.position].flatten(0, 1))
        yield
    finally:
        for choice in choices:
            choice.take_back()
