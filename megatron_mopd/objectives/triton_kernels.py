"""Triton implementation of the passes over a block of logits: statistics, mean score, value and gradient (see
`definitions.py`).

The same three functions as `torch_kernels`, for CUDA. One program processes one row and loops over its
columns, so `statistics` reads both logits blocks once, and `divergence` reads both once and writes the
gradient once, in place. JSD's gradient needs one more read pass (`mean_score`). Block size and number of
warps are autotuned for each vocabulary width and dtype; matrix products use cuBLAS.

This is the only module that imports Triton. Under Triton's interpreter (TRITON_INTERPRET=1) it runs on the
CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mopd.objectives.definitions import (
    LOGIT_FLOOR,
    SERIES,
    DivergenceSpec,
    Moments,
    series_limit,
    statistics_dtype,
)

_FLOOR = tl.constexpr(LOGIT_FLOOR)
_S4, _S3, _S2, _S1, _S0 = (tl.constexpr(coefficient) for coefficient in SERIES)

_CONFIGS = [
    triton.Config({"BLOCK": block}, num_warps=warps)
    for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16), (8192, 32))
]
if triton.knobs.runtime.interpret:  # no timing, and several column blocks even in small tests
    _CONFIGS = [triton.Config({"BLOCK": 16})]


def statistics(
    student: Tensor, teacher: Tensor, spec: DivergenceSpec, masked: bool = False, entropy: bool = False
) -> Tensor:
    """Local softmax statistics of both blocks -> [5 or 7, rows], like `torch_kernels.statistics`."""
    rows, columns = student.shape
    result = torch.zeros(
        7 if entropy else 5, rows, dtype=statistics_dtype(student.dtype), device=student.device
    )
    if columns == 0:
        result[:2] = LOGIT_FLOOR
    if rows == 0 or columns == 0:
        return result
    student, teacher = _unit_stride(student), _unit_stride(teacher)
    _statistics_kernel[(rows,)](
        student,
        teacher,
        result,
        student.stride(0),
        teacher.stride(0),
        rows,
        columns,
        INVERSE_TEMPERATURE=spec.inverse_temperature,
        MASKED=masked,
        WITH_CROSS=spec.kind == "reverse_kl",
        LIMIT=series_limit(result.dtype),
        WITH_ENTROPY=entropy,
    )
    return result


def mean_score(
    student: Tensor, teacher: Tensor, moments: Moments, spec: DivergenceSpec, masked: bool = False
) -> Tensor:
    """Local part of JSD's E_p[-l] -> [rows], like `torch_kernels.mean_score`."""
    rows, columns = student.shape
    result = torch.zeros(rows, dtype=statistics_dtype(student.dtype), device=student.device)
    if rows == 0 or columns == 0:
        return result
    student, teacher = _unit_stride(student), _unit_stride(teacher)
    _mean_score_kernel[(rows,)](
        student,
        teacher,
        moments.student_log_normalizer.contiguous(),
        moments.log_ratio_offset.contiguous(),
        result,
        student.stride(0),
        teacher.stride(0),
        columns,
        INVERSE_TEMPERATURE=spec.inverse_temperature,
        MASKED=masked,
        BETA=spec.beta,
        LIMIT=series_limit(result.dtype),
    )
    return result


def divergence(
    student: Tensor,
    teacher: Tensor,
    moments: Moments,
    spec: DivergenceSpec,
    scale: Tensor | None = None,
    out: Tensor | None = None,
    masked: bool = False,
) -> Tensor:
    """Local part of each row's divergence -> [rows], like `torch_kernels.divergence`; `out` may be
    `student`."""
    rows, columns = student.shape
    value = torch.zeros(rows, dtype=statistics_dtype(student.dtype), device=student.device)
    if rows == 0 or columns == 0:
        return value
    student, teacher = _unit_stride(student), _unit_stride(teacher)
    assert out is None or out.stride(1) == 1
    _divergence_kernel[(rows,)](
        student,
        teacher,
        *(moment.contiguous() for moment in moments),
        value if scale is None else scale.contiguous(),
        value,
        student if out is None else out,
        student.stride(0),
        teacher.stride(0),
        student.stride(0) if out is None else out.stride(0),
        columns,
        INVERSE_TEMPERATURE=spec.inverse_temperature,
        MASKED=masked,
        KIND=spec.kind,
        BETA=spec.beta,
        LIMIT=series_limit(value.dtype),
        WITH_GRADIENT=out is not None,
    )
    return value


def _unit_stride(block: Tensor) -> Tensor:
    return block if block.stride(1) == 1 else block.contiguous()


@triton.autotune(configs=_CONFIGS, key=["columns"])
@triton.jit
def _statistics_kernel(
    student,
    teacher,
    result,
    student_stride,
    teacher_stride,
    rows,
    columns,
    INVERSE_TEMPERATURE: tl.constexpr,
    MASKED: tl.constexpr,
    WITH_CROSS: tl.constexpr,
    LIMIT: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = result.dtype.element_ty
    z_max, u_max = tl.full([], _FLOOR, dtype), tl.full([], _FLOOR, dtype)
    z_sum, u_sum, fifth = tl.full([], 0, dtype), tl.full([], 0, dtype), tl.full([], 0, dtype)
    z_score, u_score = tl.full([], 0, dtype), tl.full([], 0, dtype)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        z = _load(student + row * student_stride + column, inside, dtype, INVERSE_TEMPERATURE, MASKED)
        u = _load(teacher + row * teacher_stride + column, inside, dtype, INVERSE_TEMPERATURE, MASKED)
        new_z_max, new_u_max = tl.maximum(z_max, tl.max(z, 0)), tl.maximum(u_max, tl.max(u, 0))
        z_decay, u_decay = tl.exp(z_max - new_z_max), tl.exp(u_max - new_u_max)
        z_shifted, u_shifted = z - new_z_max, u - new_u_max
        z_exp, u_exp = tl.exp(z_shifted), tl.exp(u_shifted)
        # The fifth row is relative to z_max - u_max, so it shifts with the maxima.
        moved = (z_max - u_max) - (new_z_max - new_u_max)
        if WITH_CROSS:
            terms = z_exp * (z_shifted - u_shifted)
            fifth = (fifth + moved * z_sum) * z_decay
        else:
            terms = _exp_difference(z_exp, u_exp, z_shifted - u_shifted, LIMIT)
            fifth = fifth * u_decay + z_sum * _exp_difference(z_decay, u_decay, moved, LIMIT)
        fifth += tl.sum(tl.where(inside, terms, 0), 0)
        if WITH_ENTROPY:
            z_score = (z_score + (z_max - new_z_max) * z_sum) * z_decay
            z_score += tl.sum(tl.where(inside, z_exp * z_shifted, 0), 0)
            u_score = (u_score + (u_max - new_u_max) * u_sum) * u_decay
            u_score += tl.sum(tl.where(inside, u_exp * u_shifted, 0), 0)
        z_sum = z_sum * z_decay + tl.sum(tl.where(inside, z_exp, 0), 0)
        u_sum = u_sum * u_decay + tl.sum(tl.where(inside, u_exp, 0), 0)
        z_max, u_max = new_z_max, new_u_max
    tl.store(result + row, z_max)
    tl.store(result + rows + row, u_max)
    tl.store(result + 2 * rows + row, z_sum)
    tl.store(result + 3 * rows + row, u_sum)
    tl.store(result + 4 * rows + row, fifth)
    if WITH_ENTROPY:
        tl.store(result + 5 * rows + row, z_score)
        tl.store(result + 6 * rows + row, u_score)


@triton.autotune(configs=_CONFIGS, key=["columns"])
@triton.jit
def _mean_score_kernel(
    student,
    teacher,
    student_log_normalizer,
    log_ratio_offset,
    result,
    student_stride,
    teacher_stride,
    columns,
    INVERSE_TEMPERATURE: tl.constexpr,
    MASKED: tl.constexpr,
    BETA: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = result.dtype.element_ty
    normalizer, offset = tl.load(student_log_normalizer + row), tl.load(log_ratio_offset + row)
    total = tl.full([], 0, dtype)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        z = _load(student + row * student_stride + column, inside, dtype, INVERSE_TEMPERATURE, MASKED)
        u = _load(teacher + row * teacher_stride + column, inside, dtype, INVERSE_TEMPERATURE, MASKED)
        d = u - z + offset
        log_mixture = tl.where(d > 0, d, 0) + _log_mixture_term(d, BETA, LIMIT)
        total += tl.sum(tl.where(inside, tl.exp(z - normalizer) * log_mixture, 0), 0)
    tl.store(result + row, -total)


@triton.autotune(configs=_CONFIGS, key=["columns"], restore_value=["out"])  # `out` may be an input
@triton.jit
def _divergence_kernel(
    student,
    teacher,
    student_log_normalizer,
    teacher_log_normalizer,
    log_ratio_offset,
    mean_score,
    scale,
    value,
    out,
    student_stride,
    teacher_stride,
    out_stride,
    columns,
    INVERSE_TEMPERATURE: tl.constexpr,
    MASKED: tl.constexpr,
    KIND: tl.constexpr,
    BETA: tl.constexpr,
    LIMIT: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = value.dtype.element_ty
    z_normalizer, u_normalizer = tl.load(student_log_normalizer + row), tl.load(teacher_log_normalizer + row)
    offset, score, row_scale = (
        tl.load(log_ratio_offset + row),
        tl.load(mean_score + row),
        tl.load(scale + row),
    )
    total = tl.full([], 0, dtype)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        z = _load(student + row * student_stride + column, inside, dtype, INVERSE_TEMPERATURE, MASKED)
        u = _load(teacher + row * teacher_stride + column, inside, dtype, INVERSE_TEMPERATURE, MASKED)
        d = u - z + offset
        p, q = tl.exp(z - z_normalizer), tl.exp(u - u_normalizer)
        if KIND == "reverse_kl":
            terms = _generalised_kl(p, q, d, LIMIT)
            gradient = -p * (d + score)
        elif KIND == "forward_kl":
            terms = _generalised_kl(q, p, -d, LIMIT)
            gradient = terms - q * d  # p - q without cancellation
        else:
            term = _log_mixture_term(d, BETA, LIMIT)
            log_ratio = tl.where(d > 0, d, 0) + term  # l = log m - log p
            teacher_log_ratio = tl.where(d < 0, -d, 0) + term  # log m - log q
            mixture = p + BETA * (q - p)
            terms = BETA * _generalised_kl(q, mixture, teacher_log_ratio, LIMIT)
            terms += (1 - BETA) * _generalised_kl(p, mixture, log_ratio, LIMIT)
            gradient = (BETA - 1) * p * (log_ratio + score)
        total += tl.sum(tl.where(inside, terms, 0), 0)
        if WITH_GRADIENT:
            gradient = (gradient * row_scale).to(out.dtype.element_ty)
            tl.store(out + row * out_stride + column, gradient, mask=inside)
    tl.store(value + row, total)


@triton.jit
def _load(pointer, inside, dtype: tl.constexpr, INVERSE_TEMPERATURE: tl.constexpr, MASKED: tl.constexpr):
    """logits / temperature in `dtype`; LOGIT_FLOOR beyond the row and, with MASKED, for -inf."""
    logits = tl.load(pointer, mask=inside, other=0.0).to(dtype) * INVERSE_TEMPERATURE
    if MASKED:
        logits = tl.where(logits < _FLOOR, _FLOOR, logits)  # unlike maximum, a comparison propagates NaN
    return tl.where(inside, logits, _FLOOR)


@triton.jit
def _series(d):
    """(expm1(d) - d) / d^2 for small |d|."""
    return (((_S4 * d + _S3) * d + _S2) * d + _S1) * d + _S0


@triton.jit
def _expm1(x, LIMIT: tl.constexpr):
    """expm1(x) for x <= 0."""
    return tl.where(x < -LIMIT, tl.exp(x) - 1, x + x * x * _series(x))


@triton.jit
def _exp_difference(a_exp, b_exp, d, LIMIT: tl.constexpr):
    """exp(a) - exp(b) without cancellation, from both exponentials and d = a - b."""
    magnitude = tl.maximum(a_exp, b_exp) * _expm1(-tl.abs(d), LIMIT)
    return tl.where(d > 0, -magnitude, magnitude)


@triton.jit
def _generalised_kl(w, r, d, LIMIT: tl.constexpr):
    """D(w || r) with d = log(r / w), elementwise and never negative."""
    direct = r - w - w * d
    direct = tl.where(direct < 0, 0, direct)
    return tl.where(tl.abs(d) > LIMIT, direct, w * d * d * _series(d))


@triton.jit
def _log_mixture_term(d, BETA: tl.constexpr, LIMIT: tl.constexpr):
    """log(m / max(p, q)) = log1p(y) with y = g expm1(-|d|), g = BETA if d <= 0 else 1 - BETA.

    For small arguments log1p(y) = 2 atanh(y / (2 + y)).
    """
    y = ((d > 0).to(d.dtype) * (1 - 2 * BETA) + BETA) * _expm1(-tl.abs(d), LIMIT)
    s = y / (2 + y)
    s2 = s * s
    log1p = 2 * s * (1 + s2 * (1 / 3 + s2 * (1 / 5 + s2 / 7)))
    return tl.where(y < -LIMIT, tl.log(1 + y), log1p)
