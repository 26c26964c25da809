"""Being asked to stop: SIGTERM and SIGUSR1 (Slurm's warning) end a run with a checkpoint, on all ranks at
once.
"""

from __future__ import annotations

import contextlib
import signal
import threading

import torch
import torch.distributed as dist

from megatron_mopd.backend.parallel import ParallelGroups

PREEMPTED_STATUS = 75
"""Exit status of a run that was asked to stop and saved: start it again to continue (EX_TEMPFAIL)."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(Exception):
    """The run was asked to stop; everything up to `iteration` is saved."""

    def __init__(self, iteration: int):
        super().__init__(f"asked to stop: saved iteration {iteration}; the same command continues from there")


class StopRequest(contextlib.AbstractContextManager):
    """Notes the signals while the context lasts; the handlers of before come back at its end."""

    def __init__(self, groups: ParallelGroups):
        self._groups = groups
        self._asked = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        # Only the main thread may set handlers; called from elsewhere, a run cannot be asked this way.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        self._asked = True

    def agreed(self) -> bool:
        """Whether any rank has been asked to stop; the same answer on all ranks.

        Collectives: one all-reduce of one float over all ranks.
        """
        asked = torch.full((1,), float(self._asked), device=self._groups.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())
