"""The head of one micro-batch: one gradient of the weight [V/tp, h] and one of the hidden states [T, h],
however many losses there are.

Each loss alone would keep its own sums until the backward: with a dozen domains, teachers and terms in a
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
    """Collects the gradients of losses while they are computed; `loss` then hands them to autograd.

        head = MicroBatchHead(hidden, weight, group=group, vocab_size=vocab_size)
        first, _ = linear_kl(hidden[:4], weight, ..., group=group, shared_gradient=head.part(slice(0, 4)))
        other, _ = linear_kl(hidden[4:], weight, ..., group=group, shared_gradient=head.part(slice(4, 9)))
        head.loss(first + other).backward()

    The gradients are those of the plain sum of the losses, which is therefore what `loss` must be given. What
    is differentiated through `sampled_token_logprobs` must have had its own backward before that. A weight
    with megatron-core's `main_grad` is treated as under gradient accumulation fusion: the sum is added to
    that buffer in fp32, and autograd sees a placeholder.

    hidden [T, h], weight [V/tp, h], `reduce_hidden_grad` as for `linear_kl`. Token weights are taken as they
    are: for fp16 they should be of a magnitude of about one.

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
        """Where losses of the tokens `rows` put their gradients; several may share tokens."""
        if rows.stop > rows.start:
            self.gradient.expect()
        return SharedGradient(self.gradient, rows.start)

    def loss(self, total: Tensor) -> Tensor:
        """`total`, a scalar, differentiable in hidden and weight.

        Also where there was no loss at all, because this rank has no response token in the micro-batch: other
        ranks' collectives wait for its backward pass through the layers, and overlapped gradient reduction
        for the hook of every parameter, the head's first as in any other micro-batch.
        """
        if self._reduce_hidden_grad and self.gradient.needs_hidden:
            self._shard.all_reduce(self.gradient.hidden)
        return _Collected.apply(self._hidden, self._weight, total.detach(), self.gradient)


class SharedGradient:
    """A `HeadGradient` to the losses of some consecutive tokens, which start at row `start` of it."""

    def __init__(self, whole: HeadGradient, start: int):
        self._whole, self._start = whole, start
        self.unit, self.needs_hidden, self.needs_weight = whole.unit, whole.needs_hidden, whole.needs_weight
        self.needed = whole.needed

    def add(self, rows: slice, logits_grad: Tensor, hidden: Tensor) -> None:
        """Add the chunk `rows`, counted from the first token of the part."""
        self._whole.add(slice(self._start + rows.start, self._start + rows.stop), logits_grad, hidden)

    def finish(self) -> None:
        """Nothing is in flight."""


def needed_gradients(hidden: Tensor, weight: Tensor, shared: SharedGradient | None) -> dict[str, bool]:
    """Facts that tensor-parallel ranks must agree on: whose gradients a loss computes."""
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
