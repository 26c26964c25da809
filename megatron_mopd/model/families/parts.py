"""Parts shared by several families: groups of rules, and conversions of configuration values."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from megatron_mopd.config import ModelConfig
from megatron_mopd.model.families.table import (
    Rule,
    Sizes,
    column,
    fused_qkv,
    gated_mlp,
    moe_layers,
    refuse,
    replicated,
    row,
    vocabulary,
)
from megatron_mopd.model.rotary import check_scaling, effective_scaling

# Hugging Face configuration key -> our field, the same in every family.
COMMON_FIELDS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "rms_norm_eps": "layernorm_epsilon",
    "initializer_range": "init_method_std",
}

_LAYER, _HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."


def embeddings(model: ModelConfig) -> tuple[Rule, ...]:
    """Token embedding, final norm, and the output head unless it is tied to the embedding."""
    sizes = Sizes.of(model)
    rules = (
        vocabulary(
            "embedding.word_embeddings.weight", "model.embed_tokens.weight", sizes.vocab, sizes.hidden
        ),
        replicated("decoder.final_layernorm.weight", "model.norm.weight", sizes.hidden),
    )
    if model.share_embeddings_and_output_weights:
        return rules
    return *rules, vocabulary("output_layer.weight", "lm_head.weight", sizes.vocab, sizes.hidden)


def attention(model: ModelConfig) -> tuple[Rule, ...]:
    """Grouped-query attention, with the biases and query-key norms that the model has."""
    sizes, get = Sizes.of(model), model.transformer.get
    ours, theirs = _LAYER + "self_attention.", _HF_LAYER + "self_attn."
    rules = [
        replicated(ours + "linear_qkv.layer_norm_weight", _HF_LAYER + "input_layernorm.weight", sizes.hidden),
        fused_qkv(ours + "linear_qkv.weight", theirs + "{}_proj.weight", sizes, sizes.hidden),
        row(ours + "linear_proj.weight", theirs + "o_proj.weight", sizes.hidden, sizes.query),
    ]
    if get("add_qkv_bias") or get("add_bias_linear"):
        rules.append(fused_qkv(ours + "linear_qkv.bias", theirs + "{}_proj.bias", sizes))
    if model.attention_output_bias or get("add_bias_linear"):
        rules.append(replicated(ours + "linear_proj.bias", theirs + "o_proj.bias", sizes.hidden))
    if get("qk_layernorm"):
        over_heads = model.qk_layernorm_over_heads
        widths = (sizes.query, sizes.key_value) if over_heads else (sizes.head, sizes.head)
        for letter, width in zip("qk", widths):
            norm = theirs + f"{letter}_norm.weight"
            rules.append(replicated(ours + f"{letter}_layernorm.weight", norm, width))
    return tuple(rules)


def dense_mlp(model: ModelConfig) -> tuple[Rule, ...]:
    """The gated MLP of dense layers, and the norm before it."""
    sizes = Sizes.of(model)
    ours, theirs = _LAYER + "mlp.", _HF_LAYER + "mlp."
    norm = _HF_LAYER + "post_attention_layernorm.weight"
    rules = [
        replicated(ours + "linear_fc1.layer_norm_weight", norm, sizes.hidden, layers="dense"),
        gated_mlp(
            ours + "linear_fc1.weight",
            theirs + "gate_proj.weight",
            theirs + "up_proj.weight",
            sizes.ffn,
            sizes.hidden,
            layers="dense",
        ),
        row(ours + "linear_fc2.weight", theirs + "down_proj.weight", sizes.hidden, sizes.ffn, layers="dense"),
    ]
    if model.transformer.get("add_bias_linear"):
        gate, up, down = (theirs + f"{name}_proj.bias" for name in ("gate", "up", "down"))
        rules.append(gated_mlp(ours + "linear_fc1.bias", gate, up, sizes.ffn, layers="dense"))
        rules.append(replicated(ours + "linear_fc2.bias", down, sizes.hidden, layers="dense"))
    return tuple(rules)


def experts(
    model: ModelConfig,
    block: str = "mlp",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    shared: str = "shared_experts",
) -> tuple[Rule, ...]:
    """Router, experts and shared experts of mixture-of-experts layers, and the norm before them.

    `block` and `names` are the family's names of the module and of each expert's gate, up and down
    projection.
    """
    sizes, get = Sizes.of(model), model.transformer.get
    ours, theirs = _LAYER + "mlp.", f"{_HF_LAYER}{block}."
    own = ours + "experts.experts.{expert}."
    gate, up, down = (theirs + f"experts.{{expert}}.{name}.weight" for name in names)
    norm = _HF_LAYER + "post_attention_layernorm.weight"
    hidden, ffn = sizes.hidden, sizes.expert_ffn
    rules = [
        replicated(_LAYER + "pre_mlp_layernorm.weight", norm, hidden, layers="moe"),
        replicated(ours + "router.weight", theirs + "gate.weight", sizes.experts, hidden, layers="moe"),
        gated_mlp(
            own + "linear_fc1.weight",
            gate,
            up,
            ffn,
            hidden,
            layers="moe",
            fused=theirs + "experts.gate_up_proj",
        ),
        row(
            own + "linear_fc2.weight",
            down,
            hidden,
            ffn,
            layers="moe",
            fused=theirs + "experts.down_proj",
        ),
    ]
    if get("moe_router_enable_expert_bias"):
        bias = theirs + "gate.e_score_correction_bias"
        rules.append(replicated(ours + "router.expert_bias", bias, sizes.experts, layers="moe"))
    if sizes.shared_ffn:
        own, gate, up, down = (ours + "shared_experts.", *(theirs + f"{shared}.{n}.weight" for n in names))
        rules.append(gated_mlp(own + "linear_fc1.weight", gate, up, sizes.shared_ffn, hidden, layers="moe"))
        rules.append(row(own + "linear_fc2.weight", down, hidden, sizes.shared_ffn, layers="moe"))
        if get("moe_shared_expert_gate"):
            gate = theirs + "shared_expert_gate.weight"
            rules.append(replicated(own + "gate_weight", gate, 1, hidden, layers="moe"))
    return tuple(rules)


def latent_attention(model: ModelConfig) -> tuple[Rule, ...]:
    """Multi-head latent attention; the query is compressed unless `q_lora_rank` is None."""
    get, hidden = model.transformer.get, model.transformer["hidden_size"]
    heads, nope, rope = get("num_attention_heads"), get("qk_head_dim"), get("qk_pos_emb_head_dim")
    query_rank, rank, value = get("q_lora_rank"), get("kv_lora_rank"), get("v_head_dim")
    ours, theirs = _LAYER + "self_attention.", _HF_LAYER + "self_attn."
    if query_rank is None:
        query = (
            column(ours + "linear_q_proj.weight", theirs + "q_proj.weight", heads * (nope + rope), hidden),
        )
    else:
        norm, up = theirs + "q_a_layernorm.weight", theirs + "q_b_proj.weight"
        query = (
            column(ours + "linear_q_down_proj.weight", theirs + "q_a_proj.weight", query_rank, hidden),
            replicated(ours + "linear_q_up_proj.layer_norm_weight", norm, query_rank),
            column(ours + "linear_q_up_proj.weight", up, heads * (nope + rope), query_rank),
        )
    down, norm = theirs + "kv_a_proj_with_mqa.weight", theirs + "kv_a_layernorm.weight"
    return (
        replicated(_LAYER + "input_layernorm.weight", _HF_LAYER + "input_layernorm.weight", hidden),
        *query,
        column(ours + "linear_kv_down_proj.weight", down, rank + rope, hidden),
        replicated(ours + "linear_kv_up_proj.layer_norm_weight", norm, rank),
        column(ours + "linear_kv_up_proj.weight", theirs + "kv_b_proj.weight", heads * (nope + value), rank),
        row(ours + "linear_proj.weight", theirs + "o_proj.weight", hidden, heads * value),
    )


def basics_to_megatron(config: PretrainedConfig) -> dict[str, Any]:
    """Rotary embedding and head size; refuses configurations that no supported family computes."""
    activation = getattr(config, "hidden_act", "silu")
    refuse(activation != "silu", f"hidden_act={activation!r} is not supported, only 'silu' is")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    refuse(kinds != {"full_attention"} or window, "sliding-window attention is not supported")
    quantization = getattr(config, "quantization_config", None)
    refuse(quantization, "quantized weights are not supported; convert the checkpoint to bfloat16 first")
    rope = dict(config.rope_parameters)
    base, share = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", 1.0)
    problem = check_scaling(rope)
    refuse(problem, f"rope_parameters: {problem}")
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return dict(
        rotary_base=float(base),
        rotary_percent=float(share),
        rope_scaling=effective_scaling(rope),
        kv_channels=head,
    )


def basics_to_hugging_face(model: ModelConfig) -> dict[str, Any]:
    """The inverse of `basics_to_megatron`."""
    get = model.transformer.get
    rope = {"rope_type": "default", "rope_theta": model.rotary_base} | (
        effective_scaling(model.rope_scaling) or {}
    )
    if model.rotary_percent != 1.0:
        rope["partial_rotary_factor"] = model.rotary_percent
    sizes = Sizes.of(model)
    return dict(
        hidden_act="silu",
        rope_parameters=rope,
        head_dim=sizes.head,
        num_key_value_heads=sizes.groups,
        intermediate_size=sizes.ffn,
        rms_norm_eps=get("layernorm_epsilon", 1e-5),
        initializer_range=get("init_method_std", 0.02),
    )


def leading_dense_layers(config: PretrainedConfig) -> list[int] | None:
    """`first_k_dense_replace` as a pattern of layers; `None` if all are mixture-of-experts layers."""
    dense, count = config.first_k_dense_replace, config.num_hidden_layers
    return [0] * dense + [1] * (count - dense) if dense else None


def sigmoid_router_to_megatron(config: PretrainedConfig) -> dict[str, Any]:
    """DeepSeek-V3's router (arXiv 2412.19437, 2.1.2): sigmoid scores, a selection bias, groups."""
    refuse(not config.norm_topk_prob, "norm_topk_prob=false is not supported with a sigmoid router")
    refuse(config.num_experts_per_tok < 2, "num_experts_per_tok must be at least 2 with a sigmoid router")
    groups, chosen, topk = config.n_group, config.topk_group, config.num_experts_per_tok
    limited = groups > 1 and chosen < groups
    # A group's score is the sum of its best two experts in DeepSeek-V3, of its best topk / topk_group here.
    problem = f"num_experts_per_tok={topk} must be twice topk_group={chosen} when groups limit the choice"
    refuse(limited and topk != 2 * chosen, problem)
    shared = config.n_shared_experts * config.moe_intermediate_size if config.n_shared_experts else None
    return dict(
        moe_router_num_groups=groups if limited else None,
        moe_router_group_topk=chosen if limited else None,
        moe_shared_expert_intermediate_size=shared,
        moe_layer_freq=leading_dense_layers(config),
    )


def sigmoid_router_to_hugging_face(model: ModelConfig) -> dict[str, Any]:
    """The inverse of `sigmoid_router_to_megatron`."""
    get, sizes, pattern = model.transformer.get, Sizes.of(model), moe_layers(model)
    dense = pattern.index(True) if any(pattern) else len(pattern)
    refuse(not all(pattern[dense:]), "dense layers must come before all mixture-of-experts layers")
    refuse(sizes.shared_ffn % sizes.expert_ffn, "the shared experts' width must be a multiple of an expert's")
    return dict(
        norm_topk_prob=True,
        n_group=get("moe_router_num_groups") or 1,
        topk_group=get("moe_router_group_topk") or 1,
        n_shared_experts=sizes.shared_ffn // sizes.expert_ffn,
        first_k_dense_replace=dense,
        routed_scaling_factor=get("moe_router_topk_scaling_factor") or 1.0,
    )


SIGMOID_ROUTER = dict(
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    moe_router_dtype="fp32",
)
SIGMOID_ROUTER_FIELDS = {
    "n_routed_experts": "num_moe_experts",
    "num_experts_per_tok": "moe_router_topk",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "routed_scaling_factor": "moe_router_topk_scaling_factor",
}


def softmax_router_to_megatron(config: PretrainedConfig) -> dict[str, Any]:
    """Qwen's layout of mixture-of-experts layers, and whether the chosen probabilities are normalized."""
    sparse = [
        layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
        for layer in range(config.num_hidden_layers)
    ]
    refuse(not any(sparse), "no layer is a mixture of experts; use the dense architecture")
    return dict(
        moe_router_pre_softmax=not config.norm_topk_prob,
        moe_layer_freq=None if all(sparse) else [int(flag) for flag in sparse],
    )


def softmax_router_to_hugging_face(model: ModelConfig) -> dict[str, Any]:
    """The inverse of `softmax_router_to_megatron`."""
    return dict(
        norm_topk_prob=not model.transformer.get("moe_router_pre_softmax", False),
        decoder_sparse_step=1,
        mlp_only_layers=[layer for layer, is_moe in enumerate(moe_layers(model)) if not is_moe],
    )
