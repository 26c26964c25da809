"""Training weights made ready to decode, and given back as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_mopd.backend.overrides import overridden
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
    """Weights [out, in] that a decoding step multiplies with, the output head included, each once."""
    linears = [module.weight for chunk in chunks for module in chunk.modules() if is_plain_linear(module)]
    heads = [chunk.head_weight() for chunk in chunks if chunk.post_process]
    found = {id(weight): weight for weight in [*linears, *heads]}
    yield from found.values()
