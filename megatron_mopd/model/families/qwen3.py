"""Qwen3, dense: norms on queries and keys of each head."""

from megatron_mopd.model.families import parts
from megatron_mopd.model.families.table import Family


def to_megatron(config):
    return parts.basics_to_megatron(config) | dict(
        add_qkv_bias=config.attention_bias or None, attention_output_bias=bool(config.attention_bias)
    )


def to_hugging_face(model):
    return parts.basics_to_hugging_face(model) | dict(attention_bias=model.attention_output_bias)


def _rules(model):
    return parts.embeddings(model) + parts.attention(model) + parts.dense_mlp(model)


QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fields=parts.COMMON_FIELDS,
    constants=dict(qk_layernorm=True),
    rules=_rules,
    to_megatron=to_megatron,
    to_hugging_face=to_hugging_face,
)
