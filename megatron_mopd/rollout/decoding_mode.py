"""Training weights made ready to decode, and given back as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

# Every place where megatron-core keeps the choice: the configurations, and the modules that copied it when
# built (tensor-parallel and Transformer Engine linears, the embedding and its vocabulary-parallel table, MTP
# blocks). The mark on parameters says how their gradients are reduced; no gradient is taken here, so it
# stays.
_MODULE_FLAGS = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextlib.contextmanager
def decoding_mode(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """No gradients, evaluation mode, and sequence parallelism off; everything restored on exit, exceptions
    included.

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
    try:
        for owner, name, _ in flags:
            setattr(owner, name, False)
        for chunk in chunks:
            chunk.eval()
        with torch.no_grad():
            yield
    finally:
        for owner, name, value in flags:
            setattr(owner, name, value)
        for module, was_training in training:
            module.training = was_training
