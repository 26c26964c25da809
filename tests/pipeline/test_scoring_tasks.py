"""Scoring tasks: a teacher's micro-batches are grouped separately from the student's."""

from __future__ import annotations

import random

import pytest

from megatron_mopd.data.batching import BatchShape
from megatron_mopd.data.division import Cut, Division
from megatron_mopd.pipeline.problem import ScoringTask
from megatron_mopd.training.scoring_tasks import scoring_task
from tests import _models


@pytest.mark.parametrize("dp_size", [1, 3])
@pytest.mark.parametrize("max_tokens", [None, 40])
@pytest.mark.parametrize("seed", range(5))
def test_first_uses_increase_and_cover_every_sample(seed, max_tokens, dp_size):
    rng = random.Random(seed)
    samples = _models.batch(rng.randint(1, 60), seed=seed)
    teachers = {t.index: rng.sample(["a", "b", "c"], rng.randint(1, 2)) for t in samples}
    shape = BatchShape.for_batch(
        samples, micro_batch_size=3, max_tokens=max_tokens, tp_size=1, cp_size=1, cp_rank=0
    )
    division = Division(samples, dp_size, shape, lambda t: tuple(sorted(teachers[t.index])))
    student = division.cut()
    for name in "abc":
        if not any(name in names for names in teachers.values()):
            continue
        scored = division.cut(lambda t, name=name: name in teachers[t.index])
        task = scoring_task(name, scored, student)
        assert list(task.microbatches) == sorted(set(task.microbatches)), "first uses do not increase"
        assert len(task.microbatches) == len(scored.rows) == len(task.sizes)
        for rank in range(dp_size):
            students = student.of_rank(rank)
            for (first, last), members in zip(task.uses(), scored.of_rank(rank)):
                wanted = {t.index for t in members}
                used_by = [i for i, ms in enumerate(students) if wanted & {t.index for t in ms}]
                assert not used_by or (first <= used_by[0] and used_by[-1] <= last)


def test_heads_are_read_by_forwards_that_keep_log_probs_and_by_the_losses_of_the_others():
    a, b, c, d = _models.batch(4)
    scored = Cut([[[a, b], [c]], [[c, d], []]], (1, 1))
    student = Cut([[[a], []], [[b, c], [c]], [[d], []]], (1, 1, 1))

    def task(*names):
        return scoring_task("t", scored, student, lambda t: t in names)

    assert (task().scoring_heads, task().loss_heads) == ((), (0, 1, 2))
    assert (task(a).scoring_heads, task(a).loss_heads) == ((0,), (1, 2))
    assert (task(a, c).scoring_heads, task(a, c).loss_heads) == ((0, 1), (1, 2))
    assert (task(a, b, c, d).scoring_heads, task(a, b, c, d).loss_heads) == ((0, 1), ())


def test_last_uses_must_match():
    with pytest.raises(ValueError, match="does not match first uses"):
        ScoringTask("a", (0, 2), last_uses=(1, 1))
    with pytest.raises(ValueError, match="does not match first uses"):
        ScoringTask("a", (0, 2), last_uses=(1,))
