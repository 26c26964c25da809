"""DistributedDataParallel, AdamW and the learning-rate schedule, all megatron-core's."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.moe.router import TopKRouter

from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.config import Config, ConfigError
from megatron_mopd.model.build import DTYPES
from megatron_mopd.model.gpt import HiddenStateGPT, is_expert


def freeze_routing(chunks: list[HiddenStateGPT], config: Config) -> None:
    """Freeze the routers or their expert biases if configured; must precede the gradient buffers.

    A frozen router gets no auxiliary or z-loss either, which could only change the hidden states. Raises
    `ConfigError` for a student without experts.
    """
    settings = config.optimizer
    if not (settings.freeze_router or settings.freeze_expert_bias):
        return
    for chunk in chunks:
        model = chunk.config  # the student's own, shared by its layers
        if not model.num_moe_experts:
            key = "freeze_router" if settings.freeze_router else "freeze_expert_bias"
            raise ConfigError(f"optimizer.{key}: the student has no experts (student.num_moe_experts)")
        if settings.freeze_expert_bias:
            model.moe_router_bias_update_rate = 0.0
        if settings.freeze_router:
            coefficient = model.moe_aux_loss_coeff
            model.moe_aux_loss_coeff = [0.0] * len(coefficient) if isinstance(coefficient, list) else 0.0
            model.moe_z_loss_coeff = None
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    module.requires_grad_(False)


def mark_experts(chunks: list[HiddenStateGPT], groups: ParallelGroups) -> None:
    """Mark the experts' parameters as reduced over expert-data-parallel ranks; must precede the gradient
    buffers.

    megatron-core marks them (`allreduce=False`) only under expert parallelism. Experts whose
    tensor-parallel size differs from that of the other layers also have different replicas: without the mark,
    gradients of different shards would be summed, or those of replicas not reduced. No collectives.
    """
    if groups.collection.expt_tp.size() == groups.tp_size:
        return  # the same replicas either way, or already marked
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if is_expert(name):
                parameter.allreduce = False


def wrap_data_parallel(
    chunks: list[HiddenStateGPT], config: Config, groups: ParallelGroups
) -> list[DistributedDataParallel]:
    """Wrap the student's chunks with gradient buffers. Gradients are summed over data-parallel ranks, then
    divided by the number of tokens.
    """
    freeze_routing(chunks, config)
    mark_experts(chunks, groups)
    settings = DistributedDataParallelConfig(
        # bf16 gradients lose small contributions when summed over many ranks and micro-batches.
        grad_reduce_in_fp32=config.params_dtype == "bfloat16",
        overlap_grad_reduce=config.optimizer.overlap_grad_reduce,
        use_distributed_optimizer=config.optimizer.use_distributed_optimizer,
        check_for_nan_in_grad=False,
        average_in_collective=False,
    )
    model_config = chunks[0].config
    wrapped = [
        DistributedDataParallel(
            model_config,
            settings,
            chunk,
            # Later chunks' reductions overlap with the compute of earlier ones anyway; only the first, whose
            # backward comes last, needs buckets.
            disable_bucketing=number > 0,
            pg_collection=groups.collection,
        )
        for number, chunk in enumerate(chunks)
    ]
    model_config.finalize_model_grads_func = finalize_model_grads
    if config.optimizer.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        start_sync = [chunk.start_grad_sync for chunk in wrapped]
        single = len(wrapped) == 1
        model_config.no_sync_func = no_sync[0] if single else no_sync
        if groups.pp_size > 1:
            model_config.grad_sync_func = start_sync[0] if single else start_sync
    return wrapped


def build_optimizer(
    chunks: list[DistributedDataParallel], config: Config, groups: ParallelGroups
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW over the chunks' parameters (state sharded over DP if configured), and its schedule in
    iterations.
    """
    settings = config.optimizer
    dtype = DTYPES[config.params_dtype]
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            clip_grad=settings.clip_grad,
            use_distributed_optimizer=settings.use_distributed_optimizer,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
        ),
        chunks,
        use_gloo_process_groups=groups.device.type != "cpu",
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=settings.lr_warmup_init,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters,
        lr_decay_steps=max(config.schedule.train_iters, settings.lr_warmup_iters + 1),
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=config.schedule.train_iters // 10 if settings.lr_decay_style == "WSD" else None,
        lr_wsd_decay_style="linear",
    )
    return optimizer, scheduler


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
