"""Estimates the activations that the student's forward passes save for backward, tensor by tensor.

The counts follow megatron-core's modules: a linear layer saves its input, a norm its input (and on the CPU,
where it is not a single kernel, also the normalized input, both in at least float32), attention its inputs
and output, a gated MLP its projections. Under sequence parallelism activations between tensor-parallel
regions are divided by TP; linear layers gather their input again in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mopd.model.specs import moe_layer_pattern

_INDEX = 8
"""Bytes of an int64."""


@dataclass(frozen=True)
class SavedActivations:
    """Bytes per token of a micro-batch, on each tensor-parallel rank."""

    model: TransformerConfig
    itemsize: int
    on_cpu: bool
    norms_over_heads: bool = False
    """Whether query and key norms run over all heads together (`HeadsRMSNorm`), with several kernels on any
    device."""

    @property
    def _split(self) -> int:
        return self.model.tensor_model_parallel_size if self.model.sequence_parallel else 1

    def _norm_input(self, width: float) -> float:
        """Bytes that a norm over `width` numbers saves: its input and a scale per row."""
        wide = max(4, self.itemsize)
        return (2 * width * wide if self.on_cpu else width * self.itemsize) + wide / self._split

    def stage(self, layers: list[int], is_first: bool, is_last: bool) -> float:
        """Bytes per token of a model chunk with these layers, numbered from 0."""
        pattern, h = moe_layer_pattern(self.model), self.model.hidden_size
        total = sum(self.layer(pattern[number]) for number in layers)
        if self.model.recompute_granularity == "full":  # layers save inputs; one is recomputed
            most = max((self.layer(pattern[number]) for number in layers), default=0.0)
            total = len(layers) * h / self._split * self.itemsize + most
        if is_first:
            total += _INDEX
        if is_last:
            total += self._norm_input(h / self._split) + _INDEX
        return total

    def layer(self, is_moe: bool) -> float:
        h = self.model.hidden_size / self._split
        norms = 2 * (self._norm_input(h) + h * self.itemsize)
        attention = self._latent_attention() if self.model.multi_latent_attention else self._attention()
        return norms + attention + (self._experts() if is_moe else self._mlp(self.model.ffn_hidden_size))

    def _attention(self) -> float:
        """The fused projection, query and key after rotation, the output, and one number per head."""
        model, tp = self.model, self.model.tensor_model_parallel_size
        groups = max(1, model.num_query_groups / tp)
        query = model.num_attention_heads * model.kv_channels / tp
        key = groups * model.kv_channels
        kept = (query + 2 * key) + (query + key) + query
        normed = 0.0
        if model.qk_layernorm:
            wide = max(4, self.itemsize)
            is_copied = model.num_attention_heads / tp > groups > 1  # heads are not contiguous
            normed = query * self.itemsize if is_copied else 0.0
            if self.norms_over_heads:
                normed += (query + key) * (self.itemsize + (wide if self.itemsize < 4 else 0)) + 4 * wide
            elif self.on_cpu:
                normed += (query + key) * wide
                normed += (query + key) * wide if self.itemsize < 4 else 0.0
        return kept * self.itemsize + normed + 4 * model.num_attention_heads / tp

    def _latent_attention(self) -> float:
        """Compressed query, key and value with their norms; the tensors expanded from them; the output."""
        model, tp = self.model, self.model.tensor_model_parallel_size
        heads = model.num_attention_heads / tp
        whole = model.qk_head_dim + model.qk_pos_emb_head_dim
        compressed = model.kv_lora_rank + (model.q_lora_rank or 0)
        norms = self._norm_input(compressed) + compressed * self.itemsize
        made = heads * (2 * whole + model.qk_head_dim + 3 * model.v_head_dim + whole)
        return norms + (made + model.qk_pos_emb_head_dim) * self.itemsize + 4 * heads

    def _mlp(self, width: float) -> float:
        """Both halves of the up projection, the shifted linear half, the activation, and their product."""
        kept = 5 if self.model.gated_linear_unit else 2
        return kept * width / self.model.tensor_model_parallel_size * self.itemsize

    def _experts(self) -> float:
        """Copies of each token for its experts, their MLPs with weighted outputs, and the router's values.
        Assumes that experts get equal numbers of tokens."""
        model = self.model
        etp, topk = model.expert_tensor_parallel_size or 1, model.moe_router_topk
        width = model.moe_ffn_hidden_size or model.ffn_hidden_size
        routed = topk * etp / self._split * (model.hidden_size + 6 * width / etp) * self.itemsize
        router = (4 * model.num_moe_experts * 4 + 2 * topk * _INDEX) / self._split
        shared = 0.0
        if model.moe_shared_expert_intermediate_size:
            shared = self._mlp(model.moe_shared_expert_intermediate_size)
        return routed + router + shared
