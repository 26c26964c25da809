"""A rank creates only the groups that it belongs to: the same groups as megatron-core's loops over all."""

from __future__ import annotations

import contextlib
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # noqa: F401  (registers the backend "fake")
from megatron.core import parallel_state
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import startup
from megatron_mopd.backend import cpu, process_groups
from megatron_mopd.backend.parallel import ParallelGroups, build_parallel_groups, destroy_parallel_groups
from megatron_mopd.backend.process_groups import new_group
from megatron_mopd.config import ParallelConfig
from megatron_mopd.pipeline.communicator import PipelineCommunicator
from megatron_mopd.teachers.placement import gather_groups
from tests._distributed import run_ranks

CPU = torch.device("cpu")


@contextlib.contextmanager
def simulated(rank: int, world_size: int):
    """This process as one rank of many, which do not exist; yields the (ranks, settings) of the groups that
    it creates."""
    created, create = [], process_groups._new_group

    def recorded(ranks, **settings):
        created.append((tuple(ranks), settings))
        return create(ranks, **settings | {"backend": "fake", "device_id": None})

    dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=world_size)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(process_groups, "_new_group", recorded)
            patch.setattr(torch.cuda, "is_available", lambda: False)
            cpu.install()
            yield created
    finally:
        if parallel_state.model_parallel_is_initialized():
            destroy_parallel_groups()
        dist.destroy_process_group()


def groups_of_start_up(rank: int, world_size: int, parallel: ParallelConfig) -> list:
    """Creates every group of a run on GPUs with `host_sharded` teachers."""
    with simulated(rank, world_size) as created:
        groups = build_parallel_groups(parallel, torch.device("cuda"), 0)
        with FakeTensorMode():
            PipelineCommunicator(groups.pp, groups.device, virtual_stages=groups.vpp_size)
        gather_groups(groups)
        return list(created)


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0], ids=["first", "middle", "last"])
def test_the_number_of_groups_of_a_rank_does_not_depend_on_the_number_of_ranks(place):
    """TP 4 x PP 4 with virtual stages and EP 4, on 64 and on 1,024 ranks."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=4,
        pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=2,
        expert_model_parallel_size=4,
        expert_tensor_parallel_size=1,
    )
    counts = set()
    for world_size in (64, 1024):
        rank = int(place * (world_size - 1))
        created = groups_of_start_up(rank, world_size, parallel)
        assert all(rank in ranks for ranks, _ in created)
        counts.add(len(created))
    (count,) = counts
    assert 20 < count < 40


SMALL = [
    dict(),
    dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    dict(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2),
    dict(tensor_model_parallel_size=2, context_parallel_size=2, pipeline_model_parallel_size=2),
    dict(expert_model_parallel_size=4),
    dict(tensor_model_parallel_size=2, expert_model_parallel_size=4, expert_tensor_parallel_size=1),
    dict(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=4,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=1,
    ),
    dict(tensor_model_parallel_size=4, expert_model_parallel_size=2, expert_tensor_parallel_size=2),
]


def groups_of_megatron_core() -> dict[str, list]:
    """What the globals of `parallel_state` hold: the ranks of every group, and its description."""

    def described(value):
        if isinstance(value, dist.ProcessGroup):
            return dist.get_process_group_ranks(value), value.group_desc
        return [described(item) for item in value] if isinstance(value, (list, tuple)) else value

    kinds = (dist.ProcessGroup, list, tuple, int)
    return {
        name: described(value)
        for name, value in vars(parallel_state).items()
        if name.startswith("_") and name[1:].isupper() and isinstance(value, kinds)
    } | {"all": described(parallel_state._global_process_group_list)}


@pytest.mark.parametrize("layout", SMALL, ids=lambda layout: "-".join(map(str, layout.values())) or "DP")
def test_the_groups_are_those_of_megatron_cores_loops(layout, monkeypatch):
    """On every rank of 16: the same members, descriptions and timeouts, created in the same order."""
    parallel = ParallelConfig(**layout, distributed_timeout_minutes=7)
    calls = {}
    create = dist.distributed_c10d._new_group_with_tag

    def recorded(ranks, timeout, backend, *others, **settings):
        if dist.get_rank() in ranks:
            calls[style].append((tuple(ranks), timeout, settings["group_desc"]))
        return create(ranks, timeout, backend, *others, **settings)

    monkeypatch.setattr(dist.distributed_c10d, "_new_group_with_tag", recorded)
    for rank in range(16):
        found, calls = {}, {"all": [], "own": []}
        for style in calls:
            with simulated(rank, 16), monkeypatch.context() as patch:
                if style == "all":
                    patch.setattr("megatron_mopd.backend.parallel.only_own_groups", contextlib.nullcontext)
                build_parallel_groups(parallel, CPU, 0)
                found[style] = groups_of_megatron_core()
        assert len(found["all"]) > 15
        assert found["own"] == found["all"]
        assert calls["own"] == calls["all"] and timedelta(minutes=7) in {call[1] for call in calls["own"]}


def test_nothing_is_split_from_the_communicator_of_the_world(monkeypatch):
    """With a device bound to the world, a split would be collective over all ranks of the run."""
    device, seen = torch.device("cuda", 0), []

    def recorded(ranks, **settings):
        seen.append((dist.group.WORLD.bound_device_id, settings["device_id"]))
        if len(seen) == 2:
            raise RuntimeError("no memory")

    with simulated(0, 8), monkeypatch.context() as patch:
        dist.group.WORLD.bound_device_id = device
        patch.setattr(process_groups, "_new_group", recorded)
        new_group([0, 1])
        assert dist.group.WORLD.bound_device_id == device
        with pytest.raises(RuntimeError, match="no memory"):
            new_group([0, 1])
        assert dist.group.WORLD.bound_device_id == device
        assert new_group([1, 2]) is None
    assert seen == [(None, device), (None, device)]


def total(group: dist.ProcessGroup | None) -> float | None:
    """The sum of the members' ranks."""
    if group is None:
        return None
    value = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(value, group=group)
    return value.item()


def groups_of_unequal_ranks(rank: int) -> list:
    """Groups of real ranks that belong to different numbers of groups; some have the same ranks, and one is
    created again after it was destroyed."""
    wanted = [[0, 3], [0, 1, 2, 3], [1, 2], [1, 2], [3], [0, 1, 2, 3], range(4)]
    groups = [new_group(ranks, timeout=timedelta(seconds=20)) for ranks in wanted]
    totals = [total(group) for group in groups]
    dist.barrier()
    for group in groups:
        if group is not None:
            dist.destroy_process_group(group)
    again = [total(new_group(ranks, timeout=timedelta(seconds=20))) for ranks in wanted]
    assert again == totals
    return totals


def test_members_find_each_other_whatever_other_groups_they_have():
    everyone = [3.0, 6.0, 3.0, 3.0, 3.0, 6.0, 6.0]
    members = [{0, 3}, {0, 1, 2, 3}, {1, 2}, {1, 2}, {3}, {0, 1, 2, 3}, {0, 1, 2, 3}]
    for rank, totals in enumerate(run_ranks(4, groups_of_unequal_ranks)):
        assert totals == [value if rank in among else None for value, among in zip(everyone, members)]


def collectives_of_a_layout(rank: int) -> dict[str, tuple[list[int], float | None]]:
    cpu.install()
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    found = {}
    for _ in range(2):  # a second time, with new groups
        groups: ParallelGroups = build_parallel_groups(parallel, CPU, 0)
        kinds = {"tp": groups.tp, "pp": groups.pp, "dp": groups.dp, "tp_dp": groups.collection.tp_dp_cp}
        found = {
            kind: (dist.get_process_group_ranks(group), total(group))
            for kind, group in (kinds | gather_groups(groups)).items()
        }
        destroy_parallel_groups(keep_models_working=False)
    return found


def test_groups_of_real_ranks():
    for rank, found in enumerate(run_ranks(8, collectives_of_a_layout)):
        assert found["tp"][0] == [rank - rank % 2, rank - rank % 2 + 1]
        assert found["pp"][0] == [rank % 4, rank % 4 + 4]
        assert all(sum(ranks) == summed for ranks, summed in found.values())


def test_the_benchmark(monkeypatch, capsys):
    """Its figures: the calls of the old way grow with the ranks; the groups of a rank are the same."""
    monkeypatch.setattr("sys.argv", ["startup", "--ranks", "64", "128", "--real", "4"])
    monkeypatch.setattr(startup, "LAYOUTS", {"TP 2, PP 4, VPP 2, EP 8": (2, 4, 2, 8)})
    startup.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line.replace(",", "").split("|") for line in lines if line.startswith("TP 2, PP 4")]
    (all_64, own_64), (all_128, own_128) = ([side.split()[:2] for side in row[2:]] for row in rows)
    assert own_64 == own_128 == [own_64[1]] * 2
    assert all_64[1] == all_128[1] == own_64[1]
    assert 1.5 * int(all_64[0]) < int(all_128[0])
    assert "   64 ranks: 7" in lines and "  128 ranks: 7" in lines
    assert any(line.startswith("4 real ranks, gloo: every rank ") for line in lines)
