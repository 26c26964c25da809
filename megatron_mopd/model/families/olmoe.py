"""OLMoE: every layer a mixture of experts, query and key norms over all heads together."""

from megatron_mopd.model.families import parts
from megatron_mopd.model.families.table import Family, Sizes, refuse


def _to_megatron(config):
    refuse(config.clip_qkv is not None, "clip_qkv is not supported")
    basics = parts.basics_to_megatron(config)
    width = basics["kv_channels"] * config.num_attention_heads
    refuse(width != config.hidden_size, "attention heads must be as wide together as hidden_size")
    return basics | dict(
        moe_ffn_hidden_size=config.intermediate_size,
        moe_router_pre_softmax=not config.norm_topk_prob,
        add_qkv_bias=config.attention_bias or None,
        attention_output_bias=bool(config.attention_bias),
    )


def _to_hugging_face(model):
    return parts.basics_to_hugging_face(model) | dict(
        intermediate_size=Sizes.of(model).expert_ffn,
        norm_topk_prob=not model.transformer.get("moe_router_pre_softmax", False),
        attention_bias=model.attention_output_bias,
        clip_qkv=None,
    )


def _rules(model):
    return parts.embeddings(model) + parts.attention(model) + parts.experts(model)


OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    fields=parts.COMMON_FIELDS | {"num_experts": "num_moe_experts", "num_experts_per_tok": "moe_router_topk"},
    constants=dict(qk_layernorm=True, qk_layernorm_over_heads=True),
    rules=_rules,
    to_megatron=_to_megatron,
    to_hugging_face=_to_hugging_face,
)
