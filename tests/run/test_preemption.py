"""Signals that ask a run to stop, and the second Ctrl-C, which stops at once."""

import multiprocessing
import os
import signal
import types

import pytest

from megatron_mopd.run.preemption import INTERRUPTED_STATUS, StopRequest


def _stopped(signals, path, rank):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), 2)
    stop = StopRequest(types.SimpleNamespace(rank=rank))
    with stop:
        for number in signals:
            os.kill(os.getpid(), number)
        os._exit(75 if stop._asked else 0)


@pytest.mark.parametrize(
    "signals, status",
    [
        ([], 0),
        ([signal.SIGTERM], 75),
        ([signal.SIGUSR1], 75),
        ([signal.SIGINT], 75),
        ([signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM], 75),  # Slurm's warning, then its SIGTERM
        ([signal.SIGTERM, signal.SIGINT], 75),
        ([signal.SIGINT, signal.SIGINT], INTERRUPTED_STATUS),
        ([signal.SIGINT, signal.SIGTERM], INTERRUPTED_STATUS),  # torchrun forwards the second one as SIGTERM
    ],
)
def test_signals(tmp_path, signals, status):
    for rank in (0, 1):
        path = tmp_path / f"{rank}"
        process = multiprocessing.get_context("fork").Process(target=_stopped, args=(signals, path, rank))
        process.start()
        process.join(30)
        assert process.exitcode == status
        says = rank == 0 and signal.SIGINT in signals
        assert ("Ctrl-C: stopping after this step" in path.read_text()) == says
