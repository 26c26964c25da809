"""How a batch is shared among blocks of data-parallel ranks."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest

from benchmarks.cluster_scale import Case, measure
from megatron_mopd.data.blocks import TOLERANCE, assign_blocks, portions, share_among_blocks
from tests._models import trajectory

SHAPES = [(teachers, blocks) for teachers in (1, 2, 5, 12, 48) for blocks in (1, 2, 3, 8, 40)]


def random_sizes(rng, teachers):
    """From equal to very uneven sizes, sorted or not."""
    exponent = rng.choice([0, 0.5, 1, 2])
    sizes = [rng.uniform(0.7, 1.3) / (number + 1) ** exponent for number in range(teachers)]
    rng.shuffle(sizes)
    return sizes if rng.random() < 0.5 else sorted(sizes)


def batch(rng, count, domains, longest=60):
    weights = [rng.choice([1, 1 / (number + 1)]) for number in range(domains)]
    return [
        trajectory(
            index,
            [1],
            [2] * min(longest, 1 + int(rng.lognormvariate(math.log(6), 0.8))),
            f"domain {rng.choices(range(domains), weights)[0]}",
        )
        for index in range(count)
    ]


def share(trajectories, blocks, **kwargs):
    costs = np.array(list(map(len, trajectories)), dtype=float)
    return share_among_blocks(trajectories, blocks, [t.domain for t in trajectories], costs, **kwargs)


@pytest.mark.parametrize(("teachers", "blocks"), SHAPES)
def test_portions_are_complete_even_and_of_few_mixtures(teachers, blocks):
    """A contiguous cut in the order of sizes would leave a block with most of the small ones."""
    rng = random.Random(teachers * blocks)
    for _ in range(50):
        sizes = random_sizes(rng, teachers)
        found = portions(sizes, blocks)
        loads, counts = [0.0] * blocks, [0] * blocks
        for size, portion in zip(sizes, found):
            assert math.isclose(sum(amount for _, amount in portion), size)
            assert len({block for block, _ in portion}) == len(portion)
            for block, amount in portion:
                loads[block] += amount
                counts[block] += 1
        assert max(loads) <= (1 + 2 * TOLERANCE) * sum(sizes) / blocks
        assert max(counts) <= math.ceil(teachers / blocks) + 1


@pytest.mark.parametrize("blocks", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("count", [0, 1, 5, 39, 300])
@pytest.mark.parametrize("domains", [1, 4, 24])
def test_every_trajectory_is_in_one_share_whatever_the_order(blocks, count, domains):
    rng = random.Random(count)
    trajectories = batch(rng, count, domains)
    shares = share(trajectories, blocks)
    assert len(shares) == blocks
    assert sorted(t.index for part in shares for t in part) == list(range(count))
    mixtures = len({t.domain for t in trajectories})
    assert max(len({t.domain for t in part}) for part in shares) <= math.ceil(mixtures / blocks) + 1
    rng.shuffle(trajectories)
    again = share(trajectories, blocks)
    assert [{t.index for t in part} for part in again] == [{t.index for t in part} for part in shares]


@pytest.mark.parametrize(("blocks", "domains"), [(2, 3), (4, 12), (8, 12), (16, 12), (64, 12), (64, 48)])
def test_whole_trajectories_are_shared_evenly(blocks, domains):
    """Sixteen trajectories of very different length to a block: dealt in turn, or at random, the fullest
    would be a third above the mean."""
    for seed in range(5):
        trajectories = batch(random.Random(seed), 16 * blocks, domains)
        loads = [sum(map(len, part)) for part in share(trajectories, blocks)]
        assert max(loads) <= 1.1 * sum(loads) / blocks


def test_a_block_keeps_the_teacher_that_it_alone_needs():
    """Equal domains, many blocks: only blocks where two domains meet see other teachers in the next batch."""
    before, changed = None, 0
    for seed in range(10):
        rng = random.Random(seed)
        trajectories = [trajectory(i, [1], [2] * rng.randint(5, 50), f"d{i % 4}") for i in range(1024)]
        seen = [{t.domain for t in part} for part in share(trajectories, 64)]
        changed += sum(not now <= earlier for now, earlier in zip(seen, before or seen))
        before = seen
    assert changed <= 0.06 * 64 * 9


def test_blocks_keep_small_mixtures_whose_sizes_change():
    """Two large domains and ten small ones. Sorted by size, the small ones would change places in every
    batch; cut in the order of names, one block would have most of them."""
    seen = set()
    for seed in range(10):
        rng = random.Random(seed)
        found = portions([20.0, 20.0, *(rng.uniform(1, 4) for _ in range(10))], 2)
        assert max(Counter(block for portion in found for block, _ in portion).values()) <= 7
        seen.add(tuple(tuple(block for block, _ in portion) for portion in found[2:]))
    assert len(seen) == 1


def test_a_small_part_of_a_mixture_has_short_trajectories():
    """All ranks of a block wait for a mixture's longest trajectory, so it must not be in a small part."""
    lengths = [200] * 6 + [20] * 90
    trajectories = [trajectory(i, [1], [2] * (n - 1), "a") for i, n in enumerate(lengths)]
    trajectories += [trajectory(96 + i, [1], [2] * 19, "b") for i in range(95)]
    shares = share(trajectories, 2, block_size=2)
    small = min((part for part in shares), key=lambda part: sum(len(t) for t in part if t.domain == "a"))
    assert 0 < sum(len(t) for t in small if t.domain == "a")
    assert max(len(t) for t in small if t.domain == "a") == 20


def test_waiting_for_a_long_trajectory_counts_as_work():
    """Four ranks score one trajectory of 400 tokens: three wait, in the student's forward pass for half of
    the time. So the block that has it gets less of the rest."""
    trajectories = [trajectory(0, [1], [2] * 399, "rare")]
    trajectories += [trajectory(1 + i, [1], [2] * 9, "usual") for i in range(160)]
    beside = []
    for block_size, cost in ((1, 1.0), (4, 0.0), (4, 1.0)):
        scoring = cost * np.array(list(map(len, trajectories)))
        shares = share(trajectories, 2, block_size=block_size, scoring_costs=scoring)
        (part,) = (part for part in shares if any(t.domain == "rare" for t in part))
        beside.append(sum(map(len, part)) - 400)
    assert beside[0] > 500
    assert 200 < beside[1] < 400
    assert beside[2] == 0


def test_one_giant_domain_is_shared_by_all_blocks():
    shares = share(batch(random.Random(0), 128, 1), 8)
    assert Counter(t.domain for part in shares for t in part) == {"domain 0": 128}
    assert min(map(len, shares)) > 0


def test_keys_may_be_any_hashable_value():
    """Mixtures of several teachers, and none."""
    keys = [None, (("a", 0.5), ("b", 0.5)), (("a", 1.0),)]
    trajectories = [trajectory(i, [1], [2] * 9) for i in range(30)]
    shares = share_among_blocks(trajectories, 3, [keys[t.index % 3] for t in trajectories], np.full(30, 10.0))
    assert [len({keys[t.index % 3] for t in part}) for part in shares] == [1, 1, 1]


def test_thousands_of_blocks():
    """65,536 trajectories for 4,096 blocks, as arrays."""
    rng = np.random.default_rng(0)
    mixtures, costs = rng.integers(0, 12, 65536), rng.lognormal(8, 0.8, 65536)
    owners = assign_blocks(mixtures, costs, np.arange(65536), 4096, 1, np.zeros(12))
    loads = np.bincount(owners, costs, 4096)
    assert loads.max() <= 1.1 * max(loads.mean(), costs.max())


def test_the_benchmark():
    """Teachers of twelve domains on 64 ranks in blocks of 8, and four on a pipeline of two stages."""
    row = measure(Case(64, 8, shares="zipf"), batches=4, pipeline=False)
    assert max(row.figures["computed"]) <= 1.1
    assert max(row.figures["slowest"]) <= 1.15
    assert max(row.figures["loads"]) <= 3
    assert min(row.figures["before"]) > 3
    row = measure(Case(4, 2, teachers=4, pp=2, samples=64), batches=4, pipeline=True)
    assert 1 <= max(row.figures["pipeline"]) <= 1.25
