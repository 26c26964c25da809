"""The order of the student's forwards and backwards: Megatron's interleaved order, which for one chunk per
stage is 1F1B. No torch.
"""

from __future__ import annotations

FORWARD, BACKWARD, TEACHER = 0, 1, 2
"""Kinds of computation."""


def forward_group(stages: int, chunks: int, limit: int) -> int:
    """How many micro-batches move through the chunks together: Megatron's p, or fewer under a tight limit.

    A stage must hold (chunks - 1) * group + 1 forwards before the first backward can reach it.
    """
    if chunks == 1:
        return stages
    return max(1, min(stages, (limit - 1) // (chunks - 1)))


def student_order(microbatches: int, chunks: int, group: int) -> tuple[list, list]:
    """The order of (micro-batch, chunk) for forwards and for backwards, the same on every stage."""
    forward, backward = [], []
    for first in range(0, microbatches, group):
        members = range(first, min(first + group, microbatches))
        forward += [(i, c) for c in range(chunks) for i in members]
        backward += [(i, c) for c in reversed(range(chunks)) for i in members]
    return forward, backward


def one_forward_one_backward(microbatches: int, chunks: int, group: int, warmup: int) -> list[int]:
    """One stage's student order: FORWARD or BACKWARD, `warmup` forwards first, then alternating.

    An incomplete last group is planned as if it were full, and the missing micro-batches are then removed:
    removing whole micro-batches cannot make an order deadlock.
    """
    full = -(-microbatches // group) * group
    forward, backward = student_order(full, chunks, group)
    keep_forward = [i < microbatches for i, _ in forward]
    keep_backward = [i < microbatches for i, _ in backward]
    total = len(forward)
    warmup = min(warmup, total)
    order = [FORWARD] * sum(keep_forward[:warmup])
    for number in range(total):
        if warmup + number < total and keep_forward[warmup + number]:
            order.append(FORWARD)
        if keep_backward[number]:
            order.append(BACKWARD)
    return order
