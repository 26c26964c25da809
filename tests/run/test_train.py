"""Whole runs through the command line on two ranks: a base, two experts, MOPD of them and `self`. Also the
files of a run, an interrupted run that resumes, and a teacher that is the student.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct

import pytest
import torch
from omegaconf import OmegaConf
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_mopd.config import load_config
from megatron_mopd.data.tokenizer import load_tokenizer
from megatron_mopd.model.checkpoint import TRACKER, find_checkpoint
from megatron_mopd.observe.journal import read_journal
from megatron_mopd.observe.metrics import read_metrics
from megatron_mopd.run.best_checkpoint import best_iteration
from tests import _runs

EP2 = {"expert_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    _runs.write_inputs(directory)
    return directory


def run(directory, name, ranks=2, **sections):
    """Run in `directory/name` and return the outcome."""
    values = _runs.values(directory, run_dir=str(directory / name), **sections)
    arguments = _runs.write_config(directory / f"{name}.yaml", values)
    outcome = _runs.run_main(arguments, ranks)
    assert outcome.statuses == [0] * ranks, outcome.printed
    assert outcome.stdout[1:] == [""] * (ranks - 1), "a rank other than 0 prints"
    return outcome


@pytest.fixture(scope="module")
def base(directory):
    run(directory, "base", parallel=EP2, schedule={"train_iters": 4}, optimizer={"lr": 1e-2})
    return str(directory / "base" / "checkpoints")


@pytest.fixture(scope="module")
def experts(directory, base):
    """One expert per domain, each trained in a different layout."""
    lines = (directory / "prompts.jsonl").read_text().splitlines()
    paths = {}
    for domain, parallel in (("add", TP2), ("copy", PP2)):
        prompts = directory / f"{domain}.jsonl"
        prompts.write_text("\n".join(line for line in lines if json.loads(line)["domain"] == domain))
        run(
            directory,
            domain,
            parallel=parallel,
            student={"load": base},
            data={"prompts": [{"path": str(prompts)}]},
            checkpoint={"save_optimizer": False},
            optimizer={"lr": 1e-2},
        )
        paths[domain] = str(directory / domain / "checkpoints")
    return paths


def mopd(base, experts, **sections):
    return {
        "parallel": EP2,
        "student": {"load": base},
        "teachers": [{"name": n, "load": p} for n, p in experts.items()] + [{"name": "self"}],
        "routing": {"add": {"add": 0.7, "self": 0.3}, "default": "copy"},
        "objective": {"kind": "full_vocab_kl"},
        "rollout": {"max_new_tokens": 6, "samples_per_prompt": 2},
        "schedule": {"train_iters": 4, "global_batch_size": 8, "micro_batch_size": 2},
        "checkpoint": {"save_interval": 2},
    } | sections


@pytest.fixture(scope="module")
def distilled(directory, base, experts):
    evaluated = {
        "eval": [{"path": str(directory / "held_out.jsonl")}],
    }
    (directory / "held_out.jsonl").write_text('{"prompt": "9 + 9 =", "answer": "18", "domain": "add"}\n')
    log = {"tensorboard": True, "report": True, "samples_per_domain": 8}
    return run(
        directory, "mopd", **mopd(base, experts, data=evaluated, log=log, evaluation={"pass_at": [1, 2]})
    )


def test_run_directory(directory, distilled):
    """A run leaves the documented files and no incomplete ones."""
    path = directory / "mopd"
    found = {entry.name for entry in path.iterdir()}
    (events,) = [name for name in found if name.startswith("events.")]
    assert found - {"alarms.jsonl"} == {
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "samples.jsonl",
        "checkpoints",
        "report.png",
        events,
    }
    checkpoints = {entry.name for entry in (path / "checkpoints").iterdir()}
    assert checkpoints == {"iter_0000002", "iter_0000004", TRACKER, "best.json"}
    assert best_iteration(path / "checkpoints") == 4, "not the only one that was evaluated"
    assert (path / "checkpoints" / TRACKER).read_text() == "4"
    newest = find_checkpoint(path / "checkpoints", "load")
    tokenizer = load_tokenizer(directory / "tokenizer.model")
    assert load_tokenizer(newest / "tokenizer").fingerprint() == tokenizer.fingerprint()

    resolved = load_config(path / "config.yaml")
    given = load_config(directory / "mopd.yaml")
    assert resolved.data.date is not None, "a resumed run would render different prompts"
    given = dataclasses.replace(given, data=dataclasses.replace(given.data, date=resolved.data.date))
    assert resolved == given, "config.yaml is not what was run"
    assert "lr_decay_style" in OmegaConf.load(path / "config.yaml").optimizer, "defaults are not written"

    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert {"loss", "tokens", "grad_norm", "lr", "response_length", "tokens_per_second"} <= line.keys()
        assert line["kl/add"] > 1e-4 and line["kl/copy"] > 1e-4, "the experts equal the student"
    assert lines[-1]["pass_at_2/add"] >= lines[-1]["pass_at_1/add"] >= 0
    assert "accuracy/add" in lines[-1] and "accuracy" not in lines[0]
    picture = (path / "report.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and min(struct.unpack(">II", picture[16:24])) > 300
    assert (path / events).stat().st_size > 500


def test_samples_are_what_the_metrics_are_means_of(directory, distilled):
    """The samples hold the KL of every token of a step, here from two data-parallel ranks."""
    lines = read_journal(directory / "mopd" / "samples.jsonl")
    assert [line["iteration"] for line in lines] == [1] * 8 + [4] * 8
    metrics = {line["iteration"]: line for line in read_metrics(directory / "mopd")}
    for line in lines:
        assert len(line["tokens"]) == len(line["kl"]) == len(line["logprobs"]) >= 1
        assert line["teachers"] == {"add": {"add": 0.7, "self": 0.3}, "copy": {"copy": 1.0}}[line["domain"]]
    for iteration in (1, 4):
        for domain in ("add", "copy"):
            own = [t for t in lines if (t["iteration"], t["domain"]) == (iteration, domain)]
            kl = [value for line in own for value in line["kl"]]
            assert sum(kl) / len(kl) == pytest.approx(metrics[iteration][f"kl/{domain}"], abs=2e-6)
    facts = json.loads((directory / "mopd" / "run.json").read_text())
    assert facts["ranks"] == 2 and set(facts["manifest"]["teachers"]) == {"add", "copy", "self"}
    assert {"torch", "megatron-core", "python"} <= facts["versions"].keys()


def test_terminal(distilled):
    """One line per step, and no message that Apex is missing or that an expert equals the student."""
    lines = distilled.stdout[0].splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step")] == ["1/4", "2/4", "3/4", "4/4"]
    assert not any("equals the student" in line for line in lines)
    assert "not installed" not in distilled.printed


def test_interrupted_run_continues_with_the_same_metrics(directory, base, experts, distilled):
    """As if the machine had failed in the fourth iteration: everything after the second runs again."""
    path = directory / "resumed"
    shutil.copytree(directory / "mopd", path)
    shutil.rmtree(path / "checkpoints" / "iter_0000004")
    (path / "checkpoints" / TRACKER).write_text("2")
    (path / "checkpoints" / ".iter_0000004.incomplete").mkdir()
    data = {"eval": [{"path": str(directory / "held_out.jsonl")}]}
    sections = mopd(base, experts, data=data, evaluation={"pass_at": [1, 2]})
    outcome = run(directory, "resumed", **sections)
    assert "step 3/4" in outcome.stdout[0] and "step 2/4" not in outcome.stdout[0]
    assert _runs.comparable(path) == _runs.comparable(directory / "mopd")
    assert not (path / "checkpoints" / ".iter_0000004.incomplete").exists()
    there, again = (run_dir / "checkpoints" / "iter_0000004" for run_dir in (directory / "mopd", path))
    assert _runs.contents(again) == _runs.contents(there)

    # The run is finished: a new start reports that.
    outcome = run(directory, "resumed", **sections)
    assert "run_dir: finished: " in outcome.stdout[0] and "step" not in outcome.stdout[0]


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"objective": {"kind": "jsd"}}, ["objective"]),
        ({"routing": {"default": "copy"}}, ["routing"]),
        ({"student": {"moe_router_topk": 3}}, ["architecture", "moe_router_topk"]),
    ],
)
def test_resuming_another_run_is_refused(directory, base, experts, distilled, change, parts):
    sections = mopd(base, experts)
    for name, section in change.items():
        sections[name] = section if name == "routing" else sections[name] | section
    values = _runs.values(directory, run_dir=str(directory / "mopd"), **sections)
    outcome = _runs.run_main(_runs.write_config(directory / "other.yaml", values), 2)
    assert outcome.statuses == [2, 2], outcome.printed
    (message,) = set(outcome.failures)
    assert outcome.printed.splitlines() == [message]
    for part in ["run_dir", *parts]:
        assert part in message
    assert len(read_metrics(directory / "mopd")) == 4, "the old run is untouched"


@pytest.mark.parametrize(
    "name, parallel, schedule",
    [("twin", EP2, {}), ("twin_pp", PP2, {"max_tokens_per_micro_batch": 60}), ("twin_tp", TP2, {})],
)
def test_a_teacher_that_is_the_student(directory, base, name, parallel, schedule):
    """Self-distillation: no divergence, unchanged weights at weight decay 0, and an alarm."""
    outcome = run(
        directory,
        name,
        parallel=parallel,
        student={"load": base},
        teachers=[{"name": "twin", "load": base}],
        routing={"default": "twin"},
        objective={"kind": "full_vocab_kl"},
        optimizer={"lr": 1e-2, "weight_decay": 0.0},
        schedule={"train_iters": 2, "global_batch_size": 8, "micro_batch_size": 2} | schedule,
    )
    for line in read_metrics(directory / name):
        assert max(line["kl/add"], line["kl/copy"], line["loss"]) < 1e-6
        assert min(line["kl/add"], line["kl/copy"], line["loss"]) >= 0
        assert line["grad_norm"] < 1e-6
    alarms = [line for line in outcome.stdout[0].splitlines() if "equals the student" in line]
    assert alarms[0].startswith("ALARM: teacher 'twin' equals the student"), "no alarm before the first step"
    assert {"'add'" in alarm for alarm in alarms[1:]} == {True, False} and len(alarms) == 3
    assert all(alarm.startswith("ALARM: teacher twin equals the student") for alarm in alarms[1:])
    old, new = (weights(find_checkpoint(path, "load")) for path in (base, directory / name / "checkpoints"))
    assert old.keys() == new.keys() and len(old) > 8
    real = load_tokenizer(directory / "tokenizer.model").vocab_size
    for key in old:
        # Rows that pad the vocabulary to a layout's width are not loaded.
        rows = slice(real if "word_embeddings" in key or "output_layer" in key else None)
        assert (old[key][rows] - new[key][rows]).abs().max() <= 1e-6, key


def weights(checkpoint):
    """Full tensors of a checkpoint, without those of the optimizer."""
    metadata = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer")
    }
    load(tensors, storage_reader=FileSystemReader(checkpoint), no_dist=True)
    return tensors
