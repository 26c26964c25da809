"""Loss and gradient of whole batches against the papers' equations, in every layout.

`objective_oracle.py` evaluates the equations in fp64 for logits that the model computes one response at a
time; gradients of all weights are compared.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import get_args

import pytest
import torch

from megatron_mopd.choices import ObjectiveKind
from megatron_mopd.model.gpt import unwrap
from megatron_mopd.training.step import train_step
from megatron_mopd.training.step_batch import plan_step
from tests import _models
from tests._distributed import RankPool
from tests.losses.objective_oracle import Sample, batch_loss

MIMO = dict(  # MiMo-V2-Flash, arXiv 2601.02780, 4.4
    kind="sampled_token",
    outcome_reward_weight=0.3,
    rollout_correction="icepop",
    importance_low=0.8,
    importance_high=1.25,
)
GLM5 = dict(kind="sampled_token")  # arXiv 2602.15763, 3.5
NEMOTRON = dict(kind="sampled_token", rollout_correction="icepop")  # arXiv 2603.19220: [0.5, 2]
DEEPSEEK = dict(kind="full_vocab_kl")  # DeepSeek-V4, 5.1.2
ALL = ("arith", "other", "text")

CASES = {
    "mimo_v2_flash": ("sequence_mean", dict.fromkeys(ALL, MIMO)),
    "glm5": ("token_mean", dict.fromkeys(ALL, GLM5)),
    "nemotron_cascade2": ("token_mean", dict.fromkeys(ALL, NEMOTRON)),
    "deepseek_v4": ("domain_mean", dict.fromkeys(ALL, DEEPSEEK)),
    "divergences": (
        "token_mean",
        {
            "arith": dict(kind="full_vocab_kl", rollout_correction="tis", importance_high=1.1, weight=2.0),
            "text": dict(kind="top_k_kl", top_k=5, top_k_from="student", rollout_correction="icepop"),
            "other": dict(kind="sft"),
        },
    ),
    "sums": (
        "domain_mean",
        {
            "arith": dict(kind="jsd", beta=0.3, add={"grpo": 0.5}, rollout_correction="sequence_mask"),
            "text": dict(kind="forward_kl", add={"sampled_token": 0.2}, drift_gate_block=2),
            "other": dict(kind="grpo", normalize_advantage=False),
        },
    ),
    "clipped": (
        "token_mean",
        {
            "arith": dict(
                kind="sampled_token",
                policy_loss="ppo_clip",
                clip_eps_high=0.1,
                rollout_correction="tis",
                importance_high=1.2,
            ),
            "text": dict(kind="grpo", policy_loss="ppo_clip", proximal="behaviour"),
            "other": dict(kind="full_vocab_kl", add={"grpo": 0.3}, policy_loss="ppo_clip"),
        },
    ),
    "shaped": (
        "sequence_mean",
        {
            "arith": dict(kind="sampled_token", future_discount=0.9, log_ratio_clamp=0.5),
            "text": dict(
                kind="sampled_token",
                shaping=0.7,
                future_discount=1.0,
                drift_gate_block=3,
                drift_gate_sharpness=2.0,
            ),
            "other": dict(
                kind="sampled_token",
                outcome_reward_weight=0.5,
                rollout_correction="sequence_mask",
                importance_low=0.9,
                importance_high=1.1,
            ),
        },
    ),
}
SAMPLES_PER_PROMPT = 4


def test_every_kind_is_compared_with_the_oracle():
    objectives = [objective for _, domains in CASES.values() for objective in domains.values()]
    compared = {kind for o in objectives for kind in (o["kind"], *o.get("add", ()))}
    assert compared == set(get_args(ObjectiveKind))


def tp(n):
    return dict(tensor_model_parallel_size=n, sequence_parallel=True)


# (model, layout of two ranks, batching)
LAYOUTS = [
    ("GQA", tp(2), dict(max_tokens_per_micro_batch=40)),
    ("GQA", dict(pipeline_model_parallel_size=2), dict(micro_batch_size=3)),
    ("MOE", dict(expert_model_parallel_size=2), dict(max_tokens_per_micro_batch=40)),
    ("GQA", dict(context_parallel_size=2), dict(micro_batch_size=2)),
]


def make_batch():
    """16 trajectories of three domains in groups of four, with the sampler's log-probs and rewards."""
    rng = random.Random(5)
    trajectories, rewards, proximal = [], {}, {}
    for prompt in range(4):
        domain = ("arith", "text", "other", "arith")[prompt]
        ids = [rng.randrange(_models.VOCAB) for _ in range(rng.randint(1, 9))]
        for _ in range(SAMPLES_PER_PROMPT):
            index = len(trajectories)
            response = [rng.randrange(_models.VOCAB) for _ in range(rng.randint(1, 9))]
            trajectory = _models.trajectory(index, ids, response, domain)
            # Deviations from the student's log-probs, which `expected` and `found` add.
            deviations = [rng.gauss(0, 0.3) for _ in response]
            trajectories.append(dataclasses.replace(trajectory, logprobs=tuple(deviations)))
            proximal[index] = torch.tensor([rng.gauss(0, 0.3) for _ in response], dtype=torch.float64)
            rewards[index] = None if index in (1, 14) else float(rng.random() < 0.5)
    return trajectories, rewards, proximal


def objective_section(case):
    reduction, domains = CASES[case]
    return dict(reduction=reduction, chunk_size=7, per_domain=domains)


def make_learner(case, model, parallel, schedule):
    return _models.make_learner(
        getattr(_models, model),
        parallel,
        kind="full_vocab_kl",
        objective=objective_section(case),
        rollout=dict(samples_per_prompt=SAMPLES_PER_PROMPT),
        schedule=schedule,
    )


def response_logits(model, head, trajectory):
    """[|y|, V] logits of one response, computed alone."""
    ids = torch.tensor([trajectory.token_ids.tolist()])
    hidden = model(ids, torch.arange(ids.size(1))[None], None)[:, 0]
    first = len(trajectory.prompt.token_ids) - 1
    return hidden[first:-1] @ head.t()[:, : _models.VOCAB]


def expected(rank, case, architecture):
    """(loss, gradients, the student's log-probs of each response) from the equations, in one process."""
    torch.set_grad_enabled(True)
    learner = make_learner(case, architecture, {}, {})
    student = unwrap(learner.chunks[0]).train()
    trajectories, rewards, proximal = make_batch()
    samples, logprobs = [], {}
    for trajectory in trajectories:
        logits = response_logits(student, student.head_weight(), trajectory)
        tokens = torch.tensor(trajectory.response_ids.tolist())
        own = logits.detach().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        logprobs[trajectory.index] = own.tolist()
        teachers = []
        for name, weight in learner.targets()[trajectory.domain].mixture:
            with torch.no_grad():
                model, head = learner.bank.make_resident(name), learner.bank.head(name)
                teachers.append((weight, response_logits(model, head, trajectory)))
        samples.append(
            Sample(
                trajectory.domain,
                logits,
                teachers,
                tokens,
                own + torch.tensor(trajectory.logprobs, dtype=torch.float64),
                own + proximal[trajectory.index],
                rewards[trajectory.index],
                trajectory.index // SAMPLES_PER_PROMPT,
            )
        )
    reduction, domains = CASES[case]
    loss = batch_loss(samples, domains, reduction)
    parameters = list(student.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
        parameter.main_grad.copy_(gradient)
    return loss.item(), _models.pieces(learner, gradients=True), logprobs


class Known:
    """Rewards that are already available."""

    def __init__(self, rewards):
        self._rewards = rewards

    def collect(self):
        return self._rewards


def found(rank, case, model, parallel, schedule, logprobs):
    """Loss and gradients of the training step."""
    learner = make_learner(case, model, parallel, schedule)
    trajectories, rewards, proximal = make_batch()
    trajectories = [
        dataclasses.replace(t, logprobs=tuple(a + b for a, b in zip(t.logprobs, logprobs[t.index])))
        for t in trajectories
    ]
    batch = plan_step(learner, trajectories, Known(rewards))
    stored = {i: d + torch.tensor(logprobs[i], dtype=torch.float64) for i, d in proximal.items()}
    batch = dataclasses.replace(batch, proximal=stored)
    metrics = train_step(learner, [batch])
    assert len(batch.cache) == 0, "a cached hidden state was not used"
    return metrics, _models.pieces(learner, gradients=True), batch.cache.peak_bytes


@pytest.fixture(scope="module")
def pools():
    with RankPool(1) as one, RankPool(2) as two:
        yield {1: one, 2: two}


@functools.cache
def reference(pool, case, model):
    ((loss, pieces, logprobs),) = pool.run(expected, case, model)
    return loss, _models.assemble([pieces]), logprobs


def check(pools, ranks, case, model, parallel, schedule):
    loss, gradients, logprobs = reference(pools[1], case, model)
    results = pools[ranks].run(found, case, model, parallel, schedule, logprobs)
    # megatron-core rounds 1/tokens and routing probabilities to float32, and the latter depend on the shapes
    # of micro-batches.
    tolerance = 1e-6 if model == "MOE" else 1e-7
    for metrics, *_ in results:
        assert metrics["loss"] == pytest.approx(loss, rel=tolerance, abs=tolerance * 0.1)
    assembled = _models.assemble([pieces for _, pieces, _ in results])
    assert assembled.keys() == gradients.keys()
    scale = max(value.abs().max().item() for value in gradients.values())
    for key, value in gradients.items():
        torch.testing.assert_close(
            assembled[key], value, rtol=0, atol=tolerance * scale, msg=lambda m, key=key: f"{key}: {m}"
        )
    return [peak for *_, peak in results]


@pytest.mark.parametrize("case", CASES)
def test_batch_equals_the_equations(pools, case):
    (peak,) = check(pools, 1, case, "GQA", {}, dict(micro_batch_size=3))
    if all(kinds == {"sampled_token"} for kinds in map(kinds_of_domain, CASES[case][1].values())):
        # The cache held one float64 log-prob per token and teacher (`text` has two), not 32 channels.
        assert 0 < peak <= 8 * 2 * sum(len(t.response_ids) for t in make_batch()[0])


def kinds_of_domain(objective):
    return {objective["kind"], *objective.get("add", {})}


@pytest.mark.parametrize(
    "model, parallel, schedule", LAYOUTS, ids=lambda v: v if isinstance(v, str) else next(iter(v))
)
@pytest.mark.parametrize("case", ["mimo_v2_flash", "divergences", "sums", "clipped", "shaped"])
def test_layouts_compute_the_same(pools, case, model, parallel, schedule):
    check(pools, 2, case, model, parallel, schedule)
