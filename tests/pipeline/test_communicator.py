"""Messages between real ranks: every channel of every pipeline, and no pipeline waits for another."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_mopd.backend import cpu, process_groups
from megatron_mopd.backend.parallel import build_parallel_groups
from megatron_mopd.config import ParallelConfig
from megatron_mopd.pipeline.communicator import PipelineCommunicator, all_channels
from tests._distributed import run_ranks

CPU = torch.device("cpu")
_MESSAGES = 3


def exchange_on_all_channels(rank: int, stages: int, virtual_stages: int) -> tuple[list, int]:
    """Receives are posted first, in the opposite order of the sends. Returns what arrived as (source stage,
    destination stage, sender, number), and the number of groups that the communicator created."""
    cpu.install()
    parallel = ParallelConfig(
        pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=virtual_stages
    )
    groups = build_parallel_groups(parallel, CPU, 0)
    created, create = [], process_groups._new_group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process_groups, "_new_group", lambda *a, **k: created.append(a) or create(*a, **k))
        communicator = PipelineCommunicator(groups.pp, CPU, virtual_stages=virtual_stages)
    channels = all_channels(stages, virtual_stages)
    mine = [channel for channel in channels if channel.destination == communicator.stage]
    pending = [(c, communicator.receive(c, (2,), torch.int64)) for c in mine for _ in range(_MESSAGES)]
    for channel in reversed([channel for channel in channels if channel.source == communicator.stage]):
        for number in range(_MESSAGES):
            communicator.send(channel, torch.tensor([rank, number]))
    arrived = [(c.source, c.destination, *message.wait().tolist()) for c, message in pending]
    communicator.flush()
    dist.barrier()
    return arrived, len(created)


@pytest.mark.parametrize("virtual_stages", [1, 2])
@pytest.mark.parametrize("stages", [2, 4])
def test_every_channel_of_two_pipelines(stages, virtual_stages):
    """DP 2: rank r is stage r // 2 of pipeline r % 2."""
    count = 2 * stages
    for rank, (arrived, created) in enumerate(
        run_ranks(count, exchange_on_all_channels, stages, virtual_stages)
    ):
        assert created == 1
        assert len(arrived) == _MESSAGES * sum(
            channel.destination == rank // 2 for channel in all_channels(stages, virtual_stages)
        )
        for place, (source, destination, sender, number) in enumerate(arrived):
            assert destination == rank // 2 and number == place % _MESSAGES
            assert sender == 2 * source + rank % 2


def construct_alone(rank: int) -> int:
    """Only the ranks of the first pipeline construct a communicator; those of the second do not."""
    cpu.install()
    groups = build_parallel_groups(ParallelConfig(pipeline_model_parallel_size=2), CPU, 0)
    if rank % 2 == 0:
        PipelineCommunicator(groups.pp, CPU, timeout=timedelta(seconds=10))
    # The groups that all ranks create together afterwards still have the same names on all of them.
    everyone = dist.new_group(backend="gloo", timeout=timedelta(seconds=10))
    count = torch.ones(1)
    dist.all_reduce(count, group=everyone)
    return int(count.item())


def test_a_pipeline_waits_for_no_other():
    assert run_ranks(4, construct_alone) == [4] * 4
