"""Training weights made ready to decode, and given back as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
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
            module._forward_impl = _without_gradient(weights)
        with torch.no_grad():
            yield weights
    finally:
        for module in linears:
            vars(module).pop("_forward_impl", None)
        for owner, name, value in flags:
            setattr(owner, name, value)
        for module, was_training in training:
            module.training = was_training


def _is_plain_linear(module: torch.nn.Module) -> bool:
    """megatron-core's own linear layer on the CPU, whose product is `_forward_impl` and nothing else."""
    if not isinstance(module, ColumnParallelLinear | RowParallelLinear):
        return False
    return module.weight is not None and module.weight.device.type == "cpu"


def _weights(chunks: Sequence[torch.nn.Module], linears: Sequence[torch.nn.Module]) -> Iterator[Tensor]:
    """Weights [out, in] that a decoding step multiplies with, the output head included, each once."""
    heads = [chunk.head_weight() for chunk in chunks if chunk.post_process]
    found = {id(weight): weight for weight in [*(module.weight for module in linears), *heads]}
    yield from found.values()


def _without_gradient(weights: PackedWeights):
    """The product of a linear layer that no backward pass follows; the layer itself communicates."""

    def forward(input: Tensor, weight: Tensor, bias: Tensor | None = None, **_unused) -> Tensor:
        return weights.linear(input, weight, bias)

    return forward
