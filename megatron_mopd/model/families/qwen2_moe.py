"""Qwen2-MoE and Qwen1.5-MoE: biases on query, key and value, one shared expert behind a gate."""

from megatron_mopd.model.families import parts
from megatron_mopd.model.families.table import Family, Sizes, refuse


def _to_megatron(config):
    refuse(not config.qkv_bias, "qkv_bias=false is not supported")
    return parts.basics_to_megatron(config) | parts.softmax_router_to_megatron(config)


def _to_hugging_face(model):
    return (
        parts.basics_to_hugging_face(model)
        | parts.softmax_router_to_hugging_face(model)
        | dict(qkv_bias=True, shared_expert_intermediate_size=Sizes.of(model).shared_ffn)
    )


def _rules(model):
    return (
        parts.embeddings(model)
        + parts.attention(model)
        + parts.dense_mlp(model)
        + parts.experts(model, shared="shared_expert")
    )


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    fields=parts.COMMON_FIELDS
    | {
        "num_experts": "num_moe_experts",
        "num_experts_per_tok": "moe_router_topk",
        "moe_intermediate_size": "moe_ffn_hidden_size",
        "shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
    },
    constants=dict(add_qkv_bias=True, moe_shared_expert_gate=True),
    rules=_rules,
    to_megatron=_to_megatron,
    to_hugging_face=_to_hugging_face,
)
