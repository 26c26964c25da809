"""Whole runs for the tests: small inputs on disk, and the command line in forked ranks.

`run_main(["--config", ...], 2)` runs `python -m megatron_mopd.train` on two ranks as torchrun would, without
starting an interpreter: the ranks are forked from this process and call `main`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_mopd import train
from megatron_mopd.commands import training as training_command
from megatron_mopd.config.loading import config_from_dict, save_config
from megatron_mopd.data.tokenizer import load_tokenizer, train_sentencepiece
from megatron_mopd.model.checkpoint import MODEL_FILE
from megatron_mopd.observe.metrics import read_metrics
from tests._agent import Agent

MODEL = dict(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=48,
    num_moe_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=24,
    make_vocab_size_divisible_by=8,
)


@dataclass(frozen=True)
class Outcome:
    """Exit statuses and output of the ranks of one command line, rank 0 first."""

    statuses: list[int]
    stdout: list[str]
    stderr: list[str]
    failures: list[str | None]
    """The message that each rank ended with, printed or not."""

    @property
    def printed(self) -> str:
        return "\n".join(text for pair in zip(self.stdout, self.stderr) for text in pair if text)


def run_main(arguments: list[str], world_size: int = 1, timeout: float = 280) -> Outcome:
    """`python -m megatron_mopd.train ARGUMENTS` on `world_size` forked ranks."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name, Agent() as agent:
        directory, processes = Path(name), []
        for rank in range(world_size):
            process = context.Process(target=_rank, args=(rank, world_size, agent, directory, arguments))
            process.start()
            processes.append(process)
        try:
            for process in processes:
                process.join(timeout)
        finally:
            hung = [process for process in processes if process.is_alive()]
            for process in hung:
                process.kill()
                process.join()

        def texts(kind: str) -> list[str]:
            paths = [directory / f"{rank}.{kind}" for rank in range(world_size)]
            return [path.read_text() if path.exists() else "" for path in paths]

        outcome = Outcome(
            [process.exitcode for process in processes],
            texts("out"),
            texts("err"),
            [text or None for text in texts("failure")],
        )
    assert not hung, f"{len(hung)} ranks did not end within {timeout} s:\n{outcome.printed}"
    return outcome


def _rank(rank: int, world_size: int, agent: Agent, directory: Path, arguments: list[str]) -> None:
    for stream, kind in (("stdout", "out"), ("stderr", "err")):
        descriptor = os.open(directory / f"{rank}.{kind}", os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, {"stdout": 1, "stderr": 2}[stream])
        setattr(sys, stream, open(descriptor, "w", buffering=1))
    agent.set_environment(rank, world_size)
    is_first_to_fail = training_command.is_first_to_fail

    def recorded(message: str) -> bool:
        (directory / f"{rank}.failure").write_text(message)
        return is_first_to_fail(message)

    training_command.is_first_to_fail = recorded
    status = 1
    try:
        train.main(arguments)
        status = 0
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)


def write_inputs(directory: Path) -> None:
    """`tokenizer.model` and `prompts.jsonl` with the domains `add` and `copy`, 24 prompts with answers."""
    words = "ab ba ca ac bc cb".split() * 2
    lines = [
        {"prompt": f"{a} + {b} =", "answer": str(a + b), "domain": "add"} for a in range(4) for b in range(3)
    ] + [{"prompt": f"copy {word} :", "answer": word, "domain": "copy"} for word in words]
    for number, line in enumerate(lines[18:]):
        line["prompt"] = f"again {number} " + line["prompt"]
    texts = [f"{line['prompt']} {line['answer']}" for line in lines]
    train_sentencepiece(texts, directory / "tokenizer.model", 300)
    (directory / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def values(directory: Path, **sections) -> dict:
    """A configuration for the inputs of `write_inputs`, as nested dictionaries, with `sections` merged in."""
    merged = {
        "run_dir": str(directory / "run"),
        "device": "cpu",
        "student": dict(MODEL),
        "data": {
            "tokenizer": str(directory / "tokenizer.model"),
            "seq_length": 40,
            "prompts": [{"path": str(directory / "prompts.jsonl")}],
        },
        "rollout": {"max_new_tokens": 6},
        "objective": {"kind": "sft"},
        "optimizer": {"lr": 1e-3},
        "schedule": {"train_iters": 2, "global_batch_size": 8, "micro_batch_size": 2},
        "log": {"tensorboard": False, "report": False},
    }
    for name, section in sections.items():
        merged[name] = merged.get(name, {}) | section if isinstance(section, dict) else section
    return merged


def write_config(path: Path, configuration: dict) -> list[str]:
    """Write a valid configuration to `path` and return the command-line arguments that load it."""
    save_config(config_from_dict(configuration), path)
    return ["--config", str(path)]


def describe_checkpoint(directory: Path, tokenizer: Path, **model) -> Path:
    """Write a checkpoint's description without weights: enough for every check that precedes reading them."""
    directory.mkdir(parents=True)
    description = {
        "model": MODEL | {"vocab_size": load_tokenizer(tokenizer).vocab_size} | model,
        "tokenizer": load_tokenizer(tokenizer).fingerprint(),
    }
    (directory / MODEL_FILE).write_text(json.dumps(description))
    return directory


def comparable(run_dir: Path) -> list[dict]:
    """The run's metrics without timings and without the teachers' loads, because the bank is empty after a
    start.
    """
    clocks = ("time/", "tokens_per_second", "idle/", "tflops")
    loads = ("/loads", "/load_seconds", "/load_hidden", "/score_seconds")
    return [
        {k: v for k, v in line.items() if not k.startswith(clocks) and not k.endswith(loads)}
        for line in read_metrics(run_dir)
    ]


def _comparable(value):
    """`value` without the settings, which name another run_dir, and without the entropies that alarms
    remember, which agree only up to rounding for continued responses. megatron-core 0.19 stores objects that
    are not tensors next to the tensors.
    """
    if isinstance(value, list):
        return [_comparable(item) for item in value]
    if isinstance(value, dict):
        left_out = ("settings", "recent_entropy", "first_recent_entropy")
        return {key: _comparable(item) for key, item in value.items() if key not in left_out}
    return value


def contents(checkpoint: Path) -> dict[str, str]:
    """The contents of a checkpoint: the SHA-256 of every tensor's bytes, and the comparable part of every
    other value. Pickles of equal values may differ in which objects they write once and refer to afterwards.
    """
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    found = {}
    for index, place in metadata.storage_data.items():
        with open(checkpoint / place.relative_path, "rb") as file:
            file.seek(place.offset)
            data = file.read(place.length)
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
            value = repr(_comparable(torch.load(io.BytesIO(data), weights_only=False)))
        else:
            value = hashlib.sha256(data).hexdigest()
        found[f"{index.fqn} {tuple(index.offset or ())}"] = value
    return found
