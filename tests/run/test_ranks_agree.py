"""A run starts only if all its ranks have the same software, settings and files."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import pytest

from megatron_mopd import train
from megatron_mopd.commands import ranks
from megatron_mopd.config import ConfigError, config_from_dict
from megatron_mopd.data.tokenizer import train_sentencepiece
from megatron_mopd.run import inputs, rank_facts
from tests import _runs
from tests._agent import Agent
from tests._distributed import RankPool


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The inputs, and variants that another host might have instead."""
    directory = tmp_path_factory.mktemp("inputs")
    _runs.write_inputs(directory)
    other = directory / "other"
    shutil.copytree(directory, other)
    _runs.describe_checkpoint(directory / "student", directory / "tokenizer.model")
    shutil.copytree(directory / "student", directory / "twin")
    shutil.copytree(directory / "student", directory / "newer")
    (directory / "student" / "a.distcp").write_bytes(bytes(10_000))
    (directory / "twin" / "a.distcp").write_bytes(bytes(10_000))
    (directory / "newer" / "a.distcp").write_bytes(bytes(9_999) + b"1")
    lines = (directory / "prompts.jsonl").read_text().splitlines(keepends=True)
    (other / "shorter.jsonl").write_text("".join(lines[:-1]))
    (other / "prompts.jsonl").write_text("".join(lines).replace("0 + 0 =", "0 + 1 ="))
    texts = [json.loads(line)["prompt"] for line in lines]
    train_sentencepiece(texts * 2, other / "tokenizer.model", 290)
    for iteration in (2, 4):
        _runs.describe_checkpoint(
            directory / "has_checkpoints" / "checkpoints" / f"iter_{iteration:07d}",
            directory / "tokenizer.model",
        )
    return directory


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


def inputs_on(rank, configurations, version=None):
    """`agreed_inputs` with a separate configuration per rank: its error message, or None."""
    with pytest.MonkeyPatch.context() as patch:
        if version is not None and rank == 1:
            patch.setattr(rank_facts, "installed_version", lambda names: version)
        try:
            inputs.agreed_inputs(config_from_dict(configurations[rank]))
        except ConfigError as error:
            return str(error)
    return None


def told(pool, ours, theirs, version=None):
    """The message, which is the same on both ranks."""
    (message,) = set(pool.run(inputs_on, [ours, theirs], version))
    return message


def differing(directory):
    """Name -> (sections of rank 1's configuration, parts of the message)."""
    other = directory / "other"
    return {
        "lr": ({"optimizer": {"lr": 0.1}}, ["optimizer.lr: ", "0.001 on rank 0", "0.1 on rank 1"]),
        "seed": ({"seed": 99}, ["seed: ", "1234 on rank 0", "99 on rank 1"]),
        "run_dir": ({"run_dir": "elsewhere"}, ["run_dir: ", "elsewhere on rank 1"]),
        "architecture": ({"student": {"hidden_size": 64}}, ["student.hidden_size: ", "64 on rank 1"]),
        "texts": (
            {"data": {"prompts": [{"path": str(other / "prompts.jsonl")}]}},
            ["the prompts of data.prompts[0]: ", "other/prompts.jsonl (SHA-256"],
        ),
        "shorter": (
            {"data": {"prompts": [{"path": str(other / "shorter.jsonl")}]}},
            ["the prompts of data.prompts[0]: ", "other/shorter.jsonl (SHA-256"],
        ),
        "held out": (
            {"data": {"eval": [{"path": str(other / "shorter.jsonl")}]}},
            ["data.eval (entries): 0 on rank 0, 1 on rank 1"],
        ),
        "tokenizer": (
            {"data": {"tokenizer": str(other / "tokenizer.model")}},
            ["the tokenizer of data.tokenizer: ", "other/tokenizer.model (SHA-256"],
        ),
        "missing file": (
            {"data": {"prompts": [{"path": str(other / "none.jsonl")}]}},
            ["data.prompts[0].path: cannot read", "none.jsonl", "(on rank 1)"],
        ),
    }


def test_whatever_differs_is_named_with_the_ranks(pool, directory):
    ours = _runs.values(directory)
    assert told(pool, ours, ours) is None
    cases = differing(directory)
    for name, (sections, parts) in cases.items():
        message = told(pool, ours, _runs.values(directory, **sections))
        assert message is not None and "rank 1" in message, name
        for part in parts:
            assert part in message, (name, message)
        assert "\n" not in message
        if name != "missing file":
            assert message.startswith("ranks differ in ") and "rank 0" in message


def test_copies_of_the_same_files_at_other_places_agree(pool, directory):
    """A host may have its own copies of the files and its own environment."""
    copy = directory / "copy"
    copy.mkdir()
    for name in ("prompts.jsonl", "tokenizer.model"):
        shutil.copy(directory / name, copy / name)
    student = {"num_layers": 2} | {"load": str(directory / "student")}
    ours = _runs.values(directory, student=student)
    data = {"tokenizer": str(copy / "tokenizer.model"), "prompts": [{"path": str(copy / "prompts.jsonl")}]}
    storage = {"mmap_directory": "/local"}
    student = student | {"load": str(directory / "twin")}
    theirs = _runs.values(directory, data=data, teacher_storage=storage, student=student)
    assert told(pool, ours, theirs) is None
    theirs = _runs.values(directory, student=student | {"load": str(directory / "newer")})
    message = told(pool, ours, theirs)
    assert message.startswith("ranks differ in the model of student.load: ") and "newer (SHA-256" in message
    message = told(pool, ours, _runs.values(directory, student=student | {"load": None}))
    assert message.startswith("ranks differ in student.load: ")


def test_a_run_directory_that_is_not_shared(pool, directory):
    """On resume, one host finds no checkpoints: the path is the same, but on another disk."""
    ours = _runs.values(directory, run_dir=str(directory / "has_checkpoints"))
    assert told(pool, ours, ours) is None
    (message,) = set(pool.run(without_checkpoints, ours))
    assert message.startswith("ranks differ in the checkpoints in run_dir: checkpoints 2, 4 on rank 0, no ")
    assert message.endswith("a file system that all hosts share")


def without_checkpoints(rank, configuration):
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(rank_facts, "complete_iterations", lambda directory: [])
        return inputs_on(rank, [configuration] * 2)


def test_software(pool, directory):
    message = told(pool, _runs.values(directory), _runs.values(directory), version="2.0")
    assert message.startswith("ranks differ in torch: ") and "2.0 on rank 1; install" in message


def test_what_a_variable_holds_is_compared_and_not_told(pool, directory):
    (message,) = set(pool.run(with_variable, directory))
    assert message.startswith("ranks differ in run_dir: ${oc.env:WHERE} on rank 0, ${oc.env:WHERE} on rank 1")
    assert "host-" not in message


def with_variable(rank, directory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WHERE", f"/runs/host-{rank}")
        return inputs_on(rank, [_runs.values(directory, run_dir="${oc.env:WHERE}")] * 2)


def run_tool(rank, agent, arguments, reads):
    """A tool under torchrun, started as `commands/` do; it only creates a file to show that it began."""
    agent.set_environment(rank, 2)
    sys.argv = ["tool", *arguments[rank]]
    ranks.run_on_ranks(lambda: Path(arguments[0][-1]).touch(), reads=reads[rank])
    os._exit(0)


@pytest.mark.parametrize(
    "options, model, message",
    [
        ([], "twin", None),
        ([], "newer", "ranks differ in model directory 1 of the command line: "),
        ([], "none", "ranks differ in model directory 1 of the command line: "),
        (["--seed=3"], "student", "ranks differ in the command line: "),
    ],
)
def test_tools(directory, tmp_path, capfd, options, model, message):
    context, began = multiprocessing.get_context("fork"), tmp_path / "began"
    models = [str(directory / "student"), str(directory / model)]
    arguments = [[models[0], str(began)], [*options, models[1], str(began)]]
    with Agent() as agent:
        started = [
            context.Process(target=run_tool, args=(rank, agent, arguments, [[model] for model in models]))
            for rank in range(2)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(60)
            process.kill()
    printed = capfd.readouterr().err
    assert [process.exitcode for process in started] == ([0, 0] if message is None else [2, 2]), printed
    assert began.exists() == (message is None)
    if message is not None:
        (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: {message}") and " on rank 1" in line


def test_both_ranks_of_a_run_end_with_status_2_before_anything_is_written(directory, monkeypatch):
    arguments = _runs.write_config(
        directory / "run.yaml", _runs.values(directory, run_dir=str(directory / "new"))
    )
    main = train.main

    def other_on_rank_1(arguments):
        main([*arguments, "optimizer.lr=0.1"] if os.environ["RANK"] == "1" else arguments)

    monkeypatch.setattr(train, "main", other_on_rank_1)
    outcome = _runs.run_main(arguments, 2)
    assert outcome.statuses == [2, 2], outcome.printed
    (line,) = outcome.printed.splitlines()
    assert line.startswith("error: ranks differ in optimizer.lr: 0.001 on rank 0, 0.1 on rank 1; start every")
    assert set(outcome.failures) == {line}
    assert not (directory / "new").exists()
