"""Policy gradients on one part of a micro-batch: policies, sampler corrections, advantages."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from megatron_mopd.config import ObjectiveConfig
from megatron_mopd.config.objectives import POLICY_KINDS, importance_band
from megatron_mopd.losses.response_tokens import ResponseTokens
from megatron_mopd.objectives.importance import drift_gate, importance_weights
from megatron_mopd.objectives.policy_gradient import (
    clipped_policy_gradient_loss,
    discounted_future_sum,
    distillation_advantage,
    policy_gradient_loss,
)

Observe = Callable[[str, Tensor], None]
"""Takes a metric's name and its values per token [n]."""


class PolicyPart(Protocol):
    """Consecutive trajectories that share an objective; `batch_loss.LossPart`."""

    objective: ObjectiveConfig
    tokens: ResponseTokens


class Policies(NamedTuple):
    """log-probs of the sampled tokens under each of the policies."""

    current: Tensor
    """[n], the model in training on this rank's rows; differentiable if a term needs it."""
    current_whole: Tensor
    """[sum |y|], the same for whole responses, detached."""
    proximal: Tensor
    """[sum |y|], the student at the start of the rollout batch, computed as in training."""
    behaviour: Tensor
    """[sum |y|], mu, as recorded by the sampler."""
    teachers: tuple[Tensor, ...]
    """K tensors [sum |y|], if a sampled-token term needs them."""


def correction_weights(
    objective: ObjectiveConfig, tokens: ResponseTokens, policies: Policies, observe: Observe
) -> tuple[Tensor, Tensor]:
    """Weights [n] of a divergence and of a policy-gradient term. They differ under `ppo_clip`, whose ratio
    already corrects from the proximal to the current policy."""
    low, high = importance_band(objective)

    def weights(policy: Tensor) -> tuple[Tensor, Tensor]:
        log_ratio = policy - policies.behaviour
        result, inside = importance_weights(
            log_ratio, tokens.lengths, objective.rollout_correction, low, high
        )
        if objective.drift_gate_block > 0:
            sharpness = objective.drift_gate_sharpness or 1.0
            result = result * drift_gate(log_ratio, tokens.lengths, objective.drift_gate_block, sharpness)
        return tokens.mine(result), tokens.mine(inside.to(result.dtype))

    token_factor, inside = weights(policies.current_whole)
    policy_factor = token_factor
    if objective.policy_loss == "ppo_clip":
        policy_factor, _ = weights(policies.proximal)
    observe("ratio", tokens.mine((policies.current_whole - policies.behaviour).exp()))
    observe("in_band", inside)
    observe("entropy", -tokens.mine(policies.current_whole))
    return token_factor, policy_factor


def policy_term(
    kind: str,
    part: PolicyPart,
    policies: Policies,
    teacher_weights: tuple[float, ...],
    outcome_advantage: Tensor,
    token_weight: Tensor,
    observe: Observe,
) -> Tensor:
    """Policy-gradient loss of `sampled_token` or `grpo`: weighted sum over this rank's rows.

    A_t = sum_k w_k (log T_k - log theta) + alpha A_ORM (MiMo-V2-Flash, arXiv 2601.02780, 4.4) or A_ORM alone.
    With `ppo_clip`, log theta in the advantage is the proximal policy's, so that A is constant over all steps
    of a rollout batch. `outcome_advantage` is [sum |y|], `token_weight` [n].
    """
    objective, tokens = part.objective, part.tokens
    assert kind in POLICY_KINDS, f"no advantage is assigned to kind {kind}"
    whole = outcome_advantage
    if kind == "sampled_token":
        reference = policies.proximal if objective.policy_loss == "ppo_clip" else policies.current_whole
        advantage = distillation_advantage(
            policies.teachers,
            reference,
            teacher_weights=teacher_weights,
            shaping=objective.shaping,
            clamp=objective.log_ratio_clamp,
        )
        advantage = discounted_future_sum(advantage, tokens.lengths, objective.future_discount)
        whole = advantage + objective.outcome_reward_weight * outcome_advantage
        if kind == objective.kind:
            estimates = [
                share * (policies.current_whole - teacher)
                for share, teacher in zip(teacher_weights, policies.teachers)
            ]
            observe("kl", tokens.mine(sum(estimates)))
    advantage = tokens.mine(whole)
    if kind == objective.kind:
        observe("advantage", advantage.abs())
    if objective.policy_loss == "plain":
        loss, _ = policy_gradient_loss(policies.current, advantage, token_weight)
        return loss
    loss, _, clipped = clipped_policy_gradient_loss(
        policies.current,
        tokens.mine(policies.proximal),
        advantage,
        token_weight,
        eps_low=0.2 if objective.clip_eps_low is None else objective.clip_eps_low,
        eps_high=0.2 if objective.clip_eps_high is None else objective.clip_eps_high,
    )
    if kind == objective.kind:
        observe("clipped", clipped.to(advantage.dtype))
    return loss
