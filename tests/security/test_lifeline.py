"""The lifeline on a network with strangers: they can end nothing, delay nothing, and are never trusted.

Ranks are forked processes; a stranger is this process or one of its sockets.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import stat
import time
from datetime import timedelta

import psutil
import pytest
import torch.distributed as dist

from megatron_mopd.backend import lifeline
from megatron_mopd.backend.job_secret import JOB_SECRET, read_private_file, write_private_file
from tests._agent import Agent
from tests.security._ranks import KEY, LOOPBACKS, PATIENCE, Rank, ends, joined, pending, wait_for


def listening(line):
    return [c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]


def secret_in_the_environment(line):
    return JOB_SECRET in os.environ


def fork_a_helper(line):
    """Fork a process that outlives its parent."""
    if (child := os.fork()) == 0:
        time.sleep(2 * PATIENCE)
        os._exit(0)
    return child


@pytest.fixture
def job(tmp_path):
    """`start(rank, ...)` starts one of three ranks; ranks and strangers can access `store`."""

    class Job:
        def start(self, rank, **options):
            ranks.append(Rank(agent, rank, directory=tmp_path, **options))
            return ranks[-1]

        def announced(self):
            """Rank 0's address, and the rest of its entry in the store."""
            host, port, rest = self.store.get(lifeline._ADDRESS).decode().split(maxsplit=2)
            return (host, int(port)), rest

        def visit(self):
            connection = socket.create_connection(self.announced()[0], timeout=PATIENCE)
            strangers.append(connection)
            return connection

    ranks, strangers = [], []
    with Agent() as agent:
        Job.store = dist.TCPStore("127.0.0.1", agent.port, timeout=timedelta(seconds=PATIENCE))
        yield Job()
        for rank in ranks:
            rank.process.kill()
            rank.process.join()
        for connection in strangers:
            connection.close()
        with contextlib.suppress(OSError):  # a rank 0 killed before all ranks had joined leaves its file
            os.unlink(Job.store.get(lifeline._ADDRESS).decode().split()[2])


@pytest.fixture
def two(job):
    """Ranks 0 and 1 of three: rank 0 is still waiting for the last."""
    ranks = [job.start(rank) for rank in (0, 1)]
    wait_for(lambda: ranks[0].do(joined) == 1)
    return ranks


def assert_death_is_noticed(victim, other, number):
    assert [victim.process.is_alive(), other.process.is_alive()] == [True, True]
    victim.process.kill()
    assert other.end() == 1
    assert f"rank {number} exited without an error message (killed, or out of memory" in other.printed


def says(connection, message):
    """Send `message` and nothing after it."""
    with contextlib.suppress(OSError):  # it may be rejected before all is sent
        connection.sendall(message)
        connection.shutdown(socket.SHUT_WR)
    assert ends(connection)


def closes_at_once(connection, announcement):
    connection.close()


def says_that_a_rank_died(connection, announcement):
    says(connection, b"d")


def talks_nonsense(connection, announcement):
    says(connection, secrets.token_bytes(4096))


def stops_in_the_middle(connection, announcement):
    says(connection, bytes(20))


def says_what_the_store_says(connection, announcement):
    """The token in the store used to be sufficient."""
    try:
        token = bytes.fromhex(announcement)
    except ValueError:
        token = announcement.encode()
    says(connection, token + (2).to_bytes(4, "big"))


def test_strangers_end_nothing(job, two):
    address, rest = job.announced()
    for act in (
        closes_at_once,
        says_that_a_rank_died,
        talks_nonsense,
        stops_in_the_middle,
        says_what_the_store_says,
    ):
        act(job.visit(), rest)
        assert two[0].do(joined) == 1, act.__name__
    wait_for(lambda: two[0].do(pending) == 0)
    assert_death_is_noticed(*reversed(two), 1)


def test_silent_connections_delay_nothing(job):
    """A death is detected at once even while strangers have a long time left for their handshakes."""
    patient = {"reception.HANDSHAKE_SECONDS": 2 * PATIENCE}
    zero = job.start(0, settings=patient)
    one = job.start(1)
    wait_for(lambda: zero.do(joined) == 1)
    silent = [job.visit() for _ in range(64)]
    wait_for(lambda: zero.do(pending) == len(silent))
    assert_death_is_noticed(one, zero, 1)


def test_a_byte_at_a_time(job):
    """The deadline applies to the whole handshake, not to each byte; meanwhile ranks can join."""
    zero = job.start(0, settings={"reception.HANDSHAKE_SECONDS": 0.5})
    stranger, sent = job.visit(), 0
    stranger.setblocking(False)
    job.start(1)
    with contextlib.suppress(ConnectionError):
        while sent < 20:
            with contextlib.suppress(BlockingIOError):
                if stranger.recv(64) == b"":
                    break
            stranger.send(b"\0")
            sent += 1
            time.sleep(0.4)
    assert sent < 20, "every byte has its own deadline"
    wait_for(lambda: zero.do(joined) == 1)


def test_one_host_listens_on_loopback_until_all_are_there(job):
    zero = job.start(0, world_size=2)
    assert job.announced()[0][0] in LOOPBACKS
    assert zero.do(listening) == [job.announced()[0][0]]
    one = job.start(1, world_size=2)
    wait_for(lambda: zero.do(joined) == 1 and one.do(joined))
    wait_for(lambda: zero.do(listening) == [])
    assert_death_is_noticed(zero, one, 0)


def test_one_host_keeps_the_key_in_a_private_file(job):
    zero = job.start(0, world_size=2)
    path = job.announced()[1]
    status = os.stat(path)
    assert stat.S_IMODE(status.st_mode) == 0o600 and status.st_uid == os.geteuid()
    assert len(read_private_file(path)) == 32
    job.start(1, world_size=2)
    wait_for(lambda: zero.do(joined) == 1)
    wait_for(lambda: not os.path.exists(path))
    assert zero.printed == ""


SEVERAL_HOSTS = {"LOCAL_WORLD_SIZE": "1"}
SECRET = "correct horse battery staple"


def test_several_hosts_with_a_secret(job):
    """The secret is neither in the store nor in a rank's output nor in its child processes' environment."""
    environment = SEVERAL_HOSTS | {JOB_SECRET: SECRET}
    ranks = [job.start(rank, world_size=2, environment=environment) for rank in (0, 1)]
    wait_for(lambda: ranks[0].do(joined) == 1 and ranks[1].do(joined))
    assert job.announced()[1] == "environment"
    for rank in ranks:
        assert not rank.do(secret_in_the_environment)
        assert rank.printed == ""
    assert_death_is_noticed(*ranks, 0)


def test_several_hosts_without_a_secret(job):
    """They still detect a death, and rank 0 warns about the missing secret."""
    ranks = [job.start(rank, world_size=2, environment=SEVERAL_HOSTS) for rank in (0, 1)]
    wait_for(lambda: ranks[0].do(joined) == 1)
    key = job.announced()[1]
    assert (
        f"warning: {JOB_SECRET} is not set: any process that reaches the rendezvous can" in ranks[0].printed
    )
    assert ranks[0].printed.count("\n") == 1 and key not in ranks[0].printed and ranks[1].printed == ""
    assert_death_is_noticed(*reversed(ranks), 1)


@pytest.mark.parametrize("second", [{}, {JOB_SECRET: SECRET[::-1]}])
def test_different_secrets(job, second):
    impatient = {"lifeline._JOIN_SECONDS": 0.0}
    zero = job.start(0, world_size=2, environment=SEVERAL_HOSTS | {JOB_SECRET: SECRET})
    one = job.start(1, world_size=2, environment=SEVERAL_HOSTS | second, settings=impatient)
    said = wait_for(lambda: one.printed)
    assert "rank 1: failures of other ranks will not be detected: " in said and JOB_SECRET in said
    assert SECRET not in said and SECRET[::-1] not in said
    assert zero.do(joined) == 0
    assert one.process.is_alive()


def test_a_false_rank_0(job):
    """A rank keeps retrying, whatever the false rank 0 answers, until the real one appears."""
    hurry = {"lifeline._BETWEEN_ATTEMPTS": 0.01}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        job.store.set(lifeline._ADDRESS, f"127.0.0.1 {listener.getsockname()[1]} {write_private_file(KEY)}")
        path = job.announced()[1]
        one = job.start(1, world_size=2, settings=hurry)
        for said in (b"", b"d", b"d" * 4096, secrets.token_bytes(64)):
            connection, _ = listener.accept()
            connection.settimeout(PATIENCE)
            with connection:
                says(connection, said)
        for nonsense in ("", "here", "127.0.0.1 99999999 x", "127.0.0.1 1 /etc/passwd", "\0 1 2"):
            job.store.set(lifeline._ADDRESS, nonsense)
            assert not one.do(joined)
    os.unlink(path)
    zero = job.start(0, world_size=2)
    wait_for(lambda: zero.do(joined) == 1 and one.do(joined))
    assert one.printed == ""
    assert_death_is_noticed(zero, one, 0)


def test_a_forked_helper_does_not_hide_a_death(two):
    helper = two[1].do(fork_a_helper)
    try:
        assert_death_is_noticed(*reversed(two), 1)
    finally:
        os.kill(helper, signal.SIGKILL)
