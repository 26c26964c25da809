"""Fused head product and divergence: full-vocabulary distillation without materializing all logits.

For each chunk of tokens the student's and the teacher's logits are computed from hidden states, reduced to a
few scalars per token, overwritten with the gradient, and multiplied back into the gradients of hidden states
and weight. Between forward and backward only the hidden gradient is kept per token, as for any linear layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_mopd.backend.autograd import graph_is_kept
from megatron_mopd.objectives.chunked_head import (
    HeadGradient,
    LogitsBuffer,
    chunks,
    largest_magnitude,
    without_gaps,
)
from megatron_mopd.objectives.definitions import DivergenceSpec, statistics_dtype
from megatron_mopd.objectives.diagnostics import DivergenceDiagnostics, DivergenceObserver
from megatron_mopd.objectives.divergence import complete_mean_score, merge_statistics
from megatron_mopd.objectives.kernels import kernels_for
from megatron_mopd.objectives.micro_batch_head import SharedGradient, needed_gradients
from megatron_mopd.objectives.teacher_mixture import TeacherMixture, check_mixture
from megatron_mopd.objectives.top_k import check_top_k, truncate
from megatron_mopd.objectives.validation import (
    check_chunk_size,
    check_head,
    check_main_grad,
    check_pair,
    check_token_weight,
)
from megatron_mopd.objectives.vocab_shard import Report, VocabShard, agree, require_finite


def linear_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | Sequence[Tensor],
    teacher_weight: Tensor | Sequence[Tensor],
    *,
    token_weight: Tensor,
    group: dist.ProcessGroup | None = None,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int = 1024,
    mixture_weight: Tensor | None = None,
    top_k: int | None = None,
    top_k_from: str = "teacher",
    diagnostics_top_k: int | None = None,
    reduce_hidden_grad: bool = True,
    accumulate_into_main_grad: bool = False,
    report: Report | None = None,
    shared_gradient: SharedGradient | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, DivergenceDiagnostics]:
    """Weighted sum of per-token divergences between two vocab-parallel heads: loss = sum_t token_weight_t
    L_t.

    Args:
        student_hidden: [T, h_s], equal on every rank of `group`; must be gathered under sequence parallelism.
        student_weight: [V/tp, h_s], this rank's contiguous block of the padded vocabulary.
        teacher_hidden, teacher_weight: [T, h_t] and [V/tp, h_t]; or K of each (with any widths h_k), for L_t
            = sum_k mixture_weight_k KL(p || q_k), reverse KL only. They get no gradient.
        token_weight: [T], importance ratios, masks and 1/N; treated as constant.
        group: the tensor-parallel group; None if the vocabulary is not sharded.
        divergence, beta, temperature: see `definitions.py`; the temperature divides both models' logits.
        vocab_size: real columns of the whole vocabulary; columns beyond are ignored and get zero gradient.
        chunk_size: number of tokens whose logits are in memory at a time.
        mixture_weight: [K] or [T, K], non-negative; equal weights 1/K by default.
        top_k, top_k_from: compare only the k likeliest tokens of "teacher" or "student" and, as one more
            outcome, all other tokens together.
        diagnostics_top_k: also return `DivergenceDiagnostics` with top-k sets of this size.
        reduce_hidden_grad: sum d(loss)/d(student_hidden) over `group`, so that it is complete on each rank.
            False keeps this rank's part, for a caller that reduce-scatters it (sequence parallelism).
        accumulate_into_main_grad: add the weight gradient to `student_weight.main_grad` in the backward (for
            megatron-core's gradient accumulation fusion) instead of returning it.
        report: called for NaN or infinite logits instead of raising; loss and gradients are not corrected.
            `token_weight` need not be finite either.
        shared_gradient: these tokens' part of a `MicroBatchHead`, which collects the gradients of several
            losses and determines `reduce_hidden_grad` and `accumulate_into_main_grad`. The returned tensors
            are then not differentiable.

    Returns:
        loss (a scalar) and per_token [T] (detached), in fp32, or fp64 for fp64 inputs; equal on every rank.

    Memory: two chunks of logits, chunk_size x V/tp each, besides the gradients; the weight gradient is summed
    in fp32. The forward computes the gradients, and the backward only scales them.

    Collectives over `group`: one agreement all-reduce of 32 numbers per call; per chunk of c tokens one
    all-gather of [5, c] per rank; a sum of [T] at the end: a payload of 24 bytes per token in fp32. In
    addition, as for any such head, the sum of the hidden gradient [c, h_s], overlapped with the next
    products. JSD adds a sum of [c] per chunk, K teachers an all-gather of [2, K + 1, T] per call; for top-k
    see `top_k.py`, for diagnostics `diagnostics.py`. None in the backward.

    Raises:
        ValueError: on every rank, for mismatched shapes, dtypes, devices or shards, options out of range, and
            NaN or infinite logits (naming token, rank and model).
    """
    call = _Call(
        student_hidden,
        student_weight,
        _as_list(teacher_hidden),
        _as_list(teacher_weight),
        token_weight=token_weight,
        group=group,
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        vocab_size=vocab_size,
        chunk_size=chunk_size,
        mixture_weight=mixture_weight,
        top_k=top_k,
        top_k_from=top_k_from,
        diagnostics_top_k=diagnostics_top_k,
        reduce_hidden_grad=reduce_hidden_grad,
        accumulate_into_main_grad=accumulate_into_main_grad,
        report=report,
        shared_gradient=shared_gradient,
    )
    agree(group, call.check)
    if shared_gradient is None:
        loss, per_token, *observed = _LinearDivergence.apply(student_hidden, student_weight, call)
    else:
        with torch.no_grad():
            loss, per_token, *observed = _loss_and_gradient(call, shared_gradient)
    if diagnostics_top_k is None:
        return loss, per_token
    return loss, per_token, DivergenceDiagnostics(*observed)


@dataclass
class _Call:
    """The arguments of one call. Derived attributes may only be used after `check`."""

    hidden: Tensor
    weight: Tensor
    teacher_hiddens: list[Tensor]
    teacher_weights: list[Tensor]
    token_weight: Tensor
    group: dist.ProcessGroup | None
    divergence: str
    beta: float
    temperature: float
    vocab_size: int | None
    chunk_size: int
    mixture_weight: Tensor | None
    top_k: int | None
    top_k_from: str
    diagnostics_top_k: int | None
    reduce_hidden_grad: bool
    accumulate_into_main_grad: bool
    report: Report | None
    shared_gradient: SharedGradient | None

    @cached_property
    def spec(self) -> DivergenceSpec:
        return DivergenceSpec(self.divergence, self.beta, self.temperature)

    @cached_property
    def shard(self) -> VocabShard:
        return VocabShard.of(self.weight.shape[0], self.group, self.vocab_size)

    @cached_property
    def constant_weight(self) -> Tensor:
        """The token weights [T] in the statistics' dtype."""
        return self.token_weight.detach().to(statistics_dtype(self.hidden.dtype))

    @cached_property
    def teachers(self) -> TeacherMixture:
        return TeacherMixture(
            [without_gaps(hidden.detach()) for hidden in self.teacher_hiddens],
            [without_gaps(weight.detach()) for weight in self.teacher_weights],
            self.mixture_weight,
            self.chunk_size,
            self.shard,
            self.spec,
            upcast=self.top_k is not None,
        )

    def check(self) -> dict[str, float | str]:
        """Raise ValueError for invalid arguments on this rank; return the values that must be equal on all
        ranks."""
        hidden, weight = self.hidden, self.weight
        check_head("student", hidden, weight)
        check_mixture(
            len(self.teacher_hiddens),
            len(self.teacher_weights),
            self.mixture_weight,
            hidden,
            self.spec,
            self.top_k,
        )
        for teacher_hidden, teacher_weight in zip(self.teacher_hiddens, self.teacher_weights):
            _check_teacher(hidden, weight, teacher_hidden, teacher_weight)
        check_chunk_size(self.chunk_size)
        check_token_weight(self.token_weight, hidden, finite=self.report is None)
        check_main_grad(weight, self.accumulate_into_main_grad)
        check_top_k(self.top_k, self.top_k_from)
        if self.diagnostics_top_k is not None and self.diagnostics_top_k < 1:
            raise ValueError(f"diagnostics_top_k must be at least 1, got {self.diagnostics_top_k}")
        return {
            "number of tokens": hidden.shape[0],
            "local vocabulary width": self.shard.columns,
            "vocab_size": self.shard.total,
            "chunk_size": self.chunk_size,
            **self.spec.facts(),
            "number of teachers": len(self.teacher_hiddens),
            "top_k": self.top_k or 0,
            "top_k_from": self.top_k_from,
            "diagnostics_top_k": self.diagnostics_top_k or 0,
            **needed_gradients(hidden, weight, self.shared_gradient),
            "reduce_hidden_grad": self.reduce_hidden_grad,
        }


def _check_teacher(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
) -> None:
    check_head("teacher", teacher_hidden, teacher_weight)
    check_pair("hidden", student_hidden, teacher_hidden)
    if teacher_hidden.shape[0] != student_hidden.shape[0]:
        tokens = f"{student_hidden.shape[0]} and {teacher_hidden.shape[0]}"
        raise ValueError(f"student and teacher must have the same tokens, got {tokens}")
    if teacher_weight.shape[0] != student_weight.shape[0]:
        widths = f"{student_weight.shape[0]} and {teacher_weight.shape[0]}"
        raise ValueError(
            f"student and teacher shards must have the same padded vocabulary width, got {widths}: "
            "otherwise their columns do not correspond"
        )


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, call):
        gradient = HeadGradient(
            hidden,
            weight,
            call.shard,
            ctx.needs_input_grad[:2],
            call.reduce_hidden_grad,
            largest_magnitude(call.constant_weight),
        ).expect()
        loss, per_token, *observed = _loss_and_gradient(call, gradient)
        ctx.gradient = gradient
        ctx.accumulate_into_main_grad = call.accumulate_into_main_grad
        ctx.save_for_backward(weight)
        ctx.mark_non_differentiable(per_token, *observed)
        return loss, per_token, *observed

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_grad, *_):
        (weight,) = ctx.saved_tensors
        keep = graph_is_kept()
        return *ctx.gradient.deliver(weight, loss_grad, ctx.accumulate_into_main_grad, keep), None


def _loss_and_gradient(call: _Call, gradient: HeadGradient | SharedGradient) -> tuple[Tensor, ...]:
    """Compute loss, per_token [T] and diagnostics; add to `gradient`."""
    hidden, weight = without_gaps(call.hidden.detach()), without_gaps(call.weight.detach())
    per_token, observer = _forward_chunks(hidden, weight, call, gradient)
    gradient.finish()
    call.shard.all_reduce(per_token)
    per_token = call.teachers.complete(per_token)
    require_finite(
        call.shard,
        per_token,
        lambda token: {
            "student": hidden[token] @ weight[: call.shard.valid].t(),
            **call.teachers.token_logits(token),
        },
        call.divergence,
        call.report,
    )
    loss = torch.dot(call.constant_weight, per_token)
    return loss, per_token, *(() if observer is None else observer.result(call.shard))


def _forward_chunks(
    hidden: Tensor, weight: Tensor, call: _Call, gradient: HeadGradient | SharedGradient
) -> tuple[Tensor, DivergenceObserver | None]:
    """Process all chunks: returns this rank's part of each token's divergence [T] and of the diagnostics;
    fills `gradient`."""
    shard, spec, teachers, token_weight = call.shard, call.spec, call.teachers, call.constant_weight
    kernels = kernels_for(hidden.device)
    student_logits = LogitsBuffer(hidden, call.chunk_size, shard)
    per_token = torch.zeros_like(token_weight)
    observer = None
    if call.diagnostics_top_k is not None:
        observer = DivergenceObserver(call.diagnostics_top_k, per_token)
    for rows in chunks(hidden.shape[0], call.chunk_size):
        student = student_logits.fill(hidden[rows], weight)
        teacher = teachers.logits(rows)
        observed = observer is not None
        if call.top_k is None:
            local = kernels.statistics(student, teacher, spec, entropy=observed)
            moments = merge_statistics(local, shard, spec)
            if observed:
                observer.observe(rows, student, teacher, local, moments, shard, spec)
        else:
            truncated = truncate(student, teacher, call.top_k, call.top_k_from, shard, spec)
            if observed:  # truncation only computes statistics of head and tail
                local = kernels.statistics(student, teacher, spec, entropy=True)
                observer.observe(rows, student, teacher, local, truncated.full_moments, shard, spec)
            moments = truncated.apply_(student, teacher, spec)
        scale = out = None
        if gradient.needed:
            moments = complete_mean_score(student, teacher, moments, shard, spec)
            scale = token_weight[rows] / gradient.unit * teachers.total_weight(rows)
            scale = scale * spec.inverse_temperature
            out = student
        per_token[rows] = kernels.divergence(student, teacher, moments, spec, scale, out)
        if gradient.needed:
            gradient.add(rows, student, hidden[rows])
    return per_token, observer


def _as_list(tensors: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)
