"""Floating-point operations of a step, and their share of the device's peak.

Counts the matrix products that the model needs: 2 per weight and token, causal attention over earlier tokens,
the output head only on response tokens; the backward counts as twice the forward. Recompute, sampling and the
divergence itself are not counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.model.specs import moe_layer_pattern
from megatron_mopd.teachers.routing import Mixture

# Dense bfloat16 FLOP/s from the manufacturer's data sheets, most of which print twice that value, with
# sparsity. The first entry whose words all occur in the device's name is used.
_PEAKS = {
    "GB300": 2.5e15,
    "B300": 2.25e15,
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 989.4e12,
    "H200 NVL": 835.5e12,
    "H200": 989.4e12,
    "H100 PCIe": 756.5e12,
    "H100 NVL": 835.5e12,
    "H100": 989.4e12,
    "H800 PCIe": 756.5e12,
    "H800": 989.4e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
}


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
        n = len(trajectory)
        pairs = n * (n + 1) / 2
        return self.token * n + self.pair * pairs + self.head * trajectory.response_length


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


def step_flops(
    trajectories: Sequence[Trajectory],
    student: ForwardCost,
    teachers: Mapping[str, ForwardCost],
    mixture: Callable[[str], Mixture],
) -> float:
    """FLOPs of one optimizer step on the global batch: the student forward and backward, each trajectory's
    teachers forward.
    """
    total = 0.0
    for trajectory in trajectories:
        total += 3 * student.of(trajectory)
        total += sum(teachers[name].of(trajectory) for name, _ in mixture(trajectory.domain))
    return total


def peak_flops(device: str, params_dtype: str) -> float | None:
    """Peak FLOP/s of the named device; `None` if unknown."""
    if params_dtype != "bfloat16":
        return None
    # "A100" is a word of "NVIDIA A100-SXM4-80GB", but not of "NVIDIA RTX A1000".
    words = set(re.split(r"[\s-]+", device))
    return next((peak for name, peak in _PEAKS.items() if words.issuperset(name.split())), None)


def utilization(flops: float, seconds: float, ranks: int, peak: float | None) -> dict[str, Any]:
    """`tflops` per second and rank, and `mfu`, their share of the peak, if it is known."""
    if not seconds > 0:
        return {}
    each = flops / seconds / ranks
    return {"tflops": each / 1e12} | ({"mfu": each / peak} if peak else {})
