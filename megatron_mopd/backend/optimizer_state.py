"""Repairs to the state of megatron-core's optimizers when a checkpoint is loaded."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer


def allocate_state(optimizer: MegatronOptimizer) -> None:
    """Allocate the optimizer's state as before its first step, so that a checkpoint can be loaded into it.

    megatron-core allocates the moments itself, but with torch's Adam it also reads the `step` of a state that
    does not exist yet.
    """
    for part, adam in _torch_adams(optimizer):
        part.init_state_fn(adam, part.config)
        for state in adam.state.values():
            state.setdefault("step", torch.zeros((), dtype=torch.float32))


def regroup_state(loaded: dict[Any, Any], optimizer: MegatronOptimizer) -> dict[Any, Any]:
    """A distributed optimizer's state, loaded from any layout, regrouped into the parts of `optimizer`.

    megatron-core puts experts into a separate optimizer if expert parallelism gives them different ranks, and
    saves the settings of parameter groups per part, as on rank 0. Tensors are stored by parameter and end up
    in the right part; the groups are matched here by everything that distinguishes them except their ranks.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    places = [loaded] if len(parts) == 1 else [loaded[number] for number in range(len(parts))]
    sources = [loaded, *(value for key, value in loaded.items() if isinstance(key, int))]
    groups = [group for source in sources for group in source.get("optimizer", {}).get("param_groups", ())]
    kinds = {
        source["param_state_sharding_type"] for source in sources if "param_state_sharding_type" in source
    }
    assert len(kinds) == 1, f"one way of sharding for all parts, found {kinds}"
    for part, place in zip(parts, places):
        own = [_as_saved(group, groups) for group in part.optimizer.param_groups]
        place["optimizer"] = place.get("optimizer", {}) | {"param_groups": own}
        place["param_state_sharding_type"] = next(iter(kinds))
    if len(parts) == 1:
        return {key: value for key, value in loaded.items() if not isinstance(key, int)}
    return dict(enumerate(places))


def keep_settings(loaded: dict[Any, Any], optimizer: MegatronOptimizer) -> None:
    """Overwrite the parameter groups' settings in a loaded optimizer state with those of `optimizer`.

    Learning rates, weight decay, betas, epsilon; only the step, which some optimizers store there, is kept.

    Otherwise megatron-core restores the saved settings, which the schedule then reads (0.16), or looks for
    groups with the current settings and finds none (0.19).
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    places = [loaded] if len(parts) == 1 else [loaded[number] for number in range(len(parts))]
    for part, place in zip(parts, places):
        groups = place.get("optimizer", place)["param_groups"]  # torch's state dict if not wrapped
        for saved in groups:
            alike = [group for group in part.optimizer.param_groups if _is_alike(group, saved)]
            assert alike, "parameter groups follow from the configuration, which is the same"
            saved |= {key: value for key, value in alike[0].items() if key not in ("params", "step")}


def _is_alike(group: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two groups of one optimizer are the same group, regardless of their settings."""
    identity = ("wd_mult", "lr_mult", "is_decoupled_lr", "is_expert_parallel")
    return all(group[key] == other[key] for key in identity)


def _as_saved(group: dict[str, Any], saved: list[dict[str, Any]]) -> dict[str, Any]:
    def alike(other: dict[str, Any]) -> bool:
        return all(group[key] == other[key] for key in ("wd_mult", "lr_mult", "is_decoupled_lr"))

    matches = [other for other in saved if alike(other)]
    assert matches, "parameter groups follow from the configuration, which is the same"
    same_ranks = [m for m in matches if m["is_expert_parallel"] == group["is_expert_parallel"]]
    chosen = (same_ranks or matches)[0]
    return chosen | {"is_expert_parallel": group["is_expert_parallel"], "params": group["params"]}


def separate_steps(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its own step count after loading.

    megatron-core shares one tensor among all parameters, which torch's Adam then increments once for each.
    """
    for _, adam in _torch_adams(optimizer):
        for state in adam.state.values():
            state["step"] = state["step"].clone()


def _torch_adams(optimizer: MegatronOptimizer) -> list[tuple[MegatronOptimizer, torch.optim.Optimizer]]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    adams = (torch.optim.Adam, torch.optim.AdamW)
    return [(part, part.optimizer) for part in parts if isinstance(part.optimizer, adams)]
