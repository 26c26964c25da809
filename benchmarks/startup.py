"""Start-up of thousands of ranks: how many process groups one rank creates, and how long that takes.

    python -m benchmarks.startup                          # 64 to 4,096 simulated ranks, 8 real ones
    python -m benchmarks.startup --ranks 512 --real 0

Simulated ranks: this process is one rank of a world that does not exist (torch's fake process group, whose
communicators connect to nobody), the first, a middle and the last one in turn. It runs the code of a run's
start: megatron-core's groups, the communicators of the pipeline as on GPUs, the groups of `host_sharded`
teachers. "every rank" is how torch wants it by default: each rank calls `new_group` for every group of the
run. "members" is what the trainer does. The seconds are Python's and torch's own, without the network: NCCL
would have to split the world's communicator in every call of the first kind, and connects the members in
those of the second.

Check-in: the requests of one rank to the store, before torch.distributed is initialized.

Real ranks: processes on this machine, connected by gloo, TP 2 x PP 2; seconds of the slowest rank.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # noqa: F401  (registers the backend "fake")
from torch._subclasses.fake_tensor import FakeTensorMode

import megatron_mopd.commands  # noqa: F401  (silences messages of the dependencies)
from megatron_mopd.backend import cpu, parallel, process_groups
from megatron_mopd.backend.check_in import check_in
from megatron_mopd.backend.parallel import parallel_state
from megatron_mopd.config import ParallelConfig
from megatron_mopd.pipeline import communicator
from megatron_mopd.pipeline.communicator import PipelineCommunicator
from megatron_mopd.teachers import placement
from tests._distributed import run_ranks

LAYOUTS = {
    "TP 2, PP 2, EP 8": (2, 2, 1, 8),
    "TP 4, PP 4, VPP 2, EP 16": (4, 4, 2, 16),
    "TP 8, PP 8, VPP 2, EP 8": (8, 8, 2, 8),
    "TP 8, PP 8, VPP 2, EP 32": (8, 8, 2, 32),
}
"""Tensor, pipeline, virtual pipeline and expert parallel sizes."""


@dataclass(frozen=True)
class Cost:
    calls: int
    groups: int
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--real", type=int, default=8, help="number of real ranks, a multiple of 4")
    options = parser.parse_args()
    if options.real:
        real = run_ranks(options.real, construct, timeout=300)
    print("simulated ranks          | every rank creates all groups | members only")
    print("layout                   | ranks |  calls groups seconds | calls groups seconds")
    for name, sizes in LAYOUTS.items():
        for world_size in options.ranks:
            config = layout(*sizes, world_size)
            if world_size % (sizes[0] * sizes[1]) or world_size % (sizes[3] * sizes[1]):
                continue
            everyone, members = (
                worst(config, world_size, members_only=members_only) for members_only in (False, True)
            )
            print(f"{name:24} | {world_size:5} | {shown(everyone)} | {shown(members)}", flush=True)
    print("\ncheck-in: requests to the store of one rank that arrives last")
    for world_size in options.ranks:
        print(f"{world_size:5} ranks: {requests_of_check_in(world_size)}")
    if options.real:
        print(f"\n{options.real} real ranks, gloo: every rank {real[0][0]:.2f} s, members {real[0][1]:.2f} s")


def layout(tp: int, pp: int, vpp: int, ep: int, world_size: int) -> ParallelConfig:
    """With a single teacher block, so that its groups are megatron-core's, whose ranks the old way can
    list."""
    return ParallelConfig(
        teacher_block_size=max(1, world_size // (tp * pp)),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1,
    )


def worst(config: ParallelConfig, world_size: int, *, members_only: bool) -> Cost:
    """The largest figures of the first, a middle and the last rank."""
    costs = [
        simulate(config, rank, world_size, members_only) for rank in (0, world_size // 2, world_size - 1)
    ]
    return Cost(*(max(getattr(cost, name) for cost in costs) for name in ("calls", "groups", "seconds")))


def simulate(config: ParallelConfig, rank: int, world_size: int, members_only: bool) -> Cost:
    """Start-up of one rank of a world of fake communicators."""
    calls, new_group = 0, process_groups._new_group

    def counted(ranks, **settings):
        nonlocal calls
        calls += 1
        return new_group(ranks, **settings | {"backend": "fake", "device_id": None})

    cpu.install()
    dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=world_size)
    try:
        with patch.object(process_groups, "_new_group", counted), patch.object(dist, "new_group", counted):
            started = time.perf_counter()
            with contextlib.nullcontext() if members_only else every_rank_creates_all():
                start_up(config, torch.device("cuda"))
            seconds = time.perf_counter() - started
        groups = len(dist.distributed_c10d._world.pg_map) - 1  # without the world
        return Cost(calls, groups, seconds)
    finally:
        parallel.destroy_parallel_groups()
        dist.destroy_process_group()


def start_up(config: ParallelConfig, device: torch.device) -> None:
    """Every process group of a run with `host_sharded` teachers, but one for rewards, which has all ranks."""
    groups = parallel.build_parallel_groups(config, device, seed=0)
    with FakeTensorMode() if device.type == "cuda" else contextlib.nullcontext():
        PipelineCommunicator(groups.pp, device, virtual_stages=groups.vpp_size)
    placement.gather_groups(groups)


@contextlib.contextmanager
def every_rank_creates_all() -> Iterator[None]:
    """As before: the loops of megatron-core, and for the other groups a loop over those of all ranks.

    The ranks of these groups were gathered from all ranks, which a simulation cannot do; megatron-core's
    generator lists the same ones.
    """

    def for_all(ranks, timeout=None, backend=None, group_desc=None):
        mine = None
        for others in alike(list(ranks)):
            group = dist.new_group(others, timeout=timeout, backend=backend, group_desc=group_desc)
            mine = group if others == list(ranks) else mine
        return mine

    with (
        patch.object(parallel, "only_own_groups", contextlib.nullcontext),
        patch.object(communicator, "new_group", for_all),
        patch.object(placement, "new_group", for_all),
    ):
        yield


def alike(ranks: list[int]) -> list[list[int]]:
    """All groups of the kind to which `ranks`, the pipeline's or the replicas' of this rank, belong."""
    world_size = dist.get_world_size()
    tp, pp, etp, ep = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_expert_tensor_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    )
    order = "tp-cp-ep-dp-pp"
    dense = parallel_state.RankGenerator(tp, 1, world_size // (tp * pp), pp, 1, order)
    expert = parallel_state.RankGenerator(etp, ep, world_size // (etp * ep * pp), pp, 1, order)
    kinds = (dense.get_ranks("pp"), dense.get_ranks("dp"), expert.get_ranks("dp"))
    return next(kind for kind in kinds if ranks in kind)


class CountingStore(dist.HashStore):
    """Counts the requests of a rank."""

    requests = 0

    def _counting(name):
        def method(self, *arguments):
            self.requests += 1
            return getattr(dist.HashStore, name)(self, *arguments)

        return method

    set, add, check = _counting("set"), _counting("add"), _counting("check")


def requests_of_check_in(world_size: int) -> int:
    """Of the last rank to arrive: all others are there."""
    store = CountingStore()
    store.add("arrived", world_size - 1)
    store.add("arrived_on_cpu", world_size - 1)
    store.requests = 0
    check_in(store, world_size - 1, world_size, 1.0, "cpu")
    return store.requests


def construct(rank: int) -> tuple[float, float]:
    """Seconds of the slowest rank to create all groups: every rank all of them, and the members alone; the
    median of five each, alternating."""
    cpu.install()
    config, seconds = layout(2, 2, 2, 2, dist.get_world_size()), ([], [])
    for _ in range(5):
        for style, taken in zip((every_rank_creates_all, contextlib.nullcontext), seconds):
            dist.barrier()
            started = time.perf_counter()
            with style():
                start_up(config, torch.device("cpu"))
            slowest = torch.tensor([time.perf_counter() - started])
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            taken.append(slowest.item())
            parallel.destroy_parallel_groups(keep_models_working=False)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def shown(cost: Cost) -> str:
    return f"{cost.calls:6,} {cost.groups:6} {cost.seconds:7.2f}"


if __name__ == "__main__":
    main()
