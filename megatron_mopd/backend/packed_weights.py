"""Matrix products on the CPU with weights that are cut into panels once and then used many times."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

_PANEL = 320
"""Columns of a panel: few enough that the BLAS reads a panel where it lies instead of copying it first."""
_SMALLEST = 1 << 18
"""Elements of the smallest weight that is cut: below, the calls cost more than they save."""
_ROWS = range(4, 129)
"""Products with fewer or more rows than these read a plain weight as fast."""


class PackedWeights:
    """Copies of weights in panels [in, 320], which products with few rows read faster.

    An ordinary product with a weight [out, in] rearranges it on its way, which for the few rows of a decoding
    step costs up to half as much again as the product itself. The copies take as much memory as the weights,
    and do not follow when those change: make them where nothing changes, and drop them afterwards. Small
    weights, and those of another device or dtype than float32 and float64, are multiplied as they are.
    """

    def __init__(self, weights: Iterable[Tensor] = ()):
        """Copies of those `weights` [out, in] that gain. No collectives."""
        self._packed: dict[
            int, tuple[Tensor, list[Tensor]]
        ] = {}  # by identity: the weight (kept alive), panels
        for weight in weights:
            if (
                weight.device.type == "cpu"
                and weight.dtype in (torch.float32, torch.float64)
                and weight.numel() >= _SMALLEST
            ):
                panels = [part.t().contiguous() for part in weight.detach().split(_PANEL)]
                self._packed[id(weight)] = weight, panels

    def __len__(self) -> int:
        """Weights that have a copy."""
        return len(self._packed)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] times `weight` [out, in] transposed, plus `bias` [out]: [..., out], without gradients.

        Equal to the plain product within the rounding of its sums.
        """
        found = self._packed.get(id(weight))
        if found is None or x.numel() // x.size(-1) not in _ROWS:
            return F.linear(x, weight, bias)
        rows = x.reshape(-1, x.size(-1))
        output = rows.new_empty((len(rows), weight.size(0)))
        for panel, columns in zip(found[1], output.split(_PANEL, dim=1)):
            torch.mm(rows, panel, out=columns)
        if bias is not None:
            output += bias
        return output.view(*x.shape[:-1], -1)
