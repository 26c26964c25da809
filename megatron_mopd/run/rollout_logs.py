"""Selects the log of each rollout batch's tokens and identifies the weights they were sampled from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import is_main_replica

from megatron_mopd.config.objectives import samples_per_prompt
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.model.checkpoint import model_state
from megatron_mopd.model.gpt import unwrap
from megatron_mopd.model.initialize import sharded_tensors
from megatron_mopd.observe.progress import say
from megatron_mopd.rollout.write_ahead import RolloutLog
from megatron_mopd.training.learner import Learner

MOST_LOGS, MOST_LOG_BYTES = 512, 4 * 2**30
"""Limits on the logs of rollout batches since the last checkpoint."""
_LOOK_EVERY = 16
"""Batches between checks of those limits."""
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def open_rollout_log(
    learner: Learner, number: int, prompts: Sequence[Prompt], seed: int
) -> RolloutLog | None:
    """The log of rollout batch `number`; `None` if there is none (`rollout.write_ahead` is off, or routing
    replay is on, whose records are not stored).

    The log's identity is a digest of weights, prompts and sampling distribution, so responses sampled from
    anything else are not reused. A batch sampled ahead (`rollout.batches_ahead`) of the checkpoint that this
    start resumed from has the older weights that the checkpoint names.

    Collectives: those of `weights_identity` and `RolloutLog`.
    """
    rollout = learner.config.rollout
    asked = [prompt for prompt in prompts if learner.objectives.of(prompt.domain).kind != "sft"]
    if not asked or not rollout.write_ahead or rollout.routing_replay:
        return None
    is_pending = number in learner.sampled_from
    weights = learner.sampled_from.get(number)
    if weights is None:
        weights = weights_identity(learner)
    learner.sampled_from[number] = weights
    sources = {
        "batch": number,
        "seed": seed,
        "weights": weights,
        "rollout": repr(rollout),
    }
    identity = rollout_identity(sources, asked)
    if number % _LOOK_EVERY == 0 and learner.groups.rank == 0:
        limit_rollout_logs(learner.config.run_dir, number, rollout.batches_ahead)
    log = RolloutLog(_directory(learner.config.run_dir, number), identity, learner.groups)
    wanted = len(asked) * samples_per_prompt(learner.config)
    complete = sum(known.is_complete for known in log.known.values())
    if log.known:
        say(
            f"rollout batch {number}: {complete} of {wanted} responses were sampled before the run was "
            f"interrupted, {len(log.known) - complete} are continued"
        )
    if is_pending and complete < wanted:
        say(
            f"ALARM: rollout batch {number} was sampled from weights that no longer exist, and its log is "
            "incomplete: the rest is sampled from the restored weights"
        )
    return log


def rollout_identity(sources: Mapping[str, Any], prompts: Iterable[Prompt]) -> str:
    """SHA-256 of what a rollout batch is sampled from: of the JSON text of `sources` with the token ids of
    every prompt as the last entry, `prompts`, of which one prompt exists at a time."""
    digest = hashlib.sha256(json.dumps(sources).removesuffix("}").encode())
    separator = ', "prompts": ['
    for prompt in prompts:
        digest.update((separator + json.dumps(prompt.token_ids.tolist())).encode())
        separator = ", "
    digest.update(b"]}")
    return digest.hexdigest()


def weights_identity(learner: Learner) -> int:
    """A number that changes with every weight but not with the layout: the wrapped sum of all bit patterns,
    each tensor's multiplied by its own factor.

    Collectives: one all-reduce of one int64 over all ranks.
    """
    state = model_state([unwrap(chunk) for chunk in learner.chunks], learner.groups)
    total = torch.zeros(1, dtype=torch.int64, device=learner.groups.device)
    for tensor in sharded_tensors(state):
        if tensor.data is not None and is_main_replica(tensor.replica_id):
            digest = hashlib.sha256(tensor.key.encode()).digest()
            factor = int.from_bytes(digest[:4], "little") | 1
            bits = tensor.data.detach().contiguous().view(_INTEGERS[tensor.data.element_size()])
            total += bits.sum(dtype=torch.int64) * factor
    dist.all_reduce(total)
    return int(total)


def remove_rollout_logs(run_dir: str, before: int, is_last: bool) -> None:
    """Delete the logs of rollout batches that no resume needs any more; all of them after the run's last
    checkpoint. Called by one rank only.
    """
    directory = _directory(run_dir, 0).parent
    for path in directory.glob("batch_*"):
        if path.name < _directory(run_dir, before).name:
            shutil.rmtree(path, ignore_errors=True)
    if is_last:  # before that, another rank may be about to write a log there
        with contextlib.suppress(OSError):
            directory.rmdir()


def limit_rollout_logs(run_dir: str, newest: int, ahead: int) -> None:
    """Where checkpoints are far apart, remove the oldest logs beyond `MOST_LOGS` and `MOST_LOG_BYTES`.

    newest: the batch that is about to be sampled. ahead: `rollout.batches_ahead`. Batches sampled before the
    last checkpoint stay because their weights no longer exist; so do batches that would be in that position
    if a checkpoint were saved now. A killed run samples the others again, with the same result. Called by one
    rank only.
    """
    sizes = {
        int(path.name.removeprefix("batch_")): sum(file.stat().st_size for file in path.iterdir())
        for path in sorted(_directory(run_dir, 0).parent.glob("batch_*/"))
    }
    first = min(sizes, default=0)  # a checkpoint removes all logs before its next batch
    total, removed = sum(sizes.values()), []
    for number in (n for n in sizes if first + ahead < n < newest - ahead - 1):
        if len(sizes) - len(removed) <= MOST_LOGS and total <= MOST_LOG_BYTES:
            break
        total -= sizes[number]
        removed.append(number)
        shutil.rmtree(_directory(run_dir, number), ignore_errors=True)
    if first + ahead + 1 in removed:  # the first time since that checkpoint
        say(
            f"rollouts/: {newest - first} batches since the last checkpoint, the oldest logs are removed; a "
            "killed run would sample those batches again (checkpoint.save_interval)"
        )


def _directory(run_dir: str, number: int) -> Path:
    return Path(run_dir) / "rollouts" / f"batch_{number:09d}"
