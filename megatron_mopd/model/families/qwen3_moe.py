"""Qwen3-MoE: Qwen3's attention, softmax routing, dense layers wherever the configuration puts them."""

from megatron_mopd.model.families import parts, qwen3
from megatron_mopd.model.families.table import Family


def _to_megatron(config):
    return qwen3.to_megatron(config) | parts.softmax_router_to_megatron(config)


def _to_hugging_face(model):
    return qwen3.to_hugging_face(model) | parts.softmax_router_to_hugging_face(model)


def _rules(model):
    return parts.embeddings(model) + parts.attention(model) + parts.dense_mlp(model) + parts.experts(model)


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    fields=parts.COMMON_FIELDS
    | {
        "num_experts": "num_moe_experts",
        "num_experts_per_tok": "moe_router_topk",
        "moe_intermediate_size": "moe_ffn_hidden_size",
    },
    constants=dict(qk_layernorm=True),
    rules=_rules,
    to_megatron=_to_megatron,
    to_hugging_face=_to_hugging_face,
)
