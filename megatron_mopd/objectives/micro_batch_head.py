"""The output head of one micro-batch: a single gradient of the weight [V/tp, h] and of the hidden states [T,
h] for all losses.

Otherwise each loss would keep its own sums until the backward: with a dozen domains, teachers and terms in a
micro-batch, a dozen times the memory of the head in fp32.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_mopd.backend.autograd import graph_is_kept
from megatron_mopd.objectives.chunked_head import HeadGradient
from megatron_mopd.objectives.vocab_shard import VocabShard


class MicroBatchHead:
    """Collects the gradients of losses as they are computed; `loss` then passes them to autograd.

        head = MicroBatchHead(hidden, weight, group=group, vocab_size=vocab_size)
        first, _ = linear_kl(hidden[:4], weight, ..., group=group, shared_gradient=head.part(slice(0, 4)))
        other, _ = linear_kl(hidden[4:], weight, ..., group=group, shared_gradient=head.part(slice(4, 9)))
        head.loss(first + other).backward()

    The gradients are those of the plain sum of the losses, so `loss` must be called with that sum. Losses
    that use `sampled_token_logprobs` must have run their own backward before. A weight with megatron-core's
    `main_grad` is treated as with gradient accumulation fusion: the sum is added to that buffer in fp32, and
    autograd gets a placeholder.

    hidden [T, h], weight [V/tp, h], `reduce_hidden_grad` as for `linear_kl`. Token weights are not rescaled:
    for fp16 their magnitude should be about one.

    Collective: with `reduce_hidden_grad`, one sum of [T, h] over `group` in `loss`.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        *,
        group: dist.ProcessGroup | None = None,
        vocab_size: int | None = None,
        reduce_hidden_grad: bool = True,
    ):
        self._hidden, self._weight = hidden, weight
        self._shard = VocabShard.of(weight.shape[0], group, vocab_size)
        self._reduce_hidden_grad = reduce_hidden_grad
        enabled = torch.is_grad_enabled()
        self.gradient = HeadGradient(
            hidden,
            weight.detach(),
            self._shard,
            (enabled and hidden.requires_grad, enabled and weight.requires_grad),
            reduce_hidden=False,
            unit=torch.ones((), dtype=torch.float32, device=hidden.device),
        )

    def part(self, rows: slice) -> SharedGradient:
        """The gradient accumulator for losses of the tokens `rows`; several losses may share tokens."""
        if rows.stop > rows.start:
            self.gradient.expect()
        return SharedGradient(self.gradient, rows.start)

    def loss(self, total: Tensor) -> Tensor:
        """`total`, a scalar, differentiable in hidden and weight.

        This is required even without any loss, if this rank has no response token in the micro-batch: other
        ranks' collectives wait for its backward pass through the layers, and overlapped gradient reduction
        waits for the hook of every parameter, the head's first as in any other micro-batch.
        """
        if self._reduce_hidden_grad and self.gradient.needs_hidden:
            self._shard.all_reduce(self.gradient.hidden)
        return _Collected.apply(self._hidden, self._weight, total.detach(), self.gradient)


class SharedGradient:
    """A view of a `HeadGradient` for losses of consecutive tokens, starting at its row `start`."""

    def __init__(self, whole: HeadGradient, start: int):
        self._whole, self._start = whole, start
        self.unit, self.needs_hidden, self.needs_weight = whole.unit, whole.needs_hidden, whole.needs_weight
        self.needed = whole.needed

    def add(self, rows: slice, logits_grad: Tensor, hidden: Tensor) -> None:
        """Add the chunk `rows`, counted from the first token of this part."""
        self._whole.add(slice(self._start + rows.start, self._start + rows.stop), logits_grad, hidden)

    def finish(self) -> None:
        """Does nothing: there are no pending collectives."""


def needed_gradients(hidden: Tensor, weight: Tensor, shared: SharedGradient | None) -> dict[str, bool]:
    """Facts on which tensor-parallel ranks must agree: the gradients that a loss computes."""
    enabled = torch.is_grad_enabled()
    return {
        "hidden gradient needed": shared.needs_hidden if shared else hidden.requires_grad and enabled,
        "weight gradient needed": shared.needs_weight if shared else weight.requires_grad and enabled,
    }


class _Collected(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, total, gradient):
        ctx.gradient = gradient
        ctx.save_for_backward(weight)
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_grad):
        (weight,) = ctx.saved_tensors
        fused = getattr(weight, "main_grad", None) is not None
        return *ctx.gradient.deliver(weight, loss_grad, fused, graph_is_kept()), None, None
