"""The doctor on this machine and on machines with problems: its output and exit status."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_mopd.backend import bandwidth, machine, network, software
from megatron_mopd.backend.bandwidth import GroupBandwidth
from megatron_mopd.backend.finding import Level, summary
from megatron_mopd.commands import doctor, examination, run_examination
from megatron_mopd.estimate.memory import RankMemory
from tests import _models, _runs
from tests._agent import Agent
from tests._distributed import run_ranks

TOOL = Path(__file__).parents[2] / "tools" / "doctor.py"
QUICK = ["--disk-mib", "1", "--network-mib", "1"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("doctor")
    _runs.write_inputs(directory)
    return directory


def examined(tmp_path, *arguments, world_size=1, **environment):
    """Run the doctor on ranks as torchrun starts them: (exit status of every rank, output of all)."""
    context = multiprocessing.get_context("fork")
    output = tmp_path / "doctor.log"
    with Agent() as agent:
        ranks = [
            context.Process(target=_examine, args=(rank, world_size, agent, output, arguments, environment))
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(200)
            rank.kill()
    return [rank.exitcode for rank in ranks], output.read_text()


def _examine(rank, world_size, agent, output, arguments, environment):
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = open(1, "w", closefd=False)
    if world_size > 1:
        agent.set_environment(rank, world_size)
    os.environ.update(environment)
    status = 1
    try:
        doctor.main([*QUICK, *arguments])
    except SystemExit as end:
        status = end.code
    finally:
        sys.stdout.flush()
        time.sleep(0.3 * rank)  # rank 0 exits first, and the others must not take it for dead
        os._exit(status)


def written(directory, tmp_path, **sections) -> str:
    values = _runs.values(directory, run_dir=str(tmp_path / "run"), **sections)
    return _runs.write_config(tmp_path / "config.yaml", values)[1]


def test_a_healthy_run(inputs, tmp_path):
    """Two ranks, a layout with expert parallelism, a distillation run: every section, and status 0."""
    config = written(
        inputs,
        tmp_path,
        objective={"kind": "full_vocab_kl"},
        teachers=[{"name": "self"}],
        routing={"default": "self"},
        parallel={"expert_model_parallel_size": 2},
    )
    statuses, text = examined(tmp_path, "--config", config, world_size=2)
    assert statuses == [0, 0], text
    for part in (
        "ok       megatron-core: ",
        "note     Transformer Engine: not installed",
        "used on cpu: layers: PyTorch layers of megatron-core and this package",
        "24 prompts in add, copy; teachers self",
        "layout: 2 ranks = TP 1 x PP 1 x CP 1 x DP 2, experts over EP 2",
        "start: from the beginning, 2 iterations",
        "ranks: 2 on 1 host(s)",
        "EP: 1 group(s) of 2: all-reduce ",
        "DP x CP: 1 group(s) of 2: ",
        "healthy: nothing here will stop training",
    ):
        assert part in text, f"{part!r} is not in:\n{text}"
    assert "PROBLEM" not in text
    assert not list(tmp_path.glob("run/*")), "the doctor must not write to the run directory"


def test_too_few_processes_for_the_layout(inputs, tmp_path):
    config = written(inputs, tmp_path, parallel={"pipeline_model_parallel_size": 2})
    statuses, text = examined(tmp_path, "--config", config, "--world-size", "1")
    assert statuses == [1]
    assert "PROBLEM  configuration: parallel: TP 1 x PP 2 x CP 1 with EP 1 needs at least 2 ranks" in text
    assert "1 problem will stop training" in text


def test_a_wrong_interface_stops_before_the_ranks_wait_for_each_other(tmp_path):
    statuses, text = examined(tmp_path, world_size=2, GLOO_SOCKET_IFNAME="ib7")
    assert statuses[0] == 1
    assert "GLOO_SOCKET_IFNAME=ib7: this host has no network interface 'ib7' (" in text
    assert "-> set it to one of them, or unset it" in text


@pytest.mark.parametrize("missing", ["megatron", "torch"])
def test_a_missing_package(missing):
    """In a separate interpreter: the doctor must not need the package to report that it is missing."""
    hide = f"""
import runpy, sys, importlib.metadata as metadata
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {missing!r}:
            raise ModuleNotFoundError(name=name)
sys.meta_path.insert(0, Hidden())
sys.argv = ["doctor.py"]
runpy.run_path({str(TOOL)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    name = {"megatron": "megatron-core", "torch": "torch"}[missing]
    assert f"PROBLEM  {name}: not installed\n           -> pip install '{name}" in done.stdout
    assert "install these first" in done.stdout and not done.stderr


def test_versions_and_optional_packages(monkeypatch):
    monkeypatch.setattr(software, "requirements", lambda: ["numpy<1", "numpy>=1"])
    _, too_new, fits = software.required_findings()
    assert too_new.level == Level.PROBLEM and too_new.text.endswith("but this package needs <1")
    assert fits.level == Level.OK
    # The unrelated package of that name on PyPI, and one built for another torch version.
    other = type(sys)("apex")
    monkeypatch.setitem(sys.modules, "apex", other)
    assert "not NVIDIA's Apex" in software.find_optional("Apex").error

    def broken(name):
        raise ImportError("undefined symbol: _ZN3c10\nand more")

    monkeypatch.setattr(software.importlib, "import_module", broken)
    found = software.find_optional("Triton")
    assert not found.works and found.error == "cannot be imported: undefined symbol: _ZN3c10"


def test_names_of_interfaces():
    here = ["lo", "eth0", "eth1", "ib0"]
    assert network.chosen_by_nccl("eth", here) == ["eth0", "eth1"]
    assert network.chosen_by_nccl("=eth0", here) == ["eth0"]
    assert network.chosen_by_nccl("^lo,eth", here) == ["ib0"]
    assert network.chosen_by_nccl("^=eth0", here) == ["lo", "eth1", "ib0"]
    assert network.interface_problems({"NCCL_SOCKET_IFNAME": "ib", "GLOO_SOCKET_IFNAME": "eth0"}, here) == []
    nccl, gloo = network.interface_problems(
        {"NCCL_SOCKET_IFNAME": "=ib", "GLOO_SOCKET_IFNAME": "eth0,eth"}, here
    )
    assert nccl == "NCCL_SOCKET_IFNAME==ib matches no network interface of this host (eth0, eth1, ib0, lo)"
    assert gloo.startswith("GLOO_SOCKET_IFNAME=eth0,eth: this host has no network interface 'eth' (")


@contextlib.contextmanager
def small_disk(directory, size):
    """Mount a file system of `size` bytes at `directory`; returns whether mounting is permitted."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    is_mounted = (
        shutil.which("mount") is not None and not subprocess.run(mount, capture_output=True).returncode
    )
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", str(directory)], check=True)


def test_a_full_disk(tmp_path, monkeypatch):
    (found,) = machine.disk_findings(tmp_path, 2**20)
    assert found.level < Level.PROBLEM and "MB/s" in found.text
    (found,) = machine.disk_findings(tmp_path / "not" / "yet", 2**20, needed_bytes=1e18)
    assert found.level == Level.PROBLEM and "a checkpoint takes about 1e+09 GB" in found.text
    with small_disk(tmp_path / "small", 2**20) as is_mounted:
        if is_mounted:
            (found,) = machine.disk_findings(tmp_path / "small", 2**20)
            assert found.level == Level.PROBLEM and "nearly full" in found.text

    def full(directory, size):
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(machine, "_disk_speed", full)
    (found,) = machine.disk_findings(tmp_path, 2**20)
    assert found.level == Level.PROBLEM and "No space left on device" in found.text
    assert summary([found]) == "1 problem will stop training, 0 warnings"


def test_checkpoints_that_are_not_complete(tmp_path):
    (tmp_path / "weights").write_bytes(b"1234")
    listed = {"weights": {"bytes": 4, "sha256": "0" * 64}}
    (tmp_path / "checksums.json").write_text(json.dumps(listed))
    assert run_examination.check_files(tmp_path, "student.load", False) == 4
    with pytest.raises(ValueError, match="student.load: .* weights differs from its checksum"):
        run_examination.check_files(tmp_path, "student.load", True)
    (tmp_path / "weights").write_bytes(b"123")
    with pytest.raises(ValueError, match="weights has 3 bytes instead of 4"):
        run_examination.check_files(tmp_path, "student.load", False)
    (tmp_path / "weights").unlink()
    with pytest.raises(ValueError, match="weights is missing"):
        run_examination.check_files(tmp_path, "student.load", False)


def test_memory_that_is_not_there():
    memory = {
        rank: RankMemory({"student weights": 60}, {"teacher storage": 10}, 0, (0, 0)) for rank in (0, 4)
    }
    gpu, host = run_examination.memory_findings(memory, 8, 8, 100, 100)
    assert (gpu.level, host.level) == (Level.OK, Level.OK)
    gpu, host = run_examination.memory_findings(memory, 8, 8, 63, 79)
    assert (gpu.level, host.level) == (Level.WARNING, Level.PROBLEM)
    gpu, _ = run_examination.memory_findings(memory, 8, 8, 59, 100)
    assert gpu.level == Level.PROBLEM and "too little" in gpu.text
    (host,) = run_examination.memory_findings(memory, 8, 4, None, 280)  # a CPU's ranks share its memory
    assert host.level == Level.WARNING


def test_size_of_a_checkpoint(inputs):
    """Compared with a count from the model's sizes, with two layouts."""
    values = _runs.values(inputs, params_dtype="bfloat16")
    for parallel, world_size in (({}, 1), ({"expert_model_parallel_size": 2}, 2)):
        config = _models.config_from_dict(values | {"parallel": parallel})
        memory = run_examination.estimate_apart(config, world_size, [0])
        h, vocabulary, experts = 32, 304, 2 * 4 * 3 * 24 * 32
        attention = 2 * (h * h + 2 * h * 16 + h * h)
        count = 2 * vocabulary * h + experts + attention + 2 * 4 * h + 5 * h
        assert run_examination.checkpoint_bytes(config, memory) == 14 * count


def test_sharded_teachers_are_estimated_for_hosts_of_the_given_size(inputs):
    """Two hosts of two ranks each keep the teacher once; one host of four ranks keeps it once in all."""
    values = _runs.values(inputs, objective={"kind": "full_vocab_kl"}, routing={"default": "self"})
    values |= {"teachers": [{"name": "self"}], "teacher_storage": {"mode": "host_sharded"}}
    config = _models.config_from_dict(values)
    two, four = (
        run_examination.estimate_apart(config, 4, [0], ranks)[0].host["teacher storage"] for ranks in (2, 4)
    )
    assert 1.3 * four < two < 2 * four  # heads are not sharded


def test_links_of_gpus():
    one = "GPU {}: NVIDIA H100 80GB HBM3 (UUID: GPU-{})\n"
    up = "\t Link {}: 26.562 GB/s\n"
    whole = "".join(one.format(g, g) + "".join(up.format(i) for i in range(18)) for g in range(2))
    (found,) = machine.link_findings(whole, 2)
    assert (found.level, found.text) == (Level.OK, "18 links per GPU, 26.562 GB/s each")
    (found,) = machine.link_findings(whole.replace("Link 3: 26.562 GB/s", "Link 3: <inactive>", 1), 2)
    assert found.level == Level.WARNING and "GPU 0: 17, GPU 1: 18" in found.text
    (found,) = machine.link_findings(None, 2)
    assert found.level == Level.WARNING and "PCIe" in found.text


def measured(rank, lies):
    if lies:
        bandwidth._OPERATIONS["point-to-point"] = lambda *arguments: (1.0, rank != 3, 100.0)
    groups = _models.groups_for({"pipeline_model_parallel_size": 2})
    return bandwidth.measure(groups, 4096, repeats=1)


def test_bandwidth_of_every_group():
    results = run_ranks(4, measured, True)
    assert results.count(results[0]) == 4
    assert [(group.kind, group.ranks) for group in sorted(results[0], key=lambda g: (g.kind, g.ranks))] == [
        ("DP x CP", (0, 1)),
        ("DP x CP", (2, 3)),
        ("PP", (0, 2)),
        ("PP", (1, 3)),
        ("expert DP", (0, 1)),
        ("expert DP", (2, 3)),
    ]
    assert all(min(group.bandwidth.values()) > 0 for group in results[0])
    wrong = {group.ranks: group.wrong for group in results[0] if group.kind == "PP"}
    assert wrong == {(0, 2): (), (1, 3): ("point-to-point",)}, "received data must be compared with sent data"
    findings = examination.bandwidth_findings(results[0])
    (problem,) = [f for f in findings if f.level == Level.PROBLEM and f.subject == "PP"]
    assert "point-to-point between ranks 1, 3" in problem.text and "wrong data" in problem.text


def test_slow_and_misplaced_groups_are_named():
    def group(ranks, speed, hosts=("a",)):
        return GroupBandwidth("TP", ranks, hosts, {"all-reduce": speed}, ())

    groups = [group((0, 1), 9e9), group((2, 3), 10e9), group((4, 5), 2e9, ("a", "b"))]
    summary, apart, slow = examination.bandwidth_findings(groups)
    assert summary.text == "3 group(s) of 2: all-reduce 9 GB/s (bus bandwidth, median)"
    assert apart.level == Level.WARNING and "ranks 4, 5 are on several hosts (a, b)" in apart.text
    assert slow.level == Level.WARNING and "ranks 4, 5 reaches only 2 GB/s" in slow.text


def test_hosts_that_differ():
    facts = {"torch": "2.13", "host": "a"}
    remark = machine.Finding(Level.WARNING, "NVLink", "none", "")
    gathered = [(facts, []), (facts, []), ({"torch": "2.12", "host": "b"}, [remark])]
    ranks, told, differs = examination.host_findings(gathered)
    assert ranks.text == "3 on 2 host(s): a, b"
    assert told.subject == "b: NVLink"
    assert differs.level == Level.PROBLEM and differs.text == "2.12 on b, 2.13 on a"
