"""Estimates a run's memory before it is started: per rank and per host, by component.

Parameters, gradients, optimizer state and teachers are counted on real modules: `imagined_groups` creates the
parallel groups of a world of any size in a single process (collectives do nothing), and models are built on
the meta device, without data. Activations, hidden states and logits are computed from shapes with the
formulas below.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # noqa: F401  (registers the backend "fake")
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.overrides import TorchFunctionMode

from megatron_mopd.backend.parallel import ParallelGroups, build_parallel_groups, destroy_parallel_groups
from megatron_mopd.config import Config, DomainObjectives, ModelConfig, ParallelConfig
from megatron_mopd.estimate.activations import SavedActivations
from megatron_mopd.model.build import DTYPES, build_model
from megatron_mopd.model.gpt import is_expert
from megatron_mopd.model.norm import HeadsRMSNorm
from megatron_mopd.objectives.torch_kernels import TILE_ELEMENTS
from megatron_mopd.pipeline.costs import CostModel
from megatron_mopd.pipeline.instructions import Plan, StudentForward, TeacherForward
from megatron_mopd.pipeline.plan import Planner
from megatron_mopd.pipeline.problem import Limits, PlanRequest, split_scoring
from megatron_mopd.pipeline.simulate import simulate
from megatron_mopd.teachers import placement
from megatron_mopd.teachers.bank import TeacherSource
from megatron_mopd.teachers.encoding import Encoding
from megatron_mopd.teachers.hidden_cache import DTYPES as CACHE_DTYPES
from megatron_mopd.teachers.layout import Skeleton


class _OnMeta(TorchFunctionMode):
    """Creates every tensor on the meta device, whatever device is requested."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


@contextlib.contextmanager
def imagined_groups(parallel: ParallelConfig, world_size: int, rank: int) -> Iterator[ParallelGroups]:
    """The parallel groups of `rank` in a world of `world_size`, simulated in this process.

    Must not be used if torch.distributed is already initialized.
    """
    dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=world_size)
    try:
        groups = build_parallel_groups(parallel, torch.device("cpu"), seed=0)
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
    """Number of student parameters on this rank: in experts, and elsewhere."""


def estimate_rank(
    config: Config,
    student: ModelConfig,
    teachers: list[TeacherSource],
    max_mixture: int,
    groups: ParallelGroups,
) -> RankMemory:
    """Peak memory of the rank of `groups` if every response has full length.

    For a GPU, unless `device` is `cpu`, where norms and loss are not single kernels and save more.
    """
    with _OnMeta(), torch.device("meta"):
        chunks = build_model(student, groups, config.params_dtype, max_sequence_length=config.data.seq_length)
        itemsize = DTYPES[config.params_dtype].itemsize
        parameters = sum(p.numel() for chunk in chunks for p in chunk.parameters())
        experts = sum(p.numel() for chunk in chunks for n, p in chunk.named_parameters() if is_expert(n))
        device = {
            "student weights": parameters * itemsize,
            "gradients": parameters * (4 if itemsize == 2 else itemsize),
            "optimizer": _optimizer_bytes(config, groups, parameters - experts, experts, itemsize),
            "activations": activation_bytes(config, chunks, groups, itemsize, config.device == "cpu"),
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
        device["loss"] = _loss_bytes(config, student, teachers, max_mixture, chunks, groups, itemsize)
    return RankMemory(device, host, disk, (experts, parameters - experts))


def _optimizer_bytes(config: Config, groups: ParallelGroups, dense: int, experts: int, itemsize: int) -> int:
    """Two Adam moments, and for bfloat16 a float32 copy of the weights; sharded over replicas (ZeRO-1)."""
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
    heads = min(DomainObjectives(config.objective).heads_at_once(max_mixture) + 1, len(teachers))
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
    """Hidden states of responses that wait for the loss at the same time, each scored by the maximum number
    of teachers of a sample: those of a whole step for packed micro-batches, else of as many micro-batches as
    the step's plan holds.
    """
    if not teachers:
        return 0
    storage, schedule = config.teacher_storage, config.schedule
    samples = -(-schedule.global_batch_size // groups.dp_size)
    width = max(source.model.transformer["hidden_size"] for source in teachers)
    itemsize = CACHE_DTYPES[storage.hidden_cache_dtype or config.params_dtype].itemsize
    per_token = width * itemsize
    if DomainObjectives(config.objective).compare_tokens_only():  # a log-prob instead of a state
        per_token = 8 if config.params_dtype == "float64" else 4
    per_sample = config.rollout.max_new_tokens * per_token * max_mixture // groups.cp_size
    if schedule.max_tokens_per_micro_batch:
        held = samples
    else:
        held = _scored_at_once(_planned(config, groups)) * schedule.micro_batch_size
    size = min(held, samples) * per_sample
    return size if storage.hidden_cache_bytes is None else min(size, storage.hidden_cache_bytes)


def _planned(config: Config, groups: ParallelGroups) -> Plan:
    """The plan of a step with one teacher per sample and costs that have not been measured yet."""
    schedule = config.schedule
    count = -(-schedule.global_batch_size // groups.dp_size // schedule.micro_batch_size)
    request = PlanRequest(
        groups.pp_size,
        count,
        CostModel.build(groups.pp_size, groups.vpp_size, teacher_forward={"any": 1.0}),
        groups.vpp_size,
        split_scoring({"any": count}),
        schedule.kind,
        Limits(activations=schedule.max_activations, cached_states=schedule.max_cached_states),
    )
    return Planner(effort=0).plan(request)


def _scored_at_once(plan: Plan) -> int:
    """Maximum number of scored micro-batches that wait for the loss at the same time."""
    held = most = 0
    releases, last_chunk = plan.request.releases(), plan.request.virtual_stages - 1
    for entry in plan.stages[-1]:
        if isinstance(entry, TeacherForward):
            held += 1
        elif isinstance(entry, StudentForward) and entry.chunk == last_chunk:
            held -= releases[entry.microbatch]
        most = max(most, held)
    return most


def _loss_bytes(
    config: Config,
    student: ModelConfig,
    teachers: list[TeacherSource],
    max_mixture: int,
    chunks,
    groups: ParallelGroups,
    itemsize: int,
) -> int:
    """Memory of the loss of one micro-batch: chunks of the student's and the teachers' logits (and of their
    mixture), the head's gradient, summed over all losses before it is added to those of other micro-batches,
    and for every response token the student's hidden state, its gradient, and the teachers' states; on the
    CPU also the tiles of a divergence or a softmax.
    """
    head, wide = chunks[-1].head_weight(), max(itemsize, 4)
    share = config.rollout.max_new_tokens / config.data.seq_length
    rows = int(_micro_batch_tokens(config) * share / groups.cp_size)
    chunk = min(config.objective.chunk_size, rows) * head.shape[0]
    logits, states = chunk * itemsize, 2 * student.transformer["hidden_size"]
    tiles = 2 * wide * min(chunk, TILE_ELEMENTS["cpu"])
    if teachers and not DomainObjectives(config.objective).compare_tokens_only():
        # Teachers' logits are mixed in at least float32.
        logits += chunk * (itemsize + (wide if max_mixture > 1 else 0))
        states += max(source.model.transformer["hidden_size"] for source in teachers) * max_mixture
        tiles = 8 * wide * min(chunk, TILE_ELEMENTS["cpu"])
    kept = head.numel() * wide + rows * states * itemsize
    return logits + kept + (tiles if config.device == "cpu" else 0)


def _micro_batch_tokens(config: Config) -> int:
    """Tokens of the largest micro-batch, before it is split over TP and CP."""
    schedule = config.schedule
    return schedule.max_tokens_per_micro_batch or schedule.micro_batch_size * config.data.seq_length


def activation_bytes(config: Config, chunks, groups: ParallelGroups, itemsize: int, on_cpu: bool) -> int:
    """Peak memory of the activations that the student's forward passes save for backward on this stage.

    A stage holds as many chunks' passes as the step's plan (or megatron-core's 1F1B) has in flight.
    """
    model: TransformerConfig = chunks[0].config
    tokens = _micro_batch_tokens(config) // groups.cp_size
    in_flight = simulate([_planned(config, groups)]).peak_activations[groups.pp.rank()]
    over_heads = any(isinstance(module, HeadsRMSNorm) for chunk in chunks for module in chunk.modules())
    saved = SavedActivations(model, itemsize, on_cpu, over_heads)
    per_token = sum(
        saved.stage(
            [layer.layer_number - 1 for layer in chunk.decoder.layers], chunk.pre_process, chunk.post_process
        )
        for chunk in chunks
    )
    return int(in_flight * tokens * per_token / len(chunks))
