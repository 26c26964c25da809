"""Fused head product and log-probability of given tokens: cross-entropy and policy-gradient log-probs.

Both process a vocab-parallel head chunk by chunk like `linear_kl.py`. Cross-entropy knows its token weights,
so its forward computes the gradient and the backward only scales it. The upstream gradient of a
log-probability is unknown until the backward, which therefore recomputes each chunk's logits.
"""

from dataclasses import dataclass, field
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
from megatron_mopd.objectives.definitions import check_temperature, statistics_dtype
from megatron_mopd.objectives.micro_batch_head import SharedGradient, needed_gradients
from megatron_mopd.objectives.torch_kernels import scaled_softmax_, softmax_statistics
from megatron_mopd.objectives.validation import (
    check_chunk_size,
    check_head,
    check_main_grad,
    check_per_token,
    check_token_ids,
    check_token_weight,
)
from megatron_mopd.objectives.vocab_shard import Report, VocabShard, agree, require_finite


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    token_weight: Tensor,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_size: int = 1024,
    reduce_hidden_grad: bool = True,
    accumulate_into_main_grad: bool = False,
    report: Report | None = None,
    shared_gradient: SharedGradient | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of token cross-entropies of a vocab-parallel head: loss = sum_t token_weight_t L_t.

    hidden [T, h], weight [V/tp, h], target_ids [T] (global ids; ignored where the token weight is 0),
    token_weight [T]. The other arguments, memory, errors and the result (loss, per_token [T]) are as for
    `linear_kl`; per_token is 0 where the token weight is 0.

    Collectives over `group`: one agreement all-reduce per call; per chunk of c tokens an all-gather of [3, c]
    per rank, 12 bytes per token in fp32, and the sum of the hidden gradient [c, h]. None in the backward.
    """
    call = _Call(
        target_ids,
        token_weight=token_weight,
        group=group,
        temperature=1.0,
        vocab_size=vocab_size,
        chunk_size=chunk_size,
        reduce_hidden_grad=reduce_hidden_grad,
        accumulate_into_main_grad=accumulate_into_main_grad,
        report=report,
        shared_gradient=shared_gradient,
    )
    agree(group, lambda: call.check(hidden, weight))
    call.token_weight = token_weight.detach().to(statistics_dtype(hidden.dtype))
    if shared_gradient is not None:
        with torch.no_grad():
            return _loss_and_gradient(hidden, weight, call, shared_gradient)
    return _LinearCrossEntropy.apply(hidden, weight, call)


def sampled_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int = 1024,
    reduce_hidden_grad: bool = True,
    accumulate_into_main_grad: bool = False,
    report: Report | None = None,
    shared_gradient: SharedGradient | None = None,
) -> Tensor:
    """Log-probabilities [T] of given tokens under a vocab-parallel head, differentiable in hidden and weight.

    hidden [T, h], weight [V/tp, h], token_ids [T] (global ids); logits are divided by `temperature`. The
    result is fp32, or fp64 for fp64 inputs, and equal on every rank of `group`. Memory: one chunk of logits,
    chunk_size x V/tp; saved for the backward: the inputs and one scalar per token.

    Collectives over `group`: one agreement all-reduce and an all-gather of [3, T] per rank, 12 bytes per
    token in fp32; in the backward the sum of the hidden gradient [c, h] per chunk of c tokens, unless
    reduce_hidden_grad=False.

    Raises:
        ValueError: on every rank, for mismatched shapes, dtypes, devices or shards, ids outside the
            vocabulary, options out of range, and NaN or infinite logits (naming token and rank), unless
            `report` is given: see `linear_kl`.
    """
    call = _Call(
        token_ids,
        token_weight=None,
        group=group,
        temperature=temperature,
        vocab_size=vocab_size,
        chunk_size=chunk_size,
        reduce_hidden_grad=reduce_hidden_grad,
        accumulate_into_main_grad=accumulate_into_main_grad,
        report=report,
        shared_gradient=shared_gradient,
    )
    agree(group, lambda: call.check(hidden, weight))
    if shared_gradient is not None:  # the micro-batch's head collects the gradients of both
        hidden, weight = hidden.detach().requires_grad_(shared_gradient.needed), weight.detach()
    return _SampledTokenLogprobs.apply(hidden, weight, call)


@dataclass
class _Call:
    """The arguments of one call, without the head, so that the backward does not keep it alive."""

    token_ids: Tensor
    token_weight: Tensor | None
    group: dist.ProcessGroup | None
    temperature: float
    vocab_size: int | None
    chunk_size: int
    reduce_hidden_grad: bool
    accumulate_into_main_grad: bool
    report: Report | None
    shared_gradient: SharedGradient | None
    shard: VocabShard = field(init=False)
    """Set by `check`."""

    @cached_property
    def local_ids(self) -> tuple[Tensor, Tensor]:
        """[T] the column of each token in this shard, clamped, and [T] whether the token is in this shard."""
        return self.shard.local_ids(self.token_ids)

    @property
    def inverse_temperature(self) -> float:
        return 1.0 / self.temperature

    def check(self, hidden: Tensor, weight: Tensor) -> dict[str, float | str]:
        """Raise ValueError for invalid arguments on this rank; return the values that must be equal on all
        ranks."""
        check_head("student", hidden, weight)
        check_temperature(self.temperature)
        check_chunk_size(self.chunk_size)
        check_main_grad(weight, self.accumulate_into_main_grad)
        self.shard = VocabShard.of(weight.shape[0], self.group, self.vocab_size)
        check_per_token("token ids", self.token_ids, hidden)
        in_use = None
        if self.token_weight is not None:
            check_token_weight(self.token_weight, hidden, finite=self.report is None)
            in_use = self.token_weight != 0
        check_token_ids("token ids", self.token_ids, in_use, self.shard.total)
        return {
            "number of tokens": hidden.shape[0],
            "local vocabulary width": self.shard.columns,
            "vocab_size": self.shard.total,
            "chunk_size": self.chunk_size,
            "temperature": self.temperature,
            **needed_gradients(hidden, weight, self.shared_gradient),
            "reduce_hidden_grad": self.reduce_hidden_grad,
        }


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, call):
        gradient = HeadGradient(
            hidden,
            weight,
            call.shard,
            ctx.needs_input_grad[:2],
            call.reduce_hidden_grad,
            largest_magnitude(call.token_weight),
        ).expect()
        loss, per_token = _loss_and_gradient(hidden, weight, call, gradient)
        ctx.gradient = gradient
        ctx.accumulate_into_main_grad = call.accumulate_into_main_grad
        ctx.save_for_backward(weight)
        ctx.mark_non_differentiable(per_token)
        return loss, per_token

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_grad, _):
        (weight,) = ctx.saved_tensors
        keep = graph_is_kept()
        return *ctx.gradient.deliver(weight, loss_grad, ctx.accumulate_into_main_grad, keep), None


def _loss_and_gradient(
    hidden: Tensor, weight: Tensor, call: _Call, gradient: HeadGradient | SharedGradient
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy's loss and per_token [T]; add to `gradient`."""
    shard, token_weight = call.shard, call.token_weight
    hidden, weight = without_gaps(hidden), without_gaps(weight)
    buffer = LogitsBuffer(hidden, call.chunk_size, shard)
    logprobs = torch.zeros_like(token_weight)
    for rows in chunks(hidden.shape[0], call.chunk_size):
        logits = buffer.fill(hidden[rows], weight)
        normalizer, logprobs[rows] = _merge(shard, _local_statistics(logits, rows, call))
        if gradient.needed:
            scale = token_weight[rows] / gradient.unit
            _nll_gradient_(logits, rows, normalizer, logprobs[rows], scale, call)
            gradient.add(rows, logits, hidden[rows])
    gradient.finish()
    _require_finite(hidden, weight, logprobs, call)
    per_token = logprobs.neg_().masked_fill_(token_weight == 0, 0)
    return torch.dot(token_weight, per_token), per_token


class _SampledTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, call):
        shard = call.shard
        hidden, weight = without_gaps(hidden), without_gaps(weight)
        buffer = LogitsBuffer(hidden, call.chunk_size, shard)
        dtype = statistics_dtype(hidden.dtype)
        local = torch.zeros(3, hidden.shape[0], dtype=dtype, device=hidden.device)
        for rows in chunks(hidden.shape[0], call.chunk_size):
            logits = buffer.fill(hidden[rows], weight)
            local[:, rows] = _local_statistics(logits, rows, call)
        normalizer, logprobs = _merge(shard, local)
        _require_finite(hidden, weight, logprobs, call)
        ctx.save_for_backward(hidden, weight, normalizer, logprobs)
        ctx.call = call
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, logprobs_grad):
        hidden, weight, normalizer, logprobs = ctx.saved_tensors
        call, shared = ctx.call, ctx.call.shared_gradient
        # A log-probability is a negated cross-entropy whose token weight is only known in the backward.
        token_weight = -logprobs_grad.to(logprobs.dtype) * call.inverse_temperature
        gradient = shared
        if shared is None:
            gradient = HeadGradient(
                hidden,
                weight,
                call.shard,
                ctx.needs_input_grad[:2],
                call.reduce_hidden_grad,
                largest_magnitude(token_weight),
            ).expect()
        buffer = LogitsBuffer(hidden, call.chunk_size, call.shard)
        for rows in chunks(hidden.shape[0], call.chunk_size):
            logits = buffer.fill(hidden[rows], weight)
            scale = token_weight[rows] / gradient.unit
            _nll_gradient_(logits, rows, normalizer[rows], logprobs[rows], scale, call)
            gradient.add(rows, logits, hidden[rows])
        gradient.finish()
        if shared is not None:
            return None, None, None
        return *gradient.deliver(weight, 1.0, call.accumulate_into_main_grad, keep=False), None


def _local_statistics(logits: Tensor, rows: slice, call: _Call) -> Tensor:
    """This shard's maximum, sum of exponentials and part of the tokens' own logits -> [3, c]."""
    statistics = softmax_statistics(logits, call.inverse_temperature)
    own = torch.zeros_like(statistics[0])
    if logits.shape[1] > 0:
        columns, is_here = call.local_ids
        picked = logits.gather(1, columns[rows].unsqueeze(1)).squeeze(1).to(own.dtype)
        own = torch.where(is_here[rows], picked * call.inverse_temperature, own)
    return torch.stack([*statistics, own])


def _merge(shard: VocabShard, local: Tensor) -> tuple[Tensor, Tensor]:
    """Every rank's `_local_statistics` [3, c] -> log normalizer [c] and log-probability [c] of the tokens.

    Collective: all-gather of [3, c] per rank. A token's logit is on one rank; the others have zero.
    """
    gathered = shard.all_gather(local)
    maximum = gathered[:, 0].amax(0)
    log_sum = (gathered[:, 1] * (gathered[:, 0] - maximum).exp()).sum(0).log()
    return maximum + log_sum, gathered[:, 2].sum(0) - maximum - log_sum


def _nll_gradient_(
    logits: Tensor, rows: slice, normalizer: Tensor, logprobs: Tensor, scale: Tensor, call: _Call
) -> None:
    """Overwrite logits [c, columns] with scale [c] times (p - onehot), the gradient of the tokens' -log p."""
    scaled_softmax_(logits, normalizer, scale, call.inverse_temperature)
    if logits.shape[1] == 0:
        return
    columns, is_here = (values[rows].unsqueeze(1) for values in call.local_ids)
    # Compute p - 1 from the fp32 log-probability: near p = 1, rounding p to bf16 would lose it entirely.
    at_token = (scale * logprobs.expm1()).to(logits.dtype).unsqueeze(1)
    logits.scatter_(1, columns, torch.where(is_here, at_token, logits.gather(1, columns)))


def _require_finite(hidden: Tensor, weight: Tensor, logprobs: Tensor, call: _Call) -> None:
    require_finite(
        call.shard,
        logprobs,
        lambda token: {"student": hidden[token] @ weight[: call.shard.valid].t()},
        "token log-probability",
        call.report,
    )
