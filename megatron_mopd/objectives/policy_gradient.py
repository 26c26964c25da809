"""Advantages of sampled tokens, and policy-gradient losses.

An advantage is a constant: only log theta(y_t) is differentiated. (The gradient of the log-ratio itself would
not depend on the teacher.) Vectors over response tokens [n] are concatenations of whole responses with the
given lengths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def distillation_advantage(
    teacher_logprobs: Sequence[Tensor],
    student_logprobs: Tensor,
    *,
    teacher_weights: Sequence[float] = (1.0,),
    shaping: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """A_t = sum_k w_k (log T_k(y_t) - log theta(y_t)), detached [n], from log-probs [n] of sampled tokens.

    With one teacher this is the advantage of GLM-5 (arXiv 2602.15763, 3.5) and the distillation part of that
    of MiMo-V2-Flash (arXiv 2601.02780, 4.4). `shaping` = a replaces T by a T + (1 - a) theta, which bounds
    the log-ratio from below by log(1 - a), however small the teacher's probability is. `clamp` limits each
    log-ratio to [-clamp, clamp]. No collectives.
    """
    student = student_logprobs.detach()
    total = torch.zeros_like(student)
    for weight, teacher in zip(teacher_weights, teacher_logprobs, strict=True):
        log_ratio = teacher.detach() - student
        if shaping is not None and shaping < 1.0:
            floor = torch.full_like(log_ratio, math.log1p(-shaping))
            log_ratio = torch.logaddexp(log_ratio + math.log(shaping), floor)
        if clamp is not None:
            log_ratio = log_ratio.clamp(-clamp, clamp)
        total += weight * log_ratio
    return total


def discounted_future_sum(values: Tensor, lengths: Sequence[int], discount: float) -> Tensor:
    """sum_{s >= t} discount^(s - t) values_s within each response: [n] -> [n]; discount 0 returns `values`.

    A token also affects later log-ratios: with discount 1 this is the return of the sequence-level reverse
    KL, whose gradient is unbiased but has high variance.
    """
    if discount == 0.0:
        return values
    result = values.clone()
    padded = torch.nn.utils.rnn.pad_sequence(list(result.split(list(lengths))), batch_first=True)
    for position in range(padded.size(1) - 2, -1, -1):
        padded[:, position] += discount * padded[:, position + 1]
    return torch.cat([row[:length] for row, length in zip(padded, lengths)])


def group_relative_advantages(
    rewards: Mapping[int, float | None], groups: Mapping[int, int], *, normalize: bool = True
) -> dict[int, float]:
    """(r - mean) / std of each response's reward within its group (responses to the same prompt), by index.

    GRPO (arXiv 2402.03300, equation 2 of 4.1.2), with the population standard deviation; `normalize=False`
    omits the division. A group with fewer than two rewards, or with equal rewards, has advantage 0. A missing
    reward (`None`) is ignored and gets 0.
    """
    members: dict[int, list[float]] = {}
    for index, reward in rewards.items():
        if reward is not None:
            members.setdefault(groups[index], []).append(reward)
    advantages = {}
    for index, reward in rewards.items():
        values = members.get(groups[index], [])
        advantages[index] = 0.0
        if reward is None or len(values) < 2:
            continue
        mean = math.fsum(values) / len(values)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
        if deviation > 1e-8:
            advantages[index] = (reward - mean) / (deviation if normalize else 1.0)
    return advantages


def policy_gradient_loss(logprobs: Tensor, advantage: Tensor, token_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Plain policy gradient, sum_t weight_t (-A_t log theta(y_t)): (loss, detached per token [n]).

    `logprobs` [n] is differentiated; advantages [n] and weights [n] (importance ratios included) are not.
    MiMo-V2-Flash, arXiv 2601.02780, 4.4, with weight_t = w_t / |y|.
    """
    per_token = -advantage.detach() * logprobs
    return torch.dot(token_weight.detach(), per_token), per_token.detach()


def clipped_policy_gradient_loss(
    logprobs: Tensor,
    proximal_logprobs: Tensor,
    advantage: Tensor,
    token_weight: Tensor,
    *,
    eps_low: float,
    eps_high: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's clipped surrogate, sum_t weight_t (-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)).

    r_t = theta / proximal, the policy at the start of the rollout batch (arXiv 1707.06347, equation 7; in
    GRPO arXiv 2402.03300, equation 3). The weight contains the sampler's ratio proximal / mu: the decoupled
    objective of arXiv 2110.00641, equation 7. Returns (loss, detached per token [n], whether clipped [n]).
    """
    advantage = advantage.detach()
    ratio = (logprobs - proximal_logprobs.detach()).exp()
    plain, clipped = ratio * advantage, ratio.clamp(1.0 - eps_low, 1.0 + eps_high) * advantage
    per_token = -torch.minimum(plain, clipped)
    return torch.dot(token_weight.detach(), per_token), per_token.detach(), clipped < plain
