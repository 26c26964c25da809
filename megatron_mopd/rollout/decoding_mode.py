"""Training weights made ready to decode, and given back as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_mopd.backend.packed_weights import PackedWeights
from megatron_mopd.rollout.forward_only import forward_only, is_plain_linear

# Every place where megatron-core keeps the choice: the configurations, and the modules that copied it when
# built (tensor-parallel and Transformer Engine linears, the embedding and its vocabulary-parallel table, MTP
# blocks). The mark on parameters says how their gradients are reduced; no gradient is taken here, so it
# stays.
_MODULE_FLAGS = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextlib.contextmanager
def decoding_mode(chunks: Sequence[torch.nn.Module], packed: bool = False) -> Iterator[PackedWeights]:
    """No gradients, evaluation mode, and sequence parallelism off; everything restored on exit, exceptions
    included.

    On the CPU the layers leave out what only a backward pass needs (`forward_only`). If `packed`, their
    weights and the output head's also exist in panels for products with the few rows of a decoding step
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
    weights = PackedWeights(_weights(chunks) if packed else ())
    lean = [(module, forward) for module in modules if (forward := forward_only(module, weights))]
    try:
        for owner, name, _ in flags:
            setattr(owner, name, False)
        for chunk in chunks:
            chunk.eval()
        for module, forward in lean:
            module.forward = forward
        with torch.no_grad():
            yield weights
    finally:
        for module, _ in lean:
            vars(module).pop("forward", None)
        for owner, name, value in flags:
            setattr(owner, name, value)
        for module, was_training in training:
            module.training = was_training


def _weights(chunks: Sequence[torch.nn.Module]) -> Iterator[Tensor]:
    """Weights [out, in] that a decoding step multiplies with, the output head included, each once."""
    linears = [module.weight for chunk in chunks for module in chunk.modules() if is_plain_linear(module)]
    heads = [chunk.head_weight() for chunk in chunks if chunk.post_process]
    found = {id(weight): weight for weight in [*linears, *heads]}
    yield from found.values()
