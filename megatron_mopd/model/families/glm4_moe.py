"""GLM-4.5 and 4.6: grouped-query attention with half of each head rotated, DeepSeek-V3's routing."""

from megatron_mopd.model.families import parts
from megatron_mopd.model.families.table import Family


def _to_megatron(config):
    return (
        parts.basics_to_megatron(config)
        | parts.sigmoid_router_to_megatron(config)
        | dict(add_qkv_bias=config.attention_bias or None, qk_layernorm=config.use_qk_norm or None)
    )


def _to_hugging_face(model):
    get, config = model.transformer.get, parts.basics_to_hugging_face(model)
    config["rope_parameters"]["partial_rotary_factor"] = model.rotary_percent
    return (
        config
        | parts.sigmoid_router_to_hugging_face(model)
        | dict(
            attention_bias=bool(get("add_qkv_bias")),
            use_qk_norm=bool(get("qk_layernorm")),
            num_nextn_predict_layers=0,
        )
    )


def _rules(model):
    return parts.embeddings(model) + parts.attention(model) + parts.dense_mlp(model) + parts.experts(model)


GLM4_MOE = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    fields=parts.COMMON_FIELDS | parts.SIGMOID_ROUTER_FIELDS,
    constants=parts.SIGMOID_ROUTER,
    rules=_rules,
    to_megatron=_to_megatron,
    to_hugging_face=_to_hugging_face,
)
