"""Floating-point operations of a model's forward pass.

Counts the matrix products that the model needs: 2 per weight and token, causal attention over earlier tokens,
and the output head only on response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.model.specs import moe_layer_pattern

Number = TypeVar("Number", float, np.ndarray)


@dataclass(frozen=True)
class ForwardCost:
    """FLOPs of a model's forward pass."""

    token: float
    """Per token, without attention scores and head."""
    pair: float
    """Per pair of a token and a token that it attends to."""
    head: float
    """The output head on one token."""

    def of(self, trajectory: Trajectory) -> float:
        """FLOPs of a whole trajectory, with the head on its response tokens."""
        return self.of_lengths(len(trajectory), trajectory.response_length)

    def of_lengths(self, length: Number, response_length: Number) -> Number:
        """`of` trajectories with these numbers of tokens, elementwise for arrays."""
        pairs = length * (length + 1) / 2
        return self.token * length + self.pair * pairs + self.head * response_length


def forward_cost(config: TransformerConfig, vocab_size: int) -> ForwardCost:
    """Cost of one forward pass of this architecture; independent of the layout."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if config.multi_latent_attention:
        keys, values = config.qk_head_dim + config.qk_pos_emb_head_dim, config.v_head_dim
        queries = hidden * heads * keys
        if config.q_lora_rank:
            queries = config.q_lora_rank * (hidden + heads * keys)
        latent = hidden * (config.kv_lora_rank + config.qk_pos_emb_head_dim)
        expanded = config.kv_lora_rank * heads * (config.qk_head_dim + values)
        attention = queries + latent + expanded + heads * values * hidden
    else:
        keys = values = config.kv_channels
        groups = config.num_query_groups or heads
        attention = hidden * (heads + 2 * groups) * keys + heads * values * hidden
    matrices = 3 if config.gated_linear_unit else 2
    dense = matrices * hidden * config.ffn_hidden_size
    sparse = 0
    if config.num_moe_experts:
        expert = matrices * hidden * (config.moe_ffn_hidden_size or config.ffn_hidden_size)
        shared = matrices * hidden * (config.moe_shared_expert_intermediate_size or 0)
        sparse = config.moe_router_topk * expert + shared + hidden * config.num_moe_experts
        pattern = moe_layer_pattern(config)
    else:
        pattern = [0] * config.num_layers
    weights = sum(attention + (sparse if is_sparse else dense) for is_sparse in pattern)
    pair = 2.0 * heads * (keys + values) * config.num_layers
    return ForwardCost(token=2.0 * weights, pair=pair, head=2.0 * hidden * vocab_size)
