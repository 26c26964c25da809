"""Recipes of published systems by name: what each published about its multi-teacher distillation.

``recipe: NAME`` in a configuration provides defaults for the sections below; explicit settings take
precedence. ``objective.per_domain.DOMAIN: NAME`` (or ``recipe: NAME`` inside it) uses a recipe's objective
for one domain. Values marked "our choice" are not published.
"""

from __future__ import annotations

import copy
from typing import Any

from megatron_mopd.backend.messages import shown
from megatron_mopd.config.errors import ConfigError, nearest

_OUTCOME_REWARD_WEIGHT = 0.2  # our choice: alpha is not published
_MIMO_BAND = (0.5, 2.0)  # our choice: eps_low and eps_high are not published

RECIPES: dict[str, dict[str, Any]] = {
    # MiMo-V2-Flash, arXiv 2601.02780, 4.4: w_t = sg[theta / mu] inside the band, else 0;
    # A_t = sg[log T - log theta] + alpha A_ORM; 1/|y| per response; about 50 steps.
    "mimo_v2_flash": {
        "objective": {
            "kind": "sampled_token",
            "reduction": "sequence_mean",
            "outcome_reward_weight": _OUTCOME_REWARD_WEIGHT,
            "rollout_correction": "icepop",
            "importance_low": _MIMO_BAND[0],
            "importance_high": _MIMO_BAND[1],
        },
        "rollout": {"samples_per_prompt": 4, "temperature": 1.0},  # group size: our choice
        "optimizer": {"lr": 2e-6, "lr_warmup_iters": 5},  # our choice
        "schedule": {"train_iters": 50, "global_batch_size": 512},  # batch size: our choice
    },
    # GLM-5, arXiv 2602.15763, 3.5: A_t = sg[log T_infer / theta_train], group size 1, a large batch, prompts
    # in proportion from each teacher's own prompt set (`data.prompts[].weight`).
    "glm5": {
        "objective": {
            "kind": "sampled_token",
            "reduction": "token_mean",  # our choice
            "policy_loss": "ppo_clip",  # our choice; the advantage replaces the group-relative one
            "proximal": "recompute",
        },
        "rollout": {"samples_per_prompt": 1, "temperature": 1.0},
        "optimizer": {"lr": 1e-6, "lr_warmup_iters": 5},  # our choice
        "schedule": {"train_iters": 50, "global_batch_size": 1024},  # our choice
    },
    # Nemotron-Cascade 2, arXiv 2603.19220: w_t = sg[r_t] 1[0.5 <= r_t <= 2], token mean, 128 prompts x 4
    # rollouts, lr 2e-6 after 30 steps of warm-up from 2e-7, temperature 1, 40 to 52 steps.
    "nemotron_cascade2": {
        "objective": {
            "kind": "sampled_token",
            "reduction": "token_mean",
            "rollout_correction": "icepop",
            "importance_low": 0.5,
            "importance_high": 2.0,
        },
        "rollout": {"samples_per_prompt": 4, "temperature": 1.0},
        "optimizer": {"lr": 2e-6, "lr_warmup_iters": 30, "lr_warmup_init": 2e-7},
        "schedule": {"train_iters": 52, "global_batch_size": 512},
    },
    # DeepSeek-V4, technical report, 5.1.2: sum_i w_i KL(theta || E_i) over the full vocabulary. No
    # hyperparameters are published.
    "deepseek_v4": {
        "objective": {"kind": "full_vocab_kl", "reduction": "token_mean"},  # reduction: our choice
        "rollout": {"samples_per_prompt": 1, "temperature": 1.0},  # our choice
        "optimizer": {"lr": 2e-6, "lr_warmup_iters": 10},  # our choice
        "schedule": {"train_iters": 100, "global_batch_size": 512},  # our choice
    },
}


def with_recipe(values: dict[str, Any]) -> dict[str, Any]:
    """The nested dictionaries of a configuration merged over its `recipe`; `ConfigError` for an unknown
    recipe."""
    values = copy.deepcopy(values)
    if values.get("recipe") is not None:
        values = _merge(_recipe(values["recipe"], "recipe"), values)
    objective = values.get("objective")
    per_domain = objective.get("per_domain") if isinstance(objective, dict) else None
    if isinstance(per_domain, dict):
        objective["per_domain"] = {
            domain: _domain_objective(own, f"objective.per_domain.{domain}")
            for domain, own in per_domain.items()
        }
    return values


def _domain_objective(own: Any, where: str) -> Any:
    """Replace `recipe` among a domain's keys, or a recipe's name in their place, by its objective."""
    if isinstance(own, str) and own in RECIPES:
        own = {"recipe": own}
    if not isinstance(own, dict) or "recipe" not in own:
        return own
    objective = dict(_recipe(own["recipe"], f"{where}.recipe")["objective"])
    objective.pop("reduction", None)  # one batch has one reduction
    return objective | {key: value for key, value in own.items() if key != "recipe"}


def _recipe(name: Any, where: str) -> dict[str, Any]:
    if not isinstance(name, str) or name not in RECIPES:
        raise ConfigError(f"{where}: unknown recipe {shown(name)}{nearest(str(name), RECIPES)}")
    return copy.deepcopy(RECIPES[name])


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            value = _merge(merged[key], value)
        merged[key] = value
    return merged
