"""Starting the ranks and creating their groups: missing ranks, sizes that fit, and patches per backend."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.moe import moe_utils, router
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from megatron_mopd.backend import failure, parallel, versions
from megatron_mopd.backend.check_in import announce
from megatron_mopd.backend.launch_environment import Launch, read_launch
from megatron_mopd.config import ConfigError, ParallelConfig
from tests import _models
from tests._agent import Agent
from tests._distributed import RankPool, run_ranks

CPU = torch.device("cpu")


@pytest.fixture
def store(monkeypatch):
    """A rendezvous served by an agent, as under torchrun; this process is rank 1 of three."""
    with Agent() as agent:
        for name, value in dict(
            RANK="1",
            LOCAL_RANK="1",
            WORLD_SIZE="3",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(agent.port),
            TORCHELASTIC_USE_AGENT_STORE="True",
        ).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
        yield dist.TCPStore("127.0.0.1", agent.port)


def test_missing_ranks_are_named(store, monkeypatch):
    begun = time.monotonic()
    message = r"only 1 of 3 ranks started within 0.01 minutes; missing: 0, 2\. .*distributed_timeout_minutes"
    with pytest.raises(ConfigError, match=message):
        parallel.start_ranks(CPU, 0.01)
    assert time.monotonic() - begun < 30
    assert not dist.is_initialized()
    # Rank 0 of the same attempt has arrived; ranks of the previous attempt do not count.
    announce(dist.PrefixStore("megatron_mopd/0", store), 0, 3, "cpu")
    with pytest.raises(ConfigError, match="only 2 of 3 ranks started .* missing: 2. "):
        parallel.start_ranks(CPU, 0.01)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(ConfigError, match="only 1 of 3 ranks"):
        parallel.start_ranks(CPU, 0.01)


def test_ranks_on_other_devices_are_named(store):
    """Process groups of different backends would wait for each other."""
    for rank in (0, 2):
        announce(dist.PrefixStore("megatron_mopd/0", store), rank, 3, "cuda")
    with pytest.raises(ConfigError, match="ranks differ in device: cpu on rank 1, cuda on ranks 0, 2; every"):
        parallel.start_ranks(CPU, 0.1)
    assert not dist.is_initialized()


def test_agents_that_count_restarts_differently(store, monkeypatch):
    """Rank 0 serves the store (launch/train.sh on several nodes): a replaced node's count starts at 0."""
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    announce(dist.PrefixStore("megatron_mopd/0", store), 0, 3, "cpu")
    with pytest.raises(ConfigError, match="only 2 of 3 ranks started .* missing: 2. "):
        parallel.start_ranks(CPU, 0.01)


def test_no_rendezvous(store, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ConfigError, match="rank 1 could not reach the rendezvous at 127.0.0.1:1 within 0.02"):
        parallel.start_ranks(CPU, 0.02)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    with pytest.raises(ConfigError, match="GLOO_SOCKET_IFNAME=ib7: this host has no .* set it to one of"):
        parallel.start_ranks(CPU, 0.02)


TORCHRUN = dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
LAUNCHES = [
    ({}, {}, Launch(0, 1, 0, None)),
    (TORCHRUN, {}, Launch(1, 3, 1, ("127.0.0.1", 29500))),
    (TORCHRUN, {"WORLD_SIZE": "1", "RANK": "0"}, Launch(0, 1, 1, None)),
    ({}, {"SLURM_STEP_NUM_TASKS": "1"}, Launch(0, 1, 0, None)),
    (TORCHRUN, {"SLURM_STEP_NUM_TASKS": "8"}, Launch(1, 3, 1, ("127.0.0.1", 29500))),
    (TORCHRUN, {"LOCAL_WORLD_SIZE": "2"}, Launch(1, 3, 1, ("127.0.0.1", 29500), 2)),
    (TORCHRUN, {"LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE='two' is not a number"),
    (TORCHRUN, {"MASTER_ADDR": None}, "MASTER_ADDR is not set although WORLD_SIZE=3; start with torchrun"),
    (TORCHRUN, {"MASTER_PORT": None}, "MASTER_PORT is not set although WORLD_SIZE=3; start with torchrun"),
    (TORCHRUN, {"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a number"),
    (TORCHRUN, {"RANK": None}, "RANK is not set although WORLD_SIZE=3"),
    (TORCHRUN, {"RANK": "3"}, "RANK=3 is not below WORLD_SIZE=3"),
    (TORCHRUN, {"LOCAL_RANK": None}, "LOCAL_RANK is not set although WORLD_SIZE=3"),
    (TORCHRUN, {"WORLD_SIZE": "three"}, "WORLD_SIZE='three' is not a number"),
    ({}, {"RANK": "1"}, "RANK=1 but WORLD_SIZE is not set; start with torchrun"),
    ({}, {"SLURM_STEP_NUM_TASKS": "8"}, "srun started 8 processes .* launch/train.sh once per node"),
    ({}, {"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 processes"),
]


@pytest.mark.parametrize("variables, changes, expected", LAUNCHES)
def test_variables_of_the_launcher(variables, changes, expected):
    environment = {name: value for name, value in (variables | changes).items() if value is not None}
    if isinstance(expected, Launch):
        assert read_launch(environment) == expected
    else:
        with pytest.raises(ConfigError, match=expected):
            read_launch(environment)


def test_whether_a_job_is_on_one_host():
    """Known only if the launcher says so; the lifeline then needs no secret from the user."""
    assert Launch(0, 1, 0, None).is_on_one_host
    for here, is_on_one_host in ((3, True), (2, False), (None, False)):
        assert Launch(1, 3, 1, ("127.0.0.1", 29500), here).is_on_one_host is is_on_one_host


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="LOCAL_RANK=1, but this host has 1 GPU, .*nproc-per-node gpu"):
        parallel.select_device("auto")


def test_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device: 'cuda' .* device=cpu"):
        parallel.select_device("cuda")


MODEL = dict(num_layers=6, num_moe_experts=None, num_attention_heads=12, num_query_groups=4)
EXPERTS = MODEL | dict(num_moe_experts=6)
LAYOUTS = [
    ({"tensor_model_parallel_size": 3}, MODEL, "3 x 1 x 1 = 3 does not divide .* 4; valid products: 1, 2, 4"),
    (
        {"context_parallel_size": 8},
        MODEL,
        "TP 1 x PP 1 x CP 8 with EP 1 needs at least 8 ranks, and 4 were started; .*nproc-per-node 8",
    ),
    (
        {"tensor_model_parallel_size": 4},
        MODEL | {"num_attention_heads": 6},
        "num_attention_heads=6; valid: 1, 2, 3, 6",
    ),
    (
        {"tensor_model_parallel_size": 4},
        MODEL | {"num_query_groups": 6},
        "num_query_groups=6; valid: 1, 2, 3, 6",
    ),
    (
        {"pipeline_model_parallel_size": 4},
        MODEL,
        "4 stages x 1 .*num_layers=6; valid products: 1, 2, 3, 6",
    ),
    (
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        MODEL,
        "2 stages x 2 virtual chunks do not divide num_layers=6",
    ),
    ({"virtual_pipeline_model_parallel_size": 2}, MODEL, "needs pipeline_model_parallel_size of at least 2"),
    ({"expert_model_parallel_size": 2}, MODEL, "above 1, but the model has no num_moe_experts"),
    ({"expert_model_parallel_size": 4}, EXPERTS, "4 does not divide num_moe_experts=6; valid: 1, 2, 3, 6"),
    (
        {"expert_model_parallel_size": 4, "pipeline_model_parallel_size": 2},
        EXPERTS,
        "TP 1 x PP 2 x CP 1 with EP 4 needs at least 8 ranks, and 4 were started",
    ),
    (
        {"expert_model_parallel_size": 3},
        EXPERTS,
        r"expert_model_parallel_size: 3 .* pipeline 1\) does not divide .* ranks, 4; valid: 1, 2, 4",
    ),
    ({"sequence_parallel": True}, MODEL, "sequence_parallel: needs tensor_model_parallel_size of at least 2"),
    ({"tensor_model_parallel_size": 2}, EXPERTS, "sequence_parallel: must be true for a mixture-of-experts"),
]


@pytest.mark.parametrize("layout, model, message", LAYOUTS)
def test_sizes_that_do_not_fit_are_named_with_those_that_do(layout, model, message):
    with pytest.raises(ConfigError, match=message):
        parallel.validate_layout(ParallelConfig(**layout), 4, **model)


def test_sizes_that_fit():
    fits = dict(tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=3)
    parallel.validate_layout(ParallelConfig(**fits, virtual_pipeline_model_parallel_size=2), 12, **MODEL)
    parallel.validate_layout(ParallelConfig(**fits, expert_model_parallel_size=2), 12, **EXPERTS)
    # More tensor-parallel ranks than query groups: each group is replicated on several of them.
    few = MODEL | dict(num_query_groups=2)
    parallel.validate_layout(ParallelConfig(tensor_model_parallel_size=4), 12, **few)


def layout_facts(rank, layout):
    groups = _models.groups_for(layout)
    sizes = (groups.tp_size, groups.pp_size, groups.cp_size, groups.dp_size, groups.vpp_size)
    return sizes, groups.is_first_stage, groups.is_last_stage, groups.last_stage_rank, groups.rank


def test_groups():
    with RankPool(4) as pool:
        layout = dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
        assert pool.run(layout_facts, layout) == [
            ((2, 2, 1, 1, 1), True, False, 2, 0),
            ((2, 2, 1, 1, 1), True, False, 3, 1),
            ((2, 2, 1, 1, 1), False, True, 2, 2),
            ((2, 2, 1, 1, 1), False, True, 3, 3),
        ]
        layout = dict(context_parallel_size=2, expert_model_parallel_size=2)
        for rank, facts in enumerate(pool.run(layout_facts, layout)):
            assert facts == ((1, 1, 2, 2, 1), True, True, rank, rank)


def who_speaks(rank, reports):
    os.environ["TORCHELASTIC_ERROR_FILE"] = f"{reports}/{rank}.json"
    if rank == 1:
        return failure.is_first_to_fail("rank 1 ran out of luck")
    time.sleep(0.3)  # the consequential failure comes after its cause
    return failure.is_first_to_fail("rank 1 has gone")


def test_only_the_first_failing_rank_speaks(tmp_path):
    assert run_ranks(3, who_speaks, str(tmp_path)) == [False, True, False]
    (report,) = tmp_path.iterdir()
    assert report.name == "1.json"
    failed = ProcessFailure(local_rank=1, pid=1, exitcode=1, error_file=str(report))
    assert failed.message["message"] == "rank 1 ran out of luck", "torchrun reads this key"
    assert abs(failed.timestamp - time.time()) < 300


def test_before_ranks_are_connected_rank_0_speaks(monkeypatch):
    monkeypatch.setattr(failure, "_LET_THE_FIRST_SPEAK", 0.0)
    for rank, speaks in (("0", True), ("3", False)):
        monkeypatch.setenv("RANK", rank)
        assert failure.is_first_to_fail("no such file") is speaks


WHAT_IS_PATCHED = """
import json
import torch, torch.distributed
import megatron_mopd.train
from megatron.core.tensor_parallel import random as megatron_random
from megatron_mopd.backend import parallel

MODULES = {"torch": torch, "cuda": torch.cuda, "nvtx": torch.cuda.nvtx, "random": megatron_random,
           "dist": torch.distributed, "Tensor": torch.Tensor, "Module": torch.nn.Module}
keep = []  # so that no id is used twice

def facts():
    things = {f"{m}.{n}": vars(module)[n] for m, module in MODULES.items() for n in vars(module)}
    keep.append(things)
    return {name: id(thing) for name, thing in things.items()}

def changed(device):
    before = facts()
    selected = parallel.select_device(device)
    return str(selected), [name for name, thing in facts().items() if before.get(name) != thing]

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.set_device = lambda device: None
on_cuda = changed("auto")
torch.cuda.is_available = lambda: False
print(json.dumps([on_cuda, changed("auto")]))
"""


def test_nothing_is_patched_on_cuda():
    """In a separate interpreter, because the changes of `select_device` cannot be undone."""
    result = subprocess.run(
        [sys.executable, "-c", WHAT_IS_PATCHED],
        capture_output=True,
        text=True,
        timeout=250,
        env=os.environ | {"LOCAL_RANK": "0"},
    )
    assert result.returncode == 0, result.stderr
    (device, on_cuda), (_, on_cpu) = json.loads(result.stdout)
    assert device == "cuda:0"
    assert on_cuda == []
    assert {"torch.zeros", "Tensor.cuda", "cuda.Stream", "dist.all_to_all_single"} <= set(on_cpu)
    # The package's log filter works: no warning about missing Apex or Transformer Engine appears.
    assert not re.search("Apex|Transformer Engine", result.stderr), result.stderr


def test_version_repairs_are_idempotent():
    versions.install()
    once = router.TopKRouter._apply_expert_bias
    versions.install()
    assert router.TopKRouter._apply_expert_bias is once
    assert hasattr(moe_utils, "te_general_gemm")
