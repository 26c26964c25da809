"""Scoring the next step's samples ahead of time in the smallest cache that works."""

from __future__ import annotations

import dataclasses

import pytest
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: F401  (before forking)

from megatron_mopd.config import ConfigError
from megatron_mopd.pipeline.costs import CostModel
from megatron_mopd.pipeline.problem import PlanRequest
from megatron_mopd.teachers.hidden_cache import HiddenCache
from megatron_mopd.training.step import train_step
from megatron_mopd.training.step_batch import plan_step
from tests import _models
from tests._distributed import RankPool

LENGTHS = (12, 12, 30, 8, 30)
"""Longest sample of each step: some later states are smaller than those scored ahead, some larger."""


def make_steps(learner):
    return [plan_step(learner, _models.batch(6, seed=n, longest=length)) for n, length in enumerate(LENGTHS)]


def smallest_cache(step):
    costs = CostModel.build(1, teacher_forward=dict.fromkeys(_models.TEACHERS, 1.0))
    return PlanRequest(1, len(step.student), costs, scoring=step.scoring).smallest_cache()


def losses(rank, kind, limit):
    """Losses, peak bytes in the caches of all steps together, and the limit on them (`None`: no limit)."""
    learner = _models.make_learner(
        _models.DENSE | dict(num_layers=2),
        dict(pipeline_model_parallel_size=2),
        schedule=dict(micro_batch_size=1, kind=kind),
    )
    least = [smallest_cache(step) for step in make_steps(learner)]
    budget = None
    if limit == "bytes":
        budget = max(n * step.state_bytes for n, step in zip(least, make_steps(learner)))
        storage = dataclasses.replace(learner.config.teacher_storage, hidden_cache_bytes=budget)
        learner.config = dataclasses.replace(learner.config, teacher_storage=storage)
        learner.pipeline.cache_bytes = storage.hidden_cache_bytes
    elif limit == "states":
        learner.pipeline.limits = dataclasses.replace(learner.pipeline.limits, cached_states=max(least))
    steps, keep, peak = make_steps(learner), HiddenCache._keep, 0

    def watched(self, *arguments):
        nonlocal peak
        keep(self, *arguments)
        peak = max(peak, sum(step.cache._bytes for step in steps))

    HiddenCache._keep = watched
    try:
        found = [train_step(learner, steps[n : n + 2])["loss"] for n in range(len(steps))]
    finally:
        HiddenCache._keep = keep
    return found, peak, budget


@pytest.fixture(scope="module")
def pool():
    with RankPool(2, timeout=120) as ranks:
        yield ranks


def test_a_tight_cache_ends_no_run_and_changes_no_loss(pool):
    free = pool.run(losses, "bubble_fill", None)
    for limit in ("bytes", "states"):
        for (expected, most, _), (found, peak, budget) in zip(free, pool.run(losses, "bubble_fill", limit)):
            assert found == expected
            assert budget is None or peak <= budget < max(most, budget + 1)


def refusals(rank):
    """Error messages for caches that cannot hold the states of all teachers of one micro-batch."""
    messages = []
    for states, in_bytes in ((1, True), (1, False)):
        schedule = dict(micro_batch_size=1) | ({} if in_bytes else dict(max_cached_states=states))
        learner = _models.make_learner(_models.DENSE | dict(num_layers=2), {}, schedule=schedule)
        step = plan_step(learner, _models.batch(6))
        if in_bytes:
            storage = dataclasses.replace(learner.config.teacher_storage, hidden_cache_bytes=step.state_bytes)
            learner.config = dataclasses.replace(learner.config, teacher_storage=storage)
            learner.pipeline.cache_bytes = storage.hidden_cache_bytes
        try:
            train_step(learner, [step])
        except ConfigError as error:
            messages.append(str(error))
    return messages, step.state_bytes, smallest_cache(step)


def test_a_cache_that_is_too_small_is_named_as_the_user_named_it(pool):
    results = pool.run(refusals)
    # Every rank is a block with a plan of its own; all report what the block that needs most needs.
    most = max(least for *_, least in results)
    most_bytes = max(least * size for _, size, least in results if least > 1)
    for (in_bytes, in_states), size, least in results:
        if least > 1:
            assert in_bytes.startswith(f"teacher_storage.hidden_cache_bytes: {size} cannot hold")
        assert f"up to {most_bytes} bytes" in in_bytes
        assert in_states.startswith("schedule.max_cached_states: 1 cannot be met by any plan")
        assert in_states.endswith(f"must be at least {most}")
