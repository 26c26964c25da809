"""Finds the checkpoint to resume from, and checks that it belongs to the same run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mopd.config import Config, ConfigError, ModelConfig, to_dict
from megatron_mopd.config.resume import Change, ResumeClass, changes
from megatron_mopd.data.tokenizer import Tokenizer
from megatron_mopd.model.checkpoint import (
    MODEL_FILE,
    complete_iterations,
    iteration_directory,
    latest_iteration,
    read_model_config,
    recorded_tokenizer,
)
from megatron_mopd.model.checkpoint_tokenizer import check_tokenizer
from megatron_mopd.model.checksums import verify_checksums
from megatron_mopd.model.pickled_files import Checked, refuse_code
from megatron_mopd.observe.progress import say
from megatron_mopd.teachers.manifest import changed_teachers, with_tokenizer

_MOST_SAID = 8
"""Changed keys that are logged individually."""


class FinishedRun(Exception):
    """All configured iterations are done; nothing must be written."""


@dataclass(frozen=True)
class Resumable:
    """An undamaged checkpoint to resume from."""

    path: Path
    iteration: int
    """Optimizer steps done."""
    description: Checked
    same_tokenizer: str | None = None
    """The fingerprint of the run's tokenizer if the checkpoint has a different one and `with_run_tokenizer`
    found the two equivalent, or was allowed to accept the difference."""

    def with_run_tokenizer(self, tokenizer: Tokenizer, *, allow_change: bool) -> Resumable:
        """A copy with `tokenizer`'s fingerprint in place of the saved one, if the tokenizers are equivalent.

        Raises `ConfigError` naming the difference, unless `allow_change`; the same texts may then encode to
        other tokens, so prompts are not compared. No collectives.
        """
        current = tokenizer.fingerprint()
        if recorded_tokenizer(self.path, "run_dir") == current:
            return self
        check_tokenizer(self.path, tokenizer, "run_dir", allow_change=allow_change)
        common = self.description.common
        manifest = with_tokenizer(common.get("manifest", {}), current)
        if allow_change:
            manifest.pop("prompts", None)
        description = replace(self.description, common=common | {"manifest": manifest})
        return replace(self, description=description, same_tokenizer=current)

    def check_continues(self, config: Config) -> None:
        """Raise `FinishedRun` if there is nothing left to do, `ConfigError` if the run cannot be resumed."""
        wanted, steps = config.schedule.train_iters, config.schedule.steps_per_rollout
        if self.iteration >= wanted:
            raise FinishedRun(
                f"run_dir: finished: {self.path} has {self.iteration} iterations and schedule.train_iters is "
                f"{wanted}; raise it to continue, or start a new run_dir"
            )
        if "optimizer" not in self.description.common:
            raise ConfigError(
                f"run_dir: {self.path} has no optimizer state to continue from (checkpoint.save_optimizer "
                "was false); use it as student.load of a new run, or set checkpoint.resume=false"
            )
        if self.iteration % steps:
            raise ConfigError(
                f"schedule.steps_per_rollout: {self.path} is at iteration {self.iteration}, in the middle of "
                f"a rollout batch of {steps} steps; use a divisor of it, or start a new run_dir"
            )


def checkpoints_directory(run_dir: str) -> Path:
    """The directory of a run's checkpoints."""
    return Path(run_dir) / "checkpoints"


def find_resumable(config: Config) -> Resumable | None:
    """The newest undamaged checkpoint in the run directory; `None` if the run starts from the beginning.

    Logs each checkpoint it passes over and why; if all are damaged, raises the newest one's `ConfigError`.
    Collective over all ranks, which share the reading.
    """
    if not config.checkpoint.resume:
        return None
    directory = checkpoints_directory(config.run_dir)
    candidates = complete_iterations(directory)
    _say_incomplete(directory)
    newest = latest_iteration(directory)
    first_error = None
    for iteration in candidates:
        if newest is not None and iteration > newest:
            continue  # the user has set the tracker back
        path = iteration_directory(directory, iteration)
        try:
            verify_checksums(path, "run_dir")
            return Resumable(path, iteration, refuse_code(path, "run_dir"))
        except ConfigError as error:
            say(f"resume: passed over {path.name}: {error}")
            first_error = first_error or error
    if first_error is not None:
        raise first_error
    return None


def _say_incomplete(directory: Path) -> None:
    if not directory.is_dir():
        return
    for entry in sorted(os.listdir(directory)):
        if entry.endswith(".incomplete"):
            say(f"resume: passed over {entry}: the run ended while it was written")
        elif entry.startswith("iter_") and not (directory / entry / MODEL_FILE).exists():
            say(f"resume: passed over {entry}: no {MODEL_FILE}, so it is not complete")


def settings(config: Config, student: ModelConfig) -> str:
    """The configuration as a checkpoint stores it: JSON of all keys, with the student's resolved
    architecture. Environment variables are stored by name.
    """
    return json.dumps(to_dict(replace(config, student=student)))


def check_same_run(
    found: Resumable, config: Config, student: ModelConfig, manifest: Mapping[str, Any]
) -> list[Change]:
    """The changed keys, all of which are allowed to change. No collectives.

    manifest: fingerprints of this run's inputs (`run_manifest`), compared with those of `found`. Raises
    `ConfigError` if a key changed that must not: it names the first such key with the old and the new value,
    and lists the others. Paths are compared by the content they point to.
    """
    path, common = found.path, found.description.common
    saved_student, tokenizer = read_model_config(path, "run_dir")
    if (found.same_tokenizer or tokenizer) != manifest["tokenizer"]:
        raise ConfigError(f"data.tokenizer: not the tokenizer that run_dir ({path}) was saved with")
    changed = _changed_settings(common, path, config, student, saved_student)
    allowed = config.checkpoint.allow_teacher_change
    forbidden = [
        change
        for change in changed
        if change.kind is ResumeClass.MUST_NOT_CHANGE and not (allowed and change.key == "routing")
    ]
    if forbidden:
        rest = ", ".join(change.key for change in forbidden[1:])
        raise ConfigError(forbidden[0].refusal(path) + (f" (also changed: {rest})" if rest else ""))
    _check_content(common.get("manifest", {}), manifest, changed, path)
    _check_teachers(common.get("manifest", {}), manifest, path, allowed)
    return changed


def _changed_settings(
    common: Mapping[str, Any], path: Path, config: Config, student: ModelConfig, saved_student: ModelConfig
) -> list[Change]:
    current = json.loads(settings(config, student))
    # A checkpoint of an earlier release describes the student and no other settings.
    saved = current | {"student": to_dict(replace(saved_student, load=student.load))}
    try:
        if "settings" in common:
            saved = json.loads(common["settings"])
        return changes(saved, current)
    except (ValueError, TypeError, AttributeError, KeyError):
        raise ConfigError(f"run_dir: the settings that {path} was saved with are not readable") from None


def _check_content(
    saved: Mapping[str, Any], current: Mapping[str, Any], changed: Sequence[Change], path: Path
) -> None:
    """Check that the student's initial weights and the prompts of every source are unchanged."""
    by_key, both = {change.key: change for change in changed}, saved.keys() & current.keys()

    def refuse(key: str, what: str) -> None:
        if key in by_key:
            raise ConfigError(by_key[key].refusal(path))
        raise ConfigError(f"{key}: {what} differ from those that {path} was saved with; start a new run_dir")

    if "student" in both and saved["student"] != current["student"]:
        refuse("student.load", "weights")
    # A checkpoint of an earlier release has one fingerprint of all prompts, computed differently.
    is_by_source = "prompts" in both and isinstance(saved["prompts"], list)
    sources = zip(saved["prompts"], current["prompts"]) if is_by_source else ()
    for number, (before, now) in enumerate(sources):
        if before != now:
            key = f"data.prompts[{number}]"
            refuse(f"{key}.path" if f"{key}.path" in by_key else key, "prompts")


def _check_teachers(
    saved: Mapping[str, Any], current: Mapping[str, Any], path: Path, is_allowed: bool
) -> None:
    changed = changed_teachers(saved.get("teachers", {}), current.get("teachers", {}))
    if changed and not is_allowed:
        raise ConfigError(
            f"teachers: not those that {path} was written with: {', '.join(changed)}; restore them, or "
            "continue with --allow-teacher-change"
        )


def say_changes(changed: Sequence[Change], saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Log one line about the keys changed since the checkpoint, and one about changed teachers."""
    if changed:
        said = [str(change) for change in changed[:_MOST_SAID]]
        more = len(changed) - len(said)
        say(f"resume: changed since: {', '.join(said)}{f' and {more} more' if more else ''}")
    if teachers := changed_teachers(saved.get("teachers", {}), current.get("teachers", {})):
        say(f"resume: teachers changed since: {', '.join(teachers)}")
