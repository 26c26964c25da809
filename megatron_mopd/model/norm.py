"""RMSNorm with sequence parallelism, without Transformer Engine or Apex; also over sharded heads."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Root-mean-square layer norm over the last dimension, statistics in at least float32.

    Under sequence parallelism each rank sees only its slice of the sequence, so the weight's gradient is
    partial; the attribute `sequence_parallel` on the weight makes megatron-core sum it over the
    tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, (x.size(-1),), self.weight, self.eps)


class HeadsRMSNorm(torch.nn.Module):
    """Root-mean-square layer norm over all heads of a token together (OLMoE, arXiv 2409.02060), of which this
    rank holds a shard: [..., heads / tp, d]. Statistics in at least float32.

    Every tensor-parallel rank holds the whole weight [heads x d] and uses the part of its heads:
    megatron-core sums gradients of `q_layernorm` and `k_layernorm` over the group.

    Collectives: an all-reduce of one number per token over the tensor-parallel group, forward and backward.
    """

    heads: int
    """Number of heads of the whole model; a class attribute set by `over_heads`, like `group`."""
    group: dist.ProcessGroup

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused):
        """`hidden_size`: channels of one head, d."""
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(self.heads * hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = wide.square().sum(dim=(-2, -1), keepdim=True)
        size, rank, own = self.group.size(), self.group.rank(), x.size(-2) * x.size(-1)
        if size > 1:  # sum over ranks in forward, and of the gradients in backward
            squares = reduce_from_tensor_model_parallel_region(squares, group=self.group)
            squares = copy_to_tensor_model_parallel_region(squares, group=self.group)
        # With fewer key heads than ranks, a head is counted on several ranks, in the sum as in the number.
        normed = wide * torch.rsqrt(squares / (size * own) + self.eps)
        start = rank * self.heads // size * x.size(-1)
        weight = self.weight[start : start + own].view(x.shape[-2:])
        return normed.to(x.dtype) * weight


def over_heads(heads: int, group: dist.ProcessGroup) -> type[HeadsRMSNorm]:
    """The norm class for a layer spec, over this many heads on the ranks of `group`."""
    return type("HeadsRMSNorm", (HeadsRMSNorm,), dict(heads=heads, group=group))
