"""The proximal policy: the student at the start of a rollout batch, before its first optimizer step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_mopd.data.batching import MicroBatch
from megatron_mopd.losses.batch_loss import LossSettings
from megatron_mopd.losses.findings import Findings
from megatron_mopd.losses.response_tokens import ResponseTokens, response_hidden, row_positions
from megatron_mopd.model.gpt import unwrap
from megatron_mopd.objectives import sampled_token_logprobs
from megatron_mopd.objectives.definitions import statistics_dtype
from megatron_mopd.pipeline.driver import PipelineDriver


def proximal_logprobs(
    pipeline: PipelineDriver,
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    *,
    settings: LossSettings,
    findings: Findings,
) -> dict[int, Tensor]:
    """log-probs [|y|] of the sampled tokens under the current student, by trajectory index, on the CPU.

    One forward pass of the student as in training, not through the rollout engine: the difference between the
    two must remain in the ratio proximal / mu. Filled on the last stage for this rank's trajectories, empty
    elsewhere. Collectives: those of `PipelineDriver.forward` and `sampled_token_logprobs`, and under context
    parallelism one all-reduce of the response tokens per micro-batch.
    """
    found: dict[int, Tensor] = {}

    def keep(micro_batch: MicroBatch, hidden: Tensor) -> None:
        if not micro_batch.trajectories:
            return
        rows = response_hidden(hidden, micro_batch, settings.groups)
        tokens = ResponseTokens(
            micro_batch.trajectories,
            slice(0, rows.size(0)),
            row_positions(micro_batch),
            micro_batch.loss_counts,
            settings.groups,
        )
        logprobs = torch.zeros(0, dtype=statistics_dtype(rows.dtype), device=rows.device)
        if rows.size(0):
            logprobs = sampled_token_logprobs(
                rows,
                unwrap(chunks[-1]).head_weight(),
                micro_batch.target_ids,
                temperature=settings.rollout_temperature,
                report=findings.report(tokens),
                **settings.head_options,
            )
        whole = tokens.whole(logprobs).cpu()
        for trajectory, values in zip(micro_batch.trajectories, whole.split(tokens.lengths)):
            found[trajectory.index] = values

    pipeline.forward(chunks, micro_batches, keep)
    return found
