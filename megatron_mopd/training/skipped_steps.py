"""Steps whose loss or gradient is not finite: left out on all ranks alike, counted, with evidence on disk.

A gradient whose square overflows float32 counts as not finite: its norm would be infinite, and clipping would
turn every other gradient into zero. A flipped exponent bit in memory or on the way looks like that.
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
"""Largest norm of the gradients in one buffer: the squares of 3e2 such buffers still add up in float32."""
MOST_EVIDENCE = 16
"""Steps that were left out whose evidence is kept: half of them the first, half the last."""
MOST_EVIDENCE_BYTES = 2**30


@dataclass
class SkippedSteps:
    """How many optimizer steps were left out; part of a checkpoint."""

    total: int = 0
    in_a_row: int = 0
    weights_damaged: bool = False
    """Whether the last step was skipped because of the student's own weights, on any rank. Nothing is saved
    then: a checkpoint of them could take the place of a good one."""
    causes: list[str] = field(default_factory=list)
    """What the losses and log-probs of all ranks found in the last step, if it was skipped."""

    def add(self, causes: list[str], weights_damaged: bool) -> None:
        """Count one more skipped step, with what was found in it."""
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        self.causes, self.weights_damaged = causes, weights_damaged

    def end_row(self) -> None:
        """Note that a step was not skipped."""
        self.in_a_row, self.causes, self.weights_damaged = 0, [], False

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total, self.in_a_row = state["total"], state["in_a_row"]


def causes_of_all_ranks(findings: Findings) -> list[str]:
    """Every rank's findings, each once, damaged weights first. Collective: a gather of a few sentences over
    all ranks, only for a step that is left out."""
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, findings.causes)
    causes = dict.fromkeys(cause for causes in gathered for cause in causes)
    return sorted(causes, key=lambda cause: not cause.startswith(DAMAGED_WEIGHT))


def weights_damaged(causes: Sequence[str]) -> bool:
    """Whether the student's own weights are among the causes."""
    return any(cause.startswith(DAMAGED_WEIGHT) for cause in causes)


class ExpertBiases:
    """What the routers' expert biases were before a step: megatron-core moves them with the gradients'
    synchronisation, before it is known whether the step is left out."""

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
                # The norm is NaN or infinite when one element is, and needs no copy of them all.
                norm = torch.linalg.vector_norm(buffer.grad_data)
                bad += (~(norm <= LARGEST_GRADIENT)).float()  # NaN is not less than anything
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
    """Write what went into a step that was left out, and where its gradients were not finite.

    `directory/iter_0000010/batch.json` (rank 0): metrics, the global batch, and `causes`, what the losses of
    all ranks found (`Findings`). `rank_3.json` (each rank that
    has any): names of parameters whose gradients are not finite, and how many elements. Of many such steps
    the first and the last are kept (`limit_evidence`). Collectives: none.
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
                "prompt_ids": list(t.prompt.token_ids),
                "response_ids": list(t.response_ids),
                "logprobs": None if t.logprobs is None else [repr(float(p)) for p in t.logprobs],
            }
            for t in trajectories
        ]
        said = {name: repr(value) for name, value in metrics.items()}  # JSON has no NaN
        evidence = {"metrics": said, "causes": list(causes), "batch": batch}
        write_whole(path / "batch.json", json.dumps(evidence))
        limit_evidence(directory)
    return path


def limit_evidence(directory: Path) -> None:
    """Remove evidence from the middle until the first and the last steps that were left out remain, not more
    than `MOST_EVIDENCE` and `MOST_EVIDENCE_BYTES`; the first and the newest always do. One rank alone: other
    ranks are done with all but the newest.
    """
    sizes = {
        path: sum(file.stat().st_size for file in path.iterdir())
        for path in sorted(directory.glob("iter_*/"), key=lambda path: (len(path.name), path.name))
    }
    while len(sizes) > 2 and (len(sizes) > MOST_EVIDENCE or sum(sizes.values()) > MOST_EVIDENCE_BYTES):
        middle = list(sizes)[len(sizes) // 2]
        del sizes[middle]
        shutil.rmtree(middle, ignore_errors=True)
        say(f"evidence/{middle.name} is removed: the first and the last steps that were left out stay")
