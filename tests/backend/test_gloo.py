"""Process groups on CPUs share one gloo device."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mopd.backend.gloo import share_device
from tests._distributed import run_ranks


def polling_threads():
    names = (path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    return sum(name == "gloo_tcp_loop" for name in names)


def many_groups(rank):
    share_device()
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [0, 1, 2], [1, 2], [2]) for _ in range(3)]
    sums = []
    for group in groups:
        if dist.get_rank(group) >= 0:
            tensor = torch.tensor([10.0**rank])
            dist.all_reduce(tensor, group=group)
            sums.append(tensor.item())
    return polling_threads(), sums


def test_one_thread_polls_for_all_groups(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    results = run_ranks(3, many_groups)
    assert [threads for threads, _ in results] == [1, 1, 1]
    assert [sums for _, sums in results] == [
        [11.0] * 3 + [111.0] * 3,
        [11.0] * 3 + [111.0] * 3 + [110.0] * 3,
        [111.0] * 3 + [110.0] * 3 + [100.0] * 3,
    ]
