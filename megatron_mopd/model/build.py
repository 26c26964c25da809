"""Builds this rank's model chunks from a configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.config import ConfigError, ModelConfig, ParallelConfig
from megatron_mopd.model.gpt import HiddenStateGPT
from megatron_mopd.model.initialize import initialize_weights
from megatron_mopd.model.rotary import RotaryAngles, check_scaling, effective_scaling
from megatron_mopd.model.specs import block_spec, uses_transformer_engine

_REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    TypeError,
    ValueError,
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "squared_relu": squared_relu}

# Shared by nearly all current open models, so a configuration need not contain them.
_ARCHITECTURE_DEFAULTS: dict[str, Any] = dict(
    normalization="RMSNorm",
    gated_linear_unit=True,
    activation_func="silu",
    add_bias_linear=False,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    moe_token_dispatcher_type="alltoall",
    # The balancing loss that does not depend on how trajectories are split into micro-batches (`router.py`).
    moe_router_load_balancing_type="seq_aux_loss",
)

# Fields of TransformerConfig that are counts; megatron-core does not validate most of them before reshaping a
# tensor.
_COUNTS = """
    num_layers hidden_size num_attention_heads num_query_groups kv_channels ffn_hidden_size
    num_moe_experts moe_router_topk moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_latent_size
    moe_router_num_groups moe_router_group_topk moe_router_topk_limited_devices
    q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim
""".split()

# A frozen teacher only runs forward passes.
_FROZEN_OVERRIDES: dict[str, Any] = dict(
    moe_router_load_balancing_type="none",
    moe_aux_loss_coeff=0.0,
    moe_z_loss_coeff=None,
    moe_input_jitter_eps=None,
    mtp_num_layers=None,
    recompute_granularity=None,
    recompute_method=None,
    recompute_num_layers=None,
    moe_router_bias_update_rate=0.0,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    params_dtype: str,
    device_type: str,
    *,
    frozen: bool = False,
    where: str = "student",
) -> TransformerConfig:
    """Build the TransformerConfig of one model; `ConfigError` (prefix `where`) if megatron-core refuses it.

    `frozen` is for teachers: no auxiliary loss, no multi-token prediction, no recompute, no virtual stages.
    """
    for key in ("num_layers", "hidden_size", "num_attention_heads"):
        if key not in model.transformer:
            raise ConfigError(f"{where}.{key}: missing; name it or load a checkpoint")
    values = _ARCHITECTURE_DEFAULTS | model.transformer
    values |= _layout_values(parallel, values, frozen) | _execution_values(values, params_dtype, device_type)
    if frozen:
        values |= _FROZEN_OVERRIDES
    else:
        _check_biases(values, where)
    if isinstance(values["activation_func"], str):
        if values["activation_func"] not in _ACTIVATIONS:
            raise ConfigError(f"{where}.activation_func: not one of {', '.join(_ACTIVATIONS)}")
        values["activation_func"] = _ACTIVATIONS[values["activation_func"]]
    _check_values(model, values, where)
    _check_kernels(values, device_type, where)
    if values.get("multi_latent_attention"):
        values |= _latent_attention_scale(model, where)
    cls = MLATransformerConfig if values.get("multi_latent_attention") else TransformerConfig
    try:
        config = cls(**values)
    except _REFUSALS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{where}: megatron-core refuses this model: {reason}") from None
    _check_router(config, where)
    _check_rotary(model, config, where)
    return config


def _layout_values(parallel: ParallelConfig, values: Mapping[str, Any], frozen: bool) -> dict[str, Any]:
    vpp = parallel.virtual_pipeline_model_parallel_size
    tp = parallel.tensor_model_parallel_size
    # A dense model may share its layout with a mixture of experts that uses expert parallelism.
    ep = parallel.expert_model_parallel_size if values.get("num_moe_experts") else 1
    return dict(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=vpp if vpp and vpp > 1 and not frozen else None,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size or tp,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
    )


def _execution_values(values: Mapping[str, Any], params_dtype: str, device_type: str) -> dict[str, Any]:
    """Precision, kernels and communication: what does not belong to the architecture."""
    dtype, on_cuda = DTYPES[params_dtype], device_type == "cuda"
    return dict(
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        calculate_per_token_loss=True,
        # Micro-batches of one step share a shape unless they are packed; the runtime sets this before each
        # step.
        variable_seq_lengths=False,
        deallocate_pipeline_outputs=True,
        # `initialize_weights` draws weights by their global name, so that they do not depend on the layout.
        # Not `perform_initialization=False`: it also omits the attributes by which the gradient norm
        # distinguishes shards of a weight (summed over TP) from copies (counted once).
        perform_initialization=True,
        init_method=_leave_as_is,
        output_layer_init_method=_leave_as_is,
        embedding_init_method=_leave_as_is,
        gradient_accumulation_fusion=False,
        moe_grouped_gemm=values.get("moe_grouped_gemm", uses_transformer_engine(device_type)),
        masked_softmax_fusion=False,
        bias_activation_fusion=values.get("bias_activation_fusion", on_cuda),
        bias_dropout_fusion=values.get("bias_dropout_fusion", on_cuda),
        persist_layer_norm=False,
        batch_p2p_comm=on_cuda,
        batch_p2p_sync=False,
    )


def _check_values(model: ModelConfig, values: dict[str, Any], where: str) -> None:
    """Raise `ConfigError` for values that megatron-core does not validate, so that a forward pass would
    fail."""
    if values["normalization"] != "RMSNorm":
        raise ConfigError(
            f"{where}.normalization: only RMSNorm is supported, found {values['normalization']!r}"
        )
    if not 0 < model.rotary_percent <= 1:
        raise ConfigError(
            f"{where}.rotary_percent: must be above 0 and at most 1, found {model.rotary_percent}"
        )
    if model.qk_layernorm_over_heads and (
        not values.get("qk_layernorm") or values.get("multi_latent_attention")
    ):
        raise ConfigError(
            f"{where}.qk_layernorm_over_heads: needs qk_layernorm, and is not for multi_latent_attention"
        )
    if values.get("fused_single_qkv_rope"):
        raise ConfigError(
            f"{where}.fused_single_qkv_rope: not supported: megatron-core asserts conditions on each forward "
            "pass that packed batches and decoding do not meet; leave it out"
        )
    for key, value in model.transformer.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where}.{key}: must be finite, found {value}")
    for key in _COUNTS:
        if (value := values.get(key)) is not None and value < 1:
            raise ConfigError(f"{where}.{key}: must be at least 1, found {value}")
    heads, groups = values["num_attention_heads"], values.get("num_query_groups")
    if groups is not None and heads % groups:
        raise ConfigError(f"{where}.num_query_groups: {groups} does not divide num_attention_heads={heads}")
    for key in ("softmax_scale", "layernorm_epsilon"):
        if (value := values.get(key)) is not None and value <= 0:
            raise ConfigError(f"{where}.{key}: must be above 0, found {value}")
    for key in ("init_method_std", "embedding_init_method_std"):
        if (value := values.get(key)) is not None and value < 0:
            raise ConfigError(f"{where}.{key}: must be at least 0, found {value}")
    for key in ("attention_dropout", "hidden_dropout"):
        if not 0 <= values[key] < 1:
            raise ConfigError(f"{where}.{key}: must be at least 0 and below 1, found {values[key]}")
    if problem := check_scaling(model.rope_scaling):
        raise ConfigError(f"{where}.rope_scaling: {problem}")


def _check_kernels(values: dict[str, Any], device_type: str, where: str) -> None:
    """Raise `ConfigError` for Transformer Engine kernels if its layers are not used."""
    for key in ("moe_router_fusion", "use_te_activation_func"):
        if values.get(key) and not uses_transformer_engine(device_type):
            raise ConfigError(f"{where}.{key}: needs transformer-engine and a GPU; leave it out")


def _check_router(config: TransformerConfig, where: str) -> None:
    """Raise `ConfigError` if a router cannot choose the requested number of experts, or of expert groups."""
    experts, chosen = config.num_moe_experts, config.moe_router_topk
    if experts is None:
        return
    if chosen > experts:
        raise ConfigError(f"{where}.moe_router_topk: {chosen} of {experts} experts cannot be chosen")
    if config.moe_apply_probs_on_input and chosen != 1:
        raise ConfigError(f"{where}.moe_apply_probs_on_input: needs moe_router_topk=1, found {chosen}")
    coefficients = config.moe_aux_loss_coeff
    if isinstance(coefficients, list) and not isinstance(config.moe_router_load_balancing_type, list):
        raise ConfigError(
            f"{where}.moe_aux_loss_coeff: a list needs a list of moe_router_load_balancing_type of its length"
        )
    if config.moe_router_load_balancing_type == "sinkhorn" and coefficients:
        raise ConfigError(f"{where}.moe_aux_loss_coeff: must be 0 with sinkhorn, found {coefficients}")
    groups, group_topk = config.moe_router_num_groups, config.moe_router_group_topk
    if not group_topk:
        return
    where = f"{where}.moe_router_group_topk"
    if config.moe_router_topk_limited_devices:
        # megatron-core has turned it into groups, one for each expert-parallel rank.
        where = where.replace("group_topk", "topk_limited_devices")
    if group_topk > groups:
        raise ConfigError(f"{where}: {group_topk} of {groups} groups of experts cannot be chosen")
    size = experts // groups
    if not group_topk <= chosen <= group_topk * size or chosen // group_topk > size:
        raise ConfigError(
            f"{where}: moe_router_topk={chosen} experts cannot come from {group_topk} groups of {size}; it "
            f"must be from {group_topk} to {group_topk * size}"
        )


def _check_rotary(model: ModelConfig, config: TransformerConfig, where: str) -> None:
    """Raise `ConfigError` for an odd number of channels: rotary embeddings rotate pairs."""
    if (angles := _rotary_channels(model, config)) % 2:
        key = "qk_pos_emb_head_dim" if config.multi_latent_attention else "kv_channels"
        raise ConfigError(
            f"{where}.{key}: rotary embeddings rotate pairs of channels, and {angles} (of each head) is an "
            f"odd number; change {key}{'' if config.multi_latent_attention else ' or rotary_percent'}"
        )


def _check_biases(values: dict[str, Any], where: str) -> None:
    """Raise `ConfigError` for a trained model with biases for which megatron-core's backward pass is
    incorrect."""
    if not values["add_bias_linear"]:
        return
    if values.get("num_moe_experts"):
        # They are added in place to a view, which autograd refuses, and marked for a reduction over
        # tensor-parallel ranks, which hold different experts.
        raise ConfigError(
            f"{where}.add_bias_linear: experts with biases (num_moe_experts) cannot be trained; use "
            "add_qkv_bias and attention_output_bias for attention biases"
        )
    recomputed = values.get("recompute_modules")
    is_selective = values.get("recompute_granularity") == "selective" and isinstance(recomputed, list)
    if is_selective and "mlp" in recomputed:
        # The MLP returns its last bias, a parameter. As an output of the checkpointed function, its backward
        # is that of the function itself, which recurses infinitely.
        raise ConfigError(
            f"{where}.recompute_modules: 'mlp' does not work with add_bias_linear; leave it out, or set "
            "recompute_granularity to full"
        )


def _latent_attention_scale(model: ModelConfig, where: str) -> dict[str, Any]:
    """The fields from which megatron-core derives YaRN's softmax scale (DeepSeek-V3); we compute the angles
    ourselves."""
    owned = {
        "rope_type",
        "rotary_scaling_factor",
        "mscale",
        "mscale_all_dim",
        "rotary_base",
        "rotary_percent",
    }
    if named := sorted(owned & model.transformer.keys()):
        raise ConfigError(f"{where}.{named[0]}: set rope_scaling, rotary_base or rotary_percent instead")
    scaling = effective_scaling(model.rope_scaling) or {"rope_type": "default"}
    is_yarn = scaling["rope_type"] == "yarn"
    return dict(
        rope_type="rope",
        rotary_scaling_factor=scaling["factor"] if is_yarn else 1.0,
        mscale_all_dim=(scaling.get("mscale_all_dim") or 0.0) if is_yarn else 0.0,
    )


def _leave_as_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _rotary_channels(model: ModelConfig, config: TransformerConfig) -> int:
    """Number of channels of each head that rotary embeddings rotate."""
    if model.position_embedding_type == "none":
        return 0
    if config.multi_latent_attention:
        return config.qk_pos_emb_head_dim
    return int(config.kv_channels * model.rotary_percent)


def _rotary_angles(model: ModelConfig, config: TransformerConfig) -> RotaryAngles | None:
    if model.position_embedding_type == "none":
        return None
    channels = _rotary_channels(model, config)
    return RotaryAngles(channels, model.rotary_base, effective_scaling(model.rope_scaling))


def padded_vocab_size(vocab_size: int, divisible_by: int, tp_size: int) -> int:
    """Vocabulary size rounded up so that every tensor-parallel rank holds the same number of columns."""
    multiple = divisible_by * tp_size
    return (vocab_size + multiple - 1) // multiple * multiple


def build_model(
    model: ModelConfig,
    groups: ParallelGroups,
    params_dtype: str,
    *,
    max_sequence_length: int,
    seed: int | None = None,
    frozen: bool = False,
    where: str = "student",
) -> list[HiddenStateGPT]:
    """The model chunks of this rank (one, or one per virtual stage), on the run's device.

    `seed` initializes the weights; with `None` they must be loaded. A frozen model requires no gradient, is
    in evaluation mode, and never has virtual stages. Collectives: only those of megatron-core's constructor.
    """
    config = transformer_config(
        model, groups.config, params_dtype, groups.device.type, frozen=frozen, where=where
    )
    assert model.vocab_size is not None, "vocab_size is resolved from the tokenizer before building"
    try:
        chunks = _build_chunks(model, config, groups, max_sequence_length)
    except ConfigError:
        raise
    except _REFUSALS as error:
        # megatron-core detects some invalid combinations of fields only on use, with various exceptions.
        raise ConfigError(
            f"{where}: megatron-core cannot build this model: {type(error).__name__}: "
            f"{' '.join(str(error).split())}; set here: {', '.join(sorted(model.transformer))}"
        ) from error
    if seed is not None:
        initialize_weights(chunks, config, seed)
    if frozen:
        for chunk in chunks:
            chunk.requires_grad_(False)
            chunk.eval()
    return chunks


def _build_chunks(
    model: ModelConfig, config: TransformerConfig, groups: ParallelGroups, max_sequence_length: int
) -> list[HiddenStateGPT]:
    num_chunks = config.virtual_pipeline_model_parallel_size or 1
    chunks = []
    for chunk in range(num_chunks):
        vp_stage = chunk if num_chunks > 1 else None
        chunks.append(
            HiddenStateGPT(
                config=config,
                transformer_layer_spec=block_spec(
                    config,
                    groups.device.type,
                    vp_stage,
                    groups.pp.rank(),
                    attention_output_bias=model.attention_output_bias,
                    qk_norm_group=groups.tp if model.qk_layernorm_over_heads else None,
                ),
                vocab_size=padded_vocab_size(
                    model.vocab_size, model.make_vocab_size_divisible_by, groups.tp_size
                ),
                max_sequence_length=max_sequence_length,
                pre_process=groups.is_first_stage and chunk == 0,
                post_process=groups.is_last_stage and chunk == num_chunks - 1,
                share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
                rotary=_rotary_angles(model, config),
                pg_collection=groups.collection,
                vp_stage=vp_stage,
            ).to(groups.device)
        )
    return chunks
