"""Routing replay: training uses the experts that sampling used, in every layout and under recompute."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_mopd.config import ConfigError
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.losses.findings import Findings
from megatron_mopd.model.gpt import unwrap
from megatron_mopd.model.router_replay import install_routing_replay, routing_choices
from megatron_mopd.rollout.engine import SamplingParams
from megatron_mopd.rollout.megatron_engine import MegatronEngine
from megatron_mopd.training.proximal_policy import proximal_logprobs
from megatron_mopd.training.step import train_step
from megatron_mopd.training.step_batch import plan_step
from tests import _models
from tests._distributed import RankPool

RECOMPUTE = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


def prompts(count=6):
    rng = random.Random(3)
    ids = [tuple(rng.randrange(_models.VOCAB) for _ in range(rng.randint(1, 7))) for _ in range(count)]
    return [Prompt("", i, ("arith", "text")[n % 2], None, "exact_match") for n, i in enumerate(ids)]


def rollout(learner):
    """Two responses per prompt, with the experts to which their tokens were routed."""
    install_routing_replay(learner.chunks)
    engine = MegatronEngine(
        learner.chunks, learner.groups, vocab_size=_models.VOCAB, max_sequence_length=64, max_batch_size=8
    )
    sampling = SamplingParams(max_new_tokens=9, stop_token_ids=(1, 2, 3), keep_routing=True)
    return engine.generate(prompts(), sampling, seed=1, samples_per_prompt=2), engine.routing


def perturb_routing(learner):
    """Make routers choose other experts with unchanged weights: the bias affects the choice only."""
    for wrapped in learner.chunks:
        for module in unwrap(wrapped).modules():
            if getattr(module, "expert_bias", None) is not None:
                generator = torch.Generator().manual_seed(module.layer_number)
                module.expert_bias += 0.5 * torch.randn(module.expert_bias.shape, generator=generator)


def deviations(rank, parallel, schedule):
    """Largest |log theta - log mu| over this rank's sampled tokens, with and without replay."""
    learner = _models.make_learner(_models.SHARED, parallel, schedule=schedule)
    trajectories, routing = rollout(learner)
    perturb_routing(learner)
    result = []
    for records in (routing, None):
        batch = plan_step(learner, trajectories, routing=records)
        found = proximal_logprobs(
            learner.pipeline,
            learner.chunks,
            batch.student,
            settings=learner.loss_settings,
            findings=Findings(),
        )
        by_index = {t.index: torch.from_numpy(t.logprobs) for t in batch.trajectories if t.has_tokens}
        differences = [(values - by_index[i]).abs().max().item() for i, values in found.items()]
        result.append(max(differences, default=None))
    compact = None if routing is None else {str(r.dtype) for r in routing.records.values()}
    return result, compact, len(found)


def gradients(rank, recompute):
    learner = _models.make_learner(
        _models.SHARED | (RECOMPUTE if recompute else {}),
        dict(pipeline_model_parallel_size=2),
        schedule=dict(micro_batch_size=2),
    )
    trajectories, routing = rollout(learner)
    perturb_routing(learner)
    batch = plan_step(learner, trajectories, routing=routing)
    metrics = train_step(learner, [batch])
    for wrapped in learner.chunks:
        for choice in routing_choices(unwrap(wrapped)):
            assert choice.target is None and not choice._recompute, "a stored choice was not used"
    teachers = [learner.bank.make_resident(name) for name in learner.bank.names]
    assert not any(routing_choices(unwrap(teacher)) for teacher in teachers), "a teacher replays routing"
    return metrics, _models.pieces(learner, gradients=True)


@pytest.fixture(scope="module")
def pools():
    with RankPool(1) as one, RankPool(2) as two:
        yield {1: one, 2: two}


@pytest.mark.parametrize(
    "ranks, parallel, schedule",
    [
        (1, {}, dict(micro_batch_size=4)),
        (1, {}, dict(max_tokens_per_micro_batch=40)),
        (2, dict(tensor_model_parallel_size=2, sequence_parallel=True), dict(micro_batch_size=4)),
        (2, dict(pipeline_model_parallel_size=2), dict(max_tokens_per_micro_batch=40)),
        (
            2,
            dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
            dict(micro_batch_size=4),
        ),
        (2, dict(expert_model_parallel_size=2), dict(micro_batch_size=4)),
        (2, dict(context_parallel_size=2), dict(max_tokens_per_micro_batch=40)),
    ],
    ids=["padded", "packed", "tp", "pp", "vpp", "ep", "cp"],
)
def test_log_probs_of_training_equal_those_of_sampling(pools, ranks, parallel, schedule):
    results = pools[ranks].run(deviations, parallel, schedule)
    scored = [result for result, _, count in results if count]
    assert scored
    for with_replay, without in scored:
        assert with_replay < 1e-5
        assert without > 1e-2
    assert all(compact in (None, {"torch.uint8"}) for _, compact, _ in results)


def test_recompute_replays_too(pools):
    """Activation recompute runs the routers again in the backward pass, between other micro-batches."""
    plain = pools[2].run(gradients, False)
    recomputed = pools[2].run(gradients, True)
    assert recomputed[0][0]["loss"] == pytest.approx(plain[0][0]["loss"], rel=1e-9)
    expected = _models.assemble([pieces for _, pieces in plain])
    found = _models.assemble([pieces for _, pieces in recomputed])
    for key, value in expected.items():
        atol = 1e-6 * value.abs().max().item()
        torch.testing.assert_close(found[key], value, rtol=0, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


def refuse(rank):
    learner = _models.make_learner(_models.DENSE)
    with pytest.raises(ConfigError, match="no experts"):
        install_routing_replay(learner.chunks)


def test_a_dense_student_is_refused(pools):
    pools[1].run(refuse)
