"""Frozen routers, the repetition stop, the proximal policy of a rollout batch, and alarms."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_mopd.config import ConfigError
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.model.gpt import unwrap
from megatron_mopd.rollout.batches import DecodingBatch, Request
from megatron_mopd.rollout.engine import SamplingParams
from megatron_mopd.run.alarms import FEWEST_VERDICTS, Alarms, rollout_metrics
from megatron_mopd.training.step import train_step
from megatron_mopd.training.step_batch import plan_step, plan_steps
from tests import _models
from tests._distributed import RankPool


@pytest.fixture(scope="module")
def pool():
    with RankPool(1) as one:
        yield one


def step_with(rank, settings):
    """Names of the weights and biases that a training step changes."""
    transformer = _models.SHARED | dict(moe_router_bias_update_rate=0.1, moe_z_loss_coeff=0.1)
    learner = _models.make_learner(transformer, optimizer=settings)
    model = unwrap(learner.chunks[0])
    before = {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}
    train_step(learner, [plan_step(learner, _models.batch(8))])
    after = model.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def test_frozen_routers_and_expert_bias_stay(pool):
    def parts(changed):
        router = any("router.weight" in name for name in changed)
        bias = any("expert_bias" in name for name in changed)
        return router, bias, any("experts.local_experts" in name for name in changed)

    assert parts(pool.run(step_with, {})[0]) == (True, True, True)
    assert parts(pool.run(step_with, dict(freeze_router=True))[0]) == (False, True, True)
    frozen = dict(freeze_router=True, freeze_expert_bias=True)
    assert parts(pool.run(step_with, frozen)[0]) == (False, False, True)


def refuse(rank):
    with pytest.raises(ConfigError, match="freeze_router: the student has no experts"):
        _models.make_learner(_models.DENSE, optimizer=dict(freeze_router=True))


def test_a_dense_student_has_no_router_to_freeze(pool):
    pool.run(refuse)


def decode(tokens, **sampling):
    """Feed the given tokens [rows][steps] to a decoding batch and return its responses."""
    requests = [Request(i, (5, 6), len(row)) for i, row in enumerate(tokens)]
    params = SamplingParams(max_new_tokens=len(tokens[0]), **sampling)
    batch = DecodingBatch(requests, params, torch.device("cpu"))
    while True:
        alive = batch.trajectories.tolist()
        drawn = torch.tensor([tokens[i][batch.position] for i in alive])
        # The cache is empty here, so there are no rows to reorder.
        batch.cache.keep_rows = lambda rows: None
        if batch.advance(drawn, torch.zeros(len(alive), dtype=torch.double)):
            return batch.responses()


def test_repetition_stop():
    rows = [
        [1, 7, 7, 7, 7, 7, 7, 7],  # period 1
        [1, 2, 3, 2, 3, 2, 3, 9],  # period 2
        [1, 2, 3, 4, 5, 6, 7, 8],
        [7, 7, 1, 7, 7, 1, 7, 7],  # period 3, but only 2 2/3 times
    ]
    lengths = [len(r.token_ids) for r in decode(rows, repetition_stop=3)]
    assert lengths == [4, 7, 8, 8]
    assert not any(r.finished for r in decode(rows, repetition_stop=3))
    assert [len(r.token_ids) for r in decode(rows, repetition_stop=3, repetition_max_period=1)] == [
        4,
        8,
        8,
        8,
    ]
    assert [len(r.token_ids) for r in decode(rows)] == [8, 8, 8, 8]


def proximal(rank):
    """Two steps on one rollout batch with clipping: the second step's proximal policy is the first's."""
    learner = _models.make_learner(
        _models.GQA,
        kind="sampled_token",
        objective=dict(policy_loss="ppo_clip", clip_eps_low=0.01, clip_eps_high=0.01),
        schedule=dict(global_batch_size=8, steps_per_rollout=2, train_iters=2, kind="megatron"),
    )
    rollout = [
        dataclasses.replace(t, logprobs=tuple(-1.0 for _ in t.response_ids)) for t in _models.batch(16)
    ]
    steps = plan_steps(learner, rollout)
    stored = [{i: v.clone() for i, v in step.proximal.items()} for step in steps]
    metrics = [train_step(learner, [step]) for step in steps]
    again = plan_steps(learner, rollout)[1].proximal
    moved = max((again[i] - stored[1][i]).abs().max().item() for i in again)
    clipped = [[v for k, v in m.items() if k.startswith("clipped/")] for m in metrics]
    return [sorted(s) for s in stored], moved, clipped


def test_the_proximal_policy_is_that_of_the_start_of_the_rollout_batch(pool):
    ((stored, moved, (first, second)),) = pool.run(proximal)
    assert stored == [list(range(8)), list(range(8, 16))]
    assert moved > 1e-3, "the student was not updated"
    assert max(first) == 0.0, "in the first step the ratio to the proximal policy is 1"
    assert max(second) > 0.0


def judged(rewards, domain="math", **changes):
    prompt = Prompt("", (1,), domain, "x", "exact_match")
    base = _models.trajectory(0, [1], [2, 3], domain)
    trajectories = [
        dataclasses.replace(base, prompt=prompt, index=i, logprobs=(-1.0, -1.0), **changes)
        for i in range(len(rewards))
    ]
    return trajectories, dict(enumerate(rewards))


def alarms_of(alarms, *batch):
    return alarms.rollout(*batch, rollout_metrics(*batch))


def test_a_constant_reward_raises_an_alarm_once():
    alarms = Alarms()
    half = [0.0] * (FEWEST_VERDICTS // 2)
    assert alarms_of(alarms, *judged(half)) == []
    (message,) = alarms_of(alarms, *judged(half + [0.0]))
    assert "domain 'math' are all 0.0" in message
    assert alarms_of(alarms, *judged(half)) == []
    assert alarms_of(alarms, *judged([0.0, 1.0])) == []
    (message,) = alarms_of(alarms, *judged([None] * FEWEST_VERDICTS))
    assert "verifier of domain 'math' failed" in message


def test_monitors_of_a_rollout():
    metrics = rollout_metrics(*judged([1.0, 0.0, None, 1.0], finished=False))
    assert metrics == {
        "length/math": 2.0,
        "unfinished/math": 1.0,
        "rollout_entropy/math": 1.0,
        "reward/math": pytest.approx(2 / 3),
        "reward_missing/math": 1,
    }


def test_growing_and_enormous_kl_raise_alarms():
    alarms = Alarms()
    assert alarms.step({"kl/math": 0.3, "kl/code": 0.05}) == []
    assert alarms.step({"kl/math": 0.1, "kl/code": 0.05}) == []
    (message,) = alarms.step({"kl/math": 0.5, "kl/code": 0.05})
    assert "'math' has grown from 0.1 to 0.5" in message
    assert "'code' is 9.00 nats" in alarms.step({"kl/code": 9.0})[0]
