"""Non-finite values found by the losses and log-probs of one step: their position and the model at fault."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_mopd.backend.messages import shown
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.losses.response_tokens import ResponseTokens
from megatron_mopd.objectives.vocab_shard import NotFinite, Report

DAMAGED_WEIGHT = "the student's weight"
"""Prefix of the finding of a weight that is not finite."""
_MOST_CAUSES = 8
"""Findings that a rank keeps per step: one damaged weight affects every token."""


@dataclass
class Findings:
    """The findings of this rank; a step with any finding is skipped."""

    causes: list[str] = field(default_factory=list)

    def add(self, cause: str) -> None:
        if len(self.causes) < _MOST_CAUSES and cause not in self.causes:
            self.causes.append(cause)

    def report(self, tokens: ResponseTokens, teachers: Sequence[str] = ()) -> Report:
        """A callback that records an objective's findings in the rows of `tokens`; `teachers` are the names
        of the teachers that the objective compares the student with."""
        numbers = {"teacher": 0} | {f"teacher {k}": k for k in range(len(teachers))}
        names = {model: f"teacher {teachers[k]!r}" for model, k in numbers.items() if k < len(teachers)}
        return self._report(tokens, lambda model: names.get(model, model))

    def report_of_teacher(self, tokens: ResponseTokens, teacher: str) -> Report:
        """The same for the log-probs of a single teacher."""
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
        """Look for a non-finite student weight; the first one found is inserted as the first cause."""
        for name, parameter in (named for chunk in chunks for named in chunk.named_parameters()):
            if count := int((~torch.isfinite(parameter)).sum()):
                self.causes.insert(
                    0,
                    f"{DAMAGED_WEIGHT} {name} is not finite in {count} of {parameter.numel()} elements on "
                    f"rank {rank}",
                )
                return

    def add_sampled(self, trajectories: Iterable[Trajectory]) -> None:
        """Look for responses sampled from non-finite logits, among those whose tokens this rank holds."""
        for trajectory in trajectories:
            if trajectory.is_sampled and not (finite := np.isfinite(trajectory.logprobs)).all():
                position = int(finite.argmin())
                self.add(
                    f"token {position} of response {trajectory.index} (domain {shown(trajectory.domain)}): "
                    f"the sampler's log-prob is {trajectory.logprobs[position]}"
                )
