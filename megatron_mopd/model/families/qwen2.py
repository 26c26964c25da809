"""Qwen2 and Qwen2.5, dense: biases on query, key and value."""

from megatron_mopd.model.families import parts
from megatron_mopd.model.families.table import Family


def _rules(model):
    return parts.embeddings(model) + parts.attention(model) + parts.dense_mlp(model)


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fields=parts.COMMON_FIELDS,
    constants=dict(add_qkv_bias=True),
    rules=_rules,
    to_megatron=parts.basics_to_megatron,
    to_hugging_face=parts.basics_to_hugging_face,
)
