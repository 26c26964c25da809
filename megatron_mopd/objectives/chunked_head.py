"""A vocab-parallel head whose logits exist one chunk of tokens at a time: its products and its gradients."""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_mopd.objectives.definitions import statistics_dtype
from megatron_mopd.objectives.vocab_shard import VocabShard


def chunks(tokens: int, chunk_size: int) -> Iterator[slice]:
    """Slices of at most `chunk_size` tokens that cover [0, tokens)."""
    for start in range(0, tokens, chunk_size):
        yield slice(start, min(start + chunk_size, tokens))


def without_gaps(matrix: Tensor) -> Tensor:
    """The matrix [n, m] itself if its rows are adjacent, else a copy: what a caller's view skips may never
    have been written, and products may read it (see `LogitsBuffer`)."""
    if matrix.stride() == (matrix.shape[1], 1):
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


class LogitsBuffer:
    """One chunk's logits [chunk, valid columns] of any head, always in the same memory.

    Rows are V/tp wide even where fewer columns are real, so that a vocabulary of odd size leaves rows aligned
    for the matrix product. What pads them stays zero: with AMX, a product of bfloat16 goes in pairs and reads
    one element past a row of odd length, and what it multiplies by 0 must not be NaN.
    """

    def __init__(self, hidden: Tensor, chunk_size: int, shard: VocabShard):
        rows, width = min(chunk_size, hidden.shape[0]), shard.columns + shard.columns % 2
        self._memory = torch.zeros(rows, width, dtype=hidden.dtype, device=hidden.device)
        self._valid = shard.valid

    def fill(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """hidden [c, h] times the real rows of weight [V/tp, h] -> logits [c, valid], until the next fill."""
        return torch.mm(hidden, weight[: self._valid].t(), out=self.rows(hidden.shape[0]))

    def rows(self, count: int) -> Tensor:
        """The first `count` rows [count, valid] of the memory."""
        return self._memory[:count, : self._valid]


class HeadGradient:
    """Gradients of one head, summed chunk by chunk: hidden [T, h] and weight [V/tp, h].

    Both count in a `unit` (a scalar), by which token weights are divided before they meet logits. The weight
    gradient of bf16 and fp16 weights is summed in fp32: adding up chunks in bf16 would drop small ones. With
    `reduce_hidden`, each chunk's hidden gradient [c, h] is summed over the tensor-parallel group (the one
    collective that any vocab-parallel head needs) while the next products run.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        shard: VocabShard,
        needs: tuple[bool, bool],
        reduce_hidden: bool,
        unit: Tensor,
    ):
        self.needs_hidden, self.needs_weight = needs
        self.unit, self._shard, self._reduce_hidden = unit, shard, reduce_hidden
        self._weight = without_gaps(weight)[: shard.valid]
        self._pending = []
        self.hidden = (
            torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device) if needs[0] else None
        )
        self.weight = None
        """Filled with zeros by `expect`, before the first chunk; never for a micro-batch without any."""

    @property
    def needed(self) -> bool:
        return self.needs_hidden or self.needs_weight

    def expect(self) -> "HeadGradient":
        """There will be chunks."""
        if self.needs_weight and self.weight is None:
            shape = (self._shard.columns, self._weight.shape[1])
            dtype = statistics_dtype(self._weight.dtype)
            self.weight = torch.zeros(shape, dtype=dtype, device=self._weight.device)
        return self

    def add(self, rows: slice, logits_grad: Tensor, hidden: Tensor) -> None:
        """Add the chunk `rows`: logits_grad [c, valid] and the chunk's hidden [c, h]."""
        if self.needs_hidden:
            self.hidden[rows].addmm_(logits_grad, self._weight)
            if self._reduce_hidden:
                self._pending.append(self._shard.all_reduce_async(self.hidden[rows]))
        if self.needs_weight:
            _add_product_(self.weight[: self._shard.valid], logits_grad.t(), hidden)

    def finish(self) -> "HeadGradient":
        """Wait for the collectives in flight."""
        for work in self._pending:
            if work is not None:
                work.wait()
        self._pending = []
        return self

    def deliver(
        self, weight: Tensor, loss_grad: Tensor | float, accumulate_into_main_grad: bool, keep: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """What a backward returns for (hidden, weight), given the loss's own gradient, a scalar.

        Without `keep`, the sums themselves are scaled and given away: a copy of [T, h] would grow with T.
        """
        factor, hidden, total = loss_grad * self.unit, self.hidden, self.weight
        if not keep:
            self.hidden = self.weight = None  # autograd copies what somebody else still holds
        hidden_grad = weight_grad = None
        if self.needs_hidden:
            hidden_grad = _scaled(hidden, factor, hidden.dtype, keep)
        if self.needs_weight:
            weight_grad = _deliver_weight_grad(weight, total, factor, accumulate_into_main_grad, keep)
        return hidden_grad, weight_grad


def largest_magnitude(token_weight: Tensor) -> Tensor:
    """Scalar by which to divide token weights [T] until the very end.

    With 1/N in the weights and no loss scale applied yet, fp16 would lose most of a gradient; with weights of
    largest magnitude 1 it does not, and the missing factor is applied in fp32.
    """
    if len(token_weight) == 0:
        return token_weight.new_ones(())
    return token_weight.abs().amax().clamp(min=torch.finfo(token_weight.dtype).tiny)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, with low-precision factors and an fp32 total where those differ."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)  # cuBLAS sums in fp32, no rounding
    else:
        total += left @ right


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype, keep: bool) -> Tensor:
    """gradient times the scalar tensor `factor`, computed in fp32 (or fp64) and rounded once to `dtype`; in
    place where that is possible, unless `keep`."""
    out = torch.empty_like(gradient, dtype=dtype) if keep or gradient.dtype != dtype else gradient
    # A 0-dim factor would be rounded to bf16 before the product; a 1-element tensor promotes the product.
    return torch.mul(gradient, factor.view(1, 1), out=out)


def _deliver_weight_grad(
    weight: Tensor, gradient: Tensor | None, factor: Tensor, accumulate_into_main_grad: bool, keep: bool
) -> Tensor | None:
    """Hand factor * gradient to autograd, or add it to `weight.main_grad` as megatron-core's fused heads do.

    In the second case the protocol is that of `LinearWithGradAccumulationAndAsyncCommunication` in
    megatron/core/tensor_parallel/layers.py: `grad_added_to_main_grad` tells DDP's hook that nothing is left
    to add, and a placeholder gradient makes the hook run. For a tied embedding megatron-core sets
    `zero_out_wgrad`: autograd then adds the embedding's own gradient to the placeholder, which must therefore
    be zero. `gradient` is None where nothing was added: that is a zero, and hooks run all the same.
    """
    if not accumulate_into_main_grad:
        return torch.zeros_like(weight) if gradient is None else _scaled(gradient, factor, weight.dtype, keep)
    if gradient is not None:
        weight.main_grad.addcmul_(gradient, factor.view(1, 1))
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    placeholder = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
    return placeholder(weight)
