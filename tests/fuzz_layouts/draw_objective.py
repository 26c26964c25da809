"""Random objectives for a domain."""

from __future__ import annotations

from random import Random
from typing import Any

_DIVERGENCES = ("full_vocab_kl", "forward_kl", "jsd", "top_k_kl")


def draw_objective(
    rng: Random, samples_per_prompt: int, temperature: float, vocab_size: int, has_teachers: bool
) -> dict[str, Any]:
    """The objective of one domain, which sets each key that applies to its kinds with some probability."""
    grouped = samples_per_prompt > 1
    if not has_teachers:
        objective: dict[str, Any] = dict(kind=rng.choice(["sft", "grpo"] if grouped else ["sft"]))
        if objective["kind"] == "sft":
            return objective | (dict(weight=0.5) if rng.random() < 0.3 else {})
    else:
        kinds = [*_DIVERGENCES, "full_vocab_kl", "sampled_token"]
        objective = dict(kind=rng.choice(kinds))
        if rng.random() < 0.35:
            others = sorted({*kinds, *(["grpo"] if grouped else [])} - {objective["kind"]})
            objective["add"] = {rng.choice(others): rng.choice([0.1, 0.5, 2.0])}
    kinds = {objective["kind"], *objective.get("add", {})}
    objective |= _divergence_keys(rng, kinds, vocab_size)
    if kinds & {"sampled_token", "grpo"}:
        objective |= _policy_keys(rng, kinds, temperature, grouped)
    else:
        objective["temperature"] = rng.choice([1.0, 0.7, 1.5])
    if rng.random() < 0.45:
        objective["rollout_correction"] = rng.choice(["tis", "icepop", "sequence_mask"])
        if rng.random() < 0.5:
            objective |= dict(importance_low=0.4, importance_high=3.0)
    if rng.random() < 0.15:
        objective["drift_gate_block"] = rng.choice([1, 2, 5])
        if rng.random() < 0.5:
            objective["drift_gate_sharpness"] = 2.0
    if rng.random() < 0.2:
        objective["weight"] = rng.choice([0.3, 2.0])
    return objective


def _divergence_keys(rng: Random, kinds: set[str], vocab_size: int) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    if "jsd" in kinds and rng.random() < 0.7:
        keys["beta"] = rng.choice([0.1, 0.3, 0.9])
    if "top_k_kl" in kinds:
        keys["top_k"] = rng.choice([k for k in (1, 2, 5, 11) if k < vocab_size])
        keys["top_k_from"] = rng.choice(["teacher", "student"])
    return keys


def _policy_keys(rng: Random, kinds: set[str], temperature: float, grouped: bool) -> dict[str, Any]:
    keys: dict[str, Any] = dict(temperature=temperature)
    if rng.random() < 0.4:
        keys |= dict(policy_loss="ppo_clip", proximal=rng.choice(["recompute", "recompute", "behaviour"]))
        if rng.random() < 0.5:
            keys["clip_eps_high"] = 0.1
    if "sampled_token" in kinds:
        for chance, values in (
            (0.3 if grouped else 0.0, dict(outcome_reward_weight=0.3)),
            (0.3, dict(future_discount=rng.choice([0.5, 0.9, 1.0]))),
            (0.2, dict(log_ratio_clamp=0.5)),
            (0.2, dict(shaping=0.7)),
        ):
            if rng.random() < chance:
                keys |= values
    if "grpo" in kinds and rng.random() < 0.3:
        keys["normalize_advantage"] = False
    return keys
