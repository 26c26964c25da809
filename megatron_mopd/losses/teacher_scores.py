"""Extracts what the loss needs from a teacher's forward pass and puts it into the cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_mopd.data.batching import MicroBatch
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.losses.batch_loss import LossSettings
from megatron_mopd.losses.findings import Findings
from megatron_mopd.losses.response_tokens import ResponseTokens, response_hidden, row_positions
from megatron_mopd.losses.targets import Targets
from megatron_mopd.objectives import sampled_token_logprobs
from megatron_mopd.teachers.bank import TeacherBank
from megatron_mopd.teachers.hidden_cache import HiddenCache


class TeacherScores:
    """Fills the cache of one step: hidden states of response positions, or, if the objective compares only
    sampled tokens, their log-probs (4 bytes per token instead of h x 2; 8 for a float64 model).
    """

    def __init__(
        self,
        settings: LossSettings,
        bank: TeacherBank | None,
        targets: Targets,
        cache: HiddenCache,
        findings: Findings,
    ):
        self._settings, self._bank, self._targets = settings, bank, targets
        self._cache, self._findings = cache, findings

    def keep(self, teacher: str, micro_batch: MicroBatch, hidden: Tensor) -> None:
        """Cache what is needed of `hidden` [s/cp(/tp), b, h], on the last stage; no reference to `hidden` is
        kept.

        Collectives: those of `response_hidden`, and of `sampled_token_logprobs` over tensor-parallel ranks.
        """
        rows = response_hidden(hidden, micro_batch, self._settings.groups)
        counts, trajectories = micro_batch.loss_counts, micro_batch.trajectories
        only = [self.keeps_log_probs(t) for t in trajectories]
        if any(only):
            log_probs = self._log_probs(teacher, rows, micro_batch, only)
        for t, states, is_only, count in zip(trajectories, rows.split(counts), only, counts):
            if not count:  # under context parallelism a rank may hold no response token of a trajectory
                continue
            if is_only:
                self._cache.put_log_probs(t.index, teacher, log_probs[:count])
                log_probs = log_probs[count:]
            else:
                self._cache.put(t.index, teacher, states)

    def keeps_log_probs(self, trajectory: Trajectory) -> bool:
        """Whether its teachers' forward passes apply their LM heads and keep log-probs."""
        return self._targets[trajectory.domain].keeps_log_probs

    def _log_probs(self, teacher: str, rows: Tensor, micro_batch: MicroBatch, only: Sequence[bool]) -> Tensor:
        """log T [n] of the sampled tokens of the trajectories flagged in `only`."""
        counts = torch.tensor(micro_batch.loss_counts, dtype=torch.long)
        chosen = torch.tensor(only).repeat_interleave(counts).to(rows.device)
        if not bool(chosen.any()):
            return rows.new_zeros(0)
        tokens = ResponseTokens(
            [t for t, is_only in zip(micro_batch.trajectories, only) if is_only],
            slice(0, int(chosen.sum())),
            row_positions(micro_batch)[chosen],
            [count for count, is_only in zip(micro_batch.loss_counts, only) if is_only],
            self._settings.groups,
        )
        with torch.no_grad():
            return sampled_token_logprobs(
                rows[chosen],
                self._bank.head(teacher),
                micro_batch.target_ids[chosen],
                group=self._settings.groups.tp,
                temperature=self._settings.rollout_temperature,
                vocab_size=self._settings.vocab_size,
                chunk_size=self._settings.chunk_size,
                report=self._findings.report_of_teacher(tokens, teacher),
            )

    def num_bytes(self, teacher: str, trajectories: Sequence[Trajectory]) -> int:
        """Cache size of these trajectories scored by `teacher`, on a rank that holds all their tokens."""
        config = self._bank.config(teacher)
        state = config.hidden_size * self._cache.itemsize(config.params_dtype)
        log_prob = 8 if config.params_dtype == torch.float64 else 4
        return sum(t.response_length * (log_prob if self.keeps_log_probs(t) else state) for t in trajectories)
