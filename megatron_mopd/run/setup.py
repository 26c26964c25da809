"""Checks a run's inputs and builds everything that the first step needs.

Every rank runs the same checks on the same inputs, so an error ends all of them with the same message.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mopd.backend.launch_environment import read_launch
from megatron_mopd.backend.lifeline import Lifeline
from megatron_mopd.backend.messages import visible
from megatron_mopd.backend.parallel import (
    ParallelGroups,
    build_parallel_groups,
    select_device,
    start_ranks,
)
from megatron_mopd.config import Config, ConfigError, DomainObjectives
from megatron_mopd.config.objectives import needs_teachers
from megatron_mopd.confinement.kernel import Confinement
from megatron_mopd.confinement.process import Unanswered, examine
from megatron_mopd.data.prompts import PromptSet
from megatron_mopd.data.tokenizer import Tokenizer
from megatron_mopd.data.verifiers import is_confined
from megatron_mopd.model.build import build_model
from megatron_mopd.model.checkpoint import find_checkpoint, load_weights
from megatron_mopd.model.router_replay import install_routing_replay
from megatron_mopd.observe.progress import phase, say
from megatron_mopd.observe.run_lock import RunLock, claim
from megatron_mopd.rollout.engine import RolloutEngine
from megatron_mopd.rollout.megatron_engine import MegatronEngine
from megatron_mopd.rollout.stop_ids import StopIds
from megatron_mopd.run.inputs import Inputs, agreed_inputs
from megatron_mopd.run.resumable import Resumable, check_same_run, find_resumable
from megatron_mopd.run.run_date import with_date
from megatron_mopd.teachers.bank import TeacherBank
from megatron_mopd.teachers.manifest import model_fingerprints, run_manifest, start_alarms
from megatron_mopd.training.learner import Learner
from megatron_mopd.training.optimizer import build_optimizer, wrap_data_parallel
from megatron_mopd.training.rewards import Rewarder
from megatron_mopd.training.teacher_blocks import block_notes, with_block_size


@dataclass
class Run:
    """A configured run, ready for its first step."""

    config: Config
    groups: ParallelGroups
    tokenizer: Tokenizer
    prompts: PromptSet
    eval_prompts: PromptSet | None
    learner: Learner
    engine: RolloutEngine
    rewarder: Rewarder
    start_alarms: list[str]
    """Alarms from comparing the teachers' fingerprints; already printed."""
    resumable: Resumable | None
    """The checkpoint to resume from, already checked to belong to the same run."""
    stop_ids: StopIds
    """The tokens that end a response."""
    lifeline: Lifeline
    """Must be released before this rank exits normally."""
    confinement: Confinement | None
    """On the first rank of a host, how answers are confined; `None` if nothing needs confinement."""
    lock: RunLock | None
    """On rank 0, keeps other runs out of `run_dir`; must be released at the end."""


def build_run(config: Config) -> Run:
    """Start the ranks, check every input, build student, teachers, optimizer and rollout engine.

    Raises `ConfigError` for a user error and `FinishedRun` if there is nothing left to do, both before
    anything is built or written. Collective over all ranks.
    """
    device = select_device(config.device)
    lifeline = start_ranks(device, config.parallel.distributed_timeout_minutes)
    config = with_date(config)
    inputs = agreed_inputs(config)
    confinement = examine_confinement(inputs)
    lock = claim(Path(config.run_dir))
    try:
        return _build(config, device, inputs, lifeline, confinement, lock)
    except BaseException:
        if lock is not None:
            lock.release()
        raise


def _build(
    config: Config,
    device: torch.device,
    inputs: Inputs,
    lifeline: Lifeline,
    confinement: Confinement | None,
    lock: RunLock | None,
) -> Run:
    tokenizer, routing = inputs.tokenizer, inputs.routing
    fingerprints = model_fingerprints(
        config.student.load,
        config.teachers if routing is not None else (),
        inputs.student,
        tokenizer.fingerprint(),
        config.seed,
    )
    manifest = run_manifest(tokenizer.fingerprint(), inputs.prompts, fingerprints)
    resumable = _checked_resumable(config, inputs, manifest)
    parallel = with_block_size(config, inputs.student, dist.get_world_size(), _fewest_ranks_per_host())
    groups = build_parallel_groups(parallel, device, config.seed)
    chunks = _student(config, inputs, groups)
    alarms, bank = [], None
    if routing is not None:
        alarms = start_alarms(fingerprints)
        for alarm in alarms:
            say(f"ALARM: {alarm}")
        bank = _teachers(config, inputs, groups, fingerprints)
        for note in block_notes(groups.block, len(bank.names), _scored_samples(config, inputs)):
            say(note)
    wrapped = wrap_data_parallel(chunks, config, groups)
    optimizer, scheduler = build_optimizer(wrapped, config, groups)
    return Run(
        config=config,
        groups=groups,
        tokenizer=tokenizer,
        prompts=inputs.prompts,
        eval_prompts=inputs.eval_prompts,
        learner=Learner(
            config=config,
            groups=groups,
            chunks=wrapped,
            optimizer=optimizer,
            scheduler=scheduler,
            model=inputs.student,
            vocab_size=tokenizer.vocab_size,
            manifest=manifest,
            domains=sorted(inputs.prompts.domains),
            routing=routing,
            bank=bank,
        ),
        engine=MegatronEngine(
            wrapped,
            groups,
            vocab_size=tokenizer.vocab_size,
            max_sequence_length=config.data.seq_length,
            max_batch_size=config.rollout.max_batch_size,
        ),
        rewarder=Rewarder(config, groups, tokenizer.decode),
        start_alarms=alarms,
        resumable=resumable,
        stop_ids=inputs.stop_ids,
        lifeline=lifeline,
        confinement=confinement,
        lock=lock,
    )


def _checked_resumable(config: Config, inputs: Inputs, manifest: dict[str, Any]) -> Resumable | None:
    """The checkpoint to continue from, of the same run; `None` for a run that starts."""
    resumable = find_resumable(config)
    if resumable is not None:
        allow_change = config.data.allow_tokenizer_change
        resumable = resumable.with_run_tokenizer(inputs.tokenizer, allow_change=allow_change)
        check_same_run(resumable, config, inputs.student, manifest)
        resumable.check_continues(config)
    return resumable


def _student(config: Config, inputs: Inputs, groups: ParallelGroups) -> list[torch.nn.Module]:
    """This rank's chunks of the student, with the weights of `student.load` or drawn from `seed`."""
    student = inputs.student
    chunks = build_model(
        student,
        groups,
        config.params_dtype,
        max_sequence_length=config.data.seq_length,
        seed=config.seed if student.load is None else None,
    )
    if student.load is not None:
        with phase("loading the student"):
            checkpoint = find_checkpoint(student.load, "student.load")
            load_weights(chunks, checkpoint, groups, "student.load", student)
    if config.rollout.routing_replay:
        install_routing_replay(chunks)
    return chunks


def _teachers(
    config: Config, inputs: Inputs, groups: ParallelGroups, fingerprints: Mapping[str, Mapping[str, str]]
) -> TeacherBank:
    """The teachers that some domain needs at some iteration; the others take no memory."""
    scored = inputs.objectives.any(needs_teachers, inputs.prompts.domains)
    needed = inputs.routing.scorers(scored)
    for source in inputs.teachers:
        if source.name not in needed:
            say(f"teachers.{source.name}: no domain of the prompts is routed to it, so it is not loaded")
    return TeacherBank(
        [
            replace(source, fingerprint=fingerprints[source.name]["weights"])
            for source in inputs.teachers
            if source.name in needed
        ],
        groups,
        config.params_dtype,
        config.data.seq_length,
        config.teacher_storage,
        directory=run_directory(config) / "teachers",
        max_mixture=DomainObjectives(config.objective).heads_at_once(inputs.routing.max_teachers),
    )


def _fewest_ranks_per_host() -> int:
    """The number of ranks on the host that has the fewest; all of them if the launcher does not say.

    One all-reduce of 8 bytes over all ranks, so that they agree.
    """
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    fewest = torch.tensor([int(here) if here.isdigit() else dist.get_world_size()])
    dist.all_reduce(fewest, dist.ReduceOp.MIN)
    return int(fewest.item())


def _scored_samples(config: Config, inputs: Inputs) -> dict[str, float]:
    """For each domain with teachers, its expected number of samples in a step."""
    shares = inputs.prompts.domain_shares()
    scored = inputs.objectives.any(needs_teachers, shares)
    return {domain: shares[domain] * config.schedule.global_batch_size for domain in scored if shares[domain]}


def examine_confinement(inputs: Inputs) -> Confinement | None:
    """Determine how this host can confine the scoring of answers, and warn about missing protection.

    Runs on the first rank of each host, and only if answers are parsed or messages go through a template;
    otherwise returns `None`. Raises `ConfigError` if no confined process can be started. Collectives: none.
    """
    prompts = [*inputs.prompts, *(inputs.eval_prompts or ())]
    is_needed = any(is_confined(prompt) or not isinstance(prompt.text, str) for prompt in prompts)
    if not is_needed or read_launch(os.environ).local_rank != 0:
        return None
    try:
        confinement = examine()
    except Unanswered as error:
        raise ConfigError(f"answers must be scored in a confined process: {error}") from None
    if (warning := confinement.warning()) is not None:
        print(f"warning: {socket.gethostname()}: {visible(warning)}", flush=True)
    return confinement


def run_directory(config: Config) -> Path:
    """The run's directory, created if it does not exist."""
    path = Path(config.run_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir: cannot create {path}: {error.strerror}") from None
    return path
