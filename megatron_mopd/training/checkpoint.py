"""Saving and resuming a run: weights, optimizer, schedule and position, at any parallel layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from megatron_mopd.config import ConfigError
from megatron_mopd.data.tokenizer import Tokenizer
from megatron_mopd.model.checkpoint import (
    find_checkpoint,
    latest_iteration,
    model_state,
    read_model_config,
    write_checkpoint,
)
from megatron_mopd.model.gpt import unwrap
from megatron_mopd.observe.progress import say
from megatron_mopd.teachers.manifest import changed_teachers
from megatron_mopd.training.optimizer import allocate_state, separate_steps
from megatron_mopd.training.step import Learner

# Optimizer state in the shape of the parameters it belongs to: the only form that any other layout can load.
_OPTIMIZER_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}


def checkpoints_directory(run_dir: str) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


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
        state["manifest"] = learner.manifest
    return state


def save(learner: Learner, iteration: int, tokenizer: Tokenizer) -> Path:
    """Write the checkpoint of `iteration` (optimizer steps done). Collective over all ranks."""
    return write_checkpoint(
        checkpoints_directory(learner.config.run_dir),
        iteration,
        _state(learner, iteration, learner.config.checkpoint.save_optimizer, is_loading=False),
        learner.model,
        tokenizer.fingerprint(),
        tokenizer.save,
    )


def resume(learner: Learner) -> int:
    """Continue from the newest checkpoint of the run directory; returns the iterations already done (0:
    none).

    Collective over all ranks. The checkpoint may have been saved at any parallel layout. Refuses
    (`ConfigError`) a checkpoint whose architecture, tokenizer, teachers or objective are not this run's, or
    without optimizer state.
    """
    directory = checkpoints_directory(learner.config.run_dir)
    newest = latest_iteration(directory)
    if newest is None or not learner.config.checkpoint.resume:
        return 0
    path = find_checkpoint(directory, "run_dir")
    model, fingerprint = read_model_config(path, "run_dir")
    if model.transformer != learner.model.transformer:
        changed = sorted(
            key
            for key in model.transformer.keys() | learner.model.transformer.keys()
            if model.transformer.get(key) != learner.model.transformer.get(key)
        )
        raise ConfigError(f"run_dir: {path} was saved with another architecture ({', '.join(changed)})")
    if fingerprint != learner.manifest["tokenizer"]:
        raise ConfigError(f"run_dir: {path} was saved with another tokenizer than data.tokenizer")
    common = dist_checkpointing.load_common_state_dict(str(path))
    if "optimizer" not in common:
        if newest >= learner.config.schedule.train_iters:
            return newest  # a finished run that kept only its weights
        raise ConfigError(
            f"run_dir: {path} has no optimizer state to continue from (checkpoint.save_optimizer was false); "
            "name it as student.load of a new run, or set checkpoint.resume=false"
        )
    _check_manifest(
        common["manifest"], learner.manifest, path, learner.config.checkpoint.allow_teacher_change
    )
    allocate_state(learner.optimizer)
    state = dist_checkpointing.load(_state(learner, 0, with_optimizer=True, is_loading=True), str(path))
    for number, chunk in enumerate(learner.chunks):
        unwrap(chunk).load_state_dict(state[f"model{number}"], strict=True)
    learner.optimizer.load_state_dict(state["optimizer"])
    separate_steps(learner.optimizer)
    learner.scheduler.load_state_dict(state["scheduler"])
    return state["iteration"]


def _check_manifest(
    saved: dict[str, Any], current: dict[str, Any], path: Path, allow_teacher_change: bool
) -> None:
    for key in sorted(saved.keys() | current.keys()):  # the same one on every rank
        if key == "teachers":
            changed = changed_teachers(saved.get(key, {}), current.get(key, {}))
            if changed and not allow_teacher_change:
                raise ConfigError(
                    f"teachers: not those that {path} was written with: {', '.join(changed)}; put them back, "
                    "or continue with --allow-teacher-change"
                )
            if changed:
                say(f"teachers changed since {path}: {', '.join(changed)}")
        elif saved.get(key) != current.get(key):
            raise ConfigError(
                f"run_dir: {path} was written with other {key} ({saved.get(key)!r}, now "
                f"{current.get(key)!r}); start a new run_dir or put the old value back"
            )
