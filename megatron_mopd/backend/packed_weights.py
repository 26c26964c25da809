"""Matrix products on the CPU with weights that are laid out for oneDNN once and then used many times."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALLEST = 1 << 18
"""Elements of the smallest weight that is laid out: below, the operator itself costs more than it saves."""
_MOST_ROWS = 64
"""Products with more rows than this read a plain weight as fast."""


class PackedWeights:
    """Copies of weights in the layout that oneDNN's small matrix products read fastest.

    An ordinary product rearranges the weight on its way, which for the few rows of a decoding step costs up
    to half as much again as the product itself. The copies take as much memory as the weights, and do not
    follow when those change: make them where nothing changes, and drop them afterwards. What cannot be laid
    out (another dtype than float32, another device, a small weight, a torch without oneDNN) is multiplied as
    it is.
    """

    def __init__(self, weights: Iterable[Tensor] = (), rows: int = 1):
        """Copies of those `weights` [out, in] that gain, laid out for inputs of about `rows` rows. No
        collectives."""
        self._packed: dict[int, tuple[Tensor, Tensor]] = {}  # by identity: the weight (kept alive), its copy
        if not _has_packed_products():
            return
        for weight in weights:
            if weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.numel() >= _SMALLEST:
                with torch.no_grad():
                    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), min(rows, _MOST_ROWS))
                self._packed[id(weight)] = weight, packed

    def __len__(self) -> int:
        """Weights that have a copy."""
        return len(self._packed)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] times `weight` [out, in] transposed, plus `bias` [out]: [..., out], without gradients.

        Equal to the plain product within the rounding of its sums.
        """
        found = self._packed.get(id(weight))
        if found is None or not 0 < x.numel() <= _MOST_ROWS * x.size(-1):
            return F.linear(x, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x, found[1], bias, "none", [], "")


def _has_packed_products() -> bool:
    """Whether this build of torch has oneDNN's products with packed weights, and may use them."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    mkldnn = torch.backends.mkldnn
    return mkldnn.is_available() and mkldnn.enabled and all(hasattr(torch.ops.mkldnn, n) for n in names)
