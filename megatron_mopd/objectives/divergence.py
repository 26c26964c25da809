"""Exact divergences between vocab-parallel student and teacher logits, without gathering them.

A row's softmax statistics are merged over the tensor-parallel ranks with one small all-gather
(`merge_statistics`); after that every rank knows the normalizers and its own columns' share of value and
gradient. The gradient is written by hand, because a plain all-reduce inside an autograd graph gives the
correct value but a wrong gradient.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_mopd.objectives.definitions import LOGIT_FLOOR, DivergenceSpec, Moments, statistics_dtype
from megatron_mopd.objectives.kernels import kernels_for
from megatron_mopd.objectives.torch_kernels import exp_difference, tiles
from megatron_mopd.objectives.validation import check_pair
from megatron_mopd.objectives.vocab_shard import VocabShard, agree, require_finite


def merge_statistics(local: Tensor, shard: VocabShard, spec: DivergenceSpec) -> Moments:
    """Merge every rank's `statistics` [5 or 7, rows] into the `Moments` of the whole vocabulary.

    Collective over the tensor-parallel group: all-gather of [5, rows] per rank ([4, rows] unless reverse KL),
    20 bytes per row in fp32. A gather has one latency instead of the two of all-reduces (MAX, then SUM), and
    every rank adds in the same order for student and teacher, so identical models have bitwise identical
    normalizers.
    """
    if spec.kind == "reverse_kl":
        gathered = shard.all_gather(local[:5])
        local_sums, cross = gathered[:, 2:4], gathered[:, 4]
    else:  # the smaller sum and the difference also give the larger sum, without cancellation
        smaller = local[2:4].amin(0, keepdim=True)
        gathered = shard.all_gather(torch.cat([local[:2], smaller, local[4:5]]))
        smaller, difference = gathered[:, 2], gathered[:, 3]
        local_sums = smaller.unsqueeze(1) + torch.stack([difference, -difference], 1).clamp_(min=0)
    local_maxima = gathered[:, :2]
    maxima = local_maxima.amax(0)
    decays = (local_maxima - maxima).exp()  # from each rank's own maximum to the common one
    sums = (local_sums * decays).sum(0)
    log_sums = sums.log()
    # Relative to the maxima as long as possible: near convergence these differences are tiny.
    log_sum_ratio = log_sums[0] - log_sums[1]
    mean_score = torch.zeros_like(log_sum_ratio)
    # Cross sums and differences are relative to each rank's difference of maxima, so they are shifted too.
    moved = (local_maxima[:, 0] - local_maxima[:, 1]) - (maxima[0] - maxima[1])
    if spec.kind == "reverse_kl":
        cross = ((cross + moved * local_sums[:, 0]) * decays[:, 0]).sum(0)
        # An error of log_sum_ratio cancels in the gradient: d contains it with the opposite sign.
        mean_score = cross / sums[0] - log_sum_ratio
    else:
        shifted = local_sums[:, 0] * exp_difference(decays.amax(1), moved)
        relative = (difference * decays[:, 1] + shifted).sum(0) / sums[1]
        log_sum_ratio = torch.where(relative.abs() < 0.5, relative.log1p(), log_sum_ratio)
    normalizers = maxima + log_sums
    return Moments(normalizers[0], normalizers[1], (maxima[0] - maxima[1]) + log_sum_ratio, mean_score)


def complete_mean_score(
    student: Tensor, teacher: Tensor, moments: Moments, shard: VocabShard, spec: DivergenceSpec, masked=False
) -> Moments:
    """Compute the mean score that JSD's gradient needs in addition: one more pass and a sum of [rows]."""
    if spec.kind != "jsd":
        return moments
    kernels = kernels_for(student.device)
    local = kernels.mean_score(student, teacher, moments, spec, masked=masked)
    return moments._replace(mean_score=shard.all_reduce(local))


def vocab_parallel_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """Per-token divergence [...] of two logits [..., V/tp], differentiable in the student's.

    Returns the same value on every rank of `group` (None: the vocabulary is not sharded), in fp32, or fp64
    for fp64 logits. A logit of -inf is a masked token with probability zero. Columns at or beyond
    `vocab_size` are ignored and get zero gradient. The teacher gets no gradient. Saved for the backward: the
    inputs and a few scalars per token.

    Collectives over `group`, for N tokens: one agreement all-reduce of 32 numbers, an all-gather of [5, N]
    per rank, a sum of [2, N] (JSD with gradient: another of [N]); 28 bytes per token in fp32. None in the
    backward.

    Raises:
        ValueError: on every rank, for mismatched shapes, dtypes, devices or shards; an unknown divergence,
            beta outside [0, 1], temperature not above 0; NaN or +inf logits, a row without an unmasked logit,
            or an infinite divergence (only one model masks a token), naming the token and the rank.
    """

    def check() -> dict[str, float | str]:
        spec = DivergenceSpec(divergence, beta, temperature)
        check_pair("logits", student_logits, teacher_logits)
        if student_logits.shape != teacher_logits.shape or student_logits.dim() == 0:
            shapes = f"{list(student_logits.shape)} and {list(teacher_logits.shape)}"
            raise ValueError(
                f"student and teacher logits must both be [..., V/tp] of one shape, got {shapes}"
            )
        shard = VocabShard.of(student_logits.shape[-1], group, vocab_size)
        return {
            "number of tokens": student_logits.shape[:-1].numel(),
            "local vocabulary width": shard.columns,
            "vocab_size": shard.total,
            **spec.facts(),
            "gradient needed": student_logits.requires_grad and torch.is_grad_enabled(),
        }

    agree(group, check)
    spec = DivergenceSpec(divergence, beta, temperature)
    shard = VocabShard.of(student_logits.shape[-1], group, vocab_size)
    return _VocabParallelDivergence.apply(student_logits, teacher_logits.detach(), shard, spec)


class _VocabParallelDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_logits, teacher_logits, shard, spec):
        student = student_logits.reshape(-1, shard.columns)[:, : shard.valid]
        teacher = teacher_logits.reshape(-1, shard.columns)[:, : shard.valid]
        kernels = kernels_for(student.device)
        moments = merge_statistics(kernels.statistics(student, teacher, spec, masked=True), shard, spec)
        if ctx.needs_input_grad[0]:
            moments = complete_mean_score(student, teacher, moments, shard, spec, masked=True)
        value = kernels.divergence(student, teacher, moments, spec, masked=True)
        value, one_sided = shard.all_reduce(torch.stack([value, _one_sided_masks(student, teacher, spec)]))
        all_masked = torch.stack(moments[:2]).amin(0) < LOGIT_FLOOR / 2
        value = value.masked_fill((one_sided > 0) | all_masked, torch.inf)

        def token_logits(token):
            numerator = student[token] if spec.kind == "reverse_kl" else teacher[token]
            legal = numerator == -torch.inf
            return {
                "student": student[token].masked_fill(legal, 0),
                "teacher": teacher[token].masked_fill(legal, 0),
            }

        require_finite(shard, value, token_logits, spec.divergence)
        ctx.save_for_backward(student_logits, teacher_logits, *moments)
        ctx.shard, ctx.spec = shard, spec
        return value.view(student_logits.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, value_grad):
        student_logits, teacher_logits, *moments = ctx.saved_tensors
        shard, spec = ctx.shard, ctx.spec
        student = student_logits.reshape(-1, shard.columns)[:, : shard.valid]
        teacher = teacher_logits.reshape(-1, shard.columns)[:, : shard.valid]
        gradient = torch.empty_like(student_logits, memory_format=torch.contiguous_format)
        rows = gradient.view(-1, shard.columns)
        rows[:, shard.valid :] = 0
        kernels_for(student.device).divergence(
            student,
            teacher,
            Moments(*moments),
            spec,
            scale=value_grad.reshape(-1).to(statistics_dtype(student.dtype)) * spec.inverse_temperature,
            out=rows[:, : shard.valid],
            masked=True,
        )
        return gradient, None, None, None


def _one_sided_masks(student: Tensor, teacher: Tensor, spec: DivergenceSpec) -> Tensor:
    """Number [rows] of columns that make the divergence infinite: probability zero for only one of the
    models."""
    count = torch.zeros(student.shape[0], dtype=statistics_dtype(student.dtype), device=student.device)
    if spec.kind == "jsd":  # bounded for any supports
        return count
    numerator, denominator = (student, teacher) if spec.kind == "reverse_kl" else (teacher, student)
    for rows, _ in tiles(student, 0, count.dtype):
        count[rows] = ((denominator[rows] == -torch.inf) & (numerator[rows] != -torch.inf)).sum(-1)
    return count
