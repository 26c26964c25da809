"""How fast ranks join, and how soon a death is detected: python -m tests.security.measure_lifeline

Prints the time until 512 and 4,095 simulated ranks (threads of four processes, on loopback) have all joined
rank 0 (with `ulimit -n` 4300), and the time from `kill -9` of one rank to the exit of another while 0 and 64
strangers hold silent connections.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import statistics
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megatron_mopd.backend import handshake, lifeline
from megatron_mopd.backend.handshake import Word
from megatron_mopd.backend.reception import HANDSHAKE_SECONDS, Reception
from tests._agent import Agent
from tests.security._ranks import KEY, Rank, joined, pending, wait_for

PROCESSES = 4


def join(address, ranks, world_size, done):
    """Let each of `ranks` join in its own thread, retrying as the lifeline does."""

    def one(rank):
        while True:
            with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
                connection = stack.enter_context(socket.create_connection(address, HANDSHAKE_SECONDS))
                session = handshake.introduce(connection, KEY, rank, world_size, HANDSHAKE_SECONDS)
                connection.sendall(session.say(Word.JOINED))
                connections.append(stack.pop_all())
                return

    connections = []
    threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.wait()


def seconds_to_join(ranks: int) -> float:
    """The time until the last rank has joined, including the start of the client processes."""
    context = multiprocessing.get_context("fork")
    done, complete = context.Event(), threading.Event()
    reception = Reception("127.0.0.1", KEY, ranks + 1, threading.Lock())
    clients = [
        context.Process(
            target=join, args=(reception.address, range(1 + part, ranks + 1, PROCESSES), ranks + 1, done)
        )
        for part in range(PROCESSES)
    ]
    begun = time.monotonic()
    for client in clients:
        client.start()
    serving = threading.Thread(target=reception.serve, args=(complete.set, lambda rank: None), daemon=True)
    serving.start()
    assert complete.wait(600), "some ranks have not joined"
    taken = time.monotonic() - begun
    reception.leave()
    done.set()
    for client in clients:
        client.join()
    return taken


def seconds_to_notice(strangers: int) -> float:
    """The time from the death of rank 1 to the exit of rank 0, which is still waiting for rank 2."""
    with Agent() as agent, tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        store = dist.TCPStore("127.0.0.1", agent.port, timeout=timedelta(seconds=60))
        zero, one = (Rank(agent, rank, directory=Path(directory)) for rank in (0, 1))
        wait_for(lambda: zero.do(joined) == 1)
        host, port, _ = store.get(lifeline._ADDRESS).decode().split(maxsplit=2)
        for _ in range(strangers):
            stack.enter_context(socket.create_connection((host, int(port))))
        wait_for(lambda: zero.do(pending) == strangers)
        begun = time.monotonic()
        one.process.kill()
        zero.process.join(600)
        return time.monotonic() - begun


def main() -> None:
    for ranks in (512, 4095):
        taken = sorted(seconds_to_join(ranks) for _ in range(3))
        print(f"{ranks} ranks have joined after {', '.join(f'{seconds:.2f}' for seconds in taken)} s")
    for strangers in (0, 64):
        taken = [seconds_to_notice(strangers) for _ in range(5)]
        print(
            f"{strangers} silent strangers: the others end {statistics.median(taken):.2f} s after a rank "
            f"was killed (at most {max(taken):.2f} s, {len(taken)} times)"
        )


if __name__ == "__main__":
    main()
