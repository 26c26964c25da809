"""Ranks whose last micro-batch has no response token, with gradient reduction overlapped with backward.

megatron-core reduces a bucket of gradients when the hooks of all its parameters have run in the last
micro-batch: a parameter that an empty loss does not reach crashes one rank and leaves the others waiting.
"""

from __future__ import annotations

import dataclasses
import functools
import random

import pytest
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: F401  (before forking)

from megatron_mopd.config.objectives import KINDS
from megatron_mopd.training import optimizer
from megatron_mopd.training.step import train_step
from megatron_mopd.training.step_batch import plan_step
from tests import _models
from tests._distributed import RankPool
from tests.losses.test_objectives import Known

COUNTS = (3, 1, 2)
"""Samples per step: an odd number, fewer than ranks, and then enough."""
KL, ONE = "full_vocab_kl", dict(micro_batch_size=1)
PP2 = dict(pipeline_model_parallel_size=2)
_DDP_CONFIG = optimizer.DistributedDataParallelConfig

# name -> (ranks, model, layout, objective, schedule, more sections)
CASES = {kind: (2, "DENSE", {}, kind, ONE, {}) for kind in KINDS} | {
    "top_k_kl": (2, "DENSE", {}, "top_k_kl", ONE, dict(objective=dict(top_k=5))),
    "packed": (2, "DENSE", {}, KL, dict(max_tokens_per_micro_batch=24), {}),
    "megatron": (2, "DENSE", {}, KL, ONE | dict(kind="megatron"), {}),
    "tied": (2, "DENSE", {}, KL, ONE, dict(model=dict(share_embeddings_and_output_weights=True))),
    "tp": (2, "DENSE", dict(tensor_model_parallel_size=2, sequence_parallel=True), KL, ONE, {}),
    "cp": (2, "GQA", dict(context_parallel_size=2), "sampled_token", ONE, {}),
    "experts": (2, "MOE", dict(expert_model_parallel_size=2), KL, ONE, {}),
    "shared experts": (2, "SHARED", {}, "sft", ONE, {}),
    "dp4": (4, "DENSE", {}, KL, ONE, {}),
    "pp": (4, "DENSE", PP2, KL, ONE, {}),
    "vpp": (4, "DENSE", PP2 | dict(virtual_pipeline_model_parallel_size=2), KL, ONE, {}),
    "distributed optimizer": (2, "DENSE", {}, KL, ONE, dict(params_dtype="float32")),
}


def make_batch(step):
    """A few trajectories with the sampler's log-probs, and their rewards."""
    rng = random.Random(step)
    trajectories = [
        dataclasses.replace(t, logprobs=tuple(-3 * rng.random() for _ in t.response_ids))
        for t in _models.batch(COUNTS[step], seed=step)
    ]
    return trajectories, Known({t.index: rng.random() for t in trajectories})


def steps(rank, model, layout, kind, schedule, sections, overlap):
    """Gradients after each step (`None` if they are sharded over ranks), and weights after the last."""
    # Adam amplifies the rounding of a float32 gradient by up to lr / adam_eps.
    settings = dict(adam_eps=1e-2) if sections.get("params_dtype") == "float32" else {}
    if overlap:  # buckets of a few parameters, which all ranks must reduce in the same order
        optimizer.DistributedDataParallelConfig = functools.partial(_DDP_CONFIG, bucket_size=500)
        sharded = sections.get("params_dtype") == "float32"
        settings |= dict(overlap_grad_reduce=True, use_distributed_optimizer=sharded)
    try:
        learner = _models.make_learner(
            getattr(_models, model),
            layout,
            kind=kind,
            schedule=schedule,
            optimizer=settings,
            rollout=dict(samples_per_prompt=1 if kind == "sft" else 2),
            **sections,
        )
    finally:
        optimizer.DistributedDataParallelConfig = _DDP_CONFIG
    gradients = []
    for step in range(len(COUNTS)):
        train_step(learner, [plan_step(learner, *make_batch(step))])
        whole = not learner.config.optimizer.use_distributed_optimizer
        gradients.append(_models.pieces(learner, gradients=True) if whole else None)
    return *gradients, _models.pieces(learner, gradients=False)


@pytest.fixture(scope="module")
def pools():
    with RankPool(1) as one, RankPool(2) as two, RankPool(4) as four:
        yield {1: one, 2: two, 4: four}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_rank(pools, case):
    ranks, model, layout, kind, schedule, sections = CASES[case]
    (expected,) = pools[1].run(steps, model, {}, kind, dict(micro_batch_size=4), sections, False)
    results = pools[ranks].run(steps, model, layout, kind, schedule, sections, True)
    # Sigmoid routers compute their scores in float32 whatever the model's precision.
    tolerance = 1e-5 if sections.get("params_dtype") or model == "SHARED" else 1e-9
    for reference, *found in zip(expected, *results):
        if found[0] is None:
            continue
        found = _models.assemble(found)
        for key, value in _models.assemble([reference]).items():
            atol = tolerance * max(value.abs().max().item(), 1e-6)
            torch.testing.assert_close(found[key], value, rtol=0, atol=atol, msg=lambda m, k=key: f"{k}: {m}")
