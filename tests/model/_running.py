"""Our model in one rank's layout: load a checkpoint of either format, and compute logits or generate."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_mopd.data.batching import BatchShape, collate
from megatron_mopd.data.division import Division
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.losses.batch_loss import response_hidden
from megatron_mopd.model.build import build_model
from megatron_mopd.model.checkpoint import find_checkpoint, load_weights, read_architecture
from megatron_mopd.rollout.engine import SamplingParams
from megatron_mopd.rollout.megatron_engine import MegatronEngine
from tests import _models
from tests._megatron_schedules import run_teacher
from tests.rollout._engines import plain

LONGEST = 64


def load(directory, parallel: dict, dtype: str, frozen: bool = True):
    """(groups, architecture, chunks) of a model with the weights of a checkpoint."""
    groups = _models.groups_for(parallel)
    path = find_checkpoint(directory, "test")
    model = read_architecture(path, "test")
    chunks = build_model(model, groups, dtype, max_sequence_length=LONGEST, frozen=frozen)
    load_weights(chunks, path, groups, "test")
    return groups, model, chunks


def logits(rank, directory, parallel, dtype, rows) -> list[dict[int, tuple]]:
    """For a padded and a packed batch: row number -> (positions, their logits [n, vocabulary]) that this rank
    has; no rank has the last position, which predicts nothing.
    """
    groups, model, (chunk,) = load(directory, parallel, dtype)
    return [_logits(groups, model, chunk, rows, packed) for packed in (False, True)]


def _logits(groups, model, chunk, rows, packed) -> dict[int, tuple]:
    trajectories = [_models.trajectory(i, row[:1], row[1:]) for i, row in enumerate(rows)]
    shape = BatchShape.for_batch(
        trajectories,
        micro_batch_size=3,
        max_tokens=24 if packed else None,
        tp_size=groups.tp_size,
        cp_size=groups.cp_size,
        cp_rank=groups.cp.rank(),
    )
    mine = Division(trajectories, groups.dp_size, shape, lambda t: 0).cut().of_rank(groups.dp.rank())
    found = {}

    def keep(micro_batch, hidden):
        states = response_hidden(hidden, micro_batch, groups)
        local = states @ chunk.head_weight().T
        parts = [torch.empty_like(local) for _ in range(groups.tp_size)]
        dist.all_gather(parts, local.contiguous(), group=groups.tp)
        full = torch.cat(parts, dim=1)
        assert full.size(1) >= model.vocab_size and not full[:, model.vocab_size :].any(), "padding not zero"
        full = full[:, : model.vocab_size]
        positions = micro_batch.position_ids[0][micro_batch.loss_index // micro_batch.tokens.size(0)]
        counts = micro_batch.loss_counts
        for item in zip(micro_batch.trajectories, positions.split(counts), full.split(counts)):
            trajectory, where, values = item
            found[trajectory.index] = where.tolist(), values.clone()

    run_teacher(chunk, [collate(group, shape) for group in mine], groups, keep)
    return found


def greedy(rank, directory, parallel, dtype, rows, new_tokens) -> list[tuple]:
    """Greedy continuations of `rows` with their log-probs, from the rollout engine and its KV cache."""
    groups, model, chunks = load(directory, parallel, dtype, frozen=False)
    engine = MegatronEngine(
        chunks, groups, vocab_size=model.vocab_size, max_sequence_length=LONGEST, max_batch_size=64
    )
    prompts = [
        Prompt("", tuple(row), "test", None, "none", None, i, f"row {i}") for i, row in enumerate(rows)
    ]
    sampling = SamplingParams(new_tokens, temperature=0.0)
    return [row[2:4] for row in plain(engine.generate(prompts, sampling, seed=0))]
