"""What a run will take of memory, before it is started: per rank and per host, by component.

Parameters, gradients, optimizer state and teachers are counted on the modules themselves: `imagined_groups`
lays the parallel groups over a world of any size inside one process (collectives do nothing), and models are
built on the meta device, which holds shapes and no data. Activations, hidden states and logits follow from
shapes by the formulas below.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_mopd.backend.parallel import ParallelGroups, build_parallel_groups, destroy_parallel_groups
from megatron_mopd.config import Config, ModelConfig
from megatron_mopd.model.build import DTYPES, build_model
from megatron_mopd.model.specs import moe_layer_pattern
from megatron_mopd.pipeline.plan import Planner
from megatron_mopd.pipeline.problem import CostModel, PlanRequest, split_groups
from megatron_mopd.pipeline.simulate import simulate
from megatron_mopd.teachers import placement
from megatron_mopd.teachers.bank import TeacherSource
from megatron_mopd.teachers.encoding import Encoding
from megatron_mopd.teachers.hidden_cache import DTYPES as CACHE_DTYPES
from megatron_mopd.teachers.layout import Skeleton


class _OnMeta(TorchFunctionMode):
    """Every tensor that is made has a shape and no data, whatever device was asked for."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


@contextlib.contextmanager
def imagined_groups(config: Config, world_size: int, rank: int) -> Iterator[ParallelGroups]:
    """The parallel groups of `rank` in a world of `world_size`, in this process alone.

    Must not be used where torch.distributed is already initialised.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        groups = build_parallel_groups(config.parallel, torch.device("cpu"), config.seed)
        yield replace(groups, device=torch.device("meta"))
    finally:
        destroy_parallel_groups()
        if dist.is_initialized():
            dist.destroy_process_group()


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank, by component."""

    device: dict[str, int]
    host: dict[str, int]
    disk: int
    parameters: tuple[int, int]
    """How many of the student's this rank holds: in experts, and elsewhere."""


def estimate_rank(
    config: Config,
    student: ModelConfig,
    teachers: list[TeacherSource],
    max_mixture: int,
    groups: ParallelGroups,
) -> RankMemory:
    """Memory of the rank that `groups` belong to, at its peak, when every response has full length."""
    with _OnMeta(), torch.device("meta"):
        chunks = build_model(student, groups, config.params_dtype, max_sequence_length=config.data.seq_length)
        itemsize = DTYPES[config.params_dtype].itemsize
        parameters = sum(p.numel() for chunk in chunks for p in chunk.parameters())
        experts = sum(p.numel() for chunk in chunks for n, p in chunk.named_parameters() if ".experts." in n)
        device = {
            "student weights": parameters * itemsize,
            "gradients": parameters * (4 if itemsize == 2 else itemsize),
            "optimizer": _optimizer_bytes(config, groups, parameters - experts, experts, itemsize),
            "activations": activation_bytes(config, chunks, groups, itemsize),
        }
        host = {}
        disk = 0
        if teachers:
            slots, store, disk = _teacher_bytes(config, teachers, max_mixture, groups)
            device["teacher slots"] = slots
            host["teacher storage"] = store
    if groups.is_last_stage:
        cache = _cache_bytes(config, teachers, max_mixture, groups)
        home = device if config.teacher_storage.hidden_cache_device == "device" else host
        home["hidden cache"] = cache
        device["logits chunk"] = _logits_bytes(config, student, chunks, itemsize)
    return RankMemory(device, host, disk, (experts, parameters - experts))


def _optimizer_bytes(config: Config, groups: ParallelGroups, dense: int, experts: int, itemsize: int) -> int:
    """Two Adam moments, and for bfloat16 a float32 copy of the weights; shared among replicas (ZeRO-1)."""
    per_parameter = 12 if itemsize == 2 else 2 * itemsize
    if not config.optimizer.use_distributed_optimizer:
        return per_parameter * (dense + experts)
    replicas, expert_replicas = groups.collection.dp_cp.size(), groups.collection.expt_dp.size()
    return per_parameter * (dense // replicas + experts // expert_replicas)


def _teacher_bytes(
    config: Config, teachers: list[TeacherSource], max_mixture: int, groups: ParallelGroups
) -> tuple[int, int, int]:
    """(device slots, host memory, files) of all teachers on this rank, as the bank allocates them."""
    parts, skeletons = placement.sharding(groups), {}
    payload = dict.fromkeys(parts, 0)
    staging = dict.fromkeys(parts, 0)
    for source in teachers:
        key = repr(replace(source.model, load=None))
        if key not in skeletons:
            (chunk,) = build_model(
                source.model,
                groups,
                config.params_dtype,
                max_sequence_length=config.data.seq_length,
                frozen=True,
                where=f"teachers.{source.name}",
            )
            skeletons[key] = Skeleton(chunk, groups.is_last_stage, parts)
        for segment in skeletons[key].segments.values():
            size = Encoding(segment, config.teacher_storage.dtype, parts[segment.name]).num_bytes
            payload[segment.name] += size
            staging[segment.name] = max(staging[segment.name], size)
    slots = min(2, len(teachers)) * max(s.body_bytes for s in skeletons.values())
    heads = min(max_mixture + 1, len(teachers))
    if config.schedule.kind != "megatron":
        heads = max(heads, 2)  # a plan's head slots
    slots += heads * max(s.head_bytes for s in skeletons.values())
    if config.teacher_storage.dtype is not None:
        slots += sum(staging.values())
    by_mode = placement.bytes_per_mode(payload, parts)
    mode = config.teacher_storage.mode
    return slots, by_mode[mode], by_mode["host"] if mode == "mmap" else 0


def _cache_bytes(
    config: Config, teachers: list[TeacherSource], max_mixture: int, groups: ParallelGroups
) -> int:
    """Hidden states of responses that wait for the loss at the same time, each scored by as many teachers as
    any sample has: all of a step's with megatron-core's schedules or with look-ahead, else as many
    micro-batches as a plan of the step holds.
    """
    if not teachers:
        return 0
    storage, schedule = config.teacher_storage, config.schedule
    samples = -(-schedule.global_batch_size // groups.dp_size)
    width = max(source.model.transformer["hidden_size"] for source in teachers)
    itemsize = CACHE_DTYPES[storage.hidden_cache_dtype or config.params_dtype].itemsize
    per_sample = config.rollout.max_new_tokens * width * itemsize * max_mixture // groups.cp_size
    if schedule.kind == "megatron" or schedule.max_tokens_per_micro_batch:
        held = samples
    else:
        held = _planned_states(config, groups, samples) * schedule.micro_batch_size
    size = min(held, samples) * per_sample
    return size if storage.hidden_cache_bytes is None else min(size, storage.hidden_cache_bytes)


def _planned_states(config: Config, groups: ParallelGroups, samples: int) -> int:
    """Scored micro-batches that a step's plan holds at once, with one teacher a sample and equal costs."""
    count = -(-samples // config.schedule.micro_batch_size)
    request = PlanRequest(
        groups.pp_size,
        count,
        CostModel.build(groups.pp_size, groups.vpp_size, teacher_forward={"any": 1.0}),
        groups.vpp_size,
        split_groups({"any": count}),
        config.schedule.kind,
    )
    return max(simulate([Planner(effort=0).plan(request)]).peak_cached_states)


def _logits_bytes(config: Config, student: ModelConfig, chunks, itemsize: int) -> int:
    """Two chunks of logits, and the head's gradient before it is added to the others."""
    head = chunks[-1].head_weight()
    rows = min(config.objective.chunk_size, _micro_batch_tokens(config))
    return 2 * rows * head.shape[0] * itemsize + head.numel() * (4 if itemsize == 2 else itemsize)


def _micro_batch_tokens(config: Config) -> int:
    """Tokens of the largest micro-batch, before TP and CP divide it."""
    schedule = config.schedule
    return schedule.max_tokens_per_micro_batch or schedule.micro_batch_size * config.data.seq_length


def activation_bytes(config: Config, chunks, groups: ParallelGroups, itemsize: int) -> int:
    """What the student's forward passes keep for their backward passes, at the most, on this stage.

    In 1F1B a stage holds as many micro-batches as there are stages from it to the last.
    """
    model: TransformerConfig = chunks[0].config
    tokens = _micro_batch_tokens(config) // groups.cp_size
    stages = groups.pp_size
    microbatches = -(-config.schedule.global_batch_size // groups.dp_size // config.schedule.micro_batch_size)
    in_flight = min(microbatches, stages - groups.pp.rank())
    if groups.vpp_size > 1:
        in_flight = min(microbatches, in_flight + stages) / groups.vpp_size
    pattern = moe_layer_pattern(model)
    held = [layer.layer_number - 1 for chunk in chunks for layer in chunk.decoder.layers]
    per_token = sum(_layer_elements(model, pattern[layer]) for layer in held)
    return int(in_flight * tokens * per_token * itemsize)


def _layer_elements(model: TransformerConfig, is_moe: bool) -> float:
    """Numbers that one layer keeps for each token, on each tensor-parallel rank.

    Norm inputs and outputs, queries, keys and values before and after the rotary embedding, attention's
    output, and the feed-forward block's projections; recomputed layers keep their input only.
    """
    h, tp = model.hidden_size, model.tensor_model_parallel_size
    if model.recompute_granularity == "full":
        return h / (tp if model.sequence_parallel else 1)
    query = model.num_attention_heads * model.kv_channels
    key_value = model.num_query_groups * model.kv_channels
    split = tp if model.sequence_parallel else 1
    gated = 2 if model.gated_linear_unit else 1

    def feed_forward(width: int) -> float:
        # Up projection, its halves' activation and product; the gate's float32 copy is not kept.
        return width * (2 * gated + 1)

    attention = 2 * h / split + h + (2 * query + 2 * key_value + query) / tp
    if not is_moe:
        return attention + 2 * h / split + h + feed_forward(model.ffn_hidden_size) / tp
    topk, width = model.moe_router_topk, model.moe_ffn_hidden_size or model.ffn_hidden_size
    routed = topk * (2 * h + feed_forward(width) / (model.expert_tensor_parallel_size or 1))
    shared = 0.0
    if model.moe_shared_expert_intermediate_size:
        shared = h + feed_forward(model.moe_shared_expert_intermediate_size) / tp
    return attention + 3 * h / split + routed / 1 + shared + 3 * model.num_moe_experts / split
