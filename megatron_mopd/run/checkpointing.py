"""Saving and resuming a run: weights, optimizer, schedule and position, at any parallel layout."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import is_main_replica

from megatron_mopd.backend.optimizer_state import allocate_state, keep_settings, regroup_state, separate_steps
from megatron_mopd.config import ConfigError
from megatron_mopd.config.objectives import rollout_sizes
from megatron_mopd.config.resume import ResumeClass
from megatron_mopd.data.position import DataPosition
from megatron_mopd.data.tokenizer import Tokenizer
from megatron_mopd.model.background_save import CheckpointWriter
from megatron_mopd.model.checkpoint import (
    complete_iterations,
    iteration_directory,
    load_described,
    model_state,
    put_into,
    remove_checkpoint,
    without_extra_state,
)
from megatron_mopd.model.gpt import unwrap
from megatron_mopd.model.initialize import sharded_tensors
from megatron_mopd.run.alarms import Alarms
from megatron_mopd.run.best_checkpoint import best_iteration
from megatron_mopd.run.resumable import (
    FinishedRun,
    Resumable,
    check_same_run,
    checkpoints_directory,
    find_resumable,
    say_changes,
    settings,
)
from megatron_mopd.run.rollout_logs import remove_rollout_logs
from megatron_mopd.training.learner import Learner

# Optimizer state in the shape of its parameters, the only form that every other parallel layout can load.
_OPTIMIZER_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}
_SPACE_MARGIN = 1.1
"""Required free space relative to the tensors' size: covers metadata, tokenizer and checksum list."""


def _state(learner: Learner, iteration: int, with_optimizer: bool, is_loading: bool) -> dict[str, Any]:
    state = model_state([unwrap(chunk) for chunk in learner.chunks], learner.groups)
    if with_optimizer:
        weights = {key: value for key, value in state.items() if key.startswith("model")}
        metadata = _OPTIMIZER_METADATA | {"dp_cp_group": learner.groups.collection.dp_cp}
        state["optimizer"] = learner.optimizer.sharded_state_dict(
            weights if len(weights) > 1 else weights["model0"], is_loading=is_loading, metadata=metadata
        )
        state["scheduler"] = learner.scheduler.state_dict()
        state["iteration"] = iteration
        state["position"] = learner.position.state_dict()
        state["skipped"] = learner.skipped.state_dict()
        # Batches sampled but not trained on yet: the weights they came from no longer exist on resume.
        next_batch = learner.position.batch(iteration)
        state["sampled_from"] = {n: w for n, w in learner.sampled_from.items() if n >= next_batch}
    state["settings"] = settings(learner.config, learner.model)
    state["manifest"] = learner.manifest
    return state


def save(
    learner: Learner,
    iteration: int,
    tokenizer: Tokenizer,
    alarms: Alarms | None = None,
    *,
    with_optimizer: bool | None = None,
    writer: CheckpointWriter | None = None,
) -> Path:
    """Write the checkpoint of `iteration` (steps done), then remove those that need not be kept.

    with_optimizer: defaults to `checkpoint.save_optimizer`. writer: writes the checkpoint in the background;
    the caller must wait for it before the run ends. Without one, this returns when the checkpoint is
    complete. Collective over all ranks. Raises on every rank: `OSError` if the disk has no room for another
    checkpoint, `SaveError` if this one, or the one that `writer` was still writing, could not be written; the
    last complete checkpoint is kept.
    """
    settings = learner.config.checkpoint
    if with_optimizer is None:
        with_optimizer = settings.save_optimizer
    if writer is not None:
        writer.wait()
    state = _state(learner, iteration, with_optimizer, is_loading=False)
    if with_optimizer and alarms is not None:
        state["alarms"] = alarms.state_dict()
    size = sum(
        tensor.data.nbytes
        for tensor in sharded_tensors(state)
        if tensor.data is not None and is_main_replica(tensor.replica_id)
    )
    if problem := _lack_of_space(learner, size):
        raise OSError(errno.ENOSPC, f"iteration {iteration} cannot be saved: {problem}")
    directory = checkpoints_directory(learner.config.run_dir)

    def remove_older() -> None:
        # Later checkpoints, which resuming skipped as damaged, are overwritten when the run reaches them.
        older = [i for i in complete_iterations(directory) if i <= iteration][settings.keep_last :]
        best = best_iteration(directory)
        for number in older if settings.keep_last else ():
            if number != best and not (settings.keep_every and number % settings.keep_every == 0):
                remove_checkpoint(iteration_directory(directory, number))
        for abandoned in directory.glob(".iter_*.incomplete"):  # of earlier starts that ended while writing
            shutil.rmtree(abandoned, ignore_errors=True)
        is_last = iteration >= learner.config.schedule.train_iters
        remove_rollout_logs(learner.config.run_dir, learner.position.batch(iteration), is_last)

    background = writer or CheckpointWriter()
    path = background.start(
        directory, iteration, state, learner.model, tokenizer.fingerprint(), tokenizer.save, remove_older
    )
    if writer is None:
        background.wait()
    return path


def check_space(learner: Learner) -> None:
    """Raise `ConfigError` on every rank if the run's disk has no room for one checkpoint. Collective."""
    size = 0
    for tensor in sharded_tensors(model_state([unwrap(c) for c in learner.chunks], learner.groups)):
        if tensor.data is not None and is_main_replica(tensor.replica_id):
            # Two moments in at least float32, plus a master copy of weights in lower precision.
            width = tensor.data.element_size()
            moments = (2 + (width < 4)) * max(4, width) if learner.config.checkpoint.save_optimizer else 0
            size += tensor.data.numel() * (width + moments)
    if problem := _lack_of_space(learner, size):
        raise ConfigError(f"run_dir: {problem}; make room")


def _lack_of_space(learner: Learner, size: int) -> str | None:
    """A message if there is no space for a checkpoint of which this rank writes `size` bytes, else `None`.

    Collectives: one all-reduce of two float64 over all ranks; the free space is what rank 0 sees.
    """
    directory = Path(learner.config.run_dir)
    free = 0
    if dist.get_rank() == 0:
        existing = next(path for path in [directory, *directory.absolute().parents] if path.exists())
        free = shutil.disk_usage(existing).free
    totals = torch.tensor([size, free], dtype=torch.float64, device=learner.groups.device)
    dist.all_reduce(totals)
    needed, free = totals[0].item() * _SPACE_MARGIN, totals[1].item()
    if free >= needed:
        return None
    return (
        f"a checkpoint takes about {needed / 1e9:.3g} GB, {directory} has {free / 1e9:.3g} GB left "
        "(checkpoint.keep_last keeps fewer)"
    )


def resume(learner: Learner, alarms: Alarms | None = None, found: Resumable | None = None) -> int:
    """Resume from `found`, by default the newest undamaged checkpoint of the run directory; returns the
    number of iterations already done (0: none).

    Collective over all ranks. The checkpoint may have been saved with any parallel layout. Logs what changed
    since it was saved. Raises `ConfigError` for a checkpoint of another run (`check_same_run`), one in the
    middle of a rollout batch, or one without optimizer state.
    """
    found = found or find_resumable(learner.config)
    if found is None:
        return 0
    changed = check_same_run(found, learner.config, learner.model, learner.manifest)
    try:
        found.check_continues(learner.config)
    except FinishedRun:
        return found.iteration
    say_changes(changed, found.description.common["manifest"], learner.manifest)
    # Batches that were sampled ahead have the old sizes and were sampled with the old settings.
    keeps_rollouts = not any(
        change.key.startswith("rollout.") or change.kind is ResumeClass.DATA_POSITION for change in changed
    )
    return _load(learner, found, alarms, keeps_rollouts)


def _load(learner: Learner, found: Resumable, alarms: Alarms | None, keeps_rollouts: bool) -> int:
    common = found.description.common
    allocate_state(learner.optimizer)
    wanted = _state(learner, 0, with_optimizer=True, is_loading=True)
    without_extra_state({key: part for key, part in wanted.items() if key.startswith("model")})
    state = load_described(wanted, found.path, found.description, "run_dir")
    for number, chunk in enumerate(learner.chunks):
        put_into(unwrap(chunk), state[f"model{number}"], "run_dir")
    optimizer_state = state["optimizer"]
    if learner.config.optimizer.use_distributed_optimizer:
        optimizer_state = regroup_state(optimizer_state, learner.optimizer)
    keep_settings(optimizer_state, learner.optimizer)
    learner.optimizer.load_state_dict(optimizer_state)
    separate_steps(learner.optimizer)
    learner.scheduler.load_state_dict(state["scheduler"])
    if "skipped" in common:
        learner.skipped.load_state_dict(common["skipped"])
    if "position" in common:
        before = DataPosition.from_state(common["position"])
        learner.position = before.resized(found.iteration, *rollout_sizes(learner.config))
    if keeps_rollouts:
        learner.sampled_from |= common.get("sampled_from", {})
    if alarms is not None and "alarms" in common:
        alarms.load_state_dict(common["alarms"])
    return state["iteration"]
