"""RMSNorm that works under sequence parallelism without Transformer Engine or Apex."""

from __future__ import annotations

import torch
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
