"""Layer specs: the module class of each part of a transformer layer."""

from __future__ import annotations

import copy

import torch.distributed as dist
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_mopd.backend.versions import moe_submodules
from megatron_mopd.model.attention import CachedSelfAttention, ScaledDotProductAttention
from megatron_mopd.model.latent_attention import LatentSelfAttention
from megatron_mopd.model.norm import RMSNorm, over_heads
from megatron_mopd.model.router import BalancedRouter


def uses_transformer_engine(device_type: str) -> bool:
    """Whether Transformer Engine's linears, norms and grouped GEMM are used: on CUDA if it is installed."""
    return HAVE_TE and device_type == "cuda"


def block_spec(
    config: TransformerConfig,
    device_type: str,
    vp_stage: int | None,
    pp_rank: int,
    *,
    attention_output_bias: bool = False,
    qk_norm_group: dist.ProcessGroup | None = None,
):
    """Submodules of the layers that this pipeline stage (and virtual chunk) holds.

    Both specs use our attention core: rollout and training must mask identically, and packed documents have
    our own format. `qk_norm_group` is the tensor-parallel group if query and key norms run over all heads
    together. Returns megatron-core's TransformerBlockSubmodules.
    """
    layers = [
        _layer_spec(config, is_moe, device_type, attention_output_bias, qk_norm_group)
        for is_moe in moe_layer_pattern(config)
    ]
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    final_norm = RMSNorm
    if uses_transformer_engine(device_type):
        from megatron.core.extensions.transformer_engine import TENorm as final_norm  # optional package
    return TransformerBlockSubmodules(layer_specs=layers[first : first + count], layer_norm=final_norm)


def moe_layer_pattern(config: TransformerConfig) -> list[bool]:
    """Which of the `num_layers` layers are mixture-of-experts layers (`moe_layer_freq`)."""
    if not config.num_moe_experts:
        return [False] * config.num_layers
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(config.num_layers)]
    return [bool(flag) for flag in frequency]


def _layer_spec(
    config: TransformerConfig,
    is_moe: bool,
    device_type: str,
    attention_output_bias: bool,
    qk_norm_group: dist.ProcessGroup | None,
) -> ModuleSpec:
    kwargs = dict(
        num_experts=config.num_moe_experts if is_moe else None,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
    )
    if uses_transformer_engine(device_type):
        spec = copy.deepcopy(get_gpt_layer_with_transformer_engine_spec(**kwargs))
    else:
        spec = copy.deepcopy(get_gpt_layer_local_spec(normalization=config.normalization, **kwargs))
        spec.submodules.input_layernorm = RMSNorm
        spec.submodules.pre_mlp_layernorm = RMSNorm
        norms = (
            ("q_layernorm", "kv_layernorm")
            if config.multi_latent_attention
            else ("q_layernorm", "k_layernorm")
        )
        for name in norms:
            if getattr(spec.submodules.self_attention.submodules, name) is not IdentityOp:
                setattr(spec.submodules.self_attention.submodules, name, RMSNorm)
        if config.multi_latent_attention and config.q_lora_rank is None:
            spec.submodules.self_attention.submodules.q_layernorm = IdentityOp  # 0.19 refuses an unused one
        spec.submodules.sharded_state_dict_keys_map = _canonical_names(config, is_moe)
    attention = spec.submodules.self_attention
    attention.submodules.core_attention = ScaledDotProductAttention
    attention.module = {SelfAttention: CachedSelfAttention, MLASelfAttention: LatentSelfAttention}[
        attention.module
    ]
    if is_moe:
        moe_submodules(spec.submodules.mlp).router = BalancedRouter
    if qk_norm_group is not None:
        attention.submodules.q_layernorm = over_heads(config.num_attention_heads, qk_norm_group)
        attention.submodules.k_layernorm = over_heads(config.num_query_groups, qk_norm_group)
    if attention_output_bias:
        attention.submodules.linear_proj = _with_bias(attention.submodules.linear_proj)
    return spec


def _canonical_names(config: TransformerConfig, is_moe: bool) -> dict[str, str]:
    """Maps the names of the local spec's norms to those in a checkpoint.

    The canonical names are those of the TE spec, which fuses a norm into the following linear layer. Without
    such a layer (experts, the two down projections of latent attention) the norm keeps its own name.
    """
    names = {} if is_moe else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    if not config.multi_latent_attention:
        return names | {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    return names | {
        "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
        "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
    }


def _with_bias(linear: type) -> type:
    """The same row-parallel linear, always with a bias."""

    class WithBias(linear):
        def __init__(self, *args, bias: bool = False, **kwargs):
            super().__init__(*args, bias=True, **kwargs)

    return WithBias
