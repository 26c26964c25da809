"""The terms of an objective on one run of trajectories: divergences, advantages, cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_mopd.config import ObjectiveConfig
from megatron_mopd.objectives import linear_cross_entropy, linear_kl
from megatron_mopd.objectives.policy_gradient import (
    clipped_policy_gradient_loss,
    discounted_future_sum,
    distillation_advantage,
    policy_gradient_loss,
)
from megatron_mopd.objectives.vocab_shard import Report
from megatron_mopd.training.response_tokens import ResponseTokens


class Teachers(NamedTuple):
    """The teachers of a run, K of them."""

    weights: tuple[float, ...]
    hidden: tuple[Tensor, ...]
    """K of [n, h_k]: last-layer states of this rank's response rows; none where log-probs were kept instead.
    """
    heads: tuple[Tensor, ...]
    """K of [V/tp, h_k]; none like `hidden`."""
    names: tuple[str, ...]


class Policies(NamedTuple):
    """log-probs of the sampled tokens under policies that are never confused."""

    current: Tensor
    """[n], this rank's rows, in training; differentiable where a term needs it."""
    current_whole: Tensor
    """[sum |y|], the same for whole responses, detached."""
    proximal: Tensor
    """[sum |y|], at the start of the rollout batch, computed as in training."""
    behaviour: Tensor
    """[sum |y|], mu: the sampler's own."""
    teachers: tuple[Tensor, ...]
    """K of [sum |y|], where a sampled-token term asks for them."""


def supervised_term(
    rows: Tensor,
    head: Tensor,
    target_ids: Tensor,
    token_weight: Tensor,
    report: Report,
    head_arguments: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the given tokens: (weighted sum, per token [n])."""
    return linear_cross_entropy(
        rows, head, target_ids, token_weight=token_weight, report=report, **head_arguments
    )


def vocabulary_term(
    kind: str,
    objective: ObjectiveConfig,
    rows: Tensor,
    head: Tensor,
    teachers: Teachers,
    token_weight: Tensor,
    report: Callable[[Sequence[str]], Report],
    head_arguments: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """A divergence of whole distributions: (weighted sum, per token [n]). `report(names)` takes down what is
    not finite in a comparison with these teachers.

    `full_vocab_kl`: sum_k w_k KL(theta || T_k) (DeepSeek-V4, 5.1.2), all teachers in one softmax. The other
    kinds have no such form: one divergence per teacher, weighted and added.
    """
    options: dict[str, Any] = dict(temperature=objective.temperature)
    if kind == "full_vocab_kl":
        shares = torch.tensor(teachers.weights, dtype=token_weight.dtype, device=rows.device)
        return linear_kl(
            rows,
            head,
            list(teachers.hidden),
            list(teachers.heads),
            token_weight=token_weight,
            mixture_weight=shares,
            report=report(teachers.names),
            **options,
            **head_arguments,
        )
    if kind == "top_k_kl":
        options |= dict(top_k=objective.top_k, top_k_from=objective.top_k_from or "teacher")
    elif kind == "forward_kl":
        options |= dict(divergence="forward_kl")
    else:
        options |= dict(divergence="jsd", beta=0.5 if objective.beta is None else objective.beta)
    loss, per_token = torch.zeros_like(token_weight[0]), torch.zeros_like(token_weight)
    for share, hidden, teacher_head, name in zip(*teachers):
        part, divergence = linear_kl(
            rows,
            head,
            hidden,
            teacher_head,
            token_weight=share * token_weight,
            report=report([name]),
            **options,
            **head_arguments,
        )
        loss, per_token = loss + part, per_token + share * divergence
    return loss, per_token


def policy_term(
    kind: str,
    objective: ObjectiveConfig,
    tokens: ResponseTokens,
    policies: Policies,
    teacher_weights: tuple[float, ...],
    outcome_advantage: Tensor,
    token_weight: Tensor,
    observe: Callable[[str, Tensor], None],
) -> Tensor:
    """Policy-gradient loss of `sampled_token` or `grpo`: weighted sum over this rank's rows.

    A_t = sum_k w_k (log T_k - log theta) + alpha A_ORM (MiMo-V2-Flash, arXiv 2601.02780, 4.4) or A_ORM alone.
    With `ppo_clip` log theta in the advantage is the proximal policy's, so that A stays what it is over all
    steps of a rollout batch. `outcome_advantage` is [sum |y|], `token_weight` [n].
    """
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
