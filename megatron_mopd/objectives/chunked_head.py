"""Products and gradients of a vocab-parallel head whose logits are computed one chunk of tokens at a time."""

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
    """The matrix [n, m] itself if its rows are adjacent, else a copy: matrix products may read the memory
    that a view skips, which may be uninitialized (see `LogitsBuffer`)."""
    if matrix.stride() == (matrix.shape[1], 1):
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


class LogitsBuffer:
    """A reused buffer for one chunk's logits [chunk, valid columns] of any head.

    Rows are V/tp wide even if fewer columns are real, so that rows stay aligned for the matrix product with a
    vocabulary of odd size. The padding stays zero: with AMX, a bfloat16 product works in pairs and reads one
    element past a row of odd length, and the element that it multiplies by 0 must not be NaN.
    """

    def __init__(self, hidden: Tensor, chunk_size: int, shard: VocabShard):
        rows, width = min(chunk_size, hidden.shape[0]), shard.columns + shard.columns % 2
        self._memory = torch.zeros(rows, width, dtype=hidden.dtype, device=hidden.device)
        self._valid = shard.valid

    def fill(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """hidden [c, h] times the real rows of weight [V/tp, h] -> logits [c, valid], valid until the next
        fill."""
        return torch.mm(hidden, weight[: self._valid].t(), out=self.rows(hidden.shape[0]))

    def rows(self, count: int) -> Tensor:
        """The first `count` rows [count, valid] of the buffer."""
        return self._memory[:count, : self._valid]


class HeadGradient:
    """Gradients of one head, summed chunk by chunk: hidden [T, h] and weight [V/tp, h].

    Both are in multiples of `unit` (a scalar), by which token weights are divided before they multiply
    logits. The weight gradient of bf16 and fp16 weights is summed in fp32, because a sum over chunks in bf16
    would lose small terms. With `reduce_hidden`, each chunk's hidden gradient [c, h] is summed over the
    tensor-parallel group (the one collective that any vocab-parallel head needs) while the next products run.
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
        """Allocated as zeros by `expect` before the first chunk; stays None in a micro-batch without
        chunks."""

    @property
    def needed(self) -> bool:
        return self.needs_hidden or self.needs_weight

    def expect(self) -> "HeadGradient":
        """Prepare for chunks: allocate the weight gradient."""
        if self.needs_weight and self.weight is None:
            shape = (self._shard.columns, self._weight.shape[1])
            dtype = statistics_dtype(self._weight.dtype)
            self.weight = torch.zeros(shape, dtype=dtype, device=self._weight.device)
        return self

    def add(self, rows: slice, logits_grad: Tensor, hidden: Tensor) -> None:
        """Add the chunk `rows`, given its logits_grad [c, valid] and hidden [c, h]."""
        if self.needs_hidden:
            self.hidden[rows].addmm_(logits_grad, self._weight)
            if self._reduce_hidden:
                self._pending.append(self._shard.all_reduce_async(self.hidden[rows]))
        if self.needs_weight:
            _add_product_(self.weight[: self._shard.valid], logits_grad.t(), hidden)

    def finish(self) -> "HeadGradient":
        """Wait for pending collectives."""
        for work in self._pending:
            if work is not None:
                work.wait()
        self._pending = []
        return self

    def deliver(
        self, weight: Tensor, loss_grad: Tensor | float, accumulate_into_main_grad: bool, keep: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients that a backward returns for (hidden, weight), given the scalar gradient of the loss.

        Without `keep`, the sums are scaled in place and released, because a copy of [T, h] would grow with T.
        """
        factor, hidden, total = loss_grad * self.unit, self.hidden, self.weight
        if not keep:
            self.hidden = self.weight = None  # autograd copies a tensor that has other references
        hidden_grad = weight_grad = None
        if self.needs_hidden:
            hidden_grad = _scaled(hidden, factor, hidden.dtype, keep)
        if self.needs_weight:
            weight_grad = _deliver_weight_grad(weight, total, factor, accumulate_into_main_grad, keep)
        return hidden_grad, weight_grad


def largest_magnitude(token_weight: Tensor) -> Tensor:
    """Scalar by which token weights [T] are divided until the gradients are delivered.

    With 1/N in the weights and no loss scale applied yet, fp16 gradients would underflow; with weights of at
    most 1 they do not, and the factor is applied in fp32 later.
    """
    if len(token_weight) == 0:
        return token_weight.new_ones(())
    return token_weight.abs().amax().clamp(min=torch.finfo(token_weight.dtype).tiny)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; the factors may have lower precision than the total."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)  # cuBLAS sums in fp32, no rounding
    else:
        total += left @ right


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype, keep: bool) -> Tensor:
    """gradient times the scalar tensor `factor`, computed in fp32 (or fp64) and rounded once to `dtype`; in
    place if possible, unless `keep`."""
    out = torch.empty_like(gradient, dtype=dtype) if keep or gradient.dtype != dtype else gradient
    # A 0-dim factor would be rounded to bf16 before the product; a 1-element tensor promotes the product.
    return torch.mul(gradient, factor.view(1, 1), out=out)


def _deliver_weight_grad(
    weight: Tensor, gradient: Tensor | None, factor: Tensor, accumulate_into_main_grad: bool, keep: bool
) -> Tensor | None:
    """Return factor * gradient for autograd, or add it to `weight.main_grad` like megatron-core's fused
    heads.

    The second case follows the protocol of `LinearWithGradAccumulationAndAsyncCommunication` in
    megatron/core/tensor_parallel/layers.py: `grad_added_to_main_grad` tells DDP's hook that the gradient has
    been added, and a placeholder gradient triggers the hook. For a tied embedding megatron-core sets
    `zero_out_wgrad`: autograd then adds the embedding's own gradient to the placeholder, which must therefore
    be zero. `gradient` is None if no chunk was added: the gradient is zero, but hooks must still run.
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
