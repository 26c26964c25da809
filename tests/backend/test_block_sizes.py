"""Teacher blocks: which data-parallel ranks must run the same instructions."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from megatron_mopd.backend.blocks import block_sizes, check_block_size, smallest_block
from megatron_mopd.backend.parallel import check_world_size, select_device
from megatron_mopd.config import ConfigError, ParallelConfig
from megatron_mopd.estimate.memory import imagined_groups
from megatron_mopd.teachers import placement
from megatron_mopd.teachers.layout import DENSE, EXPERT, HEAD

WORLD = 16


# Layout -> the smallest block, worked out by hand.
LAYOUTS = {
    (): 1,
    (("tensor_model_parallel_size", 2),): 1,
    (("expert_model_parallel_size", 4),): 4,
    (("expert_model_parallel_size", 4), ("pipeline_model_parallel_size", 2)): 4,
    (("expert_model_parallel_size", 4), ("tensor_model_parallel_size", 2)): 4,
    (
        ("expert_model_parallel_size", 4),
        ("tensor_model_parallel_size", 2),
        ("expert_tensor_parallel_size", 1),
    ): 2,
    (("expert_model_parallel_size", 2), ("context_parallel_size", 4)): 1,
    (("expert_model_parallel_size", 8), ("context_parallel_size", 2)): 4,
}


@pytest.fixture(autouse=True)
def on_the_cpu():
    select_device("cpu")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_expert_group_reaches_beyond_a_block_and_no_smaller_block_would_do(layout):
    parallel, size = ParallelConfig(**dict(layout)), LAYOUTS[layout]
    assert smallest_block(parallel) == size
    members: dict[tuple[int, int], set[int]] = {}
    experts: list[set[int]] = []
    replica = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    for rank in range(WORLD):
        with imagined_groups(parallel, WORLD, rank) as groups:
            block = groups.block
            assert (block.size, block.count * block.size) == (size, groups.dp_size)
            members.setdefault((groups.pp.rank(), block.index), set()).add(rank)
            stage = dist.get_process_group_ranks(groups.collection.tp_ep)
            experts.append(set(stage))
            everyone = set(range(WORLD))
            inside = set(groups.in_block(groups.collection.dp_cp))
            assert rank in inside and inside <= everyone and len(inside) == size * groups.cp_size
    for group in experts:
        assert any(group <= block for block in members.values())
    for block in members.values():
        assert len(block) == size * replica
    if size > 1:  # a block is connected by its expert groups: none of its ranks could be in another block
        (first,) = {frozenset(group) for group in experts if 0 in group}
        assert len({rank // replica for rank in first}) > 1


def test_sizes_are_multiples_of_the_smallest_that_divide_the_data_parallel_ranks():
    experts = ParallelConfig(expert_model_parallel_size=2)
    assert block_sizes(experts, 12) == [2, 4, 6, 12]
    assert block_sizes(ParallelConfig(), 4) == [1, 2, 4]
    for size in (1, 3, 5, 8):
        with pytest.raises(ConfigError, match=rf"teacher_block_size: {size} is not .* valid: 2, 4, 6, 12$"):
            check_block_size(ParallelConfig(expert_model_parallel_size=2, teacher_block_size=size), 12)
    with pytest.raises(ConfigError, match=r"teacher_block_size: 3 is not possible with 4 data-parallel"):
        check_world_size(ParallelConfig(pipeline_model_parallel_size=2, teacher_block_size=3), 8)


@pytest.mark.parametrize(
    "layout, dense, expert",
    [
        (dict(teacher_block_size=4), 4, 4),
        (dict(expert_model_parallel_size=4), 4, 1),
        (dict(expert_model_parallel_size=4, teacher_block_size=8), 8, 2),
        (dict(expert_model_parallel_size=2, context_parallel_size=2, teacher_block_size=2), 4, 2),
    ],
)
def test_teachers_are_sharded_over_a_block(layout, dense, expert):
    """Replicas of experts lie in different expert groups, so the smallest block has one of them."""
    with imagined_groups(ParallelConfig(**layout), WORLD, 5) as groups:
        assert placement.sharding(groups) == {DENSE: dense, EXPERT: expert, HEAD: 1}
        gathers = placement.gather_groups(groups)
        assert {name: group.size() for name, group in gathers.items()} == {DENSE: dense, EXPERT: expert}
