"""Shared by the lifeline tests: a process that acts as one rank, with a lifeline and nothing else."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from megatron_mopd.backend import lifeline, reception

PATIENCE = 60.0
"""Timeout in seconds, for a machine that stalls. Nothing here needs more than one second."""
KEY = bytes(range(32))
LOOPBACKS = ["127.0.0.1"]
with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
    LOOPBACKS.append("::1")


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)
    return value


class Rank:
    """A process that acts as one rank of a job whose store is served by `agent`."""

    def __init__(self, agent, rank, world_size=3, environment=None, settings=None, directory=None):
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._output = directory / f"rank_{rank}.txt"
        self._output.touch()
        arguments = (theirs, agent, rank, world_size, environment or {}, settings or {}, self._output)
        self.process = context.Process(target=_rank, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def do(self, function):
        """Call `function(lifeline)` in the rank and return its result. The function must be module-level."""
        self._pipe.send(function)
        assert self._pipe.poll(PATIENCE), "no answer"
        return self._pipe.recv()

    def end(self):
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, "it is still running"
        return self.process.exitcode

    @property
    def printed(self):
        return self._output.read_text()


def _rank(pipe, agent, rank, world_size, environment, settings, output):
    for descriptor in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = (open(descriptor, "w", closefd=False) for descriptor in (1, 2))
    agent.set_environment(rank, world_size)
    os.environ.update(environment)
    for name, value in settings.items():
        module, name = name.split(".")
        setattr({"lifeline": lifeline, "reception": reception}[module], name, value)
    store = dist.TCPStore("127.0.0.1", agent.port, timeout=timedelta(seconds=PATIENCE))
    line = lifeline.Lifeline(store, rank, world_size)
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(pipe.recv()(line))
    os._exit(0)


def joined(line):
    """The number of ranks that have joined, on rank 0; on another rank, whether it has joined."""
    return len(line._reception._ranks) if line._reception is not None else line._session is not None


def pending(line):
    return len(line._reception._strangers)


def ends(connection):
    """Wait until the peer closes the connection: end of stream, or a reset if it had unread data."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(4096):
            pass
    return True
