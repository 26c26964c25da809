"""Llama: SmolLM2, Llama 2 and 3."""

from megatron_mopd.model.families import parts
from megatron_mopd.model.families.table import Family, refuse


def _to_megatron(config):
    refuse(config.mlp_bias and not config.attention_bias, "mlp_bias without attention_bias is not supported")
    everywhere = config.mlp_bias and config.attention_bias
    return parts.basics_to_megatron(config) | dict(
        add_bias_linear=True if everywhere else None,
        add_qkv_bias=config.attention_bias and not everywhere or None,
        attention_output_bias=bool(config.attention_bias and not everywhere),
    )


def _to_hugging_face(model):
    everywhere = bool(model.transformer.get("add_bias_linear"))
    attention = everywhere or model.attention_output_bias
    return parts.basics_to_hugging_face(model) | dict(attention_bias=attention, mlp_bias=everywhere)


def _rules(model):
    return parts.embeddings(model) + parts.attention(model) + parts.dense_mlp(model)


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    fields=parts.COMMON_FIELDS,
    constants={},
    rules=_rules,
    to_megatron=_to_megatron,
    to_hugging_face=_to_hugging_face,
)
