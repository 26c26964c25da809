"""Configuration keys of the objective (`objective`), for the whole run or for one domain.

Re-exported by `schema.py`, which has the other sections and explains how a docstring names a key's resume
class. `objectives.py` checks which of these values are valid together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, TypeAdapter

from megatron_mopd.choices import ObjectiveKind, Reduction
from megatron_mopd.config.value_types import (
    Count,
    CountOrZero,
    FiniteNonNegative,
    FinitePositive,
    Name,
    Positive,
    PositiveShare,
    Real,
    Section,
    Share,
)


def _keys_of_a_domain(own: Any) -> dict[str, Any]:
    """The keys that a domain sets itself, checked like those of the section; `math: sampled_token` stands for
    `math: {kind: sampled_token}`.
    """
    own = {"kind": own} if isinstance(own, str) else own
    objective = _OBJECTIVE.validate_python(own)
    return {key: getattr(objective, key) for key in own}


DomainKeys = Annotated[dict[str, Any], BeforeValidator(_keys_of_a_domain)]


@dataclass(frozen=True)
class ObjectiveConfig(Section):
    """The loss to minimize. Every key except `reduction` and `chunk_size` can be overridden per domain."""

    kind: ObjectiveKind = "full_vocab_kl"
    """On the student's own trajectories, against the routed teachers: `full_vocab_kl` (reverse KL),
    `top_k_kl` (reverse KL over the k most likely tokens and one tail outcome), `forward_kl`, `jsd`,
    `sampled_token` (log-ratio of the sampled token as an advantage). `grpo`: group-relative advantage of the
    verifier's reward, no teacher. `sft`: cross-entropy on `answer`. On resume: must not change."""
    weight: FinitePositive = 1.0
    """Factor of this objective's loss, including `add`. On resume: must not change."""
    add: dict[ObjectiveKind, FinitePositive] = field(default_factory=dict)
    """Further kinds with their weights, whose losses are added to that of `kind`. On resume: must not
    change."""
    apply_as: Literal["loss", "advantage"] | None = None
    """`loss` or `advantage`: if set, checked against the only correct use of the kind. On resume: must not
    change."""
    reduction: Reduction = "token_mean"
    """`token_mean`, `sequence_mean` (equal weight per response) or `domain_mean` (equal weight per domain).
    On resume: must not change."""
    temperature: FinitePositive = 1.0
    """Temperature of both student and teacher in the divergence or the log-ratio. On resume: must not
    change."""
    chunk_size: Count = 1024
    """Tokens whose logits exist at the same time in the loss. On resume: may change."""
    beta: Share | None = None
    """`jsd`: weight of the teacher in the mixture; default 0.5. On resume: must not change."""
    top_k: Count | None = None
    """`top_k_kl`: number of tokens that are compared individually. On resume: must not change."""
    top_k_from: Literal["teacher", "student"] | None = None
    """`top_k_kl`: whose most likely tokens, `teacher` (default) or `student`. On resume: must not change."""
    policy_loss: Literal["plain", "ppo_clip"] = "plain"
    """`sampled_token` and `grpo`: `plain` (-A log theta) or `ppo_clip` (the clipped ratio to the policy at
    the start of the rollout batch). On resume: must not change."""
    clip_eps_low: PositiveShare | None = None
    """`ppo_clip`: the ratio is clipped below 1 minus this; default 0.2. On resume: must not change."""
    clip_eps_high: FinitePositive | None = None
    """`ppo_clip`: the ratio is clipped above 1 plus this; default 0.2. On resume: must not change."""
    proximal: Literal["recompute", "behaviour"] = "recompute"
    """`ppo_clip`: `recompute` (one forward pass of the training model before a rollout batch's first step) or
    `behaviour` (the sampler's own log-probs, which saves that pass). On resume: must not change."""
    outcome_reward_weight: FiniteNonNegative = 0.0
    """`sampled_token`: alpha of MiMo-V2-Flash, the weight of the group-relative outcome advantage added to
    the distillation advantage. On resume: must not change."""
    normalize_advantage: bool = True
    """Divide outcome advantages by their group's standard deviation, as in GRPO. On resume: must not
    change."""
    future_discount: Share = 0.0
    """`sampled_token`: a token's advantage is the sum of the log-ratios from it to the end of the response,
    discounted by this factor per token; 0 counts only its own. On resume: must not change."""
    log_ratio_clamp: Positive | None = None
    """`sampled_token`: log-ratios are clamped to [-this, this]. On resume: must not change."""
    shaping: PositiveShare | None = None
    """`sampled_token`: a in log(a T + (1 - a) theta) - log theta, which is bounded below by log(1 - a). On
    resume: must not change."""
    rollout_correction: Literal["none", "tis", "icepop", "sequence_mask"] = "none"
    """Per-token weight from theta / mu, the ratio of the model in training to the sampler: `tis` (clamped to
    the band), `icepop` (0 outside the band), `sequence_mask` (a response is dropped if its mean ratio is
    outside the band), `none`. On resume: must not change."""
    importance_low: Real | None = None
    """Lower end of the ratio band; default 0.5. On resume: must not change."""
    importance_high: Real | None = None
    """Upper end of the ratio band; default 2. On resume: must not change."""
    drift_gate_block: CountOrZero = 0
    """Weight blocks of this many response tokens by how far the student has drifted on them since they were
    sampled; 0 disables the gate. On resume: must not change."""
    drift_gate_sharpness: Positive | None = None
    """How steeply that weight falls with the block's mean |log theta - log mu|; default 1. On resume: must
    not change."""
    per_domain: dict[Name, DomainKeys] = field(default_factory=dict)
    """Domain -> the keys that it overrides. On resume: must not change."""


_OBJECTIVE = TypeAdapter(ObjectiveConfig)
