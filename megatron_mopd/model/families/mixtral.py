"""Mixtral: Llama's attention, every layer a mixture of experts, chosen probabilities normalized."""

from megatron_mopd.model.families import parts
from megatron_mopd.model.families.table import Family, Sizes


def _to_megatron(config):
    return parts.basics_to_megatron(config) | dict(moe_ffn_hidden_size=config.intermediate_size)


def _to_hugging_face(model):
    return parts.basics_to_hugging_face(model) | dict(intermediate_size=Sizes.of(model).expert_ffn)


def _rules(model):
    return (
        parts.embeddings(model)
        + parts.attention(model)
        + parts.experts(model, block="block_sparse_moe", names=("w1", "w3", "w2"))
    )


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    fields=parts.COMMON_FIELDS
    | {"num_local_experts": "num_moe_experts", "num_experts_per_tok": "moe_router_topk"},
    constants={},
    rules=_rules,
    to_megatron=_to_megatron,
    to_hugging_face=_to_hugging_face,
    other_names=((".mlp.", ".block_sparse_moe."),),  # the module's name since transformers 5
)
