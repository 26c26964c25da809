"""Head product and divergence in one: full-vocabulary distillation without ever holding the logits.

For each chunk of tokens the student's and the teacher's logits are built from hidden states, reduced to a few
scalars a token, overwritten in place by the gradient, and multiplied back into the gradients of hidden state
and weight. What remains per token between forward and backward is the hidden gradient, as for any linear
layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
    """Weighted sum of per-token divergences of two vocab-parallel heads: loss = sum_t token_weight_t L_t.

    Args:
        student_hidden: [T, h_s], the same on every rank of `group`; with sequence parallelism gathered first.
        student_weight: [V/tp, h_s], this rank's contiguous block of the padded vocabulary.
        teacher_hidden, teacher_weight: [T, h_t] and [V/tp, h_t]; or K of each (of any widths h_k), for
            L_t = sum_k mixture_weight_k KL(p || q_k), reverse KL only. They get no gradient.
        token_weight: [T], importance ratios, masks and 1/N; taken as constant.
        group: the tensor-parallel group; None where the vocabulary is not sharded.
        divergence, beta, temperature: see `definitions.py`; the temperature divides both models' logits.
        vocab_size: real columns of the whole vocabulary; those beyond take no part and get zero gradient.
        chunk_size: tokens whose logits exist at one time.
        mixture_weight: [K] or [T, K], not negative; equal weights 1/K by default.
        top_k, top_k_from: compare only the k likeliest tokens of "teacher" or "student" and, as one more
            outcome, all the others together.
        diagnostics_top_k: also return `DivergenceDiagnostics`, whose top-k sets have this size.
        reduce_hidden_grad: sum d(loss)/d(student_hidden) over `group`, so that it is exact on each rank.
            False leaves this rank's part, for a caller that reduce-scatters it (sequence parallelism).
        accumulate_into_main_grad: add the weight gradient to `student_weight.main_grad` in the backward (for
            megatron-core's gradient accumulation fusion) instead of returning it.
        report: is told of NaN or infinite logits, which then are no error; loss and gradients are what they
            come to. `token_weight` need not be finite either.
        shared_gradient: these tokens' part of a `MicroBatchHead`, which takes the gradients of several losses
            and decides about the two options before. Nothing that is returned is differentiable then.

    Returns:
        loss (a scalar) and per_token [T] (detached), in fp32, or fp64 for fp64 inputs; equal on every rank.

    Memory: two chunks of logits, chunk_size x V/tp each, beside the gradients themselves; the weight gradient
    is summed in fp32. The forward computes the gradients, the backward only scales them.

    Collectives over `group`: one agreement all-reduce of 32 numbers a call; per chunk of c tokens one
    all-gather of [5, c] a rank; a sum of [T] at the end: a payload of 24 bytes a token in fp32. Then what any
    such head needs, the sum of the hidden gradient [c, h_s], while the next products run. More: JSD a sum of
    [c] per chunk; top-k see `top_k.py`; K teachers an all-gather of [2, K + 1, T] a call; diagnostics see
    `diagnostics.py`. The backward has none.

    Raises:
        ValueError: on every rank alike, for shapes, dtypes, devices or shards that do not match, options
            out of range, and NaN or infinite logits (naming token, rank and model).
    """
    teacher_hiddens = _as_list(teacher_hidden)
    teacher_weights = _as_list(teacher_weight)

    def check() -> dict[str, float | str]:
        spec = DivergenceSpec(divergence, beta, temperature)
        check_head("student", student_hidden, student_weight)
        check_mixture(len(teacher_hiddens), len(teacher_weights), mixture_weight, student_hidden, spec, top_k)
        for hidden, weight in zip(teacher_hiddens, teacher_weights):
            check_head("teacher", hidden, weight)
            check_pair("hidden", student_hidden, hidden)
            if hidden.shape[0] != student_hidden.shape[0]:
                tokens = f"{student_hidden.shape[0]} and {hidden.shape[0]}"
                raise ValueError(f"student and teacher must have the same tokens, got {tokens}")
            if weight.shape[0] != student_weight.shape[0]:
                widths = f"{student_weight.shape[0]} and {weight.shape[0]}"
                raise ValueError(
                    f"student and teacher shards must have the same padded vocabulary width, got {widths}: "
                    "otherwise their columns do not correspond"
                )
        check_chunk_size(chunk_size)
        check_token_weight(token_weight, student_hidden, finite=report is None)
        check_main_grad(student_weight, accumulate_into_main_grad)
        check_top_k(top_k, top_k_from)
        if diagnostics_top_k is not None and diagnostics_top_k < 1:
            raise ValueError(f"diagnostics_top_k must be at least 1, got {diagnostics_top_k}")
        shard = VocabShard.of(student_weight.shape[0], group, vocab_size)
        return {
            "number of tokens": student_hidden.shape[0],
            "local vocabulary width": shard.columns,
            "vocab_size": shard.total,
            "chunk_size": chunk_size,
            **spec.facts(),
            "number of teachers": len(teacher_hiddens),
            "top_k": top_k or 0,
            "top_k_from": top_k_from,
            "diagnostics_top_k": diagnostics_top_k or 0,
            **needed_gradients(student_hidden, student_weight, shared_gradient),
            "reduce_hidden_grad": reduce_hidden_grad,
        }

    agree(group, check)
    shard = VocabShard.of(student_weight.shape[0], group, vocab_size)
    spec = DivergenceSpec(divergence, beta, temperature)
    request = _Request(
        shard=shard,
        spec=spec,
        teachers=TeacherMixture(
            [without_gaps(hidden.detach()) for hidden in teacher_hiddens],
            [without_gaps(weight.detach()) for weight in teacher_weights],
            mixture_weight,
            chunk_size,
            shard,
            spec,
            upcast=top_k is not None,
        ),
        token_weight=token_weight.detach().to(statistics_dtype(student_hidden.dtype)),
        chunk_size=chunk_size,
        top_k=top_k,
        top_k_from=top_k_from,
        diagnostics_top_k=diagnostics_top_k,
        reduce_hidden_grad=reduce_hidden_grad,
        accumulate_into_main_grad=accumulate_into_main_grad,
        report=report,
    )
    if shared_gradient is None:
        loss, per_token, *observed = _LinearDivergence.apply(student_hidden, student_weight, request)
    else:
        with torch.no_grad():
            loss, per_token, *observed = _loss_and_gradient(
                student_hidden, student_weight, request, shared_gradient
            )
    if diagnostics_top_k is None:
        return loss, per_token
    return loss, per_token, DivergenceDiagnostics(*observed)


@dataclass
class _Request:
    """Validated arguments of one call."""

    shard: VocabShard
    spec: DivergenceSpec
    teachers: TeacherMixture
    token_weight: Tensor
    chunk_size: int
    top_k: int | None
    top_k_from: str
    diagnostics_top_k: int | None
    reduce_hidden_grad: bool
    accumulate_into_main_grad: bool
    report: Report | None


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, request):
        gradient = HeadGradient(
            hidden,
            weight,
            request.shard,
            ctx.needs_input_grad[:2],
            request.reduce_hidden_grad,
            largest_magnitude(request.token_weight),
        ).expect()
        loss, per_token, *observed = _loss_and_gradient(hidden, weight, request, gradient)
        ctx.gradient = gradient
        ctx.accumulate_into_main_grad = request.accumulate_into_main_grad
        ctx.save_for_backward(weight)
        ctx.mark_non_differentiable(per_token, *observed)
        return loss, per_token, *observed

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_grad, *_):
        (weight,) = ctx.saved_tensors
        keep = graph_is_kept()
        return *ctx.gradient.deliver(weight, loss_grad, ctx.accumulate_into_main_grad, keep), None


def _loss_and_gradient(
    hidden: Tensor, weight: Tensor, request: _Request, gradient: HeadGradient | SharedGradient
) -> tuple[Tensor, ...]:
    """Loss, per_token [T] and what diagnostics observed; adds to `gradient`."""
    hidden, weight = without_gaps(hidden), without_gaps(weight)
    per_token, observer = _forward_chunks(hidden, weight, request, gradient)
    gradient.finish()
    request.shard.all_reduce(per_token)
    per_token = request.teachers.complete(per_token)
    require_finite(
        request.shard,
        per_token,
        lambda token: {
            "student": hidden[token] @ weight[: request.shard.valid].t(),
            **request.teachers.token_logits(token),
        },
        request.spec.divergence,
        request.report,
    )
    loss = torch.dot(request.token_weight, per_token)
    return loss, per_token, *(() if observer is None else observer.result(request.shard))


def _forward_chunks(
    hidden: Tensor, weight: Tensor, request: _Request, gradient: HeadGradient | SharedGradient
) -> tuple[Tensor, DivergenceObserver | None]:
    """All chunks: this rank's part of each token's divergence [T], and of diagnostics; fills `gradient`."""
    shard, spec, teachers = request.shard, request.spec, request.teachers
    kernels = kernels_for(hidden.device)
    student_logits = LogitsBuffer(hidden, request.chunk_size, shard)
    per_token = torch.zeros_like(request.token_weight)
    observer = None
    if request.diagnostics_top_k is not None:
        observer = DivergenceObserver(request.diagnostics_top_k, per_token)
    for rows in chunks(hidden.shape[0], request.chunk_size):
        student = student_logits.fill(hidden[rows], weight)
        teacher = teachers.logits(rows)
        observed = observer is not None
        if request.top_k is None:
            local = kernels.statistics(student, teacher, spec, entropy=observed)
            moments = merge_statistics(local, shard, spec)
            if observed:
                observer.observe(rows, student, teacher, local, moments, shard, spec)
        else:
            truncated = truncate(student, teacher, request.top_k, request.top_k_from, shard, spec)
            if observed:  # truncation has statistics of head and tail only
                local = kernels.statistics(student, teacher, spec, entropy=True)
                observer.observe(rows, student, teacher, local, truncated.full_moments, shard, spec)
            moments = truncated.apply_(student, teacher, spec)
        scale = out = None
        if gradient.needed:
            moments = complete_mean_score(student, teacher, moments, shard, spec)
            scale = request.token_weight[rows] / gradient.unit * teachers.total_weight(rows)
            scale = scale * spec.inverse_temperature
            out = student
        per_token[rows] = kernels.divergence(student, teacher, moments, spec, scale, out)
        if gradient.needed:
            gradient.add(rows, student, hidden[rows])
    return per_token, observer


def _as_list(tensors: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)
