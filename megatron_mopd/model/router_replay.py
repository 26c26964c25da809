"""Routing replay: the student trains with the experts that its tokens went to while they were sampled.

The sampler and the trainer round differently, and near a tie that is enough to send a token to another
expert, which changes log-probs far more than rounding does (R3). So the routers take down their choice while
sampling and take it back while training; the weights of the chosen experts still come from the router, with
its gradient. Only ever installed in the student: teachers route for themselves.

megatron-core's routers ask an object `router_replay` for their top-k when they have one. Its own class keeps
a process-wide list of all routers; ours belongs to one router and knows no other.
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
"""Stands in a replayed choice for tokens that were not sampled (padding, given answers)."""


class RoutingChoice(ForwardInput[Tensor]):
    """The experts [tokens, k] of one router's tokens: own ones, taken down, or given back."""

    def __init__(self, position: int):
        super().__init__()
        self.position = position
        """Which of this rank's mixture-of-experts layers it is, counted over all its model chunks."""
        self._recorded: Tensor | None = None
        self._recording = False

    def record(self) -> None:
        """Take down the next forward pass's choice."""
        self._recording = True

    def take(self) -> Tensor:
        """[tokens, k] what the last forward pass chose."""
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
    """Give every router of the student's chunks its `RoutingChoice`; `ConfigError` for routers without one
    top-k choice."""
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
    """The smallest integer that names one of `num_experts` experts."""
    return torch.uint8 if num_experts <= 256 else torch.int16


def routing_choices(chunk: HiddenStateGPT) -> list[RoutingChoice]:
    """The choices of a chunk's routers in the order of its layers; none where replay is not installed."""
    return getattr(chunk, "routing_choices", [])


@contextlib.contextmanager
def replaying(chunk: torch.nn.Module, experts: Tensor | None) -> Iterator[None]:
    """Within, the chunk's routers use `experts` [layers of this rank, s/cp, b, k], `OWN_CHOICE` excepted."""
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
