"""Verifiers run while teachers score; only the first loss that needs a reward waits for them.

The order of events shows it: here a verifier finishes only after teachers have scored, so a step that waited
for it any earlier would wait forever.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace

import pytest
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: F401  (before forking)

from megatron_mopd.data.verifiers import Score
from megatron_mopd.training import step as training_step
from megatron_mopd.training.rewards import Rewarder
from megatron_mopd.training.step import train_step
from megatron_mopd.training.step_batch import plan_step
from tests import _models
from tests._distributed import RankPool

PP2, CP2 = dict(pipeline_model_parallel_size=2), dict(context_parallel_size=2)
OBJECTIVE = dict(
    kind="full_vocab_kl",
    per_domain={
        "text": dict(kind="sampled_token", outcome_reward_weight=0.3),
        "arith": dict(add={"grpo": 0.1}),
    },
)


class SlowVerifiers:
    """Verifiers that finish when `finish` is called."""

    def __init__(self):
        self.futures, self.pairs = [], []

    def submit(self, pairs):
        self.pairs += pairs
        self.futures.append(Future())
        return self.futures

    def finish(self):
        if self.futures and not self.futures[0].done():
            self.futures[0].set_result([Score(float(len(text) % 2)) for _, text in self.pairs])

    def close(self):
        pass


class Known:
    def __init__(self, rewards):
        self.collect = lambda: rewards


def samples(domains):
    chosen = [t for t in _models.batch(40) if t.domain in domains][:12]
    return [
        replace(t, index=i, logprobs=(-1.0,) * len(t.response_ids))
        for i, t in enumerate(sorted(chosen, key=lambda t: t.domain))
    ]


def make(parallel, kind):
    learner = _models.make_learner(
        _models.DENSE,
        parallel,
        objective=OBJECTIVE,
        schedule=dict(micro_batch_size=1, kind=kind),
        rollout=dict(samples_per_prompt=2),
    )
    rewarder = Rewarder(learner.config, learner.groups, lambda ids: "x" * len(ids))
    if rewarder._workers is not None:
        rewarder._workers.close()
        rewarder._workers = SlowVerifiers()
    return learner, rewarder


def watched_step(rank, parallel, kind, domains, forwards):
    """Run a step whose verifiers finish when `forwards` teacher forwards of their rank began (None: all).

    Returns this rank's events, the loss, the loss of the same step with rewards known in advance, and the
    rewards.
    """
    learner, rewarder = make(parallel, kind)
    trajectories = samples(domains)
    rewards = rewarder.start(trajectories)
    batch = plan_step(learner, trajectories, rewards)
    number = sum(map(len, batch.teachers.values()))
    number = number if forwards is None else forwards
    events, begun = [], 0
    collect, keep, resident = rewards.collect, batch.scores.keep, learner.bank.make_resident
    build = training_step.build_loss

    def make_resident(name):
        nonlocal begun
        begun += 1
        if begun == number and rewarder._workers is not None:
            rewarder._workers.finish()
        return resident(name)

    def kept(teacher, micro_batch, hidden):
        events.append("scored")
        keep(teacher, micro_batch, hidden)

    def collected():
        events.append("collected")
        return collect()

    def build_loss(*arguments):
        loss = build(*arguments)

        def watched(micro_batch, hidden):
            events.append("".join({t.domain for t in micro_batch.trajectories}))
            return loss(micro_batch, hidden)

        return watched

    learner.bank.make_resident, batch.scores.keep, rewards.collect = make_resident, kept, collected
    training_step.build_loss = build_loss
    try:
        metrics = train_step(learner, [batch])
    finally:
        training_step.build_loss = build
    found = collect()
    rewarder.close()
    again, _ = make(parallel, kind)
    expected = train_step(again, [plan_step(again, trajectories, Known(found))])
    return events, metrics["loss"], expected["loss"], found


@pytest.fixture(scope="module")
def pools():
    with RankPool(1, timeout=60) as one, RankPool(2, timeout=60) as two:
        yield {1: one, 2: two}


@pytest.mark.parametrize(
    "parallel, kind, forwards",
    [
        ({}, "bubble_fill", 1),
        (PP2, "serial", None),
        (PP2, "bubble_fill", 1),
        (CP2, "serial", None),
    ],
    ids=["bubble_fill", "pp2-serial", "pp2-bubble_fill", "cp2-serial"],
)
def test_the_first_loss_that_needs_a_reward_waits_for_the_verifiers(pools, parallel, kind, forwards):
    results = pools[2 if parallel else 1].run(
        watched_step, parallel, kind, ("arith", "other", "text"), forwards
    )
    for _, loss, expected, found in results:
        assert loss == expected and found == results[0][3] and len(set(found.values())) == 2
    if parallel is PP2:
        assert results[0][0] == [], "the first stage waits for a reward"
    events = results[-1][0]
    waited = events.index("collected")
    assert events.count("collected") == 1
    assert "scored" in events[:waited]
    assert events[waited - 1] in ("arith", "text"), "a loss that needs no reward waits"
    assert not {"arith", "text"} & set(events[: waited - 1])
    if forwards is None:
        assert "scored" not in events[waited:], "the verifiers finished before all teachers had begun"


def test_a_step_whose_losses_need_no_reward_never_waits(pools):
    (events, loss, expected, found) = pools[1].run(watched_step, {}, "bubble_fill", ("other",), 99)[0]
    assert "collected" not in events and "other" in events and "scored" in events
    assert loss == expected and found == {}


def broken(rank):
    """The error on each rank when the verifiers of rank 0 fail."""
    learner, rewarder = make(PP2, "serial")
    rewards = rewarder.start(samples(("text",)))
    if rank == 0:
        rewarder._workers.futures[0].set_exception(OSError("no more processes"))
    with pytest.raises((OSError, RuntimeError)) as caught:
        rewards.collect()
    rewarder.close()
    return str(caught.value)


def test_every_rank_hears_of_a_rank_that_cannot_judge(pools):
    assert pools[2].run(broken) == ["no more processes", "another rank could not have its responses judged"]
