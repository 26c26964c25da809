"""Steps whose loss or gradient is not finite: left out on all ranks alike, counted, with evidence on disk.

A gradient whose square overflows float32 counts as not finite: its norm would be infinite, and clipping would
turn every other gradient into zero. A flipped exponent bit in memory or on the way looks like that.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mopd.backend.messages import shown
from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.backend.whole_files import write_whole
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.objectives.vocab_shard import NotFinite, Report
from megatron_mopd.observe.progress import say
from megatron_mopd.training.response_tokens import ResponseTokens

LARGEST_GRADIENT = 1e18
"""Largest norm of the gradients in one buffer: the squares of 3e2 such buffers still add up in float32."""
MOST_EVIDENCE = 16
"""Steps that were left out whose evidence is kept: half of them the first, half the last."""
MOST_EVIDENCE_BYTES = 2**30
_MOST_CAUSES = 8
"""Findings that a rank keeps of one step: one fault in the weights shows in every token."""


@dataclass
class SkippedSteps:
    """How many optimizer steps were left out; part of a checkpoint."""

    total: int = 0
    in_a_row: int = 0
    weights_damaged: bool = False
    """Whether the last step was left out because of the student's own weights, on whatever rank. Then nothing
    is saved: a checkpoint of them could take the place of a good one."""

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total, self.in_a_row = state["total"], state["in_a_row"]


@dataclass
class Findings:
    """What losses and log-probs of one step turned up that is not finite, on this rank; any of it leaves the
    step out."""

    causes: list[str] = field(default_factory=list)

    def add(self, cause: str) -> None:
        if len(self.causes) < _MOST_CAUSES and cause not in self.causes:
            self.causes.append(cause)

    def report(self, tokens: ResponseTokens, teachers: Sequence[str] = ()) -> Report:
        """Takes down what an objective finds among the rows of `tokens`; `teachers` are the names of the
        teachers that it compares the student with."""
        numbers = {"teacher": 0} | {f"teacher {k}": k for k in range(len(teachers))}
        names = {model: f"teacher {teachers[k]!r}" for model, k in numbers.items() if k < len(teachers)}
        return self._report(tokens, lambda model: names.get(model, model))

    def report_of_teacher(self, tokens: ResponseTokens, teacher: str) -> Report:
        """The same for log-probs of one teacher's own."""
        return self._report(tokens, lambda model: f"teacher {teacher!r}")

    def _report(self, tokens: ResponseTokens, name: Callable[[str], str]) -> Report:
        def add(found: NotFinite) -> None:
            trajectory, position = tokens.place(found.token)
            where = (
                f"token {position} of response {trajectory.index} (domain {shown(trajectory.domain)}): "
                f"{found.what} is {found.value}"
            )
            blame = dict.fromkeys(
                f"{name(model)}: logit of vocabulary id {column} is {value}"
                for _, model, column, value in found.logits
            )
            self.add(f"{where}; {'; '.join(blame) or 'no single logit is to blame'}")

        return add

    def add_weights(self, chunks: Sequence[torch.nn.Module], rank: int) -> None:
        """Look for weights of the student that are not finite; the first of them is the first cause."""
        for name, parameter in (named for chunk in chunks for named in chunk.named_parameters()):
            if count := int((~torch.isfinite(parameter)).sum()):
                self.causes.insert(
                    0,
                    f"{_DAMAGED_WEIGHT} {name} is not finite in {count} of {parameter.numel()} elements on "
                    f"rank {rank}",
                )
                return

    def add_sampled(self, trajectories: Iterable[Trajectory]) -> None:
        """Look for responses that were sampled from logits that are not finite."""
        for trajectory in trajectories:
            if not math.isfinite(sum(trajectory.logprobs or ())):
                position = [math.isfinite(value) for value in trajectory.logprobs].index(False)
                self.add(
                    f"token {position} of response {trajectory.index} (domain {shown(trajectory.domain)}): "
                    f"the sampler's log-prob is {trajectory.logprobs[position]}"
                )


_DAMAGED_WEIGHT = "the student's weight"


def causes_of_all_ranks(findings: Findings) -> list[str]:
    """Every rank's findings, each once, damaged weights first. Collective: a gather of a few sentences over
    all ranks, only for a step that is left out."""
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, findings.causes)
    causes = dict.fromkeys(cause for causes in gathered for cause in causes)
    return sorted(causes, key=lambda cause: not cause.startswith(_DAMAGED_WEIGHT))


def weights_damaged(causes: Sequence[str]) -> bool:
    """Whether the student's own weights are among the causes."""
    return any(cause.startswith(_DAMAGED_WEIGHT) for cause in causes)


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
