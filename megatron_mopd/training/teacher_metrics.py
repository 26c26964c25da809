"""Per-teacher metrics of a step: divergence, tokens, scoring and loading time, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.losses.targets import Targets
from megatron_mopd.pipeline.instructions import TeacherForward
from megatron_mopd.pipeline.simulate import Event
from megatron_mopd.teachers.bank import TeacherBank
from megatron_mopd.teachers.hidden_cache import HiddenCache


def divergence_by_teacher(kl_sums: Tensor, domains: Sequence[str], targets: Targets) -> dict[str, float]:
    """`teacher/NAME/kl` (mean per token) and `teacher/NAME/tokens` from per-domain [domains, 2] sums and
    counts.

    A sample with several weighted teachers has a single divergence, sum_k w_k KL_k, which is not split by
    teacher but reported under their joined names, `teacher/code+math/kl`.
    """
    totals: dict[str, list[float]] = {}
    for domain, (total, count) in zip(domains, kl_sums.tolist()):
        if count:
            name = "+".join(teacher for teacher, _ in targets[domain].mixture)
            sums = totals.setdefault(name, [0.0, 0.0])
            sums[0] += total
            sums[1] += count
    metrics = {}
    for name, (total, count) in sorted(totals.items()):
        metrics[f"teacher/{name}/kl"] = total / count
        metrics[f"teacher/{name}/tokens"] = count
    return metrics


def scoring_seconds(events: Sequence[Event]) -> dict[str, float]:
    """Duration of a stage's teacher forward passes, by teacher."""
    seconds: dict[str, float] = {}
    for event in events:
        if isinstance(event.instruction, TeacherForward):
            name = event.instruction.job.teacher
            seconds[name] = seconds.get(name, 0.0) + event.end - event.start
    return seconds


def cost_of_teachers(
    bank: TeacherBank, cache: HiddenCache, seconds: Mapping[str, float], groups: ParallelGroups
) -> dict[str, float]:
    """For every teacher that scored or was loaded since the last call: `score_seconds`, `loads`,
    `load_seconds`, and `load_hidden`, the fraction of the loading time that overlapped with work. Also the
    memory of all teachers together.

    Each is the maximum over all ranks. Collective: one all-reduce over all ranks of 4 x teachers + 3 float64.
    """
    traffic = bank.take_traffic()
    rows = []
    for name in bank.names:
        mine = traffic[name]
        rows += [seconds.get(name, 0.0), mine.loads, mine.load_seconds, mine.wait_seconds]
    rows += [bank.device_bytes(), bank.host_bytes(), cache.peak_bytes]
    values = torch.tensor(rows, dtype=torch.float64, device=groups.device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    rows = values.tolist()
    metrics = dict(zip(("teachers/device_bytes", "teachers/host_bytes", "teachers/cache_bytes"), rows[-3:]))
    for number, name in enumerate(bank.names):
        scoring, loads, loading, waiting = rows[4 * number : 4 * number + 4]
        if scoring:
            metrics[f"teacher/{name}/score_seconds"] = scoring
        if loads:
            metrics[f"teacher/{name}/loads"] = loads
            metrics[f"teacher/{name}/load_seconds"] = loading
            metrics[f"teacher/{name}/load_hidden"] = 1.0 - min(1.0, waiting / max(loading, 1e-9))
    return metrics
