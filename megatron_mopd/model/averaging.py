"""Weight averaging over checkpoints of one architecture, as a simple alternative to distillation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.config import ConfigError
from megatron_mopd.data.tokenizer import load_tokenizer
from megatron_mopd.model.background_save import write_checkpoint
from megatron_mopd.model.build import build_model
from megatron_mopd.model.checkpoint import (
    TOKENIZER_DIRECTORY,
    find_checkpoint,
    load_weights,
    model_state,
    read_model_config,
)


def average_checkpoints(
    checkpoints: Sequence[str | Path],
    output: str | Path,
    groups: ParallelGroups,
    *,
    weights: Sequence[float] | None = None,
    params_dtype: str = "float32",
) -> Path:
    """Write sum_k weights_k theta_k / sum_k weights_k, summed in float64, as a checkpoint in `output`.

    Equal weights by default. Only one model and one float64 sum are in memory, whatever the number of
    checkpoints. Collective over all ranks of `groups`. Raises `ConfigError` if the checkpoints differ in
    architecture or tokenizer, or if the number or values of the weights are invalid.
    """
    weights = [1.0] * len(checkpoints) if weights is None else list(weights)
    if not checkpoints or len(weights) != len(checkpoints) or min(weights) < 0 or not sum(weights) > 0:
        raise ConfigError(
            f"averaging needs checkpoints and as many weights of at least 0, found {len(checkpoints)} "
            f"checkpoints and weights {weights}"
        )
    paths = [find_checkpoint(checkpoint, str(checkpoint)) for checkpoint in checkpoints]
    model, fingerprint = read_model_config(paths[0], str(checkpoints[0]))
    for path in paths[1:]:
        if read_model_config(path, str(path)) != (model, fingerprint):
            raise ConfigError(f"{path}: different architecture or tokenizer from {paths[0]}")
    length = model.max_position_embeddings or 1
    chunks = build_model(model, groups, params_dtype, max_sequence_length=length, where=str(paths[0]))
    tensors = [
        p for chunk in chunks for p in (*chunk.parameters(), *chunk.buffers()) if p.is_floating_point()
    ]
    sums = [torch.zeros_like(tensor, dtype=torch.float64) for tensor in tensors]
    for path, weight in zip(paths, weights):
        load_weights(chunks, path, groups, str(path))
        for total, tensor in zip(sums, tensors):
            total.add_(tensor.detach().double(), alpha=weight / sum(weights))
    with torch.no_grad():
        for total, tensor in zip(sums, tensors):
            tensor.copy_(total)
    tokenizer = load_tokenizer(paths[0] / TOKENIZER_DIRECTORY)
    return write_checkpoint(output, 0, model_state(chunks, groups), model, fingerprint, tokenizer.save)
