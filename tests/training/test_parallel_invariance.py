"""One optimizer step gives the same loss, gradients and weights in every parallel layout and batching.

The reference is our own single-process run with micro-batches of four, which `test_oracle.py` compares with
formulas.
"""

from __future__ import annotations

import functools
from collections import deque

import pytest
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: F401  (import before forking)

from megatron_mopd.training.step import train_step
from megatron_mopd.training.step_batch import plan_step
from tests import _models
from tests._distributed import run_ranks

DENSE, GQA = _models.DENSE, _models.GQA
# With the routers' losses, whose oracle is in `test_router_losses.py`.
BALANCE = dict(moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=0.05, moe_z_loss_coeff=0.01)
MOE, SHARED = _models.MOE | BALANCE, _models.SHARED | BALANCE
MODELS = dict(DENSE=DENSE, GQA=GQA, MOE=MOE, SHARED=SHARED)


def tp(n):
    return dict(tensor_model_parallel_size=n, sequence_parallel=True)


def pp(n, vpp=None):
    return dict(pipeline_model_parallel_size=n, virtual_pipeline_model_parallel_size=vpp)


def ep(n, etp=1):
    return dict(expert_model_parallel_size=n, expert_tensor_parallel_size=etp)


def cp(n):
    return dict(context_parallel_size=n)


PADDED, PACKED = dict(micro_batch_size=2), dict(max_tokens_per_micro_batch=40)

# (ranks, model, layout, batching)
GRID = [
    (1, DENSE, {}, dict(micro_batch_size=1)),
    (1, MOE, {}, dict(micro_batch_size=16)),
    (1, SHARED, {}, PACKED),
    (2, DENSE, dict(tensor_model_parallel_size=2), PADDED),
    (2, GQA, tp(2), PACKED),
    (2, GQA, pp(2), PACKED),
    (2, GQA, pp(2, 2), PADDED),
    (2, GQA, cp(2), PADDED),
    (2, DENSE, {}, PACKED),
    (2, MOE, ep(2), PACKED),
    (2, MOE, ep(1, 2), PACKED),
    (2, SHARED, tp(2) | ep(1), PADDED),
    (2, SHARED, pp(2, 2), PACKED),
    (2, SHARED, tp(2), PADDED),
    (4, DENSE, tp(4), PADDED),
    (4, GQA, pp(4), PACKED),
    (4, MOE, ep(4), PADDED),
    (4, MOE, tp(2) | pp(2), PACKED),
    (4, MOE, tp(2) | ep(2, 2), PADDED),
    (4, SHARED, cp(2) | ep(2), PACKED),
    (4, SHARED, ep(2) | pp(2), PADDED),
    (8, MOE, tp(2) | pp(2, 2) | cp(2) | ep(2), PACKED),
    (8, SHARED, tp(2) | pp(2, 2) | ep(2), PADDED),
    (8, GQA, tp(2) | pp(2) | cp(2), PADDED),
]


def _name(value):
    if isinstance(value, dict):
        short = {
            "tensor": "tp",
            "pipeline": "pp",
            "virtual": "vpp",
            "expert": "ep",
            "context": "cp",
            "micro": "mbs",
            "teacher": "block",
        }
        if "num_layers" in value:
            return next(name for name, model in MODELS.items() if model is value)
        parts = [
            f"{short.get(k.split('_')[0], k.split('_')[0])}{v}"
            for k, v in value.items()
            if v not in (None, True)
        ]
        return "-".join(parts) or "dp"
    return f"{value}ranks"


def three_steps(rank, transformer, parallel, schedule, sections):
    """Loss and gradients of the first step, weights after the third."""
    learner = _models.make_learner(transformer, parallel, schedule=schedule, **sections)
    domains, gradients = sections.get("domains", _models.DOMAINS), None
    batches = deque(plan_step(learner, _models.batch(16, step, domains=domains)) for step in range(3))
    for step in range(3):
        metrics = train_step(learner, batches)
        assert len(batches.popleft().cache) == 0, "a cached hidden state was not used"
        if step == 0:
            first = metrics
            if not learner.config.optimizer.use_distributed_optimizer:
                gradients = _models.pieces(learner, gradients=True)
    return first, gradients, _models.pieces(learner, gradients=False)


@functools.cache
def reference(model_name, sections):
    transformer = MODELS[model_name]
    ((first, gradients, weights),) = run_ranks(
        1, three_steps, transformer, {}, dict(micro_batch_size=4), _sections(sections), timeout=120
    )
    return first, _models.assemble([gradients]), _models.assemble([weights])


def _sections(items):
    """Sections of a configuration from nested pairs, which are hashable."""

    def section(value):
        is_pairs = isinstance(value, tuple) and all(isinstance(item, tuple) for item in value)
        return {name: section(item) for name, item in value} if is_pairs else value

    return section(tuple(items))


def check(ranks, transformer, parallel, schedule, sections=(), tolerance=None):
    model_name = _name(transformer)
    first, gradients, weights = reference(model_name, sections)
    results = run_ranks(ranks, three_steps, transformer, parallel, schedule, _sections(sections), timeout=120)
    if tolerance is None:
        # megatron-core computes sigmoid routing scores in float32 whatever the model's precision.
        tolerance = 1e-6 if transformer is SHARED else 1e-9
    for metrics, _, _ in results:
        names = {"loss", "tokens", "grad_norm"} | {key for key in first if key.startswith("kl/")}
        assert names <= metrics.keys()
        for key in names:
            assert metrics[key] == pytest.approx(first[key], rel=max(tolerance, 1e-7)), key
    for which, expected in ((1, gradients), (2, weights)):
        if results[0][which] is None:
            continue
        found = _models.assemble([result[which] for result in results])
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            scale = value.abs().max().item()
            torch.testing.assert_close(
                found[key], value, rtol=0, atol=tolerance * scale, msg=lambda m, key=key: f"{key}: {m}"
            )


@pytest.mark.parametrize("ranks, transformer, parallel, schedule", GRID, ids=_name)
def test_loss_gradients_and_weights_do_not_depend_on_the_layout(ranks, transformer, parallel, schedule):
    check(ranks, transformer, parallel, schedule)


@pytest.mark.parametrize(
    "ranks, transformer, parallel",
    [(2, MOE, ep(2)), (4, SHARED, tp(2) | ep(2)), (4, GQA, pp(2, 2))],
    ids=_name,
)
def test_float32(ranks, transformer, parallel):
    check(ranks, transformer, parallel, PADDED, (("params_dtype", "float32"),), tolerance=1e-5)


@pytest.mark.parametrize("ranks, transformer, parallel", [(2, MOE, {}), (4, MOE, ep(2) | pp(2))], ids=_name)
def test_distributed_optimizer(ranks, transformer, parallel):
    """Weights after three steps with sharded optimizer state and overlapped gradient reduction."""
    plain, _, weights = reference("MOE", (("params_dtype", "float32"),))
    sections = {
        "params_dtype": "float32",
        "optimizer": dict(use_distributed_optimizer=True, overlap_grad_reduce=True),
    }
    results = run_ranks(ranks, three_steps, transformer, parallel, PADDED, sections, timeout=120)
    found = _models.assemble([result[2] for result in results])
    for key, value in weights.items():
        atol = 1e-5 * value.abs().max().item()
        torch.testing.assert_close(found[key], value, rtol=0, atol=atol, msg=lambda m, key=key: f"{key}: {m}")
    assert results[0][0]["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)


# Five domains: one teacher, three weighted ones, one that two domains share, and none (`sft`).
FIVE = (
    ("domains", ("d0", "d1", "d2", "d3", "d4")),
    (
        "routing",
        (("d0", "a"), ("d1", (("a", 0.2), ("b", 0.5), ("c", 0.3))), ("d2", "c"), ("d3", "c"), ("d4", "b")),
    ),
    ("objective", (("per_domain", (("d4", (("kind", "sft"),)),)),)),
)


@pytest.mark.parametrize(
    "ranks, transformer, parallel, schedule",
    [
        (4, DENSE, {}, PACKED),
        (4, DENSE, dict(teacher_block_size=2), PACKED),
        (4, DENSE, dict(teacher_block_size=4), PADDED),
        (4, MOE, ep(2), PADDED),
        (4, SHARED, ep(2, 1) | dict(teacher_block_size=4), PACKED),
        (8, GQA, pp(2), PACKED),
        (8, MOE, pp(2, 2) | ep(2), PACKED),
    ],
    ids=_name,
)
def test_blocks_of_data_parallel_ranks(ranks, transformer, parallel, schedule):
    """Four data-parallel ranks in blocks of one, two and four, which see different teachers."""
    check(ranks, transformer, parallel, schedule, FIVE)


@pytest.mark.parametrize("reduction", ["sequence_mean", "domain_mean"])
def test_named_reductions(reduction):
    """Per-sequence and per-domain means are global too: micro-batches and ranks do not reweight them."""
    sections = (("objective", (("reduction", reduction),)),)
    check(2, GQA, {}, PACKED, sections)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_tied_and_untied_over_the_pipeline(tied):
    sections = (("model", (("share_embeddings_and_output_weights", tied),)),)
    check(2, DENSE, pp(2), PADDED, sections)
    check(2, DENSE, tp(2), PADDED, sections)
