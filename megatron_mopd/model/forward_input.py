"""What a forward pass is given beside its tokens, and its recomputation once more."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class ForwardInput(Generic[T]):
    """A value for one module and the current forward pass, which activation recompute hands out again.

    Recompute calls the module once more during the backward pass, when other micro-batches have gone through
    it since; a chunk's backward passes come in the order of its forward passes.
    """

    def __init__(self):
        self.target: T | None = None
        """The value of the current forward pass."""
        self.keep_for_recompute = False
        """A backward pass will follow, so what a checkpointed forward takes is needed again."""
        self._recompute: deque[T] = deque()

    def give(self, value: T) -> None:
        """Set the value of the forward pass that begins; a backward follows where gradients are enabled."""
        self.target, self.keep_for_recompute = value, torch.is_grad_enabled()

    def take_back(self) -> None:
        """The forward pass is over."""
        self.target = None

    def next_target(self) -> T | None:
        """The value that belongs to this call of the module; called once each time the module runs."""
        if self.target is not None:
            if self.keep_for_recompute and not torch.is_grad_enabled():  # inside a checkpointed forward
                self._recompute.append(self.target)
            return self.target
        if self._recompute and torch.is_grad_enabled():
            return self._recompute.popleft()
        return None
