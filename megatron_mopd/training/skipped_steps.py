"""Steps whose loss or gradient is not finite: skipped on all ranks, counted, with evidence on disk.

A gradient whose square overflows float32 counts as not finite: its norm would be infinite, and clipping would
set every other gradient to zero. A flipped exponent bit in memory or in transit has this effect.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.backend.whole_files import write_whole
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.losses.findings import DAMAGED_WEIGHT, Findings
from megatron_mopd.observe.progress import say

LARGEST_GRADIENT = 1e18
"""Largest gradient norm of one buffer: float32 can still hold the sum of squares of 3e2 such buffers."""
MOST_EVIDENCE = 16
"""Skipped steps whose evidence is kept: half of them the first, half the last."""
MOST_EVIDENCE_BYTES = 2**30


@dataclass
class SkippedSteps:
    """Counts skipped optimizer steps; part of a checkpoint."""

    total: int = 0
    in_a_row: int = 0
    weights_damaged: bool = False
    """Whether the last step was skipped because of the student's own weights, on any rank. Nothing is saved
    then, because the checkpoint could replace a good one."""
    causes: list[str] = field(default_factory=list)
    """The findings of all ranks' losses and log-probs in the last step, if it was skipped."""

    def add(self, causes: list[str], weights_damaged: bool) -> None:
        """Count one more skipped step, with its findings."""
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        self.causes, self.weights_damaged = causes, weights_damaged

    def end_row(self) -> None:
        """Record that a step was not skipped."""
        self.in_a_row, self.causes, self.weights_damaged = 0, [], False

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total, self.in_a_row = state["total"], state["in_a_row"]


def causes_of_all_ranks(findings: Findings) -> list[str]:
    """All ranks' findings without duplicates, damaged weights first. Collective: one all-gather of a few
    sentences over all ranks, only for a skipped step."""
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, findings.causes)
    causes = dict.fromkeys(cause for causes in gathered for cause in causes)
    return sorted(causes, key=lambda cause: not cause.startswith(DAMAGED_WEIGHT))


def weights_damaged(causes: Sequence[str]) -> bool:
    """Whether the student's own weights are among the causes."""
    return any(cause.startswith(DAMAGED_WEIGHT) for cause in causes)


class ExpertBiases:
    """The routers' expert biases before a step: megatron-core updates them while synchronizing gradients,
    before it is known whether the step is skipped."""

    def __init__(self, chunks: Sequence[torch.nn.Module]):
        biases = (getattr(module, "expert_bias", None) for chunk in chunks for module in chunk.modules())
        self._before = [(bias, bias.clone()) for bias in biases if bias is not None]

    def restore(self) -> None:
        for bias, before in self._before:
            bias.copy_(before)


def all_finite(loss: float, chunks: Sequence[torch.nn.Module], groups: ParallelGroups) -> bool:
    """Whether the loss and every gradient of every rank is finite; the same answer on all ranks.

    Reads the gradient buffers once. Collectives: one all-reduce of one float over all ranks.
    """
    bad = torch.full((1,), float(not math.isfinite(loss)), device=groups.device)
    for chunk in chunks:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            if buffer.grad_data.numel():
                # The norm is NaN or infinite if any element is, and needs no copy of the buffer.
                norm = torch.linalg.vector_norm(buffer.grad_data)
                bad += (~(norm <= LARGEST_GRADIENT)).float()  # comparisons with NaN are false
    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return not bad.item()


def save_evidence(
    directory: Path,
    iteration: int,
    chunks: Sequence[torch.nn.Module],
    trajectories: Sequence[Trajectory],
    metrics: dict[str, float],
    groups: ParallelGroups,
    causes: Sequence[str] = (),
) -> Path:
    """Write the inputs of a skipped step, and where its gradients were not finite.

    `directory/iter_0000010/batch.json` (rank 0, on which all `trajectories` must have tokens): metrics, the
    global batch, and `causes`, the findings of all ranks' losses (`Findings`). `rank_3.json` (each rank that
    has any): names of parameters whose gradients are not finite, and the number of such elements. If there
    are many such steps, only the first and the last are kept (`limit_evidence`). Collectives: none.
    """
    path = directory / f"iter_{iteration:07d}"
    path.mkdir(parents=True, exist_ok=True)
    names = {}
    for number, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            gradient = getattr(parameter, "main_grad", None)
            if gradient is not None and (count := int((~(gradient.abs() <= LARGEST_GRADIENT)).sum())):
                names[f"chunk {number}: {name}"] = {"not_finite": count, "elements": gradient.numel()}
    if names:
        write_whole(path / f"rank_{groups.rank}.json", json.dumps(names, indent=1))
    if groups.rank == 0:
        batch = [
            {
                "index": t.index,
                "domain": t.domain,
                "origin": t.prompt.origin,
                "prompt_ids": t.prompt.token_ids.tolist(),
                "response_ids": t.response_ids.tolist(),
                "logprobs": None if t.logprobs is None else list(map(repr, t.logprobs.tolist())),
            }
            for t in trajectories
        ]
        said = {name: repr(value) for name, value in metrics.items()}  # JSON has no NaN
        evidence = {"metrics": said, "causes": list(causes), "batch": batch}
        write_whole(path / "batch.json", json.dumps(evidence))
        limit_evidence(directory)
    return path


def limit_evidence(directory: Path) -> None:
    """Remove evidence from the middle, keeping that of the first and the last skipped steps, until at most
    `MOST_EVIDENCE` steps and `MOST_EVIDENCE_BYTES` remain; the first and the newest are always kept. Called
    by one rank only: the other ranks have finished writing all but the newest.
    """
    sizes = {
        path: sum(file.stat().st_size for file in path.iterdir())
        for path in sorted(directory.glob("iter_*/"), key=lambda path: (len(path.name), path.name))
    }
    while len(sizes) > 2 and (len(sizes) > MOST_EVIDENCE or sum(sizes.values()) > MOST_EVIDENCE_BYTES):
        middle = list(sizes)[len(sizes) // 2]
        del sizes[middle]
        shutil.rmtree(middle, ignore_errors=True)
        say(f"evidence/{middle.name} is removed: only the first and the last skipped steps are kept")
