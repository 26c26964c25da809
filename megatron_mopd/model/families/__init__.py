"""Hugging Face architectures, one file each, with one table for both conversion directions."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from megatron_mopd.config import ConfigError, ModelConfig
from megatron_mopd.model.families.deepseek_v3 import DEEPSEEK_V3
from megatron_mopd.model.families.glm4_moe import GLM4_MOE
from megatron_mopd.model.families.llama import LLAMA
from megatron_mopd.model.families.mixtral import MIXTRAL
from megatron_mopd.model.families.olmoe import OLMOE
from megatron_mopd.model.families.qwen2 import QWEN2
from megatron_mopd.model.families.qwen2_moe import QWEN2_MOE
from megatron_mopd.model.families.qwen3 import QWEN3
from megatron_mopd.model.families.qwen3_moe import QWEN3_MOE
from megatron_mopd.model.families.table import Family, Rule, Sizes, Weight, moe_layers
from megatron_mopd.model.rotary import effective_scaling

FAMILIES = {
    family.model_type: family
    for family in (LLAMA, QWEN2, QWEN3, QWEN3_MOE, QWEN2_MOE, MIXTRAL, OLMOE, DEEPSEEK_V3, GLM4_MOE)
}

__all__ = ["FAMILIES", "Family", "Rule", "Weight", "family_named", "matching_family"]


def family_named(model_type: str | None, where: str) -> Family:
    """The family of a `model_type`; `ConfigError` (prefix `where`) lists the supported ones."""
    if model_type not in FAMILIES:
        supported = ", ".join(f"{f.architecture} ({f.model_type})" for f in FAMILIES.values())
        raise ConfigError(f"{where}: architecture {model_type!r} is not supported; supported: {supported}")
    return FAMILIES[model_type]


def matching_family(model: ModelConfig, where: str) -> Family:
    """The first family that can express this architecture; `ConfigError` (prefix `where`) if none can."""
    for family in FAMILIES.values():
        try:
            config = AutoConfig.for_model(**family.hugging_face_config(model))
            if computes(family.model_config(config, where)) == computes(model):
                return family
        except (ValueError, TypeError, ZeroDivisionError, StrictDataclassError):
            continue  # this family cannot express such a model
    raise ConfigError(
        f"{where}: no supported Hugging Face architecture computes this model (tried {', '.join(FAMILIES)})"
    )


def computes(model: ModelConfig) -> dict[str, Any]:
    """Everything that determines the function that a model computes, with defaults filled in: equal for equal
    functions."""
    get, pattern, sizes = model.transformer.get, moe_layers(model), Sizes.of(model)
    rope = (model.rotary_base, model.rotary_percent, effective_scaling(model.rope_scaling))
    result = {
        "layers": pattern,
        "embeddings": (sizes.vocab, sizes.hidden, model.share_embeddings_and_output_weights),
        "positions": rope if model.position_embedding_type == "rope" else None,
        "epsilon": get("layernorm_epsilon", 1e-5),
        "biases": (
            bool(get("add_bias_linear")),
            bool(get("add_qkv_bias") or get("add_bias_linear")),
            bool(model.attention_output_bias or get("add_bias_linear")),
        ),
        "activation": (get("activation_func", "silu"), get("gated_linear_unit", True)),
        "qk_layernorm": (bool(get("qk_layernorm")), model.qk_layernorm_over_heads),
        "attention": (get("num_attention_heads"), sizes.groups, sizes.head),
        "mlp": None if all(pattern) else sizes.ffn,
    }
    if get("multi_latent_attention"):
        names = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
        result["attention"] = (get("num_attention_heads"), *(get(name) for name in names))
    if any(pattern):
        names = ("num_moe_experts", "moe_router_topk", "moe_router_num_groups", "moe_router_group_topk")
        result["experts"] = (*(get(name) for name in names), sizes.expert_ffn, sizes.shared_ffn)
        result["router"] = (
            get("moe_router_score_function", "softmax"),
            bool(get("moe_router_pre_softmax")),
            bool(get("moe_router_enable_expert_bias")),
            get("moe_router_topk_scaling_factor") or 1.0,
            bool(get("moe_shared_expert_gate")),
        )
    return result
