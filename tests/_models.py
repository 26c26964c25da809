"""Tiny models, batches and learners for the tests, and gradients gathered from any layout."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mopd.backend.parallel import (
    ParallelGroups,
    build_parallel_groups,
    destroy_parallel_groups,
    select_device,
)
from megatron_mopd.config import Config, ModelConfig, config_from_dict
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.model.build import build_model
from megatron_mopd.model.gpt import unwrap
from megatron_mopd.model.initialize import sharded_tensors
from megatron_mopd.teachers.bank import TeacherBank, TeacherSource
from megatron_mopd.teachers.routing import Routing
from megatron_mopd.training.learner import Learner
from megatron_mopd.training.optimizer import build_optimizer, wrap_data_parallel
from megatron_mopd.training.teacher_blocks import with_block_size
from tests._megatron_schedules import MegatronSchedules

VOCAB = 83  # prime, so no layout divides it evenly

DENSE = dict(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=4,
    ffn_hidden_size=48,
    # Larger weights than usual make attention and routing matter in a model this small.
    init_method_std=0.3,
)
GQA = DENSE | dict(num_query_groups=2, qk_layernorm=True)
OVER_HEADS = GQA | dict(qk_layernorm_over_heads=True)
MOE = GQA | dict(num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=24, moe_aux_loss_coeff=0.0)
SHARED = MOE | dict(
    moe_shared_expert_intermediate_size=24,
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    moe_router_load_balancing_type="none",
    moe_router_topk_scaling_factor=1.5,
    moe_layer_freq=[0, 1, 1, 1],
)

TEACHERS = {"a": 11, "b": 12, "c": 13}
"""Teacher name -> seed of its weights."""
DOMAINS = ("arith", "other", "text")
ROUTING = {"arith": "a", "text": {"b": 0.7, "c": 0.3}, "default": "c"}


def model_config(transformer: dict, **kwargs) -> ModelConfig:
    """`transformer` may also name fields of `ModelConfig`, as a section of a configuration does."""
    own = {field.name for field in dataclasses.fields(ModelConfig)} & transformer.keys()
    values = {"vocab_size": VOCAB, "make_vocab_size_divisible_by": 8}
    values |= {name: transformer[name] for name in own} | kwargs
    return ModelConfig(
        transformer={name: value for name, value in transformer.items() if name not in own}, **values
    )


def trajectory(index: int, prompt: list[int], response: list[int], domain: str = "arith") -> Trajectory:
    text = Prompt("", tuple(prompt), domain, None, "exact_match", None, index, f"test {index}")
    return Trajectory(text, tuple(response), index)


def batch(
    count: int = 16,
    seed: int = 0,
    longest: int = 20,
    equal_lengths: bool = False,
    domains: Sequence[str] = ("arith", "text", "other"),
) -> list[Trajectory]:
    """`count` random trajectories in these domains, of different lengths unless `equal_lengths`."""
    rng = random.Random(seed)
    result = []
    for index in range(count):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, longest // 2))]
        response = rng.randint(1, longest // 2) if not equal_lengths else longest - len(prompt)
        response = [rng.randrange(VOCAB) for _ in range(response)]
        result.append(trajectory(index, prompt, response, rng.choice(domains)))
    return result


def groups_for(parallel: dict, seed: int = 1, only: bool = False) -> ParallelGroups:
    """Build the groups of one layout in a test rank. megatron-core forgets this process's earlier groups;
    with `only`, they are also destroyed.
    """
    config = config_from_dict({"run_dir": "unused", "parallel": parallel})
    device = select_device("cpu")
    if parallel_state.model_parallel_is_initialized():
        destroy_parallel_groups(keep_models_working=not only)
    return build_parallel_groups(config.parallel, device, seed)


def groups_of(config: Config, student: ModelConfig) -> ParallelGroups:
    """Build the groups of a run in a test rank, without any earlier ones."""
    parallel = with_block_size(config, student, dist.get_world_size(), ranks_per_host=None)
    return groups_for(dataclasses.asdict(parallel), only=True)


def make_learner(
    transformer: dict,
    parallel: dict | None = None,
    *,
    kind: str = "full_vocab_kl",
    teachers: dict | None = None,
    teacher_transformer: dict | None = None,
    model: dict | None = None,
    seed: int = 7,
    teacher_directory: str = "unused",
    sources: list[TeacherSource] | None = None,
    domains: Sequence[str] = DOMAINS,
    **sections,
) -> Learner:
    """A learner on this rank's layout. Weights depend on the seeds alone, so they are equal in every layout.

    `sources`: teachers with their own architectures, with `routing` as a section. `schedule.kind: megatron`
    selects megatron-core's schedules, the oracle for ours.
    """
    values = {
        "run_dir": "unused",
        "parallel": parallel or {},
        "objective": {"kind": kind},
        "params_dtype": "float64",
    }
    # Adam divides by the gradient's magnitude: with the usual epsilon, rounding in a nearly zero gradient
    # becomes a full step of the learning rate, and tests would compare noise.
    values["optimizer"] = {"use_distributed_optimizer": False, "lr": 1e-2, "clip_grad": 0.0, "adam_eps": 1e-3}
    schedule = dict(sections.pop("schedule", {}))
    is_oracle = schedule.get("kind") == "megatron"
    if is_oracle:
        del schedule["kind"]
    for name, section in (sections | {"schedule": schedule}).items():
        values[name] = values.get(name, {}) | section if isinstance(section, dict) else section
    config: Config = config_from_dict(values)
    student = model_config(transformer, **(model or {}))
    groups = groups_of(config, student)
    chunks = build_model(student, groups, config.params_dtype, max_sequence_length=64, seed=seed)
    bank = routing = None
    if kind != "sft":
        seeds = TEACHERS if teachers is None else teachers
        frozen = model_config(teacher_transformer or transformer, **(model or {}))
        table = ROUTING if teachers is None else dict.fromkeys(["default"], next(iter(seeds)))
        if sources is None:
            sources = [TeacherSource(name, frozen, number) for name, number in seeds.items()]
        routing = Routing(values.get("routing", table), sources)
        bank = TeacherBank(
            sources,
            groups,
            config.params_dtype,
            64,
            config.teacher_storage,
            directory=teacher_directory,
            max_mixture=routing.max_teachers,
        )
    learner = assemble_learner(config, groups, chunks, student, list(domains), routing=routing, bank=bank)
    if is_oracle:
        learner.pipeline = MegatronSchedules(groups)
    return learner


def assemble_learner(
    config: Config,
    groups: ParallelGroups,
    chunks: list,
    student: ModelConfig,
    domains: list[str],
    *,
    routing: Routing | None = None,
    bank: TeacherBank | None = None,
) -> Learner:
    """Build a learner with gradient buffers and an optimizer from these parts. Collective over all ranks."""
    wrapped = wrap_data_parallel(chunks, config, groups)
    optimizer, scheduler = build_optimizer(wrapped, config, groups)
    return Learner(
        config=config,
        groups=groups,
        chunks=wrapped,
        optimizer=optimizer,
        scheduler=scheduler,
        model=student,
        manifest={"tokenizer": "none"},
        domains=domains,
        routing=routing,
        bank=bank,
    )


def pieces(learner: Learner, gradients: bool) -> list[tuple]:
    """This rank's slices of weights or gradients as (key, global shape, global offset, values), detached."""
    result = []
    for wrapped in learner.chunks:
        chunk = unwrap(wrapped)
        kept = {name: parameter.data for name, parameter in chunk.named_parameters()}
        try:
            if gradients:
                for parameter in chunk.parameters():
                    if parameter.requires_grad:
                        parameter.data = parameter.main_grad.to(parameter.dtype)
                    else:
                        parameter.data = torch.zeros_like(parameter)
            for sharded in sharded_tensors(chunk.sharded_state_dict()):
                if sharded.data is None or not any(_inside(sharded.data, p) for p in chunk.parameters()):
                    continue
                values = sharded.data.detach().clone().view(1, *sharded.data.shape).squeeze(0)
                result.append(
                    (sharded.key, tuple(sharded.global_shape), tuple(sharded.global_offset), values)
                )
        finally:
            for name, parameter in chunk.named_parameters():
                parameter.data = kept[name]
    return result


def _inside(view: torch.Tensor, whole: torch.Tensor) -> bool:
    storage = whole.untyped_storage().data_ptr()
    return view.untyped_storage().data_ptr() == storage


def assemble(
    per_rank: list[list[tuple]], vocab_size: int = VOCAB, rtol: float = 1e-4, atol: float = 1e-6
) -> dict[str, torch.Tensor]:
    """Full tensors from every rank's slices; asserts that overlapping replicas agree up to rounding."""
    full: dict[str, torch.Tensor] = {}
    seen: dict[str, torch.Tensor] = {}
    for key, shape, offset, values in (piece for pieces_ in per_rank for piece in pieces_):
        if "word_embeddings" in key or "output_layer" in key:  # the padded width depends on the layout
            shape = (vocab_size, *shape[1:])
            values = values[: max(0, min(vocab_size - offset[0], len(values)))]
        target = full.setdefault(key, torch.zeros(shape, dtype=values.dtype))
        mask = seen.setdefault(key, torch.zeros(shape, dtype=torch.bool))
        values = values.reshape((1,) * (len(shape) - values.dim()) + tuple(values.shape))
        index = tuple(slice(start, start + size) for start, size in zip(offset, values.shape))
        if mask[index].any():
            torch.testing.assert_close(
                target[index], values, rtol=rtol, atol=atol, msg=f"replicas of {key} differ"
            )
        target[index] = values
        mask[index] = True
    for key, mask in seen.items():
        assert mask.all(), f"{key} is not covered by the ranks' slices"
    return full


def replace_model(config: ModelConfig, **transformer) -> ModelConfig:
    return dataclasses.replace(config, transformer=config.transformer | transformer)
