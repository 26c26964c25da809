"""The proximal policy: the student at the start of a rollout batch, before its first optimizer step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.data.batching import BatchShape, MicroBatch
from megatron_mopd.model.gpt import unwrap
from megatron_mopd.objectives import sampled_token_logprobs
from megatron_mopd.pipeline.megatron_schedules import run_forward
from megatron_mopd.training.nonfinite import Findings
from megatron_mopd.training.response_tokens import ResponseTokens, response_hidden, row_positions


def proximal_logprobs(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    shape: BatchShape,
    groups: ParallelGroups,
    *,
    vocab_size: int,
    chunk_size: int,
    temperature: float,
    findings: Findings,
) -> dict[int, Tensor]:
    """log-probs [|y|] of the sampled tokens under the student as it is, by trajectory index; on the CPU.

    One forward pass of the student as in training (not the sampler's engine: the difference between the two
    is mu's, and belongs in proximal / mu). Filled on the last stage, for this rank's trajectories; empty
    elsewhere. Collectives: the model's, those of `sampled_token_logprobs`, and under context parallelism one
    all-reduce of the response tokens per micro-batch.
    """
    found: dict[int, Tensor] = {}

    def keep(micro_batch: MicroBatch, hidden: Tensor) -> None:
        if not micro_batch.trajectories:
            return
        rows = response_hidden(hidden, micro_batch, groups)
        tokens = ResponseTokens(
            micro_batch.trajectories,
            slice(0, rows.size(0)),
            row_positions(micro_batch),
            micro_batch.loss_counts,
            groups,
        )
        statistics = torch.float64 if rows.dtype == torch.float64 else torch.float32
        logprobs = torch.zeros(0, dtype=statistics, device=rows.device)
        if rows.size(0):
            logprobs = sampled_token_logprobs(
                rows,
                unwrap(chunks[-1]).head_weight(),
                micro_batch.target_ids,
                group=groups.tp,
                vocab_size=vocab_size,
                chunk_size=chunk_size,
                temperature=temperature,
                report=findings.report(tokens),
            )
        whole = tokens.whole(logprobs).cpu()
        for trajectory, values in zip(micro_batch.trajectories, whole.split(tokens.lengths)):
            found[trajectory.index] = values

    run_forward(chunks, micro_batches, shape, groups, keep)
    return found
