"""The lifeline's handshake, with rank 0's end driven turn by turn in this process; addresses and keys."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading

import psutil
import pytest

from megatron_mopd.backend import handshake, network, reception
from megatron_mopd.backend.handshake import Session, Word
from megatron_mopd.backend.job_secret import (
    JOB_SECRET,
    read_private_file,
    take_job_secret,
    write_private_file,
)
from megatron_mopd.config import ConfigError
from tests.security._ranks import KEY, LOOPBACKS, PATIENCE, ends

WORLD = 4
SECRET = "correct horse battery staple"


class Desk:
    """Rank 0's end, with the events it reports."""

    def __init__(self, host="127.0.0.1"):
        self.reception = reception.Reception(host, KEY, WORLD, threading.Lock())
        self.lost, self.complete = [], 0

    def turn(self):
        self.reception.take_turn(self._all_joined, self.lost.append)

    def _all_joined(self):
        self.complete += 1

    @property
    def ranks(self):
        return sorted(visitor.rank for visitor in self.reception._ranks.values())

    def close(self):
        for connection in self.reception.sockets:
            connection.close()
        self.reception._selector.close()


@pytest.fixture(params=LOOPBACKS)
def desk(request):
    desk = Desk(request.param)
    yield desk
    desk.close()


class Guest:
    """A peer's end, step by step."""

    def __init__(self, desk):
        self.desk = desk
        self.connection = socket.create_connection(desk.reception.address, timeout=PATIENCE)
        desk.turn()
        self.nonce_of_rank_0, self.nonce = self.receive(32), secrets.token_bytes(32)

    def receive(self, size):
        return self.connection.recv(size, socket.MSG_WAITALL)

    def hello(self, rank, world_size=WORLD, key=KEY, claimed=None):
        """Send HELLO and return the message. claimed: a different rank to send in the clear."""
        address = self.connection.getpeername()
        self.session = Session(key, address, rank, world_size, self.nonce_of_rank_0, self.nonce)
        said = self.session.say(Word.HELLO)
        message = handshake._HELLO.pack(rank if claimed is None else claimed, world_size, self.nonce, said)
        return self.send(message)

    def send(self, message):
        self.connection.sendall(message)
        self.desk.turn()
        return message

    def say(self, word):
        self.send(self.session.say(word))

    def is_sent_away(self):
        return ends(self.connection)

    def join(self, rank):
        self.hello(rank)
        assert self.session.hear(self.receive(32), [Word.WELCOME])
        self.say(Word.JOINED)
        return self

    def close(self):
        self.connection.close()
        self.desk.turn()


def test_who_joins_and_finishes(desk):
    """After the last rank has joined, nobody can connect. A rank that leaves without GOODBYE is reported as
    lost to the other ranks."""
    one, two = Guest(desk).join(1), Guest(desk).join(2)
    silent = Guest(desk)
    three = Guest(desk).join(3)
    assert desk.ranks == [1, 2, 3] and desk.complete == 1
    assert silent.is_sent_away()
    with pytest.raises(OSError):
        socket.create_connection(desk.reception.address, timeout=PATIENCE)
    one.send(bytes(32))  # garbage on a connection that has joined
    one.say(Word.GOODBYE)
    one.close()
    assert desk.ranks == [2, 3] and desk.lost == []
    two.close()
    assert desk.lost == [2]
    assert three.session.hear(three.receive(32), [Word.DIED]) is Word.DIED
    desk.reception.leave()
    assert three.session.hear(three.receive(32), [Word.GOODBYE_OF_RANK_0])
    three.close()
    assert desk.lost == [2], "rank 0 had already finished"


@pytest.mark.parametrize(
    "rank, options",
    [
        (0, {}),
        (WORLD, {}),
        (2**32 - 1, {}),
        (1, {"world_size": WORLD + 1}),
        (1, {"key": bytes(32)}),
        (1, {"claimed": 2}),
    ],
)
def test_a_hello_that_is_wrong(desk, rank, options):
    guest = Guest(desk)
    guest.hello(rank, **options)
    assert guest.is_sent_away()
    assert desk.ranks == [] and desk.lost == []


def test_a_rank_joins_once(desk):
    first = Guest(desk).join(1)
    second = Guest(desk)
    second.hello(1)
    assert second.is_sent_away()
    assert desk.ranks == [1] and desk.lost == []
    first.say(Word.GOODBYE)
    first.close()
    again = Guest(desk)
    again.hello(1)
    assert again.is_sent_away(), "the rank had already finished"
    # Of two at the same time, the first to complete the handshake joins.
    early, late = Guest(desk), Guest(desk)
    early.hello(2)
    late.hello(2)
    late.say(Word.JOINED)
    early.say(Word.JOINED)
    early.receive(32)
    assert early.is_sent_away()
    assert desk.ranks == [2] and desk.lost == []


def test_a_connection_that_breaks_before_it_has_joined_is_no_death(desk):
    broken = Guest(desk)
    broken.hello(1)
    broken.close()
    assert desk.lost == []
    Guest(desk).join(1)
    assert desk.ranks == [1]


def test_a_hello_is_good_for_its_connection_only(desk):
    guest = Guest(desk)
    recorded = guest.hello(1)
    guest.close()
    another = Guest(desk)
    another.send(recorded)
    assert another.is_sent_away()
    # Rank 0's own message, reflected, is not accepted either.
    third = Guest(desk)
    third.hello(1)
    third.send(third.receive(32))
    assert third.is_sent_away()
    assert desk.ranks == [] and desk.lost == []


def test_so_many_strangers_and_no_more(desk):
    limit = WORLD + reception._STRANGERS
    guests = [Guest(desk) for _ in range(limit + 8)]
    assert len(desk.reception._strangers) == limit
    assert all(guest.is_sent_away() for guest in guests[:8])
    guests[-1].join(1)
    assert desk.ranks == [1] and desk.lost == []
    for guest in guests:
        guest.connection.close()


def introduced(address, serve):
    """The outcome for a rank 1 that connects to `address` while `serve` runs in a thread."""
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with socket.create_connection(address, timeout=PATIENCE) as connection:
        try:
            return handshake.introduce(connection, KEY, 1, WORLD, PATIENCE)
        except OSError as error:
            return str(error)
        finally:
            connection.close()
            thread.join(PATIENCE)


def test_rank_0_is_recognised(desk):
    def serve():
        for _ in range(2):
            desk.turn()

    assert isinstance(introduced(desk.reception.address, serve), Session)


def test_rank_0_without_the_key_is_not_believed():
    """Neither with a random reply, nor with one that reflects the rank's own message."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for word in (secrets.token_bytes(32), None):

            def serve(word=word):
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(bytes(32))
                    hello = connection.recv(72, socket.MSG_WAITALL)
                    connection.sendall(word or hello[-32:])

            assert "is not rank 0" in introduced(listener.getsockname(), serve)


def test_what_rank_0_once_said_is_not_believed_again(desk):
    heard, address = [], desk.reception.address
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET

    def true_rank_0():
        for _ in range(2):
            desk.turn()

    def false_rank_0():
        connection, _ = listener.accept()
        with connection:
            connection.sendall(heard[0])
            connection.recv(72, socket.MSG_WAITALL)
            connection.sendall(heard[1])

    class Recording(socket.socket):
        def recv(self, *arguments):
            heard.append(super().recv(*arguments))
            return heard[-1]

    thread = threading.Thread(target=true_rank_0, daemon=True)
    thread.start()
    with Recording(family) as connection:
        connection.connect(address)
        handshake.introduce(connection, KEY, 1, WORLD, PATIENCE)
    thread.join(PATIENCE)
    assert [len(said) for said in heard] == [32, 32]
    desk.close()  # another process can now take its port
    with socket.create_server(address, family=family) as listener:
        assert "is not rank 0" in introduced(address, false_rank_0)


def test_a_stranger_in_the_middle_is_noticed(desk):
    """A process that can write to the store may announce itself and relay everything to and from rank 0."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            connection, _ = listener.accept()
            with connection, socket.create_connection(desk.reception.address, PATIENCE) as onwards:
                desk.turn()
                connection.sendall(onwards.recv(32, socket.MSG_WAITALL))
                onwards.sendall(connection.recv(72, socket.MSG_WAITALL))
                desk.turn()
                with contextlib.suppress(ConnectionError):
                    connection.sendall(onwards.recv(32, socket.MSG_WAITALL))

        assert "is not rank 0" in introduced(listener.getsockname(), serve)
    assert desk.ranks == [] and desk.lost == []


def test_which_address(monkeypatch):
    for host in LOOPBACKS:  # the other ranks reached the rendezvous there, so they are on this host
        assert network.own_address(host, {}) == host
    gloo = {network.GLOO_INTERFACES: "lo"}
    for loopback in ("127.0.0.1", None):  # what this host resolves its own name to
        found = {"a-node": loopback, "192.0.2.1": "198.51.100.7"}
        monkeypatch.setattr(network, "_source_towards", found.get)
        assert network.own_address("a-node", {}) == "198.51.100.7"
        if "lo" in psutil.net_if_addrs():
            assert network.own_address("a-node", gloo) in LOOPBACKS
        del found["192.0.2.1"]
        with pytest.raises(OSError, match="MASTER_ADDR=a-node gives no address that other hosts reach"):
            network.own_address("a-node", {})
    monkeypatch.setattr(network, "_source_towards", {"first-node": "10.0.0.7"}.get)
    assert network.own_address("first-node", gloo) == "10.0.0.7"


def test_the_secret_is_taken_out_of_the_environment():
    environment = {JOB_SECRET: f" {SECRET}\n", "OTHER": "1"}
    assert take_job_secret(environment) == SECRET.encode()
    assert environment == {"OTHER": "1"} and take_job_secret(environment) is None
    with pytest.raises(ConfigError, match=f"{JOB_SECRET} has 6 characters; it needs at least 16") as error:
        take_job_secret({JOB_SECRET: "guess1"})
    assert "guess1" not in str(error.value)


def test_other_files_are_no_keys(tmp_path):
    path = write_private_file(KEY)
    try:
        assert read_private_file(path) == KEY
        os.symlink(path, tmp_path / "link")
        os.mkfifo(tmp_path / "pipe", 0o600)
        for name in ("link", "pipe", ".", "missing"):
            with pytest.raises(OSError):
                read_private_file(str(tmp_path / name))
        os.chmod(path, 0o640)
        with pytest.raises(PermissionError, match="is not a file of this user alone"):
            read_private_file(path)
        if os.geteuid() == 0:
            os.chmod(path, 0o600)
            os.chown(path, 12345, 12345)
            with pytest.raises(PermissionError, match="is not a file of this user alone"):
                read_private_file(path)
    finally:
        os.unlink(path)
    for text in (b"", b"known text", b"x" * 89, b"megatron_mopd job secret " + b"x" * 64):
        (tmp_path / "text").write_bytes(text)
        os.chmod(tmp_path / "text", 0o600)
        with pytest.raises(ValueError):
            read_private_file(str(tmp_path / "text"))
