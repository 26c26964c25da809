"""Examines the host that training will run on: GPUs and their links, network, shared memory, memory and disk.

Every function returns findings and starts nothing. `environment` and the like are arguments so that tests can
examine other hosts.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from megatron_mopd.backend.finding import Finding, Level
from megatron_mopd.backend.host_memory import available_host_bytes
from megatron_mopd.backend.network import GLOO_INTERFACES, NCCL_INTERFACES, interface_problems

_SHARED_MEMORY_FLOOR = 2**30
"""NCCL ranks on one host exchange data through shared memory; containers often have 64 MB."""
_SLOW_DISK = 50e6
"""Bytes per second below which saving a large model takes longer than the training it protects."""


def query(*command: str) -> str | None:
    """The output of a program, or `None` if it does not exist or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def gpu_findings() -> list[Finding]:
    """Driver, CUDA, NCCL, every GPU, and the links between them."""
    listed = query("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    drivers = sorted(set(listed.split())) if listed else []
    if not torch.cuda.is_available():
        if not drivers:
            return [Finding(Level.NOTE, "GPU", "none: training runs on the CPU, ranks communicate by gloo")]
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        return [
            Finding(
                Level.WARNING,
                "GPU",
                f"driver {drivers[0]} sees GPUs, torch {torch.__version__} ({built}) does not",
                "install a torch build whose CUDA the driver supports (pytorch.org, `Get started`)",
            )
        ]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    findings = [
        Finding(
            Level.OK,
            "CUDA",
            f"{torch.version.cuda}, NCCL {nccl}, driver {drivers[0] if drivers else 'unknown'}",
        )
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        text = (
            f"{properties.name}, {gib(total)} GiB, compute capability {properties.major}.{properties.minor}"
        )
        level, advice = Level.OK, ""
        if free < 0.95 * total:
            level, text = Level.WARNING, f"{text}; {gib(total - free)} GiB are in use"
            advice = "find the other process: nvidia-smi"
        findings.append(Finding(level, f"GPU {index}", text, advice))
    if torch.cuda.device_count() > 1:
        findings += link_findings(query("nvidia-smi", "nvlink", "--status"), torch.cuda.device_count())
    return findings


def link_findings(status: str | None, gpus: int) -> list[Finding]:
    """NVLink between the GPUs of this host, from the output of `nvidia-smi nvlink --status`."""
    active = dict.fromkeys(range(gpus), 0)
    speeds, inactive, gpu = set(), 0, None
    for line in (status or "").splitlines():
        if match := re.match(r"GPU (\d+):", line):
            gpu = int(match[1])
        elif gpu in active and (match := re.match(r"\s*Link \d+: (.*)", line)):
            if "inactive" in match[1]:
                inactive += 1
            else:
                active[gpu] += 1
                speeds.add(match[1].strip())
    counts = sorted(set(active.values()))
    if counts == [0]:
        return [
            Finding(
                Level.WARNING,
                "NVLink",
                "none: tensor and expert parallelism will go over PCIe",
                "prefer pipeline and data parallelism on this machine",
            )
        ]
    if len(counts) > 1 or inactive:
        text = ", ".join(f"GPU {index}: {count}" for index, count in active.items())
        return [
            Finding(Level.WARNING, "NVLink", f"not all links are up ({text})", "nvidia-smi nvlink --status")
        ]
    return [Finding(Level.OK, "NVLink", f"{counts[0]} links per GPU, {', '.join(sorted(speeds))} each")]


def network_findings(environment: Mapping[str, str]) -> list[Finding]:
    """Interfaces that are up, those named by environment variables, and InfiniBand ports."""
    stats, addresses = psutil.net_if_stats(), psutil.net_if_addrs()
    up = [name for name, state in stats.items() if state.isup]
    shown = []
    for name in up:
        address = next((a.address for a in addresses.get(name, []) if a.family.name == "AF_INET"), "no IPv4")
        speed = f", {stats[name].speed} Mbit/s" if stats[name].speed else ""
        shown.append(f"{name} ({address}{speed})")
    findings = [Finding(Level.OK, "interfaces", ", ".join(shown) or "none is up")]
    problems = interface_problems(environment, list(stats))
    for problem in problems:
        findings.append(Finding(Level.PROBLEM, "network", problem, "set it to one of them, or unset it"))
    if not problems:
        for variable in (NCCL_INTERFACES, GLOO_INTERFACES):
            if value := environment.get(variable):
                findings.append(Finding(Level.OK, variable, value))
    ports = sorted(Path("/sys/class/infiniband").glob("*/ports/*/state"))
    if ports:
        down = [port for port in ports if "ACTIVE" not in port.read_text()]
        names = ", ".join(f"{port.parts[-4]} port {port.parts[-2]}" for port in down)
        text = f"{len(ports)} ports" + (f", not active: {names}" if down else ", all active")
        findings.append(Finding(Level.WARNING if down else Level.OK, "InfiniBand", text))
    return findings


def memory_findings() -> list[Finding]:
    """Host memory, the shared-memory file system, and the limit on locked memory."""
    total, available = psutil.virtual_memory().total, available_host_bytes()
    findings = [
        Finding(
            Level.OK,
            "host memory",
            f"{gib(available)} of {gib(total)} GiB available, {os.cpu_count()} CPU cores",
        )
    ]
    uses_cuda = torch.cuda.is_available()
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        free = 0
    if uses_cuda and free < _SHARED_MEMORY_FLOOR:
        advice = "start the container with --shm-size=8g or --ipc=host"
        findings.append(
            Finding(Level.WARNING, "shared memory", f"{gib(free)} GiB are free in /dev/shm", advice)
        )
    else:
        findings.append(Finding(Level.OK, "shared memory", f"{gib(free)} GiB are free in /dev/shm"))
    if uses_cuda:
        import resource  # not available on every system, but on those with CUDA

        locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if locked != resource.RLIM_INFINITY:
            findings.append(
                Finding(
                    Level.NOTE,
                    "locked memory",
                    f"limited to {gib(locked)} GiB, but InfiniBand and pinned buffers need more",
                    "ulimit -l unlimited (containers: --ulimit memlock=-1)",
                )
            )
    return findings


def disk_findings(directory: Path, test_bytes: int, needed_bytes: float = 0) -> list[Finding]:
    """Free space for `needed_bytes` in `directory` (or its nearest existing parent), and the disk's speed.

    Writes a file of `test_bytes`, flushes it to the disk, reads it back and removes it.
    """
    existing = next(path for path in [directory, *directory.absolute().parents] if path.exists())
    subject = f"disk ({directory})"
    status = os.statvfs(existing)
    free, total = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    room = f"{free / 1e9:.3g} of {total / 1e9:.3g} GB free"
    if status.f_files and not status.f_favail:
        return [Finding(Level.PROBLEM, subject, "no file can be created: no inodes left", "remove files")]
    if free < max(needed_bytes, 2 * test_bytes):  # the test itself must not fill a disk that others use
        text = f"a checkpoint takes about {needed_bytes / 1e9:.3g} GB" if needed_bytes else "nearly full"
        return [Finding(Level.PROBLEM, subject, f"{room}: {text}", "make room, or choose another run_dir")]
    try:
        written, read = _disk_speed(existing, test_bytes)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text, advice = (
                f"full ({room}): {os.strerror(error.errno)}",
                "make room, or choose another run_dir",
            )
        else:
            text, advice = f"cannot be written: {error.strerror}", "choose another run_dir"
        return [Finding(Level.PROBLEM, subject, text, advice)]
    speed = f"{room}, writes {written / 1e6:.0f} MB/s and reads {read / 1e6:.0f} MB/s"
    if needed_bytes:
        speed += (
            f"; a checkpoint of {needed_bytes / 1e9:.3g} GB takes one writer {needed_bytes / written:.0f} s"
        )
    if written < _SLOW_DISK:
        return [Finding(Level.WARNING, subject, speed, "checkpoints will be slow: use a faster disk")]
    return [Finding(Level.OK, subject, speed)]


def _disk_speed(directory: Path, size: int) -> tuple[float, float]:
    """Bytes per second written through to the disk, and read back bypassing the page cache if possible."""
    block = os.urandom(min(size, 2**22))  # not zeros: file systems compress, and store holes
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".disk_speed_") as file:
        start = time.perf_counter()
        for _ in range(max(1, size // len(block))):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = file.tell() / (time.perf_counter() - start)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start, total = time.perf_counter(), file.tell()
        file.seek(0)
        while file.read(2**22):
            pass
        return written, total / (time.perf_counter() - start)


def gib(size: float) -> str:
    """Bytes as GiB with three significant digits."""
    return f"{size / 2**30:.3g}"
