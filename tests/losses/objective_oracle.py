"""The papers' equations for a whole batch in fp64 with plain autograd, without code from the package.

A sample is one response: its logits, its teachers' logits, the sampler's log-probs, its reward. Everything
is a Python loop over responses, because the equations are sums over them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

DEFAULTS = dict(
    weight=1.0,
    add={},
    temperature=1.0,
    beta=0.5,
    top_k=None,
    top_k_from="teacher",
    policy_loss="plain",
    clip_eps_low=0.2,
    clip_eps_high=0.2,
    proximal="recompute",
    outcome_reward_weight=0.0,
    normalize_advantage=True,
    future_discount=0.0,
    log_ratio_clamp=None,
    shaping=None,
    rollout_correction="none",
    importance_low=0.5,
    importance_high=2.0,
    drift_gate_block=0,
    drift_gate_sharpness=1.0,
)


@dataclass
class Sample:
    domain: str
    student: Tensor
    """[|y|, V] logits, differentiable."""
    teachers: list[tuple[float, Tensor]]
    """(weight, logits [|y|, V])."""
    tokens: Tensor
    behaviour: Tensor
    """[|y|] log mu."""
    proximal: Tensor | None
    """[|y|]; None means that the student in training is the proximal policy."""
    reward: float | None
    group: int
    extra: dict = field(default_factory=dict)


def batch_loss(samples: list[Sample], objectives: dict[str, dict], reduction: str) -> Tensor:
    """Loss of the batch: per-token losses times the weights of the named reduction."""
    total = torch.zeros((), dtype=torch.float64)
    tokens = sum(len(s.tokens) for s in samples)
    domains = sorted({s.domain for s in samples})
    for sample in samples:
        options = DEFAULTS | objectives[sample.domain]
        per_token = token_losses(sample, samples, options)
        if reduction == "token_mean":
            scale = 1 / tokens
        elif reduction == "sequence_mean":  # E over responses of 1/|y| sum_t (MiMo-V2-Flash, 4.4)
            scale = 1 / (len(samples) * len(sample.tokens))
        else:
            in_domain = sum(len(s.tokens) for s in samples if s.domain == sample.domain)
            scale = 1 / (len(domains) * in_domain)
        total = total + scale * per_token.sum()
    return total


def token_losses(sample: Sample, samples: list[Sample], o: dict) -> Tensor:
    log_p = (sample.student / o["temperature"]).log_softmax(-1)
    log_theta = log_p.gather(1, sample.tokens[:, None])[:, 0]
    if o["kind"] == "sft":
        return -o["weight"] * log_theta
    current = log_theta.detach()
    proximal = current
    if o["policy_loss"] == "ppo_clip":
        if o["proximal"] == "behaviour":
            proximal = sample.behaviour
        elif sample.proximal is not None:
            proximal = sample.proximal
    total = 0
    for kind, share in ({o["kind"]: 1.0} | o["add"]).items():
        if kind in ("sampled_token", "grpo"):
            part = policy_loss(kind, sample, samples, log_theta, current, proximal, o)
        else:
            weight = correction(current, sample.behaviour, o)
            part = weight * sum(
                w * divergence(kind, log_p, (teacher / o["temperature"]).log_softmax(-1), o)
                for w, teacher in sample.teachers
            )
        total = total + o["weight"] * share * part
    return total


def divergence(kind: str, log_p: Tensor, log_q: Tensor, o: dict) -> Tensor:
    def kl(a, b):
        return (a.exp() * (a - b)).sum(-1)

    if kind == "full_vocab_kl":  # DeepSeek-V4, 5.1.2: KL(theta || E_i)
        return kl(log_p, log_q)
    if kind == "forward_kl":
        return kl(log_q, log_p)
    if kind == "jsd":  # arXiv 2306.13649, equation 1
        beta = o["beta"]
        log_m = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
        return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)
    head = (log_q if o["top_k_from"] == "teacher" else log_p).topk(o["top_k"], -1).indices
    outside = torch.ones_like(log_p, dtype=torch.bool).scatter(-1, head, False)

    def with_tail(x):
        tail = x.masked_fill(~outside, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([x.gather(-1, head), tail], -1)

    return kl(with_tail(log_p), with_tail(log_q))


def policy_loss(kind, sample, samples, log_theta, current, proximal, o) -> Tensor:
    outcome = group_advantage(sample, samples, o)
    if kind == "grpo":
        advantage = torch.full_like(current, outcome)
    else:
        reference = proximal if o["policy_loss"] == "ppo_clip" else current
        advantage = torch.zeros_like(current)
        for weight, teacher in sample.teachers:
            log_q = (teacher / o["temperature"]).log_softmax(-1)
            log_t = log_q.gather(1, sample.tokens[:, None])[:, 0].detach()
            if o["shaping"] is not None:
                a = o["shaping"]
                ratio = (a * log_t.exp() + (1 - a) * reference.exp()).log() - reference
            else:
                ratio = log_t - reference  # GLM-5, 3.5
            if o["log_ratio_clamp"] is not None:
                ratio = ratio.clamp(-o["log_ratio_clamp"], o["log_ratio_clamp"])
            advantage = advantage + weight * ratio
        n = len(advantage)
        advantage = torch.stack(
            [sum(o["future_discount"] ** (s - t) * advantage[s] for s in range(t, n)) for t in range(n)]
        )
        advantage = advantage + o["outcome_reward_weight"] * outcome  # MiMo-V2-Flash, 4.4: + alpha A_ORM
    advantage = advantage.detach()
    if o["policy_loss"] == "plain":
        # MiMo-V2-Flash, 4.4: - w_t A_t log theta(y_t), w_t = sg[theta / mu] inside the band
        return -correction(current, sample.behaviour, o) * advantage * log_theta
    # arXiv 1707.06347, equation 7, weighted by proximal / mu (arXiv 2110.00641, equation 7)
    ratio = (log_theta - proximal).exp()
    low, high = 1 - o["clip_eps_low"], 1 + o["clip_eps_high"]
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    return -correction(proximal, sample.behaviour, o) * surrogate


def group_advantage(sample, samples, o) -> float:
    """arXiv 2402.03300, 4.1.2: (r_i - mean(r)) / std(r) over the responses to one prompt."""
    rewards = [s.reward for s in samples if s.group == sample.group and s.reward is not None]
    if sample.reward is None or len(rewards) < 2:
        return 0.0
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))
    if std == 0:
        return 0.0
    return (sample.reward - mean) / (std if o["normalize_advantage"] else 1.0)


def correction(policy: Tensor, behaviour: Tensor, o: dict) -> Tensor:
    """w_t of one response; no gradient flows through it."""
    ratio = (policy - behaviour).exp()
    low, high = o["importance_low"], o["importance_high"]
    weights = []
    for t in range(len(ratio)):
        r = float(ratio[t])
        if o["rollout_correction"] == "none":
            weights.append(1.0)
        elif o["rollout_correction"] == "tis":
            weights.append(min(max(r, low), high))
        elif o["rollout_correction"] == "icepop":  # Nemotron-Cascade 2: r_t 1[low <= r_t <= high]
            weights.append(r if low <= r <= high else 0.0)
        else:
            mean = float(ratio.mean())
            weights.append(r if low <= mean <= high else 0.0)
    result = torch.tensor(weights, dtype=torch.float64)
    if o["drift_gate_block"]:
        gates = []
        size = o["drift_gate_block"]
        for start in range(0, len(ratio), size):
            shift = (policy - behaviour)[start : start + size].abs()
            gates += [math.exp(-o["drift_gate_sharpness"] * float(shift.mean()))] * len(shift)
        gates = torch.tensor(gates, dtype=torch.float64)
        result = result * gates / gates.mean()
    return result
