"""DistributedDataParallel, AdamW and the learning-rate schedule, all megatron-core's."""

from __future__ import annotations

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
