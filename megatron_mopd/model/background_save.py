"""Writes checkpoints in the background: training waits while tensors are copied to host memory, not for the
disk.

A thread on each rank writes that rank's files, computes their checksums, and reports them through the store
to the thread on rank 0, which completes and renames the directory. No thread takes part in a collective, so
training never waits for one and the order of its collectives does not change.
"""

from __future__ import annotations

import pickle
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mopd.backend.planned_save import PlannedSave, SaveStrategy, plan_save
from megatron_mopd.backend.whole_files import disk_problem, naming
from megatron_mopd.config import ModelConfig
from megatron_mopd.model.checkpoint import (
    HUGGING_FACE_DIRECTORY,
    TOKENIZER_DIRECTORY,
    companion_places,
    describe_checkpoint,
    iteration_directory,
    partial_directory,
    put_in_place,
)
from megatron_mopd.model.checksums import sum_up, write_sums
from megatron_mopd.model.companions import take_over_companions
from megatron_mopd.model.initialize import sharded_tensors

_KEYS = "megatron_mopd/save"
_LONGEST_POLL = 0.25


class SaveError(RuntimeError):
    """A checkpoint could not be written; the previous one is intact."""


class CheckpointWriter:
    """Writes one checkpoint at a time. Every rank has a writer and calls its methods in the same order."""

    def __init__(self):
        self.nbytes = 0
        """Bytes of this rank's tensors in the last checkpoint."""
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._strategies: dict[tuple[str, ...], tuple[Any, SaveStrategy]] = {}
        self._store: dist.Store | None = None
        self._leftover: list[str] = []
        if dist.get_world_size() > 1:
            # A separate connection, because a store holds its lock while it waits.
            self._store = dist.distributed_c10d._get_default_store().clone()

    def start(
        self,
        directory: str | Path,
        iteration: int,
        state: dict[str, Any],
        model: ModelConfig,
        tokenizer_fingerprint: str,
        save_tokenizer: Callable[[Path], None],
        finished: Callable[[], None] | None = None,
    ) -> Path:
        """Start writing `state` (a sharded state dict) as `iter_*`; it may be modified once this returns.

        Waits for the previous checkpoint and raises its error. `finished` is called on rank 0, in the
        writer's thread, when the directory is complete and the tracker points to it. The companions of a
        Hugging Face model are copied from the run's last checkpoint, or from the one that the model was
        loaded from. Returns the final path of the directory.

        Collectives: those of `plan_save`; one all-reduce of two integers; two barriers.
        """
        self.wait()
        directory = Path(directory)
        partial = partial_directory(directory, iteration)
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        strategy, number, is_known = self._strategy(state)
        save = plan_save(state, partial, strategy, is_known)
        take_over_companions(companion_places(directory, model), partial / HUGGING_FACE_DIRECTORY)
        self.nbytes = save.nbytes

        def complete(sums: dict[str, Any]) -> None:
            save_tokenizer(partial / TOKENIZER_DIRECTORY)
            describe_checkpoint(partial, model, tokenizer_fingerprint)
            write_sums(partial, sums)
            put_in_place(partial, directory, iteration)
            if finished is not None:
                finished()

        self._thread = threading.Thread(
            target=self._run,
            args=(save, partial, number, iteration, complete),
            name="checkpoint",
            daemon=True,
        )
        self._thread.start()
        return iteration_directory(directory, iteration)

    def wait(self) -> None:
        """Wait until nothing is being written. Raises `SaveError` on every rank if the last checkpoint could
        not be written."""
        if self._thread is not None:
            self._thread.join()
        self.check()

    def check(self) -> None:
        """Raise the error if the last checkpoint has failed; does not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self._thread = None
            if self._error is not None:
                error, self._error = self._error, None
                raise SaveError(error)

    def _strategy(self, state: dict[str, Any]) -> tuple[SaveStrategy, int, bool]:
        """The cached plans for states with this structure on all ranks, a number unique to this save, and
        whether the plans already existed."""
        kind = tuple(sorted(state))
        structure = [
            (t.key, t.global_offset, t.local_shape, str(t.dtype), t.replica_id)
            for t in sharded_tensors(state)
        ]
        known, strategy = self._strategies.get(kind, (None, None))
        values = [int(known != structure), time.time_ns() if dist.get_rank() == 0 else 0]
        device = "cpu" if dist.get_backend() == "gloo" else torch.device("cuda", torch.cuda.current_device())
        agreed = torch.tensor(values, device=device)
        dist.all_reduce(agreed)
        has_changed, number = agreed.tolist()
        if has_changed:
            strategy = SaveStrategy()
            self._strategies[kind] = structure, strategy
        return strategy, number, not has_changed

    def _run(
        self,
        save: PlannedSave,
        partial: Path,
        number: int,
        iteration: int,
        complete: Callable[[dict[str, Any]], None],
    ) -> None:
        failed = f"iteration {iteration} could not be saved; the previous checkpoint is intact: "
        try:
            with naming(partial):
                names, written = save.write_part()
            message = (None, {name: sum_up(partial / name) for name in names}, written)
        except BaseException as error:
            message = (f"{failed}rank {dist.get_rank()}: {_reason(error)}", {}, [])
        save.buckets.clear()  # free the copies
        try:
            messages = self._gather(number, message)
            if messages is None:
                self._error = self._answer(number)
                return
            self._error = next((error for error, _, _ in messages if error is not None), None)
            if self._error is None:
                try:
                    with naming(partial):
                        save.finish([written for _, _, written in messages])
                        complete({name: entry for _, sums, _ in messages for name, entry in sums.items()})
                except BaseException as error:
                    self._error = f"{failed}{_reason(error)}"
            if self._store is not None:
                self._store.set(f"{_KEYS}/{number}/outcome", self._error or "")
        except RuntimeError as error:  # the process that hosted the store has exited
            self._error = f"{failed}{error}"

    def _gather(self, number: int, message: tuple) -> list[tuple] | None:
        """The messages of all ranks on rank 0, `None` elsewhere."""
        if self._store is None:
            return [message]
        rank, world_size = dist.get_rank(), dist.get_world_size()
        if rank != 0:
            self._store.set(f"{_KEYS}/{number}/{rank}", pickle.dumps(message))
            return None
        for key in self._leftover:  # every rank has read the outcome of the previous save
            self._store.delete_key(key)
        self._leftover = [f"{_KEYS}/{number}/outcome"]
        messages = [message]
        for other in range(1, world_size):
            key = f"{_KEYS}/{number}/{other}"
            # Trusted: sent by a rank of this job over the store that also carries torch's own pickled
            # objects.
            messages.append(pickle.loads(self._get(key)))
            self._store.delete_key(key)
        return messages

    def _answer(self, number: int) -> str | None:
        return self._get(f"{_KEYS}/{number}/outcome").decode() or None

    def _get(self, key: str) -> bytes:
        """Wait for a value that another rank will set. No timeout: the watchdog has one."""
        pause = 0.002
        while not self._store.check([key]):
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_POLL)
        return self._store.get(key)


def _reason(error: BaseException) -> str:
    return disk_problem(error) or f"{type(error).__name__}: {error}"


def write_checkpoint(
    directory: str | Path,
    iteration: int,
    state: dict[str, Any],
    model: ModelConfig,
    tokenizer_fingerprint: str,
    save_tokenizer: Callable[[Path], None],
) -> Path:
    """Write a checkpoint with `CheckpointWriter` and wait for it. Collective over all ranks."""
    writer = CheckpointWriter()
    path = writer.start(directory, iteration, state, model, tokenizer_fingerprint, save_tokenizer)
    writer.wait()
    return path
