"""Facts about the whole global batch that the loss needs: targets, weights, advantages, old policies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from megatron_mopd.config.objectives import needs_rewards
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.losses.findings import Findings
from megatron_mopd.losses.targets import Targets
from megatron_mopd.losses.token_samples import TokenSamples
from megatron_mopd.objectives.policy_gradient import group_relative_advantages
from megatron_mopd.teachers.hidden_cache import HiddenCache


@dataclass(frozen=True)
class BatchFacts:
    """Facts about one global batch, by trajectory index. They are equal on all ranks that run the loss,
    except for `cache`, `findings` and `samples`, which are this rank's own."""

    targets: Targets
    token_weights: Mapping[int, float]
    """Weight of each response token (`objectives.reduction`)."""
    cache: HiddenCache
    """Holds the teachers' states until the loss pops them."""
    findings: Findings
    """Collects non-finite values."""
    outcome_advantages: Callable[[], Mapping[int, float]] = dict
    """Group-relative advantages of the rewards; 0 where there is no verdict. The first call waits for the
    verifiers, so only a loss that needs an advantage calls it."""
    proximal_logprobs: Mapping[int, Tensor] = field(default_factory=dict)
    """log-probs [|y|] under the student at the start of the rollout batch; empty for its first step, where
    the proximal policy is the student in training."""
    samples: TokenSamples | None = None
    """Collects per-token divergences, in the steps that report them."""


def outcome_advantages(
    targets: Targets,
    trajectories: Sequence[Trajectory],
    rewards: Mapping[int, float | None],
    samples_per_prompt: int,
) -> dict[int, float]:
    """The group-relative advantage of every trajectory whose domain needs one, by index.

    A group is the `samples_per_prompt` responses to one prompt, which have consecutive indices.
    """
    advantages: dict[int, float] = {}
    for domain in {t.domain for t in trajectories}:
        objective = targets[domain].objective
        if not needs_rewards(objective):
            continue
        mine = {t.index: rewards.get(t.index) for t in trajectories if t.domain == domain}
        advantages |= group_relative_advantages(
            mine, {i: i // samples_per_prompt for i in mine}, normalize=objective.normalize_advantage
        )
    return advantages
