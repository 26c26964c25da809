"""Faster forward passes of megatron-core's layers when no backward pass follows.

For the few rows of a decoding step on the CPU, the overhead around the matrix products can take as long as
the products: autograd wrappers, activations in four kernels, newly allocated temporaries. The results are the
same up to the rounding of a sum.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_mopd.backend.packed_weights import PackedWeights
from megatron_mopd.model.norm import RMSNorm

WithBias = tuple[Tensor, Tensor | None]
"""A layer's output, and the bias that its caller adds, as in megatron-core."""


def forward_only(module: torch.nn.Module, weights: PackedWeights) -> Callable | None:
    """A replacement for `module.forward` while nothing is differentiated; `None` if the module is left
    unchanged.

    Linear layers multiply with `weights` if it has their panels. Only modules on the CPU and of exactly the
    types known here are replaced: a subclass may compute something else. There is no dropout: this is for
    evaluation mode.
    """
    if all(parameter.device.type != "cpu" for parameter in module.parameters()):
        return None
    if is_plain_linear(module):
        return _linear(module, weights)
    if type(module) is RMSNorm:
        return _rms_norm(module)
    if type(module) is MLP and _is_plain_swiglu(module):
        return _swiglu(module)
    if type(module) is TransformerLayer and _has_plain_residuals(module):
        return _transformer_layer(module)
    return None


def is_plain_linear(module: torch.nn.Module) -> bool:
    """Whether `module` is one of megatron-core's own linear layers on the CPU, inside a tensor-parallel
    block."""
    if not isinstance(module, ColumnParallelLinear | RowParallelLinear):
        return False
    if module.weight is None or module.weight.device.type != "cpu":
        return False
    column = isinstance(module, ColumnParallelLinear)
    return not module.gather_output if column else module.input_is_parallel


def _linear(module: ColumnParallelLinear | RowParallelLinear, weights: PackedWeights) -> Callable:
    """Collectives: a row-parallel layer's all-reduce of its output, as usual."""
    adds_bias, later = not module.skip_bias_add, module.bias if module.skip_bias_add else None
    reduces = (
        isinstance(module, RowParallelLinear)
        and not module.explicit_expert_comm
        and module.tp_group is not None
        and module.tp_group.size() > 1
    )

    def forward(input_: Tensor) -> WithBias:
        if not reduces:
            return weights.linear(input_, module.weight, module.bias if adds_bias else None), later
        output = weights.linear(input_, module.weight)
        output = reduce_from_tensor_model_parallel_region(output, group=module.tp_group)
        return (output + module.bias if adds_bias and module.bias is not None else output), later

    return forward


def _rms_norm(module: RMSNorm) -> Callable:
    """RMSNorm in at least float32, without the temporaries that `F.rms_norm` allocates on the CPU."""
    epsilon = torch.full((), module.eps, dtype=module.weight.dtype, device=module.weight.device)

    def forward(x: Tensor) -> Tensor:
        if x.dtype not in (torch.float32, torch.float64) or x.dtype != module.weight.dtype:
            return F.rms_norm(x, (x.size(-1),), module.weight, module.eps)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = torch.addcmul(epsilon, norm, norm, value=1 / x.size(-1)).rsqrt_()
        return (x * inverse).mul_(module.weight)

    return forward


def _is_plain_swiglu(module: MLP) -> bool:
    config = module.config
    return (
        config.gated_linear_unit
        and config.activation_func == F.silu
        and not config.use_te_activation_func
        and not config.bias_activation_fusion
        and not config.add_bias_linear
        and config.activation_func_clamp_value is None
        and config.glu_linear_offset == 0
    )


def _swiglu(module: MLP) -> Callable:
    def forward(hidden_states: Tensor, per_token_scale: Tensor | None = None, **_unused) -> WithBias:
        gate, up = module.linear_fc1(hidden_states)[0].chunk(2, dim=-1)
        gated = F.silu(gate, inplace=True).mul_(up)  # nothing else references the first layer's output
        if per_token_scale is not None:  # the router's weights, if this is an expert
            gated = (gated * per_token_scale.unsqueeze(-1)).to(gated.dtype)
        return module.linear_fc2(gated)

    return forward


def _has_plain_residuals(layer: TransformerLayer) -> bool:
    crossing = (layer.pre_cross_attn_layernorm, layer.cross_attention)
    return not layer.config.fp32_residual_connection and all(isinstance(x, IdentityOp) for x in crossing)


def _transformer_layer(layer: TransformerLayer) -> Callable:
    def forward(
        hidden_states: Tensor, attention_mask: Tensor | None = None, context: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        names = ("inference_context", "rotary_pos_emb", "packed_seq_params")
        arguments = {name: kwargs[name] for name in names if name in kwargs}
        attended = layer.self_attention(
            layer.input_layernorm(hidden_states), attention_mask=attention_mask, **arguments
        )
        hidden_states = _add(attended, hidden_states)
        return _add(layer.mlp(layer.pre_mlp_layernorm(hidden_states)), hidden_states), context

    return forward


def _add(output: WithBias, residual: Tensor) -> Tensor:
    """Add in place: nothing else references the output."""
    x, bias = output
    if bias is not None:
        x.add_(bias)
    return x.add_(residual)
