"""Stop requests: SIGTERM, SIGUSR1 (Slurm's warning) and Ctrl-C end a run with a checkpoint, on all ranks at
once. A second Ctrl-C ends it immediately.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import torch
import torch.distributed as dist

from megatron_mopd.backend.parallel import ParallelGroups

PREEMPTED_STATUS = 75
"""Exit status of a run that was asked to stop and saved: start it again to continue (EX_TEMPFAIL)."""

INTERRUPTED_STATUS = 130
"""Exit status of a run that Ctrl-C ended without a checkpoint: 128 plus the signal number, as in shells."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


_STOPPING = b"\nCtrl-C: stopping after this step, with a checkpoint; press again to stop at once\n"


class Preempted(Exception):
    """The run was asked to stop; everything up to `iteration` is saved."""

    def __init__(self, iteration: int):
        super().__init__(f"asked to stop: saved iteration {iteration}; the same command continues from there")


class StopRequest(contextlib.AbstractContextManager):
    """Records stop signals inside the context; leaving it restores the previous handlers."""

    def __init__(self, groups: ParallelGroups):
        self._groups = groups
        self._asked = self._interrupted = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        # Only the main thread may set handlers; a run in another thread cannot be stopped by signals.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        # A second Ctrl-C arrives as SIGINT from a terminal, but as SIGTERM from torchrun, which is already
        # forwarding the first. Schedulers send SIGTERM too, but never after SIGINT.
        if self._interrupted and number in (signal.SIGINT, signal.SIGTERM):
            os._exit(INTERRUPTED_STATUS)
        self._asked = True
        if number == signal.SIGINT:
            self._interrupted = True
            if self._groups.rank == 0:  # not `print`: the signal may have interrupted one
                os.write(2, _STOPPING)

    def agreed(self) -> bool:
        """Whether any rank has been asked to stop; the same answer on all ranks.

        Collectives: one all-reduce of one float over all ranks.
        """
        asked = torch.full((1,), float(self._asked), device=self._groups.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())
