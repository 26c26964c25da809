"""Teacher blocks: the data-parallel ranks that run the same instructions and get the same teachers.

Ranks that share experts exchange tokens in every MoE layer, so they must run the same forward passes in the
same order. Other data-parallel ranks meet only where gradients are summed. A block is a set of consecutive
data-parallel ranks that is closed under the first relation: the smallest one has a single rank for a dense
model, and the ranks of an expert-parallel group for a mixture of experts. Each block gets its own share of
every global batch and its own plan, with only the teachers that its share needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_mopd.config import ConfigError, ParallelConfig


@dataclass(frozen=True)
class Block:
    """A rank's block."""

    size: int
    """Number of its data-parallel ranks."""
    count: int
    """Number of blocks of the run."""
    index: int
    """This rank's block: data-parallel ranks `index * size` to `(index + 1) * size - 1`."""


def smallest_block(parallel: ParallelConfig) -> int:
    """The fewest data-parallel ranks whose expert-parallel groups reach no other rank.

    megatron-core numbers the ranks of a stage tensor-parallel first, then context- and data-parallel ones;
    within the same numbers, expert-tensor-parallel ranks first, then expert-parallel ones. So both kinds of
    groups are consecutive, and the smallest set that is a union of each has the least common multiple of
    their sizes.
    """
    replica = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    experts = parallel.expert_model_parallel_size * (
        parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size
    )
    return math.lcm(replica, experts) // replica


def block_sizes(parallel: ParallelConfig, dp_size: int) -> list[int]:
    """The sizes that blocks of `dp_size` data-parallel ranks can have, in increasing order."""
    smallest = smallest_block(parallel)
    return [size for size in range(smallest, dp_size + 1, smallest) if dp_size % size == 0]


def check_block_size(parallel: ParallelConfig, dp_size: int) -> None:
    """Raise `ConfigError` with the possible sizes unless `parallel.teacher_block_size` is one of them."""
    size, sizes = parallel.teacher_block_size, block_sizes(parallel, dp_size)
    if size is not None and size not in sizes:
        raise ConfigError(
            f"parallel.teacher_block_size: {size} is not possible with {dp_size} data-parallel ranks, of "
            f"which {smallest_block(parallel)} share experts; valid: {', '.join(map(str, sizes))}"
        )


def block_of(parallel: ParallelConfig, dp_rank: int, dp_size: int) -> Block:
    """The block of a data-parallel rank."""
    size = parallel.teacher_block_size or smallest_block(parallel)
    return Block(size, dp_size // size, dp_rank // size)
