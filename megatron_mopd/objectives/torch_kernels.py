"""PyTorch implementation of the passes over a block of logits: statistics, mean score, value and gradient
(see `definitions.py`).

They process tiles of a few rows with all intermediates in reused buffers that stay in cache, so a pass reads
each block of logits from memory once, and its extra memory does not depend on the number of rows.

Conventions of the three passes: logits blocks are [rows, columns] with unit column stride, only real
(unpadded) columns; `masked` allows logits of -inf, with probability zero; results are this rank's partial
sums over columns, and an empty block (a shard with only padding) gives neutral values.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_mopd.objectives.definitions import (
    LOGIT_FLOOR,
    SERIES,
    DivergenceSpec,
    Moments,
    series_limit,
    statistics_dtype,
)

# Elements per tile. On the CPU 0.5 MiB in fp32, so that the buffers of a pass stay in the last-level cache.
# On CUDA (only used without Triton) large enough to fill the device.
TILE_ELEMENTS = {"cpu": 2**17, "cuda": 2**24}


def statistics(
    student: Tensor, teacher: Tensor, spec: DivergenceSpec, masked: bool = False, entropy: bool = False
) -> Tensor:
    """Local softmax statistics of both blocks -> [5, rows], with `entropy` [7, rows].

    Rows of the result: student maximum a, teacher maximum b, student sum of exp(z - a), teacher sum of
    exp(u - b); for reverse KL the sum of exp(z - a) ((z - a) - (u - b)), for the other kinds the sum of
    exp(z - a) - exp(u - b); with `entropy` the sums of exp(z - a) (z - a) and of exp(u - b) (u - b).
    """
    dtype = statistics_dtype(student.dtype)
    result = torch.zeros(7 if entropy else 5, student.shape[0], dtype=dtype, device=student.device)
    if student.shape[1] == 0:
        result[:2] = LOGIT_FLOOR
        return result
    for rows, (z_buffer, u_buffer, a, b, *scratch) in tiles(student, 5 if entropy else 4, dtype):
        z = load(student[rows], spec.inverse_temperature, masked, z_buffer)
        u = load(teacher[rows], spec.inverse_temperature, masked, u_buffer)
        z_max, u_max = z.amax(-1, keepdim=True), u.amax(-1, keepdim=True)
        torch.sub(z, z_max, out=a)
        torch.sub(u, u_max, out=b)
        z_exp, u_exp = torch.exp(a, out=z_buffer), torch.exp(b, out=u_buffer)
        result[0, rows], result[1, rows] = z_max.squeeze(-1), u_max.squeeze(-1)
        result[2, rows], result[3, rows] = z_exp.sum(-1), u_exp.sum(-1)
        if entropy:
            result[5, rows] = torch.mul(a, z_exp, out=scratch[0]).sum(-1)
            result[6, rows] = torch.mul(b, u_exp, out=scratch[0]).sum(-1)
        if spec.kind == "reverse_kl":
            result[4, rows] = a.sub_(b).mul_(z_exp).sum(-1)
        else:
            larger = torch.maximum(z_exp, u_exp, out=z_exp)
            result[4, rows] = exp_difference(larger, a.sub_(b), out=b).sum(-1)
    return result


def exp_difference(larger: Tensor, d: Tensor, out: Tensor | None = None) -> Tensor:
    """exp(a) - exp(b) without cancellation, from the larger of both exponentials and d = a - b."""
    magnitude = torch.abs(d, out=out).neg_().expm1_().mul_(larger)
    return torch.copysign(magnitude, d, out=magnitude)


def mean_score(
    student: Tensor, teacher: Tensor, moments: Moments, spec: DivergenceSpec, masked: bool = False
) -> Tensor:
    """Local part of JSD's E_p[-l] -> [rows]; it needs both normalizers and therefore a separate pass."""
    dtype = statistics_dtype(student.dtype)
    result = torch.zeros(student.shape[0], dtype=dtype, device=student.device)
    for rows, (z_buffer, u_buffer, d, p, scratch) in tiles(student, 5, dtype):
        z = load(student[rows], spec.inverse_temperature, masked, z_buffer)
        u = load(teacher[rows], spec.inverse_temperature, masked, u_buffer)
        row = moments.rows(rows)
        torch.sub(u, z, out=d).add_(row.log_ratio_offset.unsqueeze(-1))
        torch.sub(z, row.student_log_normalizer.unsqueeze(-1), out=p).exp_()
        log_mixture = _log_mixture_term(d, spec.beta, scratch, z_buffer).add_(d.clamp_(min=0))
        result[rows] = log_mixture.mul_(p).sum(-1).neg_()
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
    """Local part of each row's divergence -> [rows]; with `out` also the gradient with respect to z.

    `out` [rows, columns] receives scale [rows] times the gradient, in its own dtype; it may be `student`
    itself.
    """
    dtype = statistics_dtype(student.dtype)
    value = torch.zeros(student.shape[0], dtype=dtype, device=student.device)
    for rows, (z_buffer, u_buffer, d, p, q, *scratch) in tiles(student, 8, dtype):
        z = load(student[rows], spec.inverse_temperature, masked, z_buffer)
        u = load(teacher[rows], spec.inverse_temperature, masked, u_buffer)
        row = Moments(*(moment.unsqueeze(-1) for moment in moments.rows(rows)))
        torch.sub(u, z, out=d).add_(row.log_ratio_offset)
        torch.sub(z, row.student_log_normalizer, out=p).exp_()
        torch.sub(u, row.teacher_log_normalizer, out=q).exp_()
        buffers = (z_buffer, u_buffer, *scratch)
        if spec.kind == "reverse_kl":
            value[rows] = _generalised_kl(p, q, d, *buffers[:3]).sum(-1)
            gradient = d.add_(row.mean_score).mul_(p).neg_() if out is not None else None
        elif spec.kind == "forward_kl":
            terms = _generalised_kl(q, p, d.neg_(), *buffers[:3])
            value[rows] = terms.sum(-1)
            gradient = terms.addcmul_(q, d)  # p - q without cancellation: D(q || p) + q log(p / q)
        else:
            value[rows], gradient = _jensen_shannon(p, q, d, row.mean_score, spec.beta, buffers)
        if out is not None:
            torch.mul(gradient, scale[rows].unsqueeze(-1), out=out[rows])
    return value


def _jensen_shannon(
    p: Tensor, q: Tensor, d: Tensor, mean_score: Tensor, beta: float, buffers: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """JSD(beta) of one tile -> (value [rows], gradient [rows, columns]); overwrites every argument."""
    *buffers, term, log_ratio = buffers
    _log_mixture_term(d, beta, term, buffers[0])
    torch.clamp(d, min=0, out=log_ratio).add_(term)  # l = log m - log p
    term.add_(d.neg_().clamp_(min=0))  # l - d = log m - log q
    mixture = torch.lerp(p, q, beta, out=d)
    value = _generalised_kl(q, mixture, term, *buffers).sum(-1).mul_(beta)
    value += _generalised_kl(p, mixture, log_ratio, *buffers).sum(-1).mul_(1 - beta)
    return value, log_ratio.add_(mean_score).mul_(p).mul_(beta - 1)


def _log_mixture_term(d: Tensor, beta: float, out: Tensor, scratch: Tensor) -> Tensor:
    """log(m / max(p, q)) = log1p(g expm1(-|d|)) with g = beta if d <= 0 else 1 - beta; cannot overflow."""
    decay = torch.abs(d, out=out).neg_().expm1_()
    weight = torch.gt(d, 0, out=scratch).mul_(1 - 2 * beta).add_(beta)
    return decay.mul_(weight).log1p_()


def _generalised_kl(w: Tensor, r: Tensor, d: Tensor, x: Tensor, result: Tensor, mask: Tensor) -> Tensor:
    """Write D(w || r) with d = log(r / w), elementwise and never negative, to `result`; `x` and `mask` are
    scratch."""
    limit = series_limit(d.dtype)
    torch.clamp(d, -limit, limit, out=x)
    highest, *lower = SERIES
    result.fill_(highest)
    for coefficient in lower:
        result.mul_(x).add_(coefficient)
    result.mul_(x).mul_(x).mul_(w)
    # The direct form can only round below zero if |logits| are so large that d and r / w disagree.
    direct = torch.sub(r, w, out=x).addcmul_(w, d, value=-1).clamp_(min=0)
    # Arithmetic selection: torch.where on a boolean mask is ten times slower on the CPU.
    torch.gt(torch.abs(d, out=mask), limit, out=mask)
    return result.addcmul_(direct.sub_(result), mask)


def load(block: Tensor, inverse_temperature: float, masked: bool, buffer: Tensor) -> Tensor:
    """logits / temperature in the statistics' dtype: `block` itself (read-only) if possible."""
    if block.dtype == buffer.dtype and inverse_temperature == 1.0 and not masked:
        return block
    buffer.copy_(block)
    if inverse_temperature != 1.0:
        buffer.mul_(inverse_temperature)
    return buffer.clamp_(min=LOGIT_FLOOR) if masked else buffer  # clamp propagates NaN


def tiles(block: Tensor, buffers: int, dtype: torch.dtype) -> Iterator[tuple[slice, list[Tensor]]]:
    """Row slices of `block` [rows, columns] and, for each, `buffers` scratch tensors of its shape."""
    rows, columns = block.shape
    if rows == 0 or columns == 0:
        return
    tile_rows = min(rows, max(1, TILE_ELEMENTS[block.device.type] // columns))
    scratch = [torch.empty(tile_rows, columns, dtype=dtype, device=block.device) for _ in range(buffers)]
    for start in range(0, rows, tile_rows):
        stop = min(start + tile_rows, rows)
        yield slice(start, stop), [buffer[: stop - start] for buffer in scratch]


def softmax_statistics(logits: Tensor, inverse_temperature: float) -> Tensor:
    """Local maximum and sum of exp(z - maximum) of one logits block [rows, columns] -> [2, rows]."""
    result = torch.zeros(2, logits.shape[0], dtype=statistics_dtype(logits.dtype), device=logits.device)
    if logits.shape[1] == 0:
        result[0] = LOGIT_FLOOR
    for rows, (z_buffer, shifted) in tiles(logits, 2, result.dtype):
        z = load(logits[rows], inverse_temperature, False, z_buffer)
        z_max = z.amax(-1, keepdim=True)
        result[0, rows] = z_max.squeeze(-1)
        result[1, rows] = torch.sub(z, z_max, out=shifted).exp_().sum(-1)
    return result


def scaled_softmax_(
    logits: Tensor, log_normalizer: Tensor, scale: Tensor, inverse_temperature: float
) -> Tensor:
    """Overwrite a logits block [rows, columns] with scale [rows] times its softmax probabilities."""
    for rows, (z_buffer, p) in tiles(logits, 2, log_normalizer.dtype):
        z = load(logits[rows], inverse_temperature, False, z_buffer)
        torch.sub(z, log_normalizer[rows].unsqueeze(-1), out=p).exp_()
        torch.mul(p, scale[rows].unsqueeze(-1), out=logits[rows])
    return logits
