"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) for padded, packed and cached sequences."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor

from megatron_mopd.model.rotary import rotate

LATENT_NORM_EPSILON = 1e-6
"""Epsilon of the norms on the compressed query and key-value; published configurations do not contain it."""


class LatentSelfAttention(MLASelfAttention):
    """megatron-core's multi-latent attention with per-token rotary angles and a KV cache.

    Weights and linear layers are megatron-core's. Its forward pass counts positions from the start of the
    row, which is wrong for packed documents and for decoding. The cache holds expanded keys and values,
    already rotated.

    Collectives beyond those of the linear layers, per token over TP: with column-parallel down projections
    one all-gather of q_lora_rank + kv_lora_rank + rope channels; with Transformer Engine's duplicated down
    projections and sequence parallelism one all-gather of the rope channels.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        del self.rotary_pos_emb  # every forward pass receives its angles
        # The norms are separate modules, or fused into the following projections by Transformer Engine.
        for name in ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj"):
            if hasattr(norm := getattr(self, name, None), "eps"):
                norm.eps = LATENT_NORM_EPSILON
        if hasattr(self, "q_layernorm") and not self.config.sequence_parallel:
            # megatron-core sums gradients of "q_layernorm" over TP, as for a norm on each rank's heads. This
            # norm sees the whole compressed query on every rank, so the gradients are equal and must be
            # averaged.
            for parameter in self.q_layernorm.parameters():
                parameter.average_gradients_across_tp_domain = True

    def _resolve_qk_norm_config(self, submodules) -> dict[str, type]:
        """Use the layer spec's modules. 0.19 would add a norm on an uncompressed query."""
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states=None,
        inference_context=None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params=None,
        **_unused,
    ) -> tuple[Tensor, Tensor | None]:
        """[s(/tp), b, h] -> attention output of the same shape, and the output projection's bias."""
        query, key, value = self._project(hidden_states, rotary_pos_emb)
        if inference_context is not None:
            key, value = inference_context.append(self.layer_number, key, value)
        if self.checkpoint_core_attention and self.training:
            attended = self._checkpointed_attention_forward(
                query, key, value, attention_mask, packed_seq_params=packed_seq_params
            )
        else:
            attended = self.core_attention(
                query, key, value, attention_mask, packed_seq_params=packed_seq_params
            )
        return self.linear_proj(attended)

    def _project(self, hidden: Tensor, angles: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key [s, b, heads/tp, nope + rope], value [s, b, heads/tp, v]."""
        config, heads = self.config, self.num_attention_heads_per_partition
        if config.q_lora_rank is None:
            query, _ = self.linear_q_proj(hidden)
        else:
            compressed = self._replicated(self.linear_q_down_proj(hidden)[0], config.q_lora_rank)
            query, _ = self.linear_q_up_proj(self.q_layernorm(self._scattered(compressed, hidden)))
        query = query.unflatten(-1, (heads, self.q_head_dim))

        width = config.kv_lora_rank + config.qk_pos_emb_head_dim
        combined = self._replicated(self.linear_kv_down_proj(hidden)[0], width)
        compressed, key_rope = combined.split((config.kv_lora_rank, config.qk_pos_emb_head_dim), dim=-1)
        if key_rope.size(0) != query.size(0):  # duplicated projection of this rank's sequence shard
            key_rope = gather_from_sequence_parallel_region(key_rope, group=self.tp_group)
        else:
            # Every rank's heads use all of it, so the gradients must be summed.
            key_rope = copy_to_tensor_model_parallel_region(key_rope, group=self.tp_group)
        key_value, _ = self.linear_kv_up_proj(self.kv_layernorm(self._scattered(compressed, hidden)))
        key_value = key_value.unflatten(-1, (heads, config.qk_head_dim + config.v_head_dim))
        key_nope, value = key_value.split((config.qk_head_dim, config.v_head_dim), dim=-1)

        query_nope, query_rope = query.split((config.qk_head_dim, config.qk_pos_emb_head_dim), dim=-1)
        key_rope = key_rope.unsqueeze(2)
        if angles is not None:
            query_rope = rotate(query_rope, angles, interleaved=True)
            key_rope = rotate(key_rope, angles, interleaved=True)
        query = torch.cat((query_nope, query_rope), dim=-1)
        key = torch.cat((key_nope, key_rope.expand(-1, -1, heads, -1)), dim=-1)
        return query, key, value

    def _replicated(self, x: Tensor, width: int) -> Tensor:
        """All channels of a down projection's output; gathers those of a column-parallel projection."""
        return x if x.size(-1) == width else gather_from_tensor_model_parallel_region(x, group=self.tp_group)

    def _scattered(self, x: Tensor, hidden: Tensor) -> Tensor:
        """This rank's sequence shard; scatters a sequence that a column-parallel projection has gathered."""
        return (
            x if x.size(0) == hidden.size(0) else scatter_to_sequence_parallel_region(x, group=self.tp_group)
        )
