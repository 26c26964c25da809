"""Training weights made ready to decode, and given back as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from megatron_mopd.backend.packed_weights import PackedWeights

# Every place where megatron-core keeps the choice: the configurations, and the modules that copied it when
# built (tensor-parallel and Transformer Engine linears, the embedding and its vocabulary-parallel table, MTP
# blocks). The mark on parameters says how their gradients are reduced; no gradient is taken here, so it
# stays.
_MODULE_FLAGS = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextlib.contextmanager
def decoding_mode(
    chunks: Sequence[torch.nn.Module], packed_for_rows: int | None = None
) -> Iterator[PackedWeights]:
    """No gradients, evaluation mode, and sequence parallelism off; everything restored on exit, exceptions
    included.

    On the CPU the linear layers leave out what only a backward pass needs. With `packed_for_rows`, the rows
    of a decoding step, their float32 weights and the output head's also exist laid out for such products
    meanwhile (as much memory again as the weights); the result multiplies with these where it has them.

    One token cannot be scattered over tensor-parallel ranks, so the layers run with all-reduces instead of
    reduce-scatters. `no_grad` and not `inference_mode`, because tables that the model caches on the way
    (rotary angles) are used by training later. No collectives.
    """
    modules = [module for chunk in chunks for module in chunk.modules()]
    training = [(module, module.training) for module in modules]
    configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
    flags = [(config, "sequence_parallel") for config in configs.values()]
    flags += [(module, name) for module in modules for name in _MODULE_FLAGS if name in vars(module)]
    flags = [(owner, name, getattr(owner, name)) for owner, name in flags if hasattr(owner, name)]
    linears = [module for module in modules if _is_plain_linear(module)]
    weights = PackedWeights(_weights(chunks, linears) if packed_for_rows else (), packed_for_rows or 1)
    try:
        for owner, name, _ in flags:
            setattr(owner, name, False)
        for chunk in chunks:
            chunk.eval()
        for module in linears:
            module.forward = _without_gradient(module, weights)
        with torch.no_grad():
            yield weights
    finally:
        for module in linears:
            vars(module).pop("forward", None)
        for owner, name, value in flags:
            setattr(owner, name, value)
        for module, was_training in training:
            module.training = was_training


def _is_plain_linear(module: torch.nn.Module) -> bool:
    """One of megatron-core's own linear layers on the CPU, inside a tensor-parallel block."""
    if not isinstance(module, ColumnParallelLinear | RowParallelLinear):
        return False
    if module.weight is None or module.weight.device.type != "cpu":
        return False
    column = isinstance(module, ColumnParallelLinear)
    return not module.gather_output if column else module.input_is_parallel


def _weights(chunks: Sequence[torch.nn.Module], linears: Sequence[torch.nn.Module]) -> Iterator[Tensor]:
    """Weights [out, in] that a decoding step multiplies with, the output head included, each once."""
    heads = [chunk.head_weight() for chunk in chunks if chunk.post_process]
    found = {id(weight): weight for weight in [*(module.weight for module in linears), *heads]}
    yield from found.values()


def _without_gradient(module: ColumnParallelLinear | RowParallelLinear, weights: PackedWeights):
    """The forward pass of a linear layer that no backward pass follows: (output, bias to be added later).

    Collectives: a row-parallel layer's all-reduce of its output, as ever.
    """
    adds_bias, later = not module.skip_bias_add, module.bias if module.skip_bias_add else None
    reduces = (
        isinstance(module, RowParallelLinear)
        and not module.explicit_expert_comm
        and module.tp_group is not None
        and module.tp_group.size() > 1
    )

    def forward(input_: Tensor) -> tuple[Tensor, Tensor | None]:
        if not reduces:
            return weights.linear(input_, module.weight, module.bias if adds_bias else None), later
        output = weights.linear(input_, module.weight)
        output = reduce_from_tensor_model_parallel_region(output, group=module.tp_group)
        return (output + module.bias if adds_bias and module.bias is not None else output), later

    return forward
