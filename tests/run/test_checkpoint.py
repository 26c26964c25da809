"""Checkpoints: they resume with the same losses in any other layout, are complete or absent, and are refused
for a different run.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: F401  (before forking)

from megatron_mopd.config import ConfigError
from megatron_mopd.model.background_save import SaveError
from megatron_mopd.model.checkpoint import (
    TRACKER,
    find_checkpoint,
    iteration_directory,
    latest_iteration,
    load_weights,
    read_model_config,
)
from megatron_mopd.model.gpt import unwrap
from megatron_mopd.run import checkpointing as checkpoint
from megatron_mopd.training.step import train_step
from megatron_mopd.training.step_batch import plan_step
from tests import _models
from tests._distributed import RankPool, run_ranks
from tests._models import GQA, MOE, SHARED

TP2_PP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=2)
EP2_DP2 = dict(expert_model_parallel_size=2)  # on four ranks: two expert shards, two replicas of each
EP2_PP2_VPP2 = dict(
    expert_model_parallel_size=2, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
)
CP2_EP2 = dict(context_parallel_size=2, expert_model_parallel_size=2)
SAVED, CONTINUED = 2, 2
"""Steps before and after the checkpoint."""


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
    # Warm-up and decay: a schedule that restarted would show in the losses.
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
        "student": "1",
        "prompts": ["1"],
        "teachers": {"a": {"weights": "1"}},
    }
    return learner


def steps(learner, first, count):
    losses = []
    for step in range(first, first + count):
        metrics = train_step(learner, [plan_step(learner, _models.batch(8, seed=step))])
        losses.append((metrics["loss"], metrics["grad_norm"], metrics["lr"]))
    return losses


def save_and_go_on(rank, transformer, parallel, run_dir, sections):
    learner = make(transformer, parallel, run_dir, **sections)
    steps(learner, 0, SAVED)
    checkpoint.save(learner, SAVED, Tokenizer())
    return steps(learner, SAVED, CONTINUED)


def resume_and_go_on(rank, transformer, parallel, run_dir, sections):
    # Different initial weights, so that everything must come from the checkpoint.
    learner = make(transformer, parallel, run_dir, seed=99, **sections)
    done = checkpoint.resume(learner)
    return done, steps(learner, done, CONTINUED)


@pytest.fixture(scope="module")
def pools():
    with RankPool(1, timeout=120) as one, RankPool(4, timeout=120) as four:
        yield {1: one, 4: four}


FLOAT64 = {"params_dtype": "float64", "optimizer": {"use_distributed_optimizer": False}}


@pytest.mark.parametrize(
    "transformer, saved_at, continued_at, sections, tolerance",
    [
        (MOE, (4, TP2_PP2), [(4, TP2_PP2), (4, EP2_DP2), (1, {}), (4, EP2_PP2_VPP2)], {}, 1e-5),
        (SHARED, (4, EP2_PP2_VPP2), [(4, CP2_EP2), (4, TP2_PP2)], {}, 1e-5),
        (GQA, (1, {}), [(4, TP2_PP2)], FLOAT64, 1e-9),
    ],
    ids=["moe", "shared", "float64"],
)
def test_any_layout_continues(pools, tmp_path, transformer, saved_at, continued_at, sections, tolerance):
    ranks, parallel = saved_at
    expected = pools[ranks].run(save_and_go_on, transformer, parallel, str(tmp_path), sections)[0]
    for ranks, other in continued_at:
        results = pools[ranks].run(resume_and_go_on, transformer, other, str(tmp_path), sections)
        for done, losses in results:
            assert done == SAVED
            if other == parallel:
                assert losses == expected, "the same layout does not resume bit for bit"
            for found, wanted in zip(losses, expected):
                assert found == pytest.approx(wanted, rel=max(tolerance, 1e-6 if sections else 0))


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
        ({}, {"prompts": ["2"]}, ["data.prompts[0]: prompts differ from"]),
        ({}, {"student": "2"}, ["student.load: weights differ from"]),
        ({"kind": "jsd"}, {}, ["objective.kind", "'full_vocab_kl'", "'jsd'"]),
        ({"routing": {"default": "c"}}, {}, ["routing", "{}", "{'default': 'c'}"]),
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


def test_the_same_run_resumes_unless_told_otherwise(pools, saved):
    assert pools[1].run(resume_with, str(saved), {}, {}) == [SAVED]
    assert pools[1].run(resume_with, str(saved), {"checkpoint": {"resume": False}}, {}) == [0]
    assert pools[1].run(resume_with, str(saved / "elsewhere"), {}, {}) == [0]


def test_weights_alone_do_not_resume_but_a_finished_run_is_finished(pools, tmp_path):
    pools[1].run(save_only, str(tmp_path), False)
    (message,) = pools[1].run(resume_with, str(tmp_path), {}, {})
    for part in ("no optimizer state", "checkpoint.save_optimizer", "student.load"):
        assert part in message
    finished = {"schedule": dict(micro_batch_size=2, train_iters=SAVED)}
    assert pools[1].run(resume_with, str(tmp_path), finished, {}) == [SAVED]


class Crash(BaseException):
    """Simulates the end of the process; no code may catch it."""


def crash_everywhere(rank, run_dir):
    """Abort a save before each of its file operations in turn, and load the newest checkpoint afterwards.

    Returns (newest iteration, whether its weights and tokenizer are those that were saved) after every crash,
    the newest iteration after a complete save, and the files then.
    """
    learner = make(GQA | dict(num_layers=1), {}, run_dir, checkpoint=dict(save_optimizer=False))
    directory = checkpoint.checkpoints_directory(run_dir)
    checkpoint.save(learner, 1, Tokenizer())
    chunk = unwrap(learner.chunks[0])
    old = {name: value.detach().clone() for name, value in chunk.named_parameters()}
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.add_(1.0)
    remaining = None

    ours, operations = os.getpid(), ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")

    def watch(event, arguments):
        nonlocal remaining
        if remaining is None or event not in operations or os.getpid() != ours:
            return
        path = str(arguments[0])
        if not path.startswith(str(directory)):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return  # read, not written
        if remaining == 0:
            remaining = None
            raise Crash(event)
        remaining -= 1

    sys.addaudithook(watch)
    seen, operation = [], 0
    while True:
        remaining = operation
        try:
            checkpoint.save(learner, 2, Tokenizer())
        except (Crash, SaveError):  # in the training thread or in the background thread
            newest = latest_iteration(directory)
            expected = {1: old, 2: {name: value + 1.0 for name, value in old.items()}}[newest]
            path = iteration_directory(directory, newest)
            load_weights([chunk], path, learner.groups, "load")
            norms = [name for name in expected if "norm" in name]  # no padding rows
            found = dict(chunk.named_parameters())
            intact = all(torch.equal(found[name], expected[name]) for name in norms)
            with torch.no_grad():
                for name, value in chunk.named_parameters():
                    value.copy_(old[name] + 1.0)
            seen.append((newest, intact and (path / "tokenizer" / "tokenizer.txt").exists()))
            operation += 1
            continue
        remaining = None
        break
    return seen, latest_iteration(directory), sorted(os.listdir(directory))


def test_a_crash_at_any_moment_leaves_the_previous_checkpoint(tmp_path):
    ((seen, newest, files),) = run_ranks(1, crash_everywhere, str(tmp_path), timeout=180)
    assert len(seen) > 7, "the crashes did not happen"
    assert all(intact for _, intact in seen)
    assert {iteration for iteration, _ in seen} == {1}, "the tracker moves with the last operation"
    assert newest == 2
    assert files == ["iter_0000001", "iter_0000002", TRACKER]


def test_the_tracker_is_not_trusted_blindly(tmp_path):
    """If the tracker is damaged, foreign or names a missing directory, the newest complete one counts."""
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
