"""Inputs of a forward pass besides its tokens, provided again for activation recompute."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class ForwardInput(Generic[T]):
    """A value for one module in the current forward pass, provided again for activation recompute.

    Recompute calls the module again during the backward pass, after other micro-batches have gone through it;
    a chunk's backward passes run in the order of its forward passes.
    """

    def __init__(self):
        self.target: T | None = None
        """The value of the current forward pass."""
        self.keep_for_recompute = False
        """Whether a backward pass will follow, so that recompute needs the value of a checkpointed forward
        again."""
        self._recompute: deque[T] = deque()

    def give(self, value: T) -> None:
        """Set the value for the next forward pass; a backward pass follows if gradients are enabled."""
        self.target, self.keep_for_recompute = value, torch.is_grad_enabled()

    def take_back(self) -> None:
        """Clear the value after the forward pass."""
        self.target = None

    def next_target(self) -> T | None:
        """The value for this call of the module; called once each time the module runs."""
        if self.target is not None:
            if self.keep_for_recompute and not torch.is_grad_enabled():  # inside a checkpointed forward
                self._recompute.append(self.target)
            return self.target
        if self._recompute and torch.is_grad_enabled():
            return self._recompute.popleft()
        return None
