"""Checkpoints: refused when the run is another one, found when the tracker is not right."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: F401  (before forking)

from megatron_mopd.config import ConfigError
from megatron_mopd.model.checkpoint import (
    TRACKER,
    find_checkpoint,
    iteration_directory,
    latest_iteration,
    read_model_config,
)
from megatron_mopd.training import checkpoint
from megatron_mopd.training.step import plan_step, train_step
from tests import _models
from tests._distributed import RankPool
from tests._models import MOE

SAVED = 2


class Tokenizer:
    """The part of a tokenizer that a checkpoint needs."""

    def __init__(self, text: str = "a tokenizer"):
        self.text = text

    def fingerprint(self):
        return self.text

    def save(self, directory):
        directory.mkdir()
        (directory / "tokenizer.txt").write_text(self.text)


def make(transformer, parallel, run_dir, **sections):
    # Warm-up and decay: a schedule that started anew would show in the losses.
    optimizer = dict(lr_warmup_iters=3, lr_decay_style="linear", use_distributed_optimizer=True)
    sections = {
        "params_dtype": "float32",
        "schedule": dict(micro_batch_size=2, train_iters=8),
        "run_dir": run_dir,
    } | sections
    optimizer |= sections.pop("optimizer", {})
    learner = _models.make_learner(transformer, parallel, optimizer=optimizer, **sections)
    learner.manifest |= {
        "tokenizer": "a tokenizer",
        "objective": "kl",
        "routing": "r",
        "teachers": {"a": {"weights": "1"}},
    }
    return learner


def steps(learner, first, count):
    losses = []
    for step in range(first, first + count):
        metrics = train_step(learner, [plan_step(learner, _models.batch(8, seed=step))])
        losses.append((metrics["loss"], metrics["grad_norm"], metrics["lr"]))
    return losses


@pytest.fixture(scope="module")
def pools():
    with RankPool(1, timeout=120) as one:
        yield {1: one}


def resume_with(rank, run_dir, changes, manifest):
    learner = make(changes.pop("transformer", MOE), {}, run_dir, **changes)
    learner.manifest |= manifest
    before = [p.detach().clone() for p in learner.chunks[0].parameters()]
    try:
        done = checkpoint.resume(learner)
    except ConfigError as error:
        assert all(map(torch.equal, before, learner.chunks[0].parameters())), "refused, yet loaded"
        return str(error)
    return done


def save_only(rank, run_dir, with_optimizer, text="a tokenizer"):
    learner = make(MOE, {}, run_dir, checkpoint=dict(save_optimizer=with_optimizer))
    steps(learner, 0, 1)  # before its first step, Adam has nothing to save
    checkpoint.save(learner, SAVED, Tokenizer(text))
    return read_model_config(find_checkpoint(checkpoint.checkpoints_directory(run_dir), "load"), "load")


@pytest.mark.parametrize(
    "changes, manifest, parts",
    [
        ({}, {"tokenizer": "another"}, ["tokenizer"]),
        ({}, {"teachers": {"a": {"weights": "2"}}}, ["teachers: ", "a (weights)"]),
        ({}, {"objective": "jsd"}, ["objective", "'kl'", "'jsd'"]),
        ({}, {"routing": "s"}, ["routing"]),
        ({"transformer": MOE | dict(moe_router_topk=3)}, {}, ["architecture", "moe_router_topk"]),
        ({"transformer": MOE | dict(num_layers=2)}, {}, ["architecture", "num_layers"]),
    ],
)
def test_another_run_is_refused(pools, saved, changes, manifest, parts):
    (message,) = pools[1].run(resume_with, str(saved), changes, manifest)
    assert isinstance(message, str), "resumed"
    for part in [str(saved), *parts]:
        assert part in message
    assert "\n" not in message


@pytest.fixture(scope="module")
def saved(pools, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    ((model, fingerprint),) = pools[1].run(save_only, str(directory), True)
    assert model.transformer == MOE and model.vocab_size == _models.VOCAB and fingerprint == "a tokenizer"
    return directory


def test_the_tracker_is_not_trusted_blindly(tmp_path):
    """Damaged, foreign or ahead of its directory: the newest complete directory counts."""
    assert latest_iteration(tmp_path) is None
    for iteration in (3, 10):
        path = iteration_directory(tmp_path, iteration)
        path.mkdir()
        (path / "model.json").write_text("{}")
    iteration_directory(tmp_path, 12).mkdir()  # not complete
    for text, expected in (("3", 3), ("release", 10), ("12", 10), ("11", 10), ("", 10)):
        (tmp_path / TRACKER).write_text(text)
        assert latest_iteration(tmp_path) == expected, text
    with pytest.raises(ConfigError, match="student.load: checkpoint directory not found"):
        find_checkpoint(tmp_path / "nothing", "student.load")
    (iteration_directory(tmp_path, 10) / "model.json").write_text('{"model": 3')
    with pytest.raises(ConfigError, match=r"student.load: .*model.json is not readable"):
        read_model_config(find_checkpoint(tmp_path, "student.load"), "student.load")
