"""Weight initialization that does not depend on the parallel layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.transformer.transformer_config import TransformerConfig

# The standard deviation of projections into the residual stream is divided by sqrt(2 x layers).
_RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")


def sharded_tensors(state_dict) -> Iterator[ShardedTensor]:
    """Every ShardedTensor of a sharded state dict; factories (gated MLPs) are expanded into their parts."""
    if isinstance(state_dict, ShardedTensorFactory):
        yield from sharded_tensors(state_dict.build())
    elif isinstance(state_dict, ShardedTensor):
        yield state_dict
    elif isinstance(state_dict, dict):
        for value in state_dict.values():
            yield from sharded_tensors(value)
    elif isinstance(state_dict, (list, tuple)):
        for value in state_dict:
            yield from sharded_tensors(value)


@torch.no_grad()
def initialize_weights(chunks, config: TransformerConfig, seed: int) -> None:
    """Draw every matrix from N(0, init_method_std^2) with a generator seeded by its global name.

    Each rank draws the whole tensor and keeps its own slice, so the result is bitwise identical for any TP,
    PP, VPP, EP and DP. Vectors (norm weights, biases) keep their constructors' values. No collectives.
    """
    for chunk in chunks:
        for sharded in sharded_tensors(chunk.sharded_state_dict()):
            prepended = sharded.prepend_axis_num
            shape = sharded.global_shape[prepended:]
            if len(shape) < 2 or sharded.data is None:
                continue
            name = f"{seed}/{sharded.key}/{sharded.global_offset[:prepended]}"
            digest = hashlib.sha256(name.encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            std = config.init_method_std
            if sharded.key.startswith("embedding.") and config.embedding_init_method_std is not None:
                std = config.embedding_init_method_std
            if sharded.key.endswith(_RESIDUAL_OUTPUTS):
                std /= (2.0 * config.num_layers) ** 0.5
            full = torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
            offset = sharded.global_offset[prepended:]
            local = sharded.data.shape
            index = tuple(slice(start, start + size) for start, size in zip(offset, local))
            sharded.data.copy_(full[index])
