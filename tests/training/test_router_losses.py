"""Auxiliary and z losses of the router: gradients of all weights against the formulas in float64.

`plain_model.py` has the formulas. `aux_loss` balances micro-batches, `seq_aux_loss` trajectories, in every
layout, padded or packed.
"""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: F401  (before forking)

from megatron_mopd.training.step import train_step
from megatron_mopd.training.step_batch import plan_step
from tests import _models
from tests._distributed import RankPool
from tests.training.plain_model import PlainTransformer, load_balancing_loss, z_loss

COEFFICIENT = 0.3
RECOMPUTE = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


def balanced(kind, transformer=_models.MOE):
    return transformer | dict(moe_router_load_balancing_type=kind, moe_aux_loss_coeff=COEFFICIENT)


Z_LOSS = _models.MOE | dict(moe_z_loss_coeff=COEFFICIENT)
BOTH = balanced("seq_aux_loss", _models.SHARED) | dict(moe_z_loss_coeff=COEFFICIENT)
TP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True)
CP2, PP2 = dict(context_parallel_size=2), dict(pipeline_model_parallel_size=2)
EP2 = dict(expert_model_parallel_size=2, expert_tensor_parallel_size=1)
PADDED, PACKED = dict(micro_batch_size=3), dict(max_tokens_per_micro_batch=40)

# (ranks, model, layout, batching)
CASES = {
    "aux": (1, balanced("aux_loss"), {}, PADDED),
    "aux, packed, TP2": (2, balanced("aux_loss"), TP2, PACKED),
    "aux, CP2": (2, balanced("aux_loss"), CP2, PADDED),
    "aux, recomputed, PP2": (2, balanced("aux_loss") | RECOMPUTE, PP2, PADDED),
    "seq": (1, balanced("seq_aux_loss"), {}, PADDED),
    "seq, packed, CP2": (2, balanced("seq_aux_loss"), CP2, PACKED),
    "seq, packed, recomputed, PP2": (2, balanced("seq_aux_loss") | RECOMPUTE, PP2, PACKED),
    "global": (1, balanced("global_aux_loss"), {}, PADDED),
    "global, packed, EP2": (2, balanced("global_aux_loss"), EP2, PACKED),
    "z, TP2": (2, Z_LOSS, TP2, PADDED),
    "z, packed, CP2": (2, Z_LOSS, CP2, PACKED),
    "sigmoid, TP2, EP2": (2, BOTH, TP2 | EP2, PACKED),
    "megatron-core's schedule": (2, BOTH, PP2, PACKED | dict(kind="megatron")),
}


@pytest.fixture(scope="module")
def pools():
    with RankPool(1, timeout=120) as one, RankPool(2, timeout=120) as two:
        yield {1: one, 2: two}


def one_step(rank, transformer, parallel, schedule):
    """Weights, gradients of an SFT step, and the micro-batches of every data-parallel rank."""
    learner = _models.make_learner(transformer, parallel, kind="sft", schedule=schedule)
    before = _models.pieces(learner, gradients=False)
    batch = plan_step(learner, _models.batch(12))
    train_step(learner, [batch])
    micro_batches = [[t.index for t in item.trajectories] for item in batch.student]
    gathered = [None] * learner.groups.dp_size
    torch.distributed.all_gather_object(gathered, micro_batches, group=learner.groups.dp)
    return before, _models.pieces(learner, gradients=True), gathered


def expected_loss(student, transformer, micro_batches):
    """Mean cross-entropy of response tokens, plus the mean of the routers' losses over all tokens."""
    batch = _models.batch(12)
    loss, count = torch.zeros((), dtype=torch.float64), 0
    for t in batch:
        rows = student.logits(t.token_ids.tolist())[len(t.prompt.token_ids) - 1 : -1].log_softmax(dim=1)
        loss = loss - rows.gather(1, torch.tensor(t.response_ids.tolist())[:, None]).sum()
        count += len(t.response_ids)
    loss = loss / count
    for router in zip(*student.router_logits):
        loss = loss + (transformer.get("moe_z_loss_coeff") or 0.0) * z_loss(router)
        kind = transformer["moe_router_load_balancing_type"] if transformer["moe_aux_loss_coeff"] else None
        if kind == "seq_aux_loss":
            loss = loss + COEFFICIENT * load_balancing_loss(router, [[i] for i in range(12)], transformer)
        elif kind == "aux_loss":
            units = [unit for rank in micro_batches for unit in rank]
            loss = loss + COEFFICIENT * load_balancing_loss(router, units, transformer)
        elif kind == "global_aux_loss":
            loss = loss + COEFFICIENT * running_loss(router, list(zip(*micro_batches)), transformer)
    return loss


def running_loss(router, rounds, transformer):
    """f_e over all ranks' micro-batches so far, P_e over the tokens of the current round."""
    total, loss = sum(map(len, router)), 0.0
    counts = torch.zeros(transformer["num_moe_experts"], dtype=torch.float64)
    for members in rounds:
        scores = torch.cat([router[i] for unit in members for i in unit]).softmax(1)
        experts = scores.topk(transformer["moe_router_topk"], dim=1).indices
        counts = counts + experts.flatten().bincount(minlength=len(counts))
        loss = loss + len(counts) * (counts / counts.sum() * scores.sum(0)).sum() / total
    return loss


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_the_formulas(pools, case):
    ranks, transformer, parallel, schedule = CASES[case]
    results = pools[ranks].run(one_step, transformer, parallel, schedule)
    weights = _models.assemble([before for before, *_ in results])
    weights = {key: value.requires_grad_() for key, value in weights.items()}
    student = PlainTransformer(weights, transformer)
    expected_loss(student, transformer, results[0][2]).backward()
    found = _models.assemble([gradients for _, gradients, _ in results])
    scale = max(weight.grad.abs().max().item() for weight in weights.values())
    for key, weight in weights.items():
        torch.testing.assert_close(
            found[key], weight.grad, rtol=0, atol=3e-6 * scale, msg=lambda m, key=key: f"{key}: {m}"
        )


def router_gradient(rank, prompt, transformer):
    """[layers, experts, h]: what the routers' losses add to the gradient of their weights, for the same 8
    sequences of 22 tokens, whose responses begin at `prompt`."""
    sequences = [[(7 * i + 3 * j) % _models.VOCAB for j in range(22)] for i in range(8)]
    trajectories = [_models.trajectory(i, s[:prompt], s[prompt:]) for i, s in enumerate(sequences)]
    found = []
    for model in (transformer, _models.MOE):
        learner = _models.make_learner(model, kind="sft", schedule=dict(micro_batch_size=4))
        train_step(learner, [plan_step(learner, trajectories)])
        routers = _models.unwrap(learner.chunks[0]).routers
        found.append(torch.stack([router.weight.main_grad.clone() for router in routers]))
    return found[0] - found[1]


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss", "z"])
def test_the_coefficient_does_not_depend_on_where_responses_begin(pools, kind):
    transformer = Z_LOSS if kind == "z" else balanced(kind)
    (short,), (long,) = (pools[1].run(router_gradient, prompt, transformer) for prompt in (20, 2))
    # These are differences of gradients that depend on float32 probabilities.
    torch.testing.assert_close(short, long, rtol=0, atol=1e-3 * short.abs().max().item())
    assert short.norm() > 1e-3
