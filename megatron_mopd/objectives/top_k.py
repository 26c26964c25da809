"""Truncated divergence over the k likeliest tokens and one more outcome, the tail, with all remaining mass.

Without the tail, a student would be rewarded for moving mass outside the top k. With it, the truncated
divergence is a true divergence between distributions over k + 1 outcomes, and never exceeds the full one.

It equals the full-vocabulary divergence from a modified teacher, which distributes its tail mass over the
tail tokens in the student's proportions (in value and gradient, for every divergence of this package). So
truncation only rewrites the teacher's logits, and all later steps are shared with the full vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mopd.objectives.definitions import LOGIT_FLOOR, DivergenceSpec, Moments
from megatron_mopd.objectives.kernels import kernels_for
from megatron_mopd.objectives.vocab_shard import VocabShard


def check_top_k(top_k: int | None, top_k_from: str) -> None:
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_k_from not in ("teacher", "student"):
        raise ValueError(f'top_k_from must be "teacher" or "student", got {top_k_from!r}')


@dataclass
class Truncation:
    """The positions of each row's k likeliest tokens on this shard, and the moments before and after
    truncation."""

    columns: Tensor  # [rows, m] local columns that may be selected
    selected: Tensor  # [rows, m] whether they are
    student_head: Tensor  # [rows, m] their logits
    teacher_head: Tensor
    tail_log_ratio: Tensor  # [rows] log of teacher tail mass over student tail mass
    full_moments: Moments
    mean_score: Tensor

    def apply_(self, student: Tensor, teacher: Tensor, spec: DivergenceSpec) -> Moments:
        """Overwrite `teacher` [rows, columns] with the modified teacher's logits; return its moments."""
        moments = self.full_moments
        shift = (self.tail_log_ratio - moments.log_ratio_offset) * spec.temperature
        teacher.copy_(student).add_(shift.unsqueeze(-1))
        if self.columns.shape[1] > 0:
            tail = teacher.gather(1, self.columns)
            teacher.scatter_(1, self.columns, torch.where(self.selected, self.teacher_head, tail))
        return moments._replace(mean_score=self.mean_score)


def truncate(
    student: Tensor, teacher: Tensor, top_k: int, top_k_from: str, shard: VocabShard, spec: DivergenceSpec
) -> Truncation:
    """Select the top k of "student" or "teacher" over all shards and compute head and tail masses.

    `student` and `teacher` [rows, columns] are this shard's logits; both are modified and restored. The
    vocabulary is not gathered: all-gathers of [rows, k] (each shard's best logits) and of [9, rows] per rank.
    """
    columns, selected = select_top_k(student if top_k_from == "student" else teacher, top_k, shard)
    student_head, teacher_head = student.gather(1, columns), teacher.gather(1, columns)
    dtype = teacher.dtype  # the statistics' dtype, see TeacherMixture
    floor = max(torch.finfo(student.dtype).min, LOGIT_FLOOR)

    # Tail: the usual statistics kernel over logits without the head. Head: a few columns, computed here.
    student.scatter_(1, columns, student_head.masked_fill(selected, floor))
    teacher.scatter_(1, columns, teacher_head.masked_fill(selected, floor))
    tail = kernels_for(student.device).statistics(student, teacher, spec)
    student.scatter_(1, columns, student_head)
    teacher.scatter_(1, columns, teacher_head)
    z = (student_head.to(dtype) * spec.inverse_temperature).masked_fill(~selected, LOGIT_FLOOR)
    u = (teacher_head.to(dtype) * spec.inverse_temperature).masked_fill(~selected, LOGIT_FLOOR)
    # Head and tail of each model, relative to their own local maxima.
    z_max, u_max = _amax(z), _amax(u)
    z, u = z - z_max.unsqueeze(-1), u - u_max.unsqueeze(-1)
    head_student = z.exp()
    cross = (head_student * (z - u)).sum(-1)
    local = [z_max, u_max, tail[0], tail[1], head_student.sum(-1), u.exp().sum(-1), tail[2], tail[3], cross]
    gathered = shard.all_gather(torch.stack(local))
    return _finish(columns, selected, student_head, teacher_head, gathered)


def _finish(columns, selected, student_head, teacher_head, gathered: Tensor) -> Truncation:
    """Each rank's maxima (heads of both models, tails), sums in the same order, cross [tp, 9, rows] ->
    Truncation."""
    local_maxima, local_sums = gathered[:, :4], gathered[:, 4:8]
    maxima = local_maxima.amax(0)
    decays = (local_maxima - maxima).exp()
    sums = (local_sums * decays).sum(0)
    moved = (local_maxima[:, 0] - local_maxima[:, 1]) - (maxima[0] - maxima[1])
    cross = ((gathered[:, 8] + moved * local_sums[:, 0]) * decays[:, 0]).sum(0)
    # A tail may be empty (k covers the vocabulary) or vanish: with zero mass any finite ratio works.
    tiny = torch.finfo(sums.dtype).tiny
    log_masses = maxima + sums.clamp(min=tiny).log()
    student_head_mass, teacher_head_mass, student_tail_mass, teacher_tail_mass = log_masses
    student_normalizer = torch.logaddexp(student_head_mass, student_tail_mass)
    teacher_normalizer = torch.logaddexp(teacher_head_mass, teacher_tail_mass)
    offset = student_normalizer - teacher_normalizer
    empty = (student_tail_mass <= LOGIT_FLOOR / 2) | (teacher_tail_mass <= LOGIT_FLOOR / 2)
    tail_log_ratio = (teacher_tail_mass - student_tail_mass + offset).masked_fill(empty, 0)

    # E_p[-d] over the k + 1 outcomes. The cross sum is relative to the heads' own maxima.
    student_head_prob = (student_head_mass - student_normalizer).exp()
    head_score = cross / sums[0].clamp(min=tiny) + (maxima[0] - maxima[1]) - offset
    tail_prob = (student_tail_mass - student_normalizer).exp()
    mean_score = student_head_prob * head_score - tail_prob * tail_log_ratio
    full_moments = Moments(student_normalizer, teacher_normalizer, offset, torch.zeros_like(offset))
    return Truncation(columns, selected, student_head, teacher_head, tail_log_ratio, full_moments, mean_score)


def select_top_k(logits: Tensor, top_k: int, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """The row-wise top k over all shards: candidate local columns [rows, m] and whether each is selected
    [rows, m].

    All ranks use the same gathered [tp, rows, k] values and a stable sort, so ties cannot be counted twice.
    """
    local_k = min(top_k, logits.shape[1])
    values, columns = logits.topk(local_k, dim=1)
    candidates = values.new_full((values.shape[0], top_k), -torch.inf)
    candidates[:, :local_k] = values
    gathered = shard.all_gather(candidates).transpose(0, 1).flatten(1)  # [rows, tp * k], best of rank 0 first
    kept = min(top_k, gathered.shape[1])
    order = gathered.sort(dim=1, descending=True, stable=True).indices[:, :kept]
    is_kept = torch.zeros_like(gathered, dtype=torch.bool).scatter_(1, order, True)
    return columns, is_kept[:, shard.rank * top_k :][:, :local_k]


def _amax(values: Tensor) -> Tensor:
    """Row-wise maximum [rows] of [rows, m], LOGIT_FLOOR where m is 0."""
    return values.amax(-1) if values.shape[1] > 0 else values.new_full(values.shape[:1], LOGIT_FLOOR)
