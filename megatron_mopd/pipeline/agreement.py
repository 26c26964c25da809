"""Agreement of all ranks before plans are executed: every block has one plan, and no rank has a problem."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_mopd.backend.agreement import ranks_text
from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.config import ConfigError
from megatron_mopd.pipeline.check import check_same_plan
from megatron_mopd.pipeline.instructions import Plan
from megatron_mopd.pipeline.problem import LimitError, UnmetLimit
from megatron_mopd.pipeline.simulate import PlanError

_BITS = 40
"""Of a digest: sums of its multiples over thousands of ranks fit an int64."""


class _Report(NamedTuple):
    """What one rank found, as it is gathered from all ranks."""

    block: int
    digest: str
    problem: str
    is_users: bool
    """Whether the problem is a `ConfigError`."""
    unmet: tuple[UnmetLimit, ...]
    state_bytes: int


def agree(
    groups: ParallelGroups, plan: Plan | None, problem: Exception | None, sizes: object, state_bytes: int
) -> None:
    """Raise on every rank if any rank has found a problem, or holds another plan (or sizes) than the other
    ranks of its block: `ConfigError`, `PlanError`, or for limits that cannot be met `LimitError`, with the
    limits of the block that needs most. state_bytes: see `LimitError`.

    Collectives over all ranks, on the CPU (gloo) so that no device waits: an all-reduce of 24 bytes; if they
    disagree, an all-gather of a line of text.
    """
    digest = hashlib.sha256(f"{problem if plan is None else plan.digest()} {sizes}".encode())
    # Every rank adds its digest, and the first of a block subtracts its own once for each other rank: the sum
    # over all ranks is 0 if the ranks of every block agree.
    block, members = groups.block, groups.world_size // groups.block.count
    is_first = groups.dp.rank() % block.size == 0 and not any(
        group.rank() for group in (groups.tp, groups.cp, groups.pp)
    )
    factor = 1 - members if is_first else 1
    words = [int.from_bytes(digest.digest()[i : i + _BITS // 8], "big") for i in (0, _BITS // 8)]
    sums = torch.tensor([*(factor * word for word in words), int(problem is not None)])
    dist.all_reduce(sums)
    if not sums.any():
        return
    unmet = tuple(problem.unmet) if isinstance(problem, LimitError) else ()
    is_users = isinstance(problem, ConfigError)
    mine = _Report(
        block.index, digest.hexdigest(), str(problem) if problem else "", is_users, unmet, state_bytes
    )
    reports: list[_Report] = [mine] * groups.world_size
    dist.all_gather_object(reports, mine)
    _raise(reports)


def _raise(reports: Sequence[_Report]) -> None:
    for report in reports:
        if report.is_users:
            raise ConfigError(report.problem)
    failed: dict[str, list[int]] = {}
    for rank, report in enumerate(reports):
        if report.problem and not report.unmet:
            failed.setdefault(report.problem, []).append(rank)
    if failed:
        raise PlanError([f"{ranks_text(ranks)}: {problem}" for problem, ranks in failed.items()])
    hardest = _hardest(reports)
    if hardest.unmet:
        raise hardest
    for block in {report.block for report in reports}:
        check_same_plan({rank: r.digest for rank, r in enumerate(reports) if r.block == block})


def _hardest(reports: Sequence[_Report]) -> LimitError:
    """The unmet limits of all blocks, each with the value that satisfies all of them."""
    hardest: dict[str, tuple[int, UnmetLimit]] = {}
    state_bytes = 0
    for report in reports:
        for limit in report.unmet:
            size = limit.smallest * (max(1, report.state_bytes) if limit.name == "cached_states" else 1)
            if limit.name not in hardest or size > hardest[limit.name][0]:
                hardest[limit.name] = size, limit
                state_bytes = report.state_bytes if limit.name == "cached_states" else state_bytes
    return LimitError([limit for _, limit in hardest.values()], state_bytes)
