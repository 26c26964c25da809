"""Reads and checks the inputs of a run: configuration, tokenizer, architectures, prompts.

Every rank runs the same checks on the same inputs, so an error ends all of them with the same message.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace

import torch.distributed as dist

from megatron_mopd.backend.agreement import require_agreement
from megatron_mopd.backend.parallel import validate_layout
from megatron_mopd.config import Config, ConfigError, DomainObjectives, ModelConfig
from megatron_mopd.config.objectives import needs_rewards, needs_teachers, samples_per_prompt
from megatron_mopd.data.prompts import PromptSet, load_prompts, require_answers
from megatron_mopd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_mopd.data.verifiers import has_verdict
from megatron_mopd.model.checkpoint import find_checkpoint, read_architecture
from megatron_mopd.model.checkpoint_tokenizer import check_tokenizer
from megatron_mopd.observe.weights_and_biases import check_tracking
from megatron_mopd.rollout.stop_ids import StopIds, model_directories, read_stop_ids
from megatron_mopd.run.rank_facts import input_facts, launch_facts
from megatron_mopd.teachers.bank import TeacherSource
from megatron_mopd.teachers.routing import Routing, check_teachers
from megatron_mopd.training.teacher_blocks import with_block_size


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run, read and checked; nothing is built yet."""

    tokenizer: Tokenizer
    objectives: DomainObjectives
    student: ModelConfig
    teachers: list[TeacherSource]
    routing: Routing | None
    prompts: PromptSet
    eval_prompts: PromptSet | None
    stop_ids: StopIds


def agreed_inputs(config: Config) -> Inputs:
    """The run's inputs, the same on every rank.

    Raises `ConfigError` on every rank for an error that any of them finds and for anything they disagree on:
    software, settings, files. Collectives: those of `require_agreement`.
    """
    facts, inputs, error = launch_facts(config), None, None
    try:
        inputs = check_inputs(config, dist.get_world_size())
        facts += input_facts(
            config,
            inputs.tokenizer.fingerprint(),
            inputs.student,
            {source.name: source.model for source in inputs.teachers},
            inputs.prompts,
            inputs.eval_prompts,
        )
    except ConfigError as mistake:
        error = mistake
    require_agreement(facts, error)
    return inputs


def check_inputs(config: Config, world_size: int) -> Inputs:
    """Check everything that can be checked before groups and models are built, for `world_size` ranks.

    Raises `ConfigError` for a user error. Collectives: none.
    """
    check_tracking(config.log)
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.date)
    objectives = DomainObjectives(config.objective)
    student = resolve_student(config, tokenizer)
    is_distillation = any(needs_teachers(objective) for objective in objectives.all())
    teachers, routing = resolve_teachers(config, student, tokenizer) if is_distillation else ([], None)
    check_layout(config, world_size, student, teachers)
    check_batch(config)

    prompts = load_prompts(config.data.prompts, tokenizer, config.data.seq_length)
    eval_prompts = None
    if config.data.eval:
        eval_prompts = load_prompts(config.data.eval, tokenizer, config.data.seq_length, "data.eval")
        prompts = prompts.without(eval_prompts)  # never train on held-out prompts, whatever the seeds
    _check_prompts(prompts, objectives, routing, tokenizer, config.data.seq_length)
    stop_ids = student_stop_ids(config, tokenizer)
    return Inputs(tokenizer, objectives, student, teachers, routing, prompts, eval_prompts, stop_ids)


def student_stop_ids(config: Config, tokenizer: Tokenizer) -> StopIds:
    """The tokens that end the student's responses, from the tokenizer, its checkpoint and the settings."""
    directories = []
    if config.student.load is not None:
        directories = model_directories(find_checkpoint(config.student.load, "student.load"))
    return read_stop_ids(tokenizer, directories, config.rollout.stop_token_ids)


def resolve_student(config: Config, tokenizer: Tokenizer) -> ModelConfig:
    """The student's architecture: that of its checkpoint, overridden by explicit settings."""
    student = config.student
    if student.load is not None:
        checkpoint = find_checkpoint(student.load, "student.load")
        loaded = read_architecture(checkpoint, "student.load", student)
        allow = config.data.allow_tokenizer_change
        check_tokenizer(checkpoint, tokenizer, "student.load", allow_change=allow)
        defaults = ModelConfig()
        explicit = {
            f.name: getattr(student, f.name)
            for f in dataclasses.fields(ModelConfig)
            if getattr(student, f.name) != getattr(defaults, f.name)
        }
        explicit["transformer"] = loaded.transformer | student.transformer
        student = replace(loaded, **explicit)
    if student.vocab_size is None:
        student = replace(student, vocab_size=tokenizer.vocab_size)
    if student.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"student.vocab_size: {student.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}"
        )
    return student


def resolve_teachers(
    config: Config, student: ModelConfig, tokenizer: Tokenizer
) -> tuple[list[TeacherSource], Routing]:
    """Sources of all teachers and the routing over them; their tokenizers must be the student's."""
    if not config.teachers:
        raise ConfigError(f"teachers: objective.kind={config.objective.kind} needs at least one teacher")
    check_teachers(config.teachers)
    sources = []
    for teacher in config.teachers:
        where = f"teachers.{teacher.name}.load"
        if teacher.load is None:
            # `self`: the initial student, read again because its layout differs (teachers have no virtual
            # stages).
            sources.append(TeacherSource(teacher.name, student, config.seed))
            continue
        checkpoint = find_checkpoint(teacher.load, where)
        # An expert trained with Megatron-LM does not describe its architecture: build it like the student.
        model = read_architecture(checkpoint, where, student)
        check_tokenizer(checkpoint, tokenizer, where, allow_change=config.data.allow_tokenizer_change)
        if model.vocab_size < tokenizer.vocab_size:
            raise ConfigError(
                f"{where}: vocabulary of {model.vocab_size} tokens, data.tokenizer has "
                f"{tokenizer.vocab_size}; a teacher must score every token of the student"
            )
        # Rows beyond the tokenizer's are unused. With the student's padded size, the vocabulary is sharded
        # over tensor-parallel ranks in the same way.
        model = replace(
            model,
            load=teacher.load,
            vocab_size=student.vocab_size,
            make_vocab_size_divisible_by=student.make_vocab_size_divisible_by,
        )
        sources.append(TeacherSource(teacher.name, model, config.seed))
    return sources, Routing(config.routing, config.teachers)


def check_layout(
    config: Config, world_size: int, student: ModelConfig, teachers: list[TeacherSource]
) -> None:
    """Check that every model fits the parallel layout; `ConfigError` names the teacher that does not."""
    models = {"student": student} | {f"teachers.{source.name}": source.model for source in teachers}
    has_experts = any(model.transformer.get("num_moe_experts") for model in models.values())
    for where, model in models.items():
        architecture, parallel = model.transformer, config.parallel
        for key in ("num_layers", "hidden_size", "num_attention_heads"):
            if key not in architecture:
                raise ConfigError(
                    f"{where}.{key}: missing; set it, or start from a checkpoint with {where}.load"
                )
        if where != "student":  # teachers have no virtual stages
            parallel = replace(parallel, virtual_pipeline_model_parallel_size=None)
        if has_experts and not architecture.get("num_moe_experts"):
            # A dense model next to a mixture of experts is replicated over the expert-parallel ranks.
            parallel = replace(parallel, expert_model_parallel_size=1, expert_tensor_parallel_size=None)
        try:
            validate_layout(
                parallel,
                world_size,
                num_layers=architecture["num_layers"],
                num_moe_experts=architecture.get("num_moe_experts"),
                num_attention_heads=architecture["num_attention_heads"],
                num_query_groups=architecture.get("num_query_groups"),
            )
        except ConfigError as error:
            if where == "student":
                raise
            raise ConfigError(f"{where} does not fit the layout: {error}") from None
    with_block_size(config, student, world_size, ranks_per_host=None)


def _check_prompts(
    prompts: PromptSet,
    objectives: DomainObjectives,
    routing: Routing | None,
    tokenizer: Tokenizer,
    seq_length: int,
) -> None:
    """Check that every prompt has what its domain's objective needs: a teacher, an answer, a verifier."""
    objectives.check_domains(prompts.domains)
    if routing is not None:
        routing.check(prompts.domains, scored=objectives.any(needs_teachers, prompts.domains))
    supervised = objectives.any(lambda objective: objective.kind == "sft", prompts.domains)
    require_answers(prompts, tokenizer, seq_length, supervised)
    rewarded = set(objectives.any(needs_rewards, prompts.domains))
    for prompt in prompts:
        if prompt.domain in rewarded and not has_verdict(prompt):
            raise ConfigError(
                f"{prompt.origin}: the objective of domain {prompt.domain!r} needs rewards, and this prompt "
                "has no `answer` for a verifier to compare with"
            )


def check_batch(config: Config) -> None:
    samples = samples_per_prompt(config)
    if config.schedule.global_batch_size % samples:
        raise ConfigError(
            f"rollout.samples_per_prompt: {samples} does not divide schedule.global_batch_size="
            f"{config.schedule.global_batch_size}"
        )
