"""DeepSeek-V3 and R1: latent attention, sigmoid routing with a selection bias and groups, shared experts,
YaRN."""

from megatron_mopd.model.families import parts
from megatron_mopd.model.families.table import Family, refuse


def _to_megatron(config):
    refuse(config.attention_bias, "attention_bias=true is not supported with latent attention")
    refuse(not config.rope_interleave, "rope_interleave=false is not supported")
    basics = parts.basics_to_megatron(config)
    del basics["kv_channels"]  # the latent dimensions determine the head size
    return basics | parts.sigmoid_router_to_megatron(config) | dict(num_query_groups=None)


def _to_hugging_face(model):
    get = model.transformer.get
    return (
        parts.basics_to_hugging_face(model)
        | parts.sigmoid_router_to_hugging_face(model)
        | dict(
            attention_bias=False,
            rope_interleave=True,
            num_key_value_heads=get("num_attention_heads"),
            head_dim=get("qk_pos_emb_head_dim"),
            q_lora_rank=get("q_lora_rank"),
            num_nextn_predict_layers=0,
        )
    )


def _rules(model):
    return (
        parts.embeddings(model)
        + parts.latent_attention(model)
        + parts.dense_mlp(model)
        + parts.experts(model)
    )


DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    fields=parts.COMMON_FIELDS
    | parts.SIGMOID_ROUTER_FIELDS
    | {
        "q_lora_rank": "q_lora_rank",
        "kv_lora_rank": "kv_lora_rank",
        "qk_nope_head_dim": "qk_head_dim",
        "qk_rope_head_dim": "qk_pos_emb_head_dim",
        "v_head_dim": "v_head_dim",
    },
    constants=parts.SIGMOID_ROUTER | dict(multi_latent_attention=True, qk_layernorm=True),
    rules=_rules,
    to_megatron=_to_megatron,
    to_hugging_face=_to_hugging_face,
)
