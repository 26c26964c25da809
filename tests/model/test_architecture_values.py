"""Invalid architecture values are refused by name when the model's configuration is built."""

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import group_limited_topk

from megatron_mopd.config import ConfigError, ModelConfig, ParallelConfig
from megatron_mopd.model.build import transformer_config
from tests import _models

BIASED = dict(add_bias_linear=True)
SELECTIVE = dict(recompute_granularity="selective", recompute_modules=["core_attn", "mlp"])
UNIFORM = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


EXPERTS = dict(num_moe_experts=8)


def made(transformer=(), **own):
    model = ModelConfig(vocab_size=64, transformer=_models.DENSE | dict(transformer), **own)
    return transformer_config(model, ParallelConfig(), "float32", "cpu", where="teachers[1]")


def test_an_architecture_that_is_fine():
    assert made(dict(kv_channels=7), position_embedding_type="none").kv_channels == 7
    assert made(dict(softmax_scale=0.25), rotary_percent=0.5).softmax_scale == 0.25


@pytest.mark.parametrize(
    "transformer, own, message",
    [
        (dict(softmax_scale=-1), {}, "softmax_scale: must be above 0, found -1"),
        (dict(layernorm_epsilon=float("nan")), {}, "layernorm_epsilon: must be finite, found nan"),
        (dict(attention_dropout=7), {}, "attention_dropout: must be at least 0 and below 1, found 7"),
        ({}, dict(rotary_percent=2.0), "rotary_percent: must be above 0 and at most 1, found 2.0"),
        ({}, dict(rotary_percent=float("nan")), "rotary_percent: must be"),
        (dict(activation_func="tanh"), {}, "activation_func: not one of silu"),
        (dict(normalization="LayerNorm"), {}, "normalization: only RMSNorm is supported"),
        ({}, dict(qk_layernorm_over_heads=True), "qk_layernorm_over_heads: needs qk_layernorm"),
        ({}, dict(rope_scaling={"rope_type": "yarn"}), "rope_scaling: "),
        (BIASED | SELECTIVE, {}, "recompute_modules: 'mlp' does not work with add_bias_linear"),
        (BIASED | dict(num_moe_experts=4), {}, "add_bias_linear: experts with biases"),
        (dict(num_query_groups=-1), {}, "num_query_groups: must be at least 1, found -1"),
        (
            dict(embedding_init_method_std=-0.5),
            {},
            "init_method_std: must be at least 0, found -0.5",
        ),
        (dict(num_attention_heads=7), {}, "num_query_groups: 4 does not divide num_attention_heads=7"),
        (dict(fused_single_qkv_rope=True), {}, "fused_single_qkv_rope: not supported"),
        (dict(kv_channels=7), {}, "kv_channels: rotary embeddings rotate pairs of channels, and 7"),
        (dict(kv_channels=6), dict(rotary_percent=0.5), "and 3 (of each head) is an odd number"),
        (dict(kv_channels=0), {}, "kv_channels: must be at least 1, found 0"),
        (EXPERTS | dict(moe_expert_capacity_factor=float("inf")), {}, "capacity_factor: must be finite"),
        (EXPERTS | dict(moe_aux_loss_coeff=[]), {}, "moe_aux_loss_coeff: a list needs a list of"),
        (
            EXPERTS | dict(moe_router_load_balancing_type="sinkhorn", moe_aux_loss_coeff=0.1),
            {},
            "moe_aux_loss_coeff: must be 0 with sinkhorn",
        ),
        (EXPERTS | dict(moe_latent_size=0), {}, "moe_latent_size: must be at least 1, found 0"),
        (EXPERTS | dict(moe_router_fusion=True), {}, "moe_router_fusion: needs transformer-engine"),
        (dict(use_te_activation_func=True), {}, "use_te_activation_func: needs transformer-engine"),
        (
            EXPERTS | dict(moe_apply_probs_on_input=True),
            {},
            "moe_apply_probs_on_input: needs moe_router_topk=1, found 2",
        ),
        (EXPERTS | dict(moe_router_topk=9), {}, "moe_router_topk: 9 of 8 experts cannot be chosen"),
        (
            EXPERTS | dict(moe_router_topk_limited_devices=4),
            {},
            "moe_router_topk_limited_devices: 4 of 1 groups of experts cannot be chosen",
        ),
        (
            EXPERTS | dict(moe_router_num_groups=4, moe_router_group_topk=2, moe_router_topk=5),
            {},
            "moe_router_topk=5 experts cannot come from 2 groups of 2; it must be from 2 to 4",
        ),
        (
            EXPERTS | dict(moe_router_num_groups=4, moe_router_group_topk=4, moe_router_topk=2),
            {},
            "moe_router_group_topk: moe_router_topk=2 experts cannot come from 4 groups of 2",
        ),
    ],
)
def test_what_makes_no_sense(transformer, own, message):
    with pytest.raises(ConfigError) as error:
        made(transformer, **own)
    assert str(error.value).startswith("teachers[1]") and message in str(error.value)


@pytest.mark.parametrize(
    "transformer",
    [SELECTIVE, BIASED | dict(recompute_granularity="selective"), BIASED | SELECTIVE | UNIFORM],
)
def test_biases_with_other_recomputation(transformer):
    made(transformer)


@pytest.mark.parametrize("chosen", [2, 3, 4])
def test_experts_from_groups(chosen):
    """megatron-core's router accepts in its first forward pass what the configuration accepts."""
    groups = dict(moe_router_num_groups=4, moe_router_group_topk=2, moe_router_topk=chosen)
    config = made(EXPERTS | groups)
    scores = torch.rand(5, 8)
    group_limited_topk(scores, chosen, 5, 8, config.moe_router_num_groups, config.moe_router_group_topk)


def test_a_teacher_may_have_what_only_training_cannot():
    model = ModelConfig(vocab_size=64, transformer=_models.MOE | BIASED | SELECTIVE)
    assert transformer_config(model, ParallelConfig(), "float32", "cpu", frozen=True).add_bias_linear


def test_whatever_megatron_core_raises():
    """megatron-core's checks of these fields raise a KeyError or AttributeError without the field's name."""
    for field, value in (("pipeline_model_parallel_layout", 0.5), ("cuda_graph_scope", "int8")):
        with pytest.raises(ConfigError, match="megatron-core refuses this model"):
            made({field: value})
