"""Random architectures that fit a layout."""

from __future__ import annotations

from random import Random
from typing import Any


def draw_model(rng: Random, layout: dict[str, int], stages: int, experts: bool) -> dict[str, Any]:
    """A tiny architecture. layout: sizes `tp`, `ep` and `etp` that divide it; stages: divide its layers."""
    tp = layout["tp"]
    heads = rng.choice([number for number in (2, 4, 8) if number % tp == 0])
    layers = stages * rng.choice([1, 1, 2] if stages > 1 else [1, 2, 3])
    model = dict(
        num_layers=layers,
        hidden_size=rng.choice([16, 32, 48] if heads < 8 else [32, 64]),
        num_attention_heads=heads,
        ffn_hidden_size=rng.choice([16, 24, 48]),  # divisible by every tp
        init_method_std=0.3,  # large, so that attention and routing matter in a model this small
    )
    model |= _latent_attention(rng) if rng.random() < 0.15 else _attention(rng, heads)
    if not experts and rng.random() < 0.15:
        model["add_bias_linear"] = True
    if rng.random() < 0.1:
        model |= dict(gated_linear_unit=False, activation_func=rng.choice(["gelu", "squared_relu", "relu"]))
    if rng.random() < 0.3:
        model["share_embeddings_and_output_weights"] = True
    if experts:
        model |= _experts(rng, layout["ep"], layers)
    return model


def _latent_attention(rng: Random) -> dict[str, Any]:
    model: dict[str, Any] = dict(
        multi_latent_attention=True,
        qk_layernorm=True,
        q_lora_rank=rng.choice([None, 16]),
        kv_lora_rank=rng.choice([8, 12, 16]),
        qk_head_dim=8,
        qk_pos_emb_head_dim=rng.choice([4, 8]),
        v_head_dim=rng.choice([8, 12]),
    )
    if rng.random() < 0.3:
        model["rope_scaling"] = dict(
            rope_type="yarn", factor=4.0, original_max_position_embeddings=8, mscale=1.0, mscale_all_dim=0.7
        )
    return model


def _attention(rng: Random, heads: int) -> dict[str, Any]:
    model: dict[str, Any] = dict(
        num_query_groups=rng.choice([groups for groups in (1, 2, 4, 8) if heads % groups == 0]),
        qk_layernorm=rng.random() < 0.5,
    )
    if model["qk_layernorm"] and rng.random() < 0.2:
        model["qk_layernorm_over_heads"] = True
    for chance, values in (
        (0.2, dict(kv_channels=rng.choice([4, 8, 12]))),
        (0.15, dict(rotary_percent=0.5)),
        (0.1, dict(position_embedding_type="none")),
        (0.2, dict(add_qkv_bias=True)),
        (0.15, dict(attention_output_bias=True)),
    ):
        if rng.random() < chance:
            model |= values
    return model


def _experts(rng: Random, ep: int, layers: int) -> dict[str, Any]:
    count = rng.choice([number for number in (2, 4, 6, 8) if number % ep == 0])
    topk = rng.choice([number for number in (1, 2, 2, 3) if number <= count])
    model: dict[str, Any] = dict(
        num_moe_experts=count,
        moe_router_topk=topk,
        moe_ffn_hidden_size=rng.choice([16, 24]),
        moe_aux_loss_coeff=0.0,
    )
    if rng.random() < 0.4:
        model["moe_shared_expert_intermediate_size"] = rng.choice([16, 24])
        if rng.random() < 0.3:
            model["moe_shared_expert_gate"] = True
    if rng.random() < 0.4:
        model |= dict(
            moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True,
            moe_router_load_balancing_type="none",
            moe_router_topk_scaling_factor=rng.choice([1.0, 1.5]),
        )
        if count % 2 == 0 and count // 2 >= topk and rng.random() < 0.4:
            model |= dict(moe_router_num_groups=2, moe_router_group_topk=1)
    elif topk == 1 or rng.random() < 0.3:
        model["moe_router_pre_softmax"] = True
    if layers > 1 and rng.random() < 0.4:
        model["moe_layer_freq"] = [0, *(rng.randint(0, 1) for _ in range(layers - 2)), 1]
    return model


def draw_router_losses(rng: Random, model: dict[str, Any], alone: bool) -> dict[str, Any]:
    """Coefficients of auxiliary and z losses for a student with experts; often none.

    alone: every micro-batch is one sample, as in the reference. `aux_loss` is computed per micro-batch, so it
    depends on how samples are split into micro-batches.
    """
    losses: dict[str, Any] = {}
    if model.get("moe_router_load_balancing_type") != "none" and rng.random() < 0.3:
        kinds = ["aux_loss", "seq_aux_loss"] if alone else ["seq_aux_loss"]
        losses["moe_router_load_balancing_type"] = rng.choice(kinds)
        losses["moe_aux_loss_coeff"] = rng.choice([0.01, 0.1, 1.0])
    if rng.random() < 0.2:
        losses["moe_z_loss_coeff"] = rng.choice([0.001, 0.1])
    return losses
