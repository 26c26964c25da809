"""Switch the training modules to decoding, and restore them afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_mopd.backend.overrides import overridden
from megatron_mopd.backend.packed_weights import PackedWeights
from megatron_mopd.rollout.forward_only import forward_only, is_plain_linear

# Every place where megatron-core stores `sequence_parallel`: the configurations, and the modules that copied
# it when built (tensor-parallel and Transformer Engine linears, the embedding and its vocabulary-parallel
# table, MTP blocks). The flag on parameters controls how their gradients are reduced; no gradient is computed
# here, so it stays.
_MODULE_FLAGS = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextlib.contextmanager
def decoding_mode(chunks: Sequence[torch.nn.Module], packed: bool = False) -> Iterator[PackedWeights]:
    """Context with gradients and sequence parallelism off, in evaluation mode; everything is restored on
    exit, also after an exception.

    On the CPU the layers skip what only a backward pass needs (`forward_only`). If `packed`, their weights
    and the output layer's are also repacked into panels for products with the few rows of a decoding step
    (this doubles the memory of the weights); the yielded object multiplies with panels where it has them.

    One token cannot be scattered over tensor-parallel ranks, so the layers run with all-reduces instead of
    reduce-scatters. This uses `no_grad`, not `inference_mode`, because training later uses tables that the
    model caches here (rotary angles). No collectives.
    """
    modules = [module for chunk in chunks for module in chunk.modules()]
    weights = PackedWeights(_weights(chunks) if packed else ())
    configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
    changes = [(config, "sequence_parallel", False) for config in configs.values()]
    for module in modules:
        changes.append((module, "training", False))
        changes += [(module, name, False) for name in _MODULE_FLAGS if name in vars(module)]
        if (forward := forward_only(module, weights)) is not None:
            changes.append((module, "forward", forward))
    with overridden(changes), torch.no_grad():
        yield weights


def _weights(chunks: Sequence[torch.nn.Module]) -> Iterator[Tensor]:
    """Weights [out, in] that a decoding step multiplies with, including the output layer's, each once."""
    linears = [module.weight for chunk in chunks for module in chunk.modules() if is_plain_linear(module)]
    heads = [chunk.head_weight() for chunk in chunks if chunk.post_process]
    found = {id(weight): weight for weight in [*linears, *heads]}
    yield from found.values()
