"""A whole MOPD step, from token ids to new weights, against plain PyTorch in float64 (`plain_model.py`)."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: F401  (before forking)

from megatron_mopd.training.step import train_step
from megatron_mopd.training.step_batch import plan_step
from tests import _models
from tests._distributed import run_ranks
from tests._models import DENSE, GQA, MOE, OVER_HEADS, SHARED
from tests.training.plain_model import PlainTransformer, mopd_loss

LR, EPS = 1e-2, 1e-3
MIXTURES = {"arith": {"a": 1.0}, "text": {"b": 0.7, "c": 0.3}, "other": {"c": 1.0}}
TP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True)
TP4 = dict(tensor_model_parallel_size=4, sequence_parallel=False)

# (ranks, model, tied embeddings, layout, batching)
CASES = {
    "dense, tied": (1, DENSE, True, {}, dict(micro_batch_size=3)),
    "grouped queries": (1, GQA, False, {}, dict(max_tokens_per_micro_batch=40)),
    "norms over all heads": (1, OVER_HEADS, False, {}, dict(micro_batch_size=3)),
    "norms over all heads, TP2": (2, OVER_HEADS, False, TP2, dict(max_tokens_per_micro_batch=40)),
    "norms over all heads, TP4 of 2 groups": (4, OVER_HEADS, False, TP4, dict(micro_batch_size=2)),
    "experts": (1, MOE, False, {}, dict(micro_batch_size=4)),
    "shared experts": (1, SHARED, False, {}, dict(max_tokens_per_micro_batch=40)),
    "shared experts, TP2": (2, SHARED, False, TP2, dict(micro_batch_size=2)),
}


def one_step(rank, transformer, tied, parallel, schedule):
    """Weights of student and teachers, then the step's metrics, gradients and new weights."""
    model = dict(share_embeddings_and_output_weights=tied)
    teachers = {}
    for name, seed in _models.TEACHERS.items():
        teacher = _models.make_learner(transformer, parallel, kind="sft", model=model, seed=seed)
        teachers[name] = _models.pieces(teacher, gradients=False)
    optimizer = dict(lr=LR, adam_eps=EPS, clip_grad=0.0)
    learner = _models.make_learner(transformer, parallel, model=model, schedule=schedule, optimizer=optimizer)
    before = _models.pieces(learner, gradients=False)
    metrics = train_step(learner, [plan_step(learner, _models.batch(12))])
    gradients = _models.pieces(learner, gradients=True)
    return before, teachers, metrics, gradients, _models.pieces(learner, gradients=False)


@pytest.mark.parametrize("case", CASES)
def test_step_equals_the_formula(case):
    ranks, transformer, tied, parallel, schedule = CASES[case]
    results = run_ranks(ranks, one_step, transformer, tied, parallel, schedule, timeout=120)
    weights = _models.assemble([result[0] for result in results])
    weights = {key: value.requires_grad_() for key, value in weights.items()}
    student = PlainTransformer(weights, transformer, tied)
    teachers = {
        name: PlainTransformer(_models.assemble([result[1][name] for result in results]), transformer, tied)
        for name in _models.TEACHERS
    }
    samples = [(t.prompt.token_ids.tolist(), t.response_ids.tolist(), t.domain) for t in _models.batch(12)]
    loss, domains = mopd_loss(student, teachers, MIXTURES, samples)
    loss.backward()

    # megatron-core computes rotary angles and routing probabilities in float32 whatever the model's
    # precision, and rounds 1 / tokens to float32.
    tolerance = 3e-6
    scale = max(weight.grad.abs().max().item() for weight in weights.values())
    squares = sum(weight.grad.square().sum() for weight in weights.values())
    for result in results:
        metrics = result[2]
        assert metrics["loss"] == pytest.approx(loss.item(), rel=tolerance)
        assert metrics["tokens"] == sum(len(response) for _, response, _ in samples)
        assert metrics["grad_norm"] == pytest.approx(squares.sqrt().item(), rel=tolerance)
        for domain, value in domains.items():
            assert metrics[f"kl/{domain}"] == pytest.approx(value, rel=tolerance), domain
    gradients = _models.assemble([result[3] for result in results])
    assert gradients.keys() == weights.keys()
    for key, weight in weights.items():
        assert weight.grad.abs().max() > 1e-4 * scale, f"{key} has almost no gradient to compare"
        torch.testing.assert_close(
            gradients[key], weight.grad, rtol=0, atol=tolerance * scale, msg=lambda m, key=key: f"{key}: {m}"
        )
    # The first step of Adam (arXiv 1412.6980): both bias-corrected moments depend on this gradient alone.
    after = _models.assemble([result[4] for result in results])
    for key, weight in weights.items():
        expected = (weight - LR * weight.grad / (weight.grad.abs() + EPS)).detach()
        atol = LR * tolerance * scale / EPS
        torch.testing.assert_close(
            after[key], expected, rtol=0, atol=atol, msg=lambda m, key=key: f"{key}: {m}"
        )
