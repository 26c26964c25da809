"""Training targets: each domain's objective and teacher weights in one optimizer step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from megatron_mopd.config import DomainObjectives, ObjectiveConfig
from megatron_mopd.config.objectives import compares_tokens_only, needs_teachers
from megatron_mopd.teachers.routing import Mixture, Routing


@dataclass(frozen=True)
class Target:
    """The objective and the teachers of one domain, resolved once per step and carried by its batch."""

    objective: ObjectiveConfig
    mixture: Mixture
    """The teachers that the objective compares the student with; empty for `sft` and `grpo`."""

    @cached_property
    def order(self) -> tuple[Mixture, str]:
        """Sort key of a batch, equal for domains whose samples share a term of the loss."""
        return self.mixture, repr(self.objective)

    @cached_property
    def keeps_log_probs(self) -> bool:
        """Whether its teachers' forward passes apply their LM heads and keep log-probs of sampled tokens,
        because the objective compares nothing else of the teachers."""
        return compares_tokens_only(self.objective)

    def is_scored_by(self, teacher: str) -> bool:
        return any(teacher == name for name, _ in self.mixture)


Targets = Mapping[str, Target]
"""By domain."""


def resolve_targets(
    objectives: DomainObjectives, routing: Routing | None, domains: Iterable[str], iteration: int
) -> dict[str, Target]:
    """The targets of these domains with the routing weights of `iteration` (optimizer steps done)."""
    current = routing.at(iteration) if routing is not None else None

    def target(domain: str) -> Target:
        objective = objectives.of(domain)
        return Target(objective, current.mixture(domain) if needs_teachers(objective) else ())

    return {domain: target(domain) for domain in domains}
