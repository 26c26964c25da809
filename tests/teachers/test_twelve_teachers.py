"""Twelve teachers of six architectures, weighted routing: loss and gradients equal the naive computation.

Two of them are Hugging Face models of different families from the student's (DeepSeek-V3: latent attention,
groups of experts; GLM-4.5: half of each head rotated, dense layers first): one converted, one read directly.

The oracle runs every teacher on every sample, one at a time, in one process and in float64, and lets autograd
differentiate sum_k w_k KL(p || q_k) from log-softmaxes; teachers that a domain does not have get weight 0.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: F401  (before forking)

from megatron_mopd.model.build import build_model
from megatron_mopd.model.checkpoint import find_checkpoint, load_weights, read_architecture
from megatron_mopd.model.convert import write_megatron
from megatron_mopd.model.gpt import unwrap
from megatron_mopd.model.hugging_face import HuggingFaceCheckpoint
from megatron_mopd.teachers.bank import TeacherSource
from megatron_mopd.training.step import train_step
from megatron_mopd.training.step_batch import plan_step
from tests import _models
from tests._distributed import RankPool
from tests._models import DENSE, MOE, SHARED
from tests.model import _families

DEEP_NARROW = DENSE | dict(num_layers=6, hidden_size=16, num_attention_heads=2, num_query_groups=2)
WIDE_MOE = MOE | dict(num_layers=2, hidden_size=48, num_attention_heads=6, num_query_groups=2)
TIED = DENSE | dict(num_layers=2, qk_layernorm=True)

ARCHITECTURES = {
    "narrow": DEEP_NARROW,
    "moe": WIDE_MOE,
    "tied": TIED,
    "shared": SHARED | dict(num_layers=2, moe_layer_freq=[0, 1]),
}
LOADED = {"glm": "glm4-moe", "deepseek": "deepseek-v3"}
"""Teacher -> its Hugging Face model."""
NAMES = [f"{architecture}{number}" for architecture in ARCHITECTURES for number in range(3)]
NAMES = [name for name in NAMES if name not in ("narrow1", "shared2")] + list(LOADED)
ROUTING = {
    "arith": {"narrow0": 0.5, "moe0": 1.5},
    "te*": {"tied0": 0.7, "shared0": 0.2, "moe1": 0.1},
    "default": "shared1",
    "d0": "glm",
    "d1": {"narrow2": {0: 1.0, 10: 0.0}, "moe2": {0: 0.0, 10: 1.0}},
    "d2": "tied1",
    "d3": {"tied2": 1.0, "deepseek": 0.3},
}
DOMAINS = ["arith", "text", "other", "d0", "d1", "d2", "d3"]
ITERATION = 4
WEIGHTS_OF_D1 = {"narrow2": 0.6, "moe2": 0.4}

TP2_PP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=2)
EP2_PP2 = dict(expert_model_parallel_size=2, pipeline_model_parallel_size=2)


def sources(loaded):
    """`loaded`: teacher -> directory of its checkpoint; the others are initialized from seeds."""
    result = []
    for number, name in enumerate(NAMES):
        if name in loaded:
            model = read_architecture(find_checkpoint(loaded[name], name), name)
            model = dataclasses.replace(model, load=loaded[name], make_vocab_size_divisible_by=8)
            result.append(TeacherSource(name, model, 0))
            continue
        architecture = name[:-1]
        model = _models.model_config(
            ARCHITECTURES[architecture], share_embeddings_and_output_weights=architecture == "tied"
        )
        result.append(TeacherSource(name, model, 100 + number))
    return result


def convert(rank, hf, output):
    write_megatron(HuggingFaceCheckpoint.open(hf, "--hf"), Path(output))


def learner_for(loaded, parallel, **sections):
    learner = _models.make_learner(MOE, parallel, sources=sources(loaded), routing=ROUTING, **sections)
    learner.domains = sorted(DOMAINS)
    return learner


def trajectories():
    batch = _models.batch(14, seed=3)
    return [
        _models.trajectory(t.index, list(t.prompt.token_ids), list(t.response_ids), DOMAINS[t.index % 7])
        for t in batch
    ]


def weight_of(domain, name):
    entry = {"text": ROUTING["te*"], "other": {"shared1": 1.0}, "d1": WEIGHTS_OF_D1}.get(domain)
    entry = ROUTING[domain] if entry is None else entry
    return {entry: 1.0}.get(name, 0.0) if isinstance(entry, str) else entry.get(name, 0.0)


def log_probs(model, head, trajectory):
    ids = torch.tensor([trajectory.token_ids.tolist()])
    hidden = model(ids, torch.arange(ids.size(1))[None], None)[:, 0]
    first = len(trajectory.prompt.token_ids) - 1
    return (hidden[first:-1] @ head.t()[:, : _models.VOCAB]).log_softmax(-1)


def naive(rank, loaded):
    """(loss, gradients) of the mean over response tokens by the naive computation."""
    torch.set_grad_enabled(True)
    learner = learner_for(loaded, {})
    build = partial(build_model, groups=learner.groups, params_dtype="float64", max_sequence_length=64)
    student = unwrap(learner.chunks[0]).train()
    batch = trajectories()
    own = {t.index: log_probs(student, student.head_weight(), t) for t in batch}
    loss = torch.zeros((), dtype=torch.float64)
    for source in sources(loaded):
        (teacher,) = build(source.model, seed=None if source.model.load else source.seed, frozen=True)
        if source.model.load:
            load_weights([teacher], find_checkpoint(source.model.load, "test"), learner.groups, "test")
        for t in batch:
            with torch.no_grad():
                other = log_probs(teacher, teacher.head_weight(), t)
            p = own[t.index]
            loss = loss + weight_of(t.domain, source.name) * (p.exp() * (p - other)).sum()
    loss = loss / sum(len(t.response_ids) for t in batch)
    parameters = list(student.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
        parameter.main_grad.copy_(gradient)
    return loss.item(), _models.pieces(learner, gradients=True)


def step(rank, loaded, parallel, schedule, storage):
    learner = learner_for(loaded, parallel, schedule=schedule, teacher_storage=storage)
    batch = plan_step(learner, trajectories(), iteration=ITERATION)
    metrics = train_step(learner, [batch])
    assert len(batch.cache) == 0
    return metrics, _models.pieces(learner, gradients=True), batch.state_bytes, batch.cache.peak_bytes


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Directories of the loaded teachers: a Hugging Face model, and a converted one."""
    directory = tmp_path_factory.mktemp("loaded")
    for name, case in LOADED.items():
        _families.make(case, directory / name, torch.float64)
    with RankPool(1, timeout=120) as pool:
        pool.run(convert, directory / "deepseek", directory / "converted")
    return {"glm": str(directory / "glm"), "deepseek": str(directory / "converted")}


@pytest.fixture(scope="module")
def oracle(loaded):
    with RankPool(1, timeout=120) as pool:
        ((loss, pieces),) = pool.run(naive, loaded)
    return loss, _models.assemble([pieces])


@pytest.fixture(scope="module")
def pool():
    with RankPool(4, timeout=180) as ranks:
        yield ranks


@pytest.mark.parametrize(
    "parallel, schedule, storage",
    [
        (TP2_PP2, dict(micro_batch_size=2), {}),
        (EP2_PP2, dict(max_tokens_per_micro_batch=40), dict(mode="host_sharded")),
        (EP2_PP2 | dict(virtual_pipeline_model_parallel_size=2), dict(micro_batch_size=3), {}),
        (dict(context_parallel_size=2), dict(micro_batch_size=2), dict(mode="host_sharded")),
    ],
    ids=["tp2-pp2", "ep2-pp2", "ep2-pp2-vpp2", "cp2"],
)
def test_twelve_teachers_equal_the_naive_computation(pool, loaded, oracle, parallel, schedule, storage):
    loss, gradients = oracle
    results = pool.run(step, loaded, parallel, schedule, storage)
    for metrics, *_ in results:
        assert metrics["loss"] == pytest.approx(loss, rel=1e-6)
    found = _models.assemble([pieces for _, pieces, *_ in results])
    assert found.keys() == gradients.keys()
    # megatron-core computes sigmoid routing scores (of the `shared` teachers) in float32.
    scale = max(value.abs().max().item() for value in gradients.values())
    for key, value in gradients.items():
        torch.testing.assert_close(
            found[key], value, rtol=0, atol=1e-6 * scale, msg=lambda m, key=key: f"{key}: {m}"
        )
    metrics = results[0][0]
    alone = {"shared1", "glm", "tied1"}
    mixtures = {"moe0+narrow0", "moe1+shared0+tied0", "moe2+narrow2", "deepseek+tied2"}
    assert {key.split("/")[1] for key in metrics if key.endswith("/kl")} == alone | mixtures
    tokens = sum(value for key, value in metrics.items() if key.startswith("teacher/") and "/tokens" in key)
    assert tokens == metrics["tokens"]
    assert {key.split("/")[1] for key in metrics if key.endswith("/score_seconds")} == set(NAMES)
