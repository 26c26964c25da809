"""How a batch is divided among ranks and micro-batches."""

from __future__ import annotations

import math
import random

import pytest

from megatron_mopd.data.batching import BatchShape
from megatron_mopd.data.division import Division
from tests._models import trajectory

LAYOUTS = [
    dict(max_tokens=None, tp_size=1, cp_size=1),
    dict(max_tokens=64, tp_size=1, cp_size=1),
    dict(max_tokens=None, tp_size=2, cp_size=2),
    dict(max_tokens=64, tp_size=2, cp_size=2),
]


def batch(lengths, domains=3):
    return [
        trajectory(index, [1], [2] * (length - 1), f"domain {index % domains}")
        for index, length in enumerate(lengths)
    ]


def divide(trajectories, ranks, micro_batch_size=2, **layout):
    layout = dict(max_tokens=None, tp_size=1, cp_size=1) | layout
    shape = BatchShape.for_batch(trajectories, micro_batch_size=micro_batch_size, cp_rank=0, **layout)
    return Division(trajectories, ranks, shape, lambda t: t.domain), shape


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [0, 1, 5, 16, 61])
def test_every_rank_gets_as_many_micro_batches_and_every_trajectory_once(layout, ranks, count):
    """Ranks in a collective would wait forever for a micro-batch that one of them lacks."""
    rng = random.Random(count)
    trajectories = batch([rng.randint(2, 40) for _ in range(count)])
    division, shape = divide(trajectories, ranks, **layout)
    cut = division.cut()
    assert len(cut.rows) == len(cut.sizes) >= 1
    assert all(len(row) == ranks for row in cut.rows)
    assert sorted(t.index for row in cut.rows for part in row for t in part) == list(range(count))
    for rank, mine in enumerate(division.per_rank()):
        parts = cut.of_rank(rank)
        assert sorted(t.index for part in parts for t in part) == sorted(t.index for t in mine)
        for part, size in zip(parts, cut.sizes):
            assert shape.num_tokens(part) <= size
            if shape.is_packed:
                assert shape.num_tokens(part) <= shape.max_tokens
            else:
                assert len(part) <= shape.micro_batch_size
    domains = [t.domain for t in division.per_rank()[0]]
    assert domains == sorted(domains), "a micro-batch's loss would have more parts than mixtures"


def test_tokens_are_levelled_over_ranks_and_micro_batches():
    """Log-normal lengths, three mixtures, eight ranks in step: little more is computed than whole sequences
    require."""
    rng = random.Random(0)
    lengths = [min(4_000, 50 + int(rng.lognormvariate(math.log(500), 0.8))) for _ in range(240)]
    division, _ = divide(batch(lengths), 8, max_tokens=4_000)
    for name in ("domain 0", "domain 1", "domain 2"):
        cut = division.cut(lambda t, name=name: t.domain == name)
        needed = sum(length for index, length in enumerate(lengths) if f"domain {index % 3}" == name)
        assert 8 * sum(cut.sizes) < 1.1 * needed
    assert 8 * sum(division.cut().sizes) < 1.1 * sum(lengths)


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_long_trajectories_of_a_mixture_lie_beside_each_other(ranks):
    """Spread over a mixture's micro-batches, each would be as long as one of them on all ranks."""
    rng = random.Random(ranks)
    lengths = [min(3_200, 20 + int(rng.lognormvariate(math.log(220), 0.8))) for _ in range(16 * ranks)]
    lengths[:3] = 3_200, 3_000, 2_800
    division, _ = divide(batch(lengths, domains=1), ranks, max_tokens=1_600)
    allowed = max(sum(lengths) / ranks, max(lengths))
    assert sum(division.cut().sizes) <= 1.07 * allowed


def test_the_student_trains_where_a_teacher_waits_for_a_long_trajectory():
    """Twelve mixtures with two trajectories a rank: a teacher's micro-batch is as long as its longest one,
    but the student's is filled with other mixtures."""
    ratios = []
    for seed in range(4):
        rng = random.Random(seed)
        lengths = [min(3_200, 20 + int(rng.lognormvariate(math.log(220), 0.8))) for _ in range(12 * 32)]
        division, _ = divide(batch(lengths, domains=12), 16, max_tokens=3_200)
        ratios.append(sum(division.cut().sizes) / (sum(lengths) / 16))
        for number in range(12):
            mine = lengths[number::12]
            cut = division.cut(lambda t, number=number: t.domain == f"domain {number}")
            assert sum(cut.sizes) <= 1.12 * max(sum(mine) / 16, *mine)
    assert sum(ratios) / 4 <= 1.3


def test_padded_trajectories_lie_beside_others_of_similar_length():
    """Dealt at random, every micro-batch would be as long as the longest trajectories."""
    lengths = [20 + 10 * index for index in range(72)]
    division, _ = divide(batch(random.Random(2).sample(lengths, 72)), 3, micro_batch_size=2)
    assert 3 * sum(division.cut().sizes) <= 1.3 * sum(lengths)


def test_small_mixtures_share_a_micro_batch():
    """Twelve mixtures with one short trajectory each are one micro-batch of the student, twelve of
    teachers."""
    division, _ = divide(batch([5] * 12, domains=12), 1, max_tokens=64)
    assert division.cut().sizes == (60,)
    for number in range(12):
        cut = division.cut(lambda t, number=number: t.domain == f"domain {number}")
        assert cut.sizes == (5,)


def test_the_same_division_on_every_rank():
    """The order in which trajectories arrive does not matter."""
    rng = random.Random(1)
    trajectories = batch([rng.randint(2, 40) for _ in range(50)])
    expected = divide(trajectories, 4, max_tokens=64)[0].cut()
    rng.shuffle(trajectories)
    assert divide(trajectories, 4, max_tokens=64)[0].cut() == expected
