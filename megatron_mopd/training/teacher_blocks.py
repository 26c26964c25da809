"""The size of teacher blocks, and each block's share of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from megatron_mopd.backend.blocks import Block, block_sizes, check_block_size
from megatron_mopd.config import Config, ConfigError, ModelConfig, ParallelConfig
from megatron_mopd.data.blocks import share_among_blocks
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.losses.targets import Targets
from megatron_mopd.model.flops import ForwardCost


def with_block_size(
    config: Config, student: ModelConfig, world_size: int, ranks_per_host: int | None
) -> ParallelConfig:
    """`config.parallel` with `teacher_block_size` set, for a layout that fits `world_size`.

    By default blocks are as small as the experts allow, with two exceptions. `host_sharded` shards teachers
    over a block, so its blocks are the ranks of a host: the host holds every teacher once. The
    `global_aux_loss` of a micro-batch is a collective over all data-parallel ranks, so they are one block.
    ranks_per_host: `None` if all ranks are on one host.

    Raises `ConfigError` for an explicit size that the layout or `global_aux_loss` does not allow.
    """
    parallel = config.parallel
    replica = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    dp_size = world_size // replica // parallel.pipeline_model_parallel_size
    check_block_size(parallel, dp_size)
    sizes = block_sizes(parallel, dp_size)
    size = parallel.teacher_block_size
    if balances_over_all_ranks(student):
        if size not in (None, dp_size):
            raise ConfigError(
                f"parallel.teacher_block_size: {size}, but student.moe_router_load_balancing_type="
                f"global_aux_loss sums over all {dp_size} data-parallel ranks in every micro-batch; leave it "
                "out, or use seq_aux_loss"
            )
        size = dp_size
    if size is None:
        size = sizes[0]
        if config.teacher_storage.mode == "host_sharded":
            on_host = (ranks_per_host or world_size) // replica
            size = max([size, *(each for each in sizes if each <= on_host)])
    return replace(parallel, teacher_block_size=size)


def balances_over_all_ranks(student: ModelConfig) -> bool:
    """Whether the student's routers communicate over all data-parallel ranks in every micro-batch."""
    kinds = student.transformer.get("moe_router_load_balancing_type", ())
    return "global_aux_loss" in ([kinds] if isinstance(kinds, str) else kinds)


def block_notes(block: Block, teachers: int, samples: Mapping[str, float]) -> list[str]:
    """What a user should know about the blocks of a run with this many teachers.

    samples: for each domain with teachers, its expected number of samples in a step.
    """
    if block.size * block.count == 1:
        return []
    most = min(teachers, -(-teachers // block.count) + 1)
    notes = [
        f"teacher blocks: {block.count} of {block.size} data-parallel rank{'s' * (block.size > 1)} each, "
        f"with at most {most} of {teachers} teachers in a step"
    ]
    for domain, expected in samples.items():
        if expected < block.size:
            notes.append(
                f"domain {domain!r} has about {expected:.1f} samples a step for the {block.size} ranks of a "
                f"block, which wait for each other: its teachers compute {block.size / expected:.1f} times "
                "as many tokens as needed, or more; a larger schedule.global_batch_size or smaller blocks "
                "(fewer expert-parallel ranks, parallel.teacher_block_size) avoid that"
            )
    return notes


def shares_of_blocks(
    trajectories: Sequence[Trajectory],
    block: Block,
    targets: Targets,
    student: ForwardCost,
    teachers: Mapping[str, ForwardCost],
) -> list[list[Trajectory]]:
    """Every block's share of a batch, of equal cost and with few teachers each.

    The cost of a trajectory is the FLOPs of the student's forward and backward and of its teachers' forwards.
    It is computed, not measured: the division decides in which order gradients are summed, and a resumed run
    must repeat that of an uninterrupted one.
    """
    names = {domain: tuple(name for name, _ in target.mixture) for domain, target in targets.items()}
    mixtures = [names[t.prompt.domain] for t in trajectories]
    count = len(trajectories)
    lengths = np.fromiter(map(len, trajectories), np.float64, count)
    responses = np.fromiter((t.response_length for t in trajectories), np.float64, count)
    numbers = {mixture: number for number, mixture in enumerate(dict.fromkeys(mixtures))}
    which = np.fromiter(map(numbers.__getitem__, mixtures), np.int64, count)
    scoring = np.zeros(count)
    for mixture, number in numbers.items():
        rows = which == number
        for name in mixture:
            scoring[rows] += teachers[name].of_lengths(lengths[rows], responses[rows])
    costs = 3 * student.of_lengths(lengths, responses) + scoring
    return share_among_blocks(trajectories, block.count, mixtures, costs, block.size, scoring)
