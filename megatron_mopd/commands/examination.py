"""The doctor's examination of hosts and layout: implementations in use, the machine, the network."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import statistics
from pathlib import Path

import megatron.core.optimizer
import torch
import torch.distributed as dist

from megatron_mopd.backend import bandwidth, machine, software
from megatron_mopd.backend.finding import Finding, Level, show
from megatron_mopd.backend.launch_environment import read_launch
from megatron_mopd.backend.parallel import (
    build_parallel_groups,
    check_world_size,
    end_ranks,
    select_device,
    start_ranks,
)
from megatron_mopd.commands.confinement_examination import confinement_findings
from megatron_mopd.commands.run_examination import examine_run, load
from megatron_mopd.config import Config, ConfigError
from megatron_mopd.model.specs import uses_transformer_engine
from megatron_mopd.objectives.kernels import kernels_for
from megatron_mopd.observe.run_log import versions


def examine(options: argparse.Namespace, required: list[Finding]) -> list[Finding]:
    """Examine everything except the required packages; prints each section when done, returns all findings.

    Collective over all ranks if torchrun started them; the highest level is the same on every rank.
    """
    logging.getLogger("megatron").setLevel(logging.ERROR)
    is_speaker = os.environ.get("RANK", "0") == "0"
    found = list(required)

    def section(title: str, findings: list[Finding]) -> None:
        found.extend(findings)
        if is_speaker and findings:
            show(title, findings)

    try:
        launch = read_launch(os.environ)
    except ConfigError as error:
        section("Launch", [Finding(Level.PROBLEM, "environment", str(error))])
        return found
    config, mistakes = load(options)
    if launch.local_rank == 0:  # once per host
        section("Optional packages, and what is used", used_findings())
        section("This machine", machine.gpu_findings() + machine.memory_findings())
        section("Answers of the model", confinement_findings())
        section("Network", machine.network_findings(os.environ))
        findings, needed = mistakes, 0.0
        if config is not None and options.config:
            findings, needed = examine_run(config, options)
        section("The run" if options.config else "The layout", findings)
        directory = config.run_dir if config is not None and options.config else "."
        disk = Path(options.directory or directory)
        section("Disk", machine.disk_findings(disk, options.disk_mib * 2**20, needed))
    if launch.world_size == 1:
        return found
    problems = [finding for finding in found if finding.level == Level.PROBLEM]
    if problems and not is_speaker:
        # Print before connecting the ranks, because a problem on this host may prevent that.
        show(f"On {socket.gethostname()}", problems)
    if not problems and config is not None:
        section(
            "Between the ranks", connected_findings(config, found, launch.world_size, options.network_mib)
        )
    return found


def used_findings() -> list[Finding]:
    """Optional packages that were found, and the implementation that training will use for each part."""
    found = {name: software.find_optional(name) for name in software.OPTIONAL}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    uses = {
        "Transformer Engine": "layers, grouped expert GEMM and fused Adam on CUDA",
        "Apex": "fused Adam and fused norms on CUDA where Transformer Engine is missing",
        "flash-attn": "not used: attention is torch's scaled_dot_product_attention",
        "Triton": "loss kernels on CUDA",
        "wandb": "logging to Weights & Biases",
    }
    findings = []
    for name, use in uses.items():
        package, advice = found[name], software.OPTIONAL[name].how
        if package.works:
            findings.append(Finding(Level.OK, name, f"{package.version} ({use})"))
        elif package.error is not None:
            findings.append(Finding(Level.WARNING, name, f"{package.version}: {package.error}", advice))
        else:
            matters = on_gpu and name in ("Transformer Engine", "Triton")
            level = Level.WARNING if matters else Level.NOTE
            wanted = matters or name == "Apex" and on_gpu
            findings.append(Finding(level, name, f"not installed ({use})", advice if wanted else ""))
    engine = uses_transformer_engine(device.type)
    adam = megatron.core.optimizer.Adam
    parts = {
        "layers": "Transformer Engine" if engine else "PyTorch layers of megatron-core and this package",
        "loss kernels": kernels_for(device).__name__.rsplit(".", 1)[-1],
        "optimizer": f"{adam.__module__}.{adam.__name__}",
        "communication": "NCCL" if on_gpu else "gloo",
    }
    text = "; ".join(f"{part}: {what}" for part, what in parts.items())
    return [*findings, Finding(Level.OK, f"used on {device.type}", text)]


def connected_findings(
    config: Config, here: list[Finding], world_size: int, network_mib: int | None
) -> list[Finding]:
    """Start the ranks, compare the hosts, and measure the layout's groups. Collective over all ranks."""
    try:
        check_world_size(config.parallel, world_size)
        device = select_device(config.device)
        lifeline = start_ranks(device, config.parallel.distributed_timeout_minutes)
        groups = build_parallel_groups(config.parallel, device, config.seed)
    except ConfigError as error:
        return [Finding(Level.PROBLEM, "ranks", str(error))]
    facts = versions() | {"host": socket.gethostname()}
    gathered: list = [None] * world_size
    dist.all_gather_object(gathered, (facts, [f for f in here if f.level >= Level.WARNING]))
    findings = host_findings(gathered)
    default = 64 if device.type == "cuda" else 4
    measured = bandwidth.measure(groups, (network_mib or default) * 2**20)
    findings += bandwidth_findings(measured)
    dist.barrier()
    end_ranks(lifeline)
    return findings


def host_findings(gathered: list[tuple[dict[str, str], list[Finding]]]) -> list[Finding]:
    """Findings of other hosts' ranks, and differing versions. gathered: one (facts, findings) per rank."""
    hosts: dict[str, dict[str, str]] = {}
    findings = []
    speaker = gathered[0][0]["host"]
    for facts, warned in gathered:
        host = facts["host"]
        if host not in hosts and host != speaker:
            findings += [Finding(f.level, f"{host}: {f.subject}", f.text, f.advice) for f in warned]
        hosts.setdefault(host, {name: version for name, version in facts.items() if name != "host"})
    first = hosts[speaker]
    for host, theirs in hosts.items():
        names = sorted(first.keys() | theirs.keys())
        differing = [n for n in names if first.get(n) != theirs.get(n)]
        for name in differing:
            text = f"{theirs.get(name, 'missing')} on {host}, {first.get(name, 'missing')} on {speaker}"
            findings.append(Finding(Level.PROBLEM, name, text, "install the same version on every host"))
    shown = ", ".join(list(hosts)[:8]) + (", ..." if len(hosts) > 8 else "")
    return [Finding(Level.OK, "ranks", f"{len(gathered)} on {len(hosts)} host(s): {shown}"), *findings]


def bandwidth_findings(measured: list[bandwidth.GroupBandwidth]) -> list[Finding]:
    """One line per kind of group with its median bandwidth, then groups that are slow, wrong or misplaced."""
    findings = []
    for kind in dict.fromkeys(group.kind for group in measured):
        same = [group for group in measured if group.kind == kind]
        figures = ", ".join(
            f"{operation} {statistics.median(g.bandwidth[operation] for g in same) / 1e9:.3g}"
            for operation in same[0].bandwidth
        )
        text = f"{len(same)} group(s) of {len(same[0].ranks)}: {figures} GB/s (bus bandwidth, median)"
        findings.append(Finding(Level.OK, kind, text))
        apart = [group for group in same if len(group.hosts) > 1]
        if apart and kind == "TP":
            text = f"ranks {_numbers(apart[0])} are on several hosts ({', '.join(apart[0].hosts)})"
            advice = "choose a tensor_model_parallel_size that divides the number of ranks per host"
            findings.append(Finding(Level.WARNING, kind, text, advice))
        for group in same:
            for operation in group.wrong:
                text = (
                    f"{operation} between ranks {_numbers(group)} ({', '.join(group.hosts)}) gave wrong data"
                )
                findings.append(
                    Finding(Level.PROBLEM, kind, text, "exclude these hosts and have them tested")
                )
    for group, operation in bandwidth.slow_groups(measured):
        speed = group.bandwidth[operation] / 1e9
        text = f"{operation} between ranks {_numbers(group)} reaches only {speed:.3g} GB/s"
        findings.append(Finding(Level.WARNING, group.kind, text, f"check {', '.join(group.hosts)}"))
    return findings


def _numbers(group: bandwidth.GroupBandwidth) -> str:
    return ", ".join(map(str, group.ranks))
