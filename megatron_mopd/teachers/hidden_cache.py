"""Last-layer hidden states of the teachers: all that is kept of their forward pass."""

from __future__ import annotations

import torch
from torch import Tensor


class HiddenCache:
    """Teacher hidden states [response tokens of this CP rank, h_teacher], keyed by (trajectory index, teacher
    name).

    They live on the last pipeline stage, in host memory when the run is on CUDA, so that the number of
    micro-batches does not bound device memory; each is released when the loss has used it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._states: dict[tuple[int, str], Tensor] = {}
        self.peak_bytes = 0
        self._bytes = 0

    def put(self, index: int, teacher: str, hidden: Tensor) -> None:
        """Keep a detached host copy of `hidden` [n, h]; the device's copy is free to go."""
        key = (index, teacher)
        assert key not in self._states, f"trajectory {index} was scored twice by teacher {teacher!r}"
        kept = torch.empty(hidden.shape, dtype=hidden.dtype, device="cpu", pin_memory=hidden.is_cuda)
        kept.copy_(hidden.detach(), non_blocking=True)
        self._states[key] = kept
        self._bytes += kept.numel() * kept.element_size()
        self.peak_bytes = max(self.peak_bytes, self._bytes)

    def pop(self, index: int, teacher: str) -> Tensor:
        """The states of one trajectory on the run's device, released from the cache."""
        kept = self._states.pop((index, teacher))
        self._bytes -= kept.numel() * kept.element_size()
        return kept.to(self.device, non_blocking=True)

    def __len__(self) -> int:
        return len(self._states)
