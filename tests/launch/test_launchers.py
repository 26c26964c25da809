"""The launchers' command lines, with recorders instead of torchrun, srun and the interpreter."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import config_from_args, parse_args

LAUNCH = Path(__file__).parents[2] / "launch"
SETTINGS = set(re.findall(r"^#   ([A-Z_]+) ", (LAUNCH / "train.sh").read_text(), re.MULTILINE))
RECORDER = f"""#!{sys.executable}
import json, os, sys
print(json.dumps({{"arguments": sys.argv[1:], "environment": dict(os.environ)}}))
"""


@pytest.fixture
def record(tmp_path):
    """Start a launcher with a recorder as its interpreter; returns its exit status and the recorded call."""
    recorder = tmp_path / "recorder"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)

    def start(script, *arguments, **settings):
        path = f"{tmp_path}:{os.environ['PATH']}"
        kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        environment = kept | {"PYTHON": str(recorder), "PATH": path} | settings
        for name in ("OMP_NUM_THREADS", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            if name not in settings:
                environment.pop(name, None)
        done = subprocess.run(
            ["bash", str(LAUNCH / script), *arguments],
            capture_output=True,
            text=True,
            env=environment,
            timeout=60,
        )
        return done, json.loads(done.stdout) if done.returncode == 0 else None

    return start


def torchrun(seen):
    """The recorded arguments as parsed by torchrun itself."""
    assert seen["arguments"][:2] == ["-m", "megatron_mopd.commands.elastic"]
    return parse_args(seen["arguments"][2:])


def test_one_node(record):
    _, seen = record("train.sh", "--config", "a b.yaml", "seed=3", NPROC_PER_NODE="2")
    arguments = torchrun(seen)
    assert arguments.standalone and arguments.module
    assert arguments.training_script == "megatron_mopd.train"
    assert arguments.training_script_args == ["--config", "a b.yaml", "seed=3"]
    config, *_ = config_from_args(arguments)
    assert (config.nproc_per_node, config.max_nodes, config.max_restarts) == (2, 1, 0)
    assert seen["environment"]["OMP_NUM_THREADS"] == "1"
    assert "NCCL_SOCKET_IFNAME" not in seen["environment"]


def test_ranks_have_time_to_save(record):
    """Slurm's signal is forwarded, and ranks get more time than torchrun's 30 s, but less than a pod."""
    _, seen = record("train.sh", "--config", "c.yaml")
    handled = config_from_args(torchrun(seen))[0].signals_to_handle.split(",")
    assert {"SIGTERM", "SIGINT", "SIGUSR1"} <= set(handled)
    patience = int(seen["environment"]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    (job_set,) = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    pod = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert 600 < patience < pod["terminationGracePeriodSeconds"]
    _, seen = record("train.sh", "--config", "c.yaml", STOP_TIMEOUT="60")
    assert seen["environment"]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "60"


def test_torchrun_passes_slurms_signal_on(tmp_path):
    """With the real torchrun, which by default exits at once with a traceback and leaves its ranks running
    (torch 2.13)."""
    (tmp_path / "stoppable.py").write_text(
        "import os, signal, sys, time\n"  # os.write: lines of different ranks do not interleave
        "def save(*_):\n    time.sleep(0.5)\n    os.write(1, b'saved\\n')\n    sys.exit(75)\n"
        "signal.signal(signal.SIGUSR1, save)\nos.write(1, b'started\\n')\ntime.sleep(120)\n"
    )
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    path = os.pathsep.join([str(tmp_path), str(LAUNCH.parent)])
    environment = kept | {"PYTHON": sys.executable, "PYTHONPATH": path}
    environment |= {"MODULE": "stoppable", "NPROC_PER_NODE": "2"}
    command = ["bash", str(LAUNCH / "train.sh")]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, env=environment, **pipes)
    assert [process.stdout.readline() for _ in range(2)] == ["started\n"] * 2
    process.send_signal(signal.SIGUSR1)
    said, errors = process.communicate(timeout=60)
    assert said == "saved\n" * 2
    assert process.returncode == 128 + signal.SIGUSR1
    assert errors.endswith("torchrun: ended its ranks after SIGUSR1\n") and "Traceback" not in errors


def test_several_nodes(record):
    settings = dict(
        NNODES="4",
        RDZV_ENDPOINT="first:29400",
        RUN_ID="merge",
        MAX_RESTARTS="3",
        NETWORK="eth1",
        JOIN_TIMEOUT="60",
        LOCAL_ADDR="10.0.0.7",
        RDZV_CONF="keep_alive_interval=2",
        NPROC_PER_NODE="1",
        MODULE="megatron_mopd.commands.doctor",
        OMP_NUM_THREADS="4",
    )
    _, seen = record("train.sh", "--config", "c.yaml", **settings)
    arguments = torchrun(seen)
    assert arguments.training_script == "megatron_mopd.commands.doctor"
    config, *_ = config_from_args(arguments)
    assert (config.min_nodes, config.max_nodes, config.max_restarts) == (4, 4, 3)
    assert (config.rdzv_backend, config.rdzv_endpoint, config.run_id) == ("c10d", "first:29400", "merge")
    assert config.local_addr == "10.0.0.7"
    assert config.rdzv_configs.items() >= {"join_timeout": "60", "keep_alive_interval": "2"}.items()
    environment = seen["environment"]
    assert (environment["NCCL_SOCKET_IFNAME"], environment["GLOO_SOCKET_IFNAME"]) == ("=eth1", "eth1")
    assert environment["OMP_NUM_THREADS"] == "4"


def test_the_node_that_has_the_address_serves_the_rendezvous(record):
    """Whatever its host name resolves to."""
    several = dict(NNODES="2", NPROC_PER_NODE="1", LOCAL_ADDR="198.51.100.7")
    for host, serves in (("198.51.100.7", True), ("198.51.100.8", False)):
        _, seen = record("train.sh", "--config", "c.yaml", RDZV_ENDPOINT=f"{host}:29400", **several)
        settings = config_from_args(torchrun(seen))[0].rdzv_configs
        assert (settings.get("is_host") == "true") is serves


def test_several_nodes_need_a_rendezvous(record):
    done, _ = record("train.sh", "--config", "c.yaml", NNODES="2")
    assert done.returncode == 2
    assert done.stderr.strip() == "error: NNODES=2 needs RDZV_ENDPOINT=HOST:PORT, the same on every node"


def test_gpus_are_found_however_slowly_they_are_listed(record, tmp_path):
    listing = tmp_path / "nvidia-smi"
    listing.write_text(
        '#!/usr/bin/env bash\nfor n in 0 1 2; do echo "GPU $n: H100" || exit 1; sleep 0.1; done\n'
    )
    listing.chmod(0o755)
    _, seen = record("train.sh", "--config", "c.yaml")
    assert torchrun(seen).nproc_per_node == "gpu"
    assert seen["environment"]["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


@pytest.fixture
def job(tmp_path):
    """A job's environment, with an srun that starts its command once, as on the first of two nodes."""
    programs = {
        "srun": '[[ $1,$2 == --kill-on-bad-exit=1,--cpu-bind=none ]] || exit 9\nshift 2\nexec "$@"',
        "scontrol": f'[[ $1 == requeue ]] && echo "$2" >> {tmp_path}/requeued && exit\n'
        '[[ $1,$2,$3 == "show,hostnames,n[3-4]" ]] && echo n3 && sleep 0.1 && echo n4',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    return dict(
        SLURM_JOB_NODELIST="n[3-4]",
        SLURM_NNODES="2",
        SLURM_JOB_ID="1042",
        SLURM_SUBMIT_DIR=str(LAUNCH.parent),
        NPROC_PER_NODE="8",
    )


def test_slurm(record, job):
    _, seen = record("slurm.sbatch", "--config", "c.yaml", **job)
    config, *_ = config_from_args(torchrun(seen))
    assert (config.max_nodes, config.nproc_per_node) == (2, 8)
    assert (config.run_id, config.rdzv_endpoint) == ("1042", "n3:29442")
    assert seen["arguments"][-2:] == ["--config", "c.yaml"]
    # A secret per job, on no command line; one that the user has set is kept.
    runs = [record("slurm.sbatch", **job)[1] for _ in range(2)]
    first, second = [run["environment"]["MOPD_JOB_SECRET"] for run in runs]
    assert re.fullmatch("[0-9a-f]{64}", first) and first != second
    assert not any(first in argument for argument in runs[0]["arguments"])
    _, seen = record("slurm.sbatch", **job, MOPD_JOB_SECRET="the user's own secret")
    assert seen["environment"]["MOPD_JOB_SECRET"] == "the user's own secret"
    # A task of a job array.
    _, seen = record(
        "slurm.sbatch", "--config", "c_%a.yaml", "seed=%a", "x=5%", **job, SLURM_ARRAY_TASK_ID="7"
    )
    assert seen["arguments"][-4:] == ["--config", "c_7.yaml", "seed=7", "x=5%"]


@pytest.mark.parametrize(
    "saves_with, array, requeued",
    [
        (1, {}, "1042\n"),
        (1, {"SLURM_ARRAY_JOB_ID": "1040", "SLURM_ARRAY_TASK_ID": "2"}, "1040_2\n"),
        (0, {}, None),  # it was the last iteration
    ],
)
def test_a_slurm_job_that_is_asked_to_stop(job, tmp_path, saves_with, array, requeued):
    """The script waits until the step has saved, and is requeued if the time limit stopped the run."""
    launched = tmp_path / "python"
    launched.write_text(
        "#!/usr/bin/env bash\n"
        f'trap "sleep 0.3; echo saved; exit {saves_with}" USR1\n'
        "echo started\nfor n in {1..300}; do sleep 0.1; done\n"
    )
    launched.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = os.environ | job | array | {"PYTHON": str(launched), "PATH": path}
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "--config", "c.yaml"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGTERM)  # from a preemption, which the step receives directly
    time.sleep(0.3)
    assert process.poll() is None, "the script did not wait for the step"
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=60)[0] == "saved\n"
    assert process.returncode == saves_with
    record = tmp_path / "requeued"
    assert (record.read_text() if record.exists() else None) == requeued


def test_kubernetes():
    """The file is YAML, sets only what train.sh reads, and states the number of nodes consistently."""
    (job_set,) = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    assert job_set["kind"] == "JobSet"
    (job,) = job_set["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert (LAUNCH.parent / container["command"][0]).samefile(LAUNCH / "train.sh")
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert set(environment) <= SETTINGS
    # Embedded Jobs were refused without it: https://github.com/kubernetes/kubernetes/issues/131512
    for rule in spec["podFailurePolicy"]["rules"]:
        assert [condition["status"] for condition in rule["onPodConditions"]] == ["True"]
    assert spec["completions"] == spec["parallelism"] == int(environment["NNODES"])
    name = job_set["metadata"]["name"]
    host, port = environment["RDZV_ENDPOINT"].split(":")
    assert host == f"{name}-{job['name']}-0-0.{name}"
    assert [entry["containerPort"] for entry in container["ports"]] == [int(port)]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}


@pytest.mark.parametrize("script", ["train.sh", "slurm.sbatch", "iterated_mopd.sh"])
def test_syntax(script):
    assert script == "slurm.sbatch" or os.access(LAUNCH / script, os.X_OK)
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)
