"""The doctor's examination of a run: everything in its configuration, short of training."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from megatron_mopd.backend.finding import Finding, Level
from megatron_mopd.backend.host_memory import available_host_bytes
from megatron_mopd.backend.machine import gib
from megatron_mopd.backend.parallel import fewest_ranks
from megatron_mopd.commands.estimate import estimate_apart, fullest_host, stage_ranks
from megatron_mopd.config import Config, ConfigError, load_config
from megatron_mopd.estimate.memory import RankMemory
from megatron_mopd.model.build import DTYPES
from megatron_mopd.model.checkpoint import complete_iterations, find_checkpoint
from megatron_mopd.model.checksums import read_sums, verify_checksums
from megatron_mopd.model.hugging_face import HuggingFaceCheckpoint, is_hugging_face
from megatron_mopd.run.inputs import Inputs, check_inputs
from megatron_mopd.run.resumable import checkpoints_directory

_COMFORTABLE = 0.9
"""Fraction of a device's memory above which an estimate is too close, because of NCCL buffers, CUDA's own
memory and fragmentation."""


def load(options: argparse.Namespace) -> tuple[Config | None, list[Finding]]:
    """The configuration of the run, or of the layout given by overrides; `None` and the error if invalid."""
    try:
        overrides = list(options.overrides) if options.config else ["run_dir=.", *options.overrides]
        return load_config(options.config, overrides), []
    except ConfigError as error:
        return None, [Finding(Level.PROBLEM, "configuration", str(error))]


def examine_run(config: Config, options: argparse.Namespace) -> tuple[list[Finding], float]:
    """Examine inputs, checkpoints, layout and memory of a run. Also returns a checkpoint's size in bytes (0
    if unknown). The number of ranks is torchrun's, `--world-size`, or the minimum of the layout. Collectives:
    none.
    """
    started = int(os.environ.get("WORLD_SIZE", "0")) or options.world_size
    world_size = started or fewest_ranks(config.parallel)
    if config.device == "cuda" and not torch.cuda.is_available():
        advice = "device=auto or device=cpu runs without; see `GPU` above"
        return [Finding(Level.PROBLEM, "device", "'cuda' was requested but is not available", advice)], 0.0
    try:
        inputs = check_inputs(config, world_size)
    except ConfigError as error:
        return [Finding(Level.PROBLEM, "configuration", str(error))], 0.0
    findings = [Finding(Level.OK, "inputs", _described(inputs))]
    if not started and world_size > 1:
        text = f"checked for {world_size}, the minimum for the layout, because torchrun started none"
        findings.append(
            Finding(Level.NOTE, "ranks", text, "--world-size N, or torchrun: also for the network")
        )
    findings += layout_findings(config, world_size)
    findings += checkpoint_findings(config, inputs, options.checksums)
    findings += resume_findings(config)
    if os.environ.get("RANK", "0") != "0":
        return findings, 0.0  # one rank's estimate is enough, and each needs the memory of a model
    ranks = stage_ranks(config, world_size)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or options.ranks_per_host
    try:
        memory = estimate_apart(config, world_size, ranks, local)
    except (ConfigError, RuntimeError) as error:
        return [*findings, Finding(Level.PROBLEM, "memory", f"cannot be estimated: {error}")], 0.0
    gpus = torch.cuda.device_count() if torch.cuda.is_available() and config.device != "cpu" else 0
    local = local or gpus or world_size
    capacity = min((torch.cuda.get_device_properties(i).total_memory for i in range(gpus)), default=None)
    findings += memory_findings(memory, world_size, local, capacity, available_host_bytes())
    return findings, checkpoint_bytes(config, memory)


def _described(inputs: Inputs) -> str:
    domains = ", ".join(sorted(inputs.prompts.domains))
    text = f"tokenizer of {inputs.tokenizer.vocab_size} tokens, {len(inputs.prompts)} prompts in {domains}"
    if inputs.eval_prompts is not None:
        text += f", {len(inputs.eval_prompts)} held out"
    if inputs.teachers:
        text += f"; teachers {', '.join(source.name for source in inputs.teachers)} cover every domain"
    return text


def layout_findings(config: Config, world_size: int) -> list[Finding]:
    """The layout, which is valid (`check_inputs` refuses others), and warnings about it."""
    parallel = config.parallel
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "CP": parallel.context_parallel_size,
        "EP": parallel.expert_model_parallel_size,
    }
    replicas = world_size // (sizes["TP"] * sizes["PP"] * sizes["CP"])
    text = " x ".join(f"{name} {size}" for name, size in sizes.items() if name != "EP")
    ranks = f"{world_size} rank{'s' * (world_size != 1)}"
    found = f"{ranks} = {text} x DP {replicas}, experts over EP {sizes['EP']}"
    findings = [Finding(Level.OK, "layout", found)]
    if config.schedule.global_batch_size < replicas:
        text = (
            f"global_batch_size={config.schedule.global_batch_size} leaves some of {replicas} replicas idle"
        )
        findings.append(
            Finding(Level.WARNING, "schedule", text, "use a larger batch or a larger model layout")
        )
    return findings


def checkpoint_findings(config: Config, inputs: Inputs, read_all: bool) -> list[Finding]:
    """Whether the files of the student's and every teacher's checkpoint are complete."""
    places = {"student.load": config.student.load}
    places |= {f"teachers.{teacher.name}.load": teacher.load for teacher in config.teachers}
    findings = []
    for where, load in places.items():
        if load is None:
            continue
        path = find_checkpoint(load, where)
        try:
            size = check_files(path, where, read_all)
        except ConfigError as error:
            findings.append(Finding(Level.PROBLEM, where, str(error)))
        else:
            how = "all checksums match" if read_all else "sizes compared"
            findings.append(Finding(Level.OK, where, f"{path} is complete ({size / 1e9:.3g} GB, {how})"))
    return findings


def check_files(path: Path, where: str, read_all: bool) -> int:
    """Bytes of a complete checkpoint; `ConfigError` if a file is missing or has a different size.

    Reads only headers and sizes, unless `read_all`, which verifies the checksums of our own checkpoints.
    """
    if is_hugging_face(path):
        HuggingFaceCheckpoint.open(path, where)  # reads every header and compares all shapes with the model
        return sum(file.stat().st_size for file in path.glob("*.safetensors"))
    if read_all:
        verify_checksums(path, where)
    if (listed := read_sums(path, where)) is None:  # written by another program
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    for name, (expected, _) in listed.items():
        if not (path / name).is_file():
            raise ConfigError(f"{where}: checkpoint {path} is damaged: {name} is missing")
        if (size := (path / name).stat().st_size) != expected:
            raise ConfigError(
                f"{where}: checkpoint {path} is damaged: {name} has {size} bytes instead of {expected}"
            )
    return sum(size for size, _ in listed.values())


def resume_findings(config: Config) -> list[Finding]:
    """Where the run will start: from its newest checkpoint, or from the beginning."""
    done = complete_iterations(checkpoints_directory(config.run_dir)) if config.checkpoint.resume else []
    total = config.schedule.train_iters
    if not done:
        return [Finding(Level.OK, "start", f"from the beginning, {total} iterations")]
    return [Finding(Level.OK, "start", f"continues after iteration {done[0]} of {total} ({config.run_dir})")]


def memory_findings(
    memory: dict[int, RankMemory],
    world_size: int,
    ranks_per_host: int,
    gpu_bytes: int | None,
    host_bytes: int,
) -> list[Finding]:
    """Compare the estimate with the available memory. gpu_bytes: the smallest GPU's; `None`: ranks use host
    memory."""
    on_device = max(sum(item.device.values()) for item in memory.values())
    on_host = sum(fullest_host(memory, world_size, ranks_per_host).values())
    advice = "python tools/estimate.py shows what takes it; docs/cluster.md says which size to raise"
    findings = []
    if gpu_bytes is None:
        on_host += on_device * min(ranks_per_host, world_size)
    else:
        findings.append(_compared("GPU memory", on_device, gpu_bytes, "a GPU", advice))
    findings.append(_compared("host memory", on_host, host_bytes, "available", advice))
    return findings


def _compared(subject: str, needed: float, there: float, whose: str, advice: str) -> Finding:
    text = f"about {gib(needed)} GiB of {gib(there)} GiB {whose}"
    if needed > there:
        return Finding(Level.PROBLEM, subject, f"{text}: too little", advice)
    if needed > _COMFORTABLE * there:
        return Finding(Level.WARNING, subject, f"{text}: close", advice)
    return Finding(Level.OK, subject, text)


def checkpoint_bytes(config: Config, memory: dict[int, RankMemory]) -> float:
    """Approximate size of one checkpoint: every stage's weights and, if saved, their optimizer state."""
    parallel = config.parallel
    tp, ep = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    expert_shards = ep * (parallel.expert_tensor_parallel_size or tp)
    count = sum(
        experts * expert_shards + others * tp for experts, others in (m.parameters for m in memory.values())
    )
    width = DTYPES[config.params_dtype].itemsize
    state = (2 + (width < 4)) * max(4, width)  # two moments, plus a float32 copy of narrower weights
    return count * (width + state * config.checkpoint.save_optimizer)
