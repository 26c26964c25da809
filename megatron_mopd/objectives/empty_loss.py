"""The loss of a micro-batch in which a rank has no response token."""

from torch import Tensor


def empty_loss(hidden: Tensor, weight: Tensor) -> Tensor:
    """Zero, as a function of hidden states [0, h] and the head's weight [V/tp, h]. No collectives.

    The backward pass still runs through the whole model, because other ranks' collectives wait for it, and
    every parameter gets a gradient of zero, the head included: megatron-core's overlapped reduction sends a
    bucket when the hooks of all its parameters have run in the last micro-batch, and the other ranks wait for
    it. As in a loss with tokens, the head's gradient is complete before the backward pass of the layers
    begins, so that all ranks send their buckets in the same order.
    """
    layers = hidden.sum()
    # The gradient of an empty slice is zero whatever the weights are, NaN included. Last in the forward pass
    # is first in the backward pass.
    return layers + weight[:0].sum()
