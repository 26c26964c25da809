"""Matrix products on the CPU with weights that are split into panels once and used many times."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

_PANEL = 320
"""Maximum columns of a panel: few enough that the BLAS reads it in place instead of copying it first."""
_SMALLEST = 1 << 18
"""Minimum elements of a weight to pack: for smaller ones the calls cost more than they save."""
_ALIGNMENT = 16
"""The number of columns of a panel is a multiple of this, a vector register of float32."""
_ROWS = range(4, 129)
"""Numbers of rows for which panels are faster than a plain weight."""


class PackedWeights:
    """Copies of weights in panels [in, at most 320], which speed up products with few rows.

    An ordinary product with a weight [out, in] repacks it internally, which for the few rows of a decoding
    step costs up to half as much as the product itself. The copies take as much memory as the weights and do
    not follow their changes: create them while the weights are constant, and drop them afterwards. Weights
    that are small, not on the CPU, or neither float32 nor float64 are multiplied directly.
    """

    def __init__(self, weights: Iterable[Tensor] = ()):
        """Copies those `weights` [out, in] that benefit. No collectives."""
        # Keyed by the identity of the weight, which is therefore kept alive next to its panels.
        self._packed: dict[int, tuple[Tensor, _Panels]] = {}
        for weight in weights:
            if (
                weight.device.type == "cpu"
                and weight.dtype in (torch.float32, torch.float64)
                and weight.numel() >= _SMALLEST
            ):
                self._packed[id(weight)] = weight, _Panels(weight.detach())

    def __len__(self) -> int:
        """Number of weights with a copy."""
        return len(self._packed)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] times `weight` [out, in] transposed, plus `bias` [out]: [..., out], without gradients.

        Equal to the plain product within the rounding of its sums.
        """
        found = self._packed.get(id(weight))
        if found is None or x.numel() // x.size(-1) not in _ROWS:
            return F.linear(x, weight, bias)
        output = found[1].product(x.reshape(-1, x.size(-1)))
        if bias is not None:
            output += bias
        return output.view(*x.shape[:-1], -1)


class _Panels:
    """A weight [out, in] as [panels, in, columns per panel], zero-padded: as one tensor, and as views of each
    panel without padding."""

    def __init__(self, weight: Tensor):
        count = math.ceil(len(weight) / _PANEL)
        width = math.ceil(len(weight) / count / _ALIGNMENT) * _ALIGNMENT
        self._together = weight.new_empty(count, weight.size(1), width)
        self._together[-1] = 0
        self._apart = []
        for panel, rows in zip(self._together, weight.split(width)):
            self._apart.append(panel[:, : len(rows)].copy_(rows.t()))
        self._columns, self._width = len(weight), width

    def product(self, rows: Tensor) -> Tensor:
        """[n, in] -> [n, out]."""
        if torch.get_num_threads() > 1:  # threads share the panels and synchronize once, not at every panel
            parts = torch.bmm(rows.expand(len(self._together), -1, -1), self._together)
            return torch.cat(parts.unbind(), dim=1)[:, : self._columns]
        output = rows.new_empty((len(rows), self._columns))
        for panel, part in zip(self._apart, output.split(self._width, dim=1)):
            torch.mm(rows, panel, out=part)
        return output
