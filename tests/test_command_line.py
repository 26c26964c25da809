"""User errors at the command line: one line before training, the same on every rank, and exit status 2."""

from __future__ import annotations

import copy
import multiprocessing
import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_mopd import train
from megatron_mopd.backend.parallel import start_ranks
from megatron_mopd.commands.ranks import run_on_ranks
from megatron_mopd.data.tokenizer import train_sentencepiece
from tests import _runs
from tests._agent import Agent


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Valid and invalid inputs."""
    directory = tmp_path_factory.mktemp("command_line")
    _runs.write_inputs(directory)
    good = (directory / "prompts.jsonl").read_text().splitlines()
    (directory / "empty.jsonl").write_text("\n\n")
    (directory / "broken.jsonl").write_text("\n".join([*good[:2], '{"prompt": "3 +', *good[2:]]))
    (directory / "long.jsonl").write_text("\n".join([good[0], good[1].replace("=", "= 7 8 9" * 20)]))
    train_sentencepiece(["other words, other pieces"] * 9, directory / "other.model", 280)
    tokenizer = directory / "tokenizer.model"
    _runs.describe_checkpoint(directory / "expert", tokenizer)
    _runs.describe_checkpoint(directory / "narrow", tokenizer, vocab_size=99)
    _runs.describe_checkpoint(directory / "foreign", directory / "other.model", vocab_size=300)
    (directory / "nothing_yet").mkdir()
    return directory


def mopd(teachers: dict, routing: dict) -> dict:
    """Sections of a distillation run; `self` needs no checkpoint."""
    entries = [{"name": name} | ({"load": load} if load else {}) for name, load in teachers.items()]
    return {"objective": {"kind": "full_vocab_kl"}, "teachers": entries, "routing": routing}


# name -> (sections of the configuration, ranks, parts of the message); "@" stands for the inputs' directory.
CASES = {
    "unknown key": ({"schedule": {"train_itres": 3}}, 2, ["'schedule.train_itres'", "'train_iters'"]),
    "unknown section": ({"optimiser": {"lr": 1}}, 1, ["'optimiser'", "'optimizer'"]),
    "unknown model key": ({"student": {"num_layer": 2}}, 1, ["'student.num_layer'", "'num_layers'"]),
    "wrong type": (
        {"schedule": {"train_iters": "many"}},
        2,
        ["train_iters: expected int", "'many'"],
    ),
    "float for int": ({"schedule": {"micro_batch_size": 2.5}}, 1, ["schedule.micro_batch_size", "2.5"]),
    "owned elsewhere": ({"student": {"sequence_parallel": True}}, 1, ["set parallel.sequence_parallel"]),
    "ranks": (
        {"parallel": {"tensor_model_parallel_size": 3}},
        2,
        ["TP 3 x PP 1 x CP 1", "needs at least 3 ranks, and 2 were started", "--nproc-per-node 3"],
    ),
    "plain python for two ranks": (
        {"parallel": {"pipeline_model_parallel_size": 2}},
        1,
        ["needs at least 2 ranks, and 1 was started", "torchrun --nproc-per-node 2"],
    ),
    "heads": (
        {
            "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            "student": {"num_attention_heads": 3, "num_query_groups": 3, "hidden_size": 33},
        },
        2,
        ["tensor_model_parallel_size: 2", "num_attention_heads=3", "valid: 1, 3"],
    ),
    "experts": (
        {"parallel": {"expert_model_parallel_size": 2}, "student": {"num_moe_experts": 3}},
        2,
        ["expert_model_parallel_size: 2", "num_moe_experts=3", "valid: 1, 3"],
    ),
    "layers": (
        {"parallel": {"pipeline_model_parallel_size": 2}, "student": {"num_layers": 3}},
        2,
        ["pipeline_model_parallel_size: 2", "num_layers=3", "valid products: 1, 3"],
    ),
    "no teacher for a domain": (
        mopd({"self": None}, {"add": "self"}),
        2,
        ["domain 'copy' has no teacher", "routing.default"],
    ),
    "unknown teacher": (mopd({"self": None}, {"default": "slef"}), 1, ["'slef'", "'self'"]),
    "no such domain": (mopd({"self": None}, {"default": "self", "ad": "self"}), 1, ["routing.ad", "'add'"]),
    "teacher's vocabulary": (
        mopd({"narrow": "@/narrow"}, {"default": "narrow"}),
        2,
        ["teachers.narrow.load", "99 tokens", "300"],
    ),
    "teacher's tokenizer": (
        mopd({"foreign": "@/foreign"}, {"default": "foreign"}),
        2,
        ["teachers.foreign.load", "@/foreign", "a different tokenizer"],
    ),
    "teacher's checkpoint missing": (
        mopd({"gone": "@/gone"}, {"default": "gone"}),
        2,
        ["teachers.gone.load", "not found", "@/gone"],
    ),
    "checkpoint missing": ({"student": {"load": "@/gone"}}, 2, ["student.load", "not found", "@/gone"]),
    "checkpoint incomplete": (
        {"student": {"load": "@/nothing_yet"}},
        1,
        ["student.load", "no complete checkpoint", "@/nothing_yet"],
    ),
    "checkpoint's tokenizer": ({"student": {"load": "@/foreign"}}, 1, ["data.tokenizer", "student.load"]),
    "no prompts": (
        {"data": {"prompts": [{"path": "@/empty.jsonl"}]}},
        2,
        ["@/empty.jsonl", "no prompts"],
    ),
    "malformed line": ({"data": {"prompts": [{"path": "@/broken.jsonl"}]}}, 2, ["@/broken.jsonl:3", "JSON"]),
    "prompt too long": (
        {"data": {"prompts": [{"path": "@/long.jsonl"}]}},
        2,
        ["@/long.jsonl:2", "tokens", "data.seq_length=40"],
    ),
    "prompt file missing": ({"data": {"prompts": [{"path": "@/no.jsonl"}]}}, 1, ["data.prompts[0].path"]),
    "tokenizer missing": ({"data": {"tokenizer": "@/no.model"}}, 1, ["@/no.model"]),
}


def replaced(value, directory):
    """`value` with every "@" replaced by the inputs' directory."""
    if isinstance(value, dict):
        return {key: replaced(item, directory) for key, item in value.items()}
    if isinstance(value, list):
        return [replaced(item, directory) for item in value]
    return value.replace("@", str(directory)) if isinstance(value, str) else value


def check(outcome, world_size, parts):
    """All ranks fail with the same message and status 2, and one rank prints it as the only output."""
    assert outcome.statuses == [2] * world_size, outcome.printed
    (message,) = set(outcome.failures)
    assert outcome.printed.splitlines() == [message]
    assert message.startswith("error: ")
    for part in parts:
        assert part in message


@pytest.mark.parametrize("case", CASES)
def test_one_line_on_every_rank(inputs, tmp_path, case):
    sections, world_size, parts = CASES[case]
    configuration = _runs.values(inputs, **replaced(copy.deepcopy(sections), inputs))
    configuration["run_dir"] = str(tmp_path / "run")
    path = tmp_path / "config.yaml"
    OmegaConf.save(OmegaConf.create(configuration), path)
    check(_runs.run_main(["--config", str(path)], world_size), world_size, replaced(parts, inputs))
    assert not list(tmp_path.rglob("metrics.jsonl")), "training was started"


@pytest.mark.parametrize(
    "text, arguments, parts",
    [
        (None, [], ["config file not found", "config.yaml"]),
        ("schedule: [1", [], ["config.yaml", "not readable as YAML"]),
        ("schedule: 3", [], ["schedule", "expected a section"]),
        ("run_dir: x", ["schedule.train_iters"], ["'schedule.train_iters'", "section.key=value"]),
        ("run_dir: x", ["schedule.train_iter=3"], ["'schedule.train_iter'", "'train_iters'"]),
        ("run_dir: x", ["schedule=[1"], ["config.yaml"]),
        ("seed: 1", [], ["run_dir: missing"]),
    ],
)
def test_configuration_file_and_overrides(tmp_path, text, arguments, parts):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    check(_runs.run_main(["--config", str(path), *arguments]), 1, parts)


def test_a_run_says_nothing_but_its_own_lines(inputs, tmp_path):
    """In a separate interpreter: libraries print no warnings, including when the run saves and resumes."""
    values = _runs.values(inputs, **mopd({"self": None}, {"default": "self"}), run_dir=str(tmp_path / "run"))
    arguments = _runs.write_config(tmp_path / "config.yaml", values)
    command = [sys.executable, "-m", "megatron_mopd.train", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment.pop("PYTHONWARNINGS", None)
    for steps in (1, 2):
        done = subprocess.run(
            [*command, f"schedule.train_iters={steps}"],
            capture_output=True,
            text=True,
            env=environment,
            timeout=250,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        lines = [line for line in done.stdout.splitlines() if "ALARM" not in line]
        expected = ["responses", "step"] if steps == 1 else ["resume:", "responses", "step"]
        assert [line.split()[0] for line in lines] == expected
        assert "responses end with 3 '</s>' (tokenizer)" in lines


def test_debug_shows_the_stack(tmp_path):
    outcome = _runs.run_main(["--debug", "--config", str(tmp_path / "none.yaml")], 2)
    assert outcome.statuses == [2, 2]
    assert "Traceback" in outcome.stderr[0] and outcome.stderr[0].endswith(f"{outcome.failures[0]}\n")
    assert outcome.stderr[1] == ""


def _fail_on_rank_1(config):
    """In place of a run: rank 1 fails while rank 0 waits for it in a collective."""
    start_ranks(torch.device("cpu"), 1)
    dist.barrier()
    if dist.get_rank() == 1:
        raise RuntimeError("rank 1 ran out of luck")
    dist.all_reduce(torch.zeros(1))


def _launch(path, config):
    """Run torchrun's agent with forked ranks; the output of all of them goes to `path`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)
    train.train = _fail_on_rank_1
    os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="one failing rank",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="fork",
    )
    try:
        elastic_launch(settings, train.main)(config)
        status = 0
    except ChildFailedError as error:
        print(f"LAUNCHER: {error}", flush=True)
        status = 1
    os._exit(status)


def _work_and_linger(rank, agent):
    agent.set_environment(rank, 2)
    run_on_ranks(dist.barrier)
    time.sleep(rank)


def test_a_rank_that_ends_first_is_not_taken_for_dead(capfd):
    context = multiprocessing.get_context("fork")
    with Agent() as agent:
        ranks = [context.Process(target=_work_and_linger, args=(rank, agent)) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(60)
            process.kill()
    assert [process.exitcode for process in ranks] == [0, 0], capfd.readouterr().err


def test_one_failing_rank_ends_the_job_with_its_message(tmp_path):
    """Under torchrun: within seconds, the cause appears once in the output and once in the final report,
    without follow-up errors from other ranks."""
    arguments = _runs.write_config(tmp_path / "config.yaml", {"run_dir": str(tmp_path / "run")})
    launcher = multiprocessing.get_context("fork").Process(
        target=_launch, args=(tmp_path / "output", arguments)
    )
    begun = time.monotonic()
    launcher.start()
    launcher.join(90)
    took = time.monotonic() - begun
    if launcher.is_alive():
        launcher.kill()
    output = (tmp_path / "output").read_text()
    assert launcher.exitcode == 1, output
    ranks, report = output.split("LAUNCHER: ")
    assert ranks.count("Traceback") == 1, output
    assert "\nRuntimeError: rank 1 ran out of luck\n" in ranks
    root = report.split("Root Cause")[1]
    assert "rank      : 1" in root and "RuntimeError: rank 1 ran out of luck" in root
    assert took < 60, "the job waited for the collective's timeout"
