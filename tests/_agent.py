"""A stand-in for torchrun's agent: the rendezvous store and the environment of the ranks that it starts."""

from __future__ import annotations

import multiprocessing
import os

import torch.distributed as dist

from tests import _distributed  # noqa: F401  (one thread before the fork)


class Agent:
    """A store that outlives the ranks, on `port`, until `close`.

    A separate process serves it. A store in the tests' own process would have a thread that forked ranks do
    not have: a rank whose garbage collection frees such a store (a failed test's traceback can hold one)
    would wait for that thread forever.
    """

    def __init__(self):
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        assert ours.poll(60), "the store did not start within a minute"
        self.port: int = ours.recv()
        ours.close()

    def close(self) -> None:
        self._process.kill()
        self._process.join()

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def set_environment(self, rank: int, world_size: int) -> None:
        """Set the environment variables of `rank` in a job on one host."""
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        os.environ.update(WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self.port), GLOO_SOCKET_IFNAME="lo")
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", OMP_NUM_THREADS="1")


def _serve(connection) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    connection.send(store.port)
    multiprocessing.parent_process().join()  # returns only if the tests were killed before `close`
    os._exit(0)
