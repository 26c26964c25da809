"""One run at a time per directory: refusals name the other run, and a dead run's lock blocks nobody."""

import errno
import json
import multiprocessing
import os
import re
import signal
import socket
import time

import pytest

from megatron_mopd.config import ConfigError
from megatron_mopd.observe import run_lock
from megatron_mopd.observe.run_lock import LOCK_FILE, RunLock, RunLostError

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def hold(tmp_path):
    """`hold(work)`: start a process that locks the directory, does `work` and then waits to be killed."""
    processes = []

    def hold(work=lambda: None):
        def main():
            RunLock(tmp_path)
            work()
            ready.set()
            time.sleep(60)

        ready = FORK.Event()
        processes.append(FORK.Process(target=main, daemon=False))
        processes[-1].start()
        assert ready.wait(30)
        return processes[-1]

    yield hold
    for process in processes:
        process.kill()
        process.join()


def rewrite(directory, **changes):
    """The lock file as another host would have left it."""
    path = directory / LOCK_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_second_start_is_refused(tmp_path, hold):
    holder = hold()
    words = rf"run_dir: {re.escape(str(tmp_path))} is in use: process {holder.pid} on host "
    words += (
        rf"'{re.escape(socket.gethostname())}', started \d+ seconds ago; stop it, or name another run_dir"
    )
    with pytest.raises(ConfigError, match=words):
        RunLock(tmp_path)
    with pytest.raises(ConfigError, match=words):  # the refused start has not removed the lock
        RunLock(tmp_path)


def test_a_killed_run_is_in_nobody_s_way(tmp_path, hold):
    """Not even if a helper process that it forked is still alive."""
    children = FORK.SimpleQueue()  # its `put` writes before it returns

    def fork():
        child = FORK.Process(target=time.sleep, args=(60,))
        child.start()
        children.put(child.pid)

    holder = hold(fork)
    holder.kill()
    holder.join()
    child = children.get()
    try:
        os.kill(child, 0)
        started = time.monotonic()
        with RunLock(tmp_path):
            assert time.monotonic() - started < 2
    finally:
        os.kill(child, signal.SIGKILL)


def test_an_ended_run_leaves_the_directory_free(tmp_path):
    for _ in range(2):
        lock = RunLock(tmp_path)
        lock.release()
        lock.release()
    assert not any(tmp_path.iterdir())


def test_a_lock_that_goes_while_it_is_taken(tmp_path, monkeypatch):
    """The previous run removes its lock file after the next one opened it and before that one locks it."""
    (tmp_path / LOCK_FILE).write_text("")
    lock = RunLock._lock

    def remove_first(self):
        monkeypatch.setattr(RunLock, "_lock", lock)
        os.unlink(tmp_path / LOCK_FILE)
        return lock(self)

    monkeypatch.setattr(RunLock, "_lock", remove_first)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["process"] == os.getpid()


def test_a_lock_that_another_host_left(tmp_path, hold, monkeypatch, capsys):
    """No process touches it: it is free after `SILENCE_SECONDS`, at once if its last touch is older."""
    monkeypatch.setattr(run_lock, "SILENCE_SECONDS", 1.5)
    holder = hold()
    holder.kill()
    holder.join()
    rewrite(tmp_path, boot="another", host="node-7\x1b[31m")
    started = time.monotonic()
    RunLock(tmp_path).release()
    assert time.monotonic() - started > 1
    said = capsys.readouterr().out
    assert f"was left by process {holder.pid} on host 'node-7" in said and "\x1b[31m" not in said

    holder = hold()
    holder.kill()
    holder.join()
    rewrite(tmp_path, boot="another")
    long_ago = time.time() - 60
    os.utime(tmp_path / LOCK_FILE, (long_ago, long_ago))
    started = time.monotonic()
    RunLock(tmp_path).release()
    assert time.monotonic() - started < 1


def test_a_lock_that_another_host_holds(tmp_path, hold, monkeypatch):
    """Where other hosts cannot see file locks, a recent modification time shows that the run is alive."""

    def no_lock(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.2)
    holder = hold()
    monkeypatch.setattr(run_lock.fcntl, "lockf", no_lock)
    started = time.monotonic()
    with pytest.raises(ConfigError, match=f"is in use: process {holder.pid} on host "):
        RunLock(tmp_path)
    assert time.monotonic() - started < 10


def test_a_run_whose_directory_was_taken_ends(tmp_path, monkeypatch):
    """It was suspended for too long, for example: two runs must not continue in one directory."""
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    lock = RunLock(tmp_path)
    lock.check()
    rewrite(tmp_path, nonce="another")
    deadline = time.monotonic() + 10
    with pytest.raises(RunLostError, match="another run has taken"):
        while time.monotonic() < deadline:
            lock.check()
            time.sleep(0.02)
    lock.release()
    assert json.loads((tmp_path / LOCK_FILE).read_text())["nonce"] == "another"


@pytest.mark.parametrize("content", ["", "[", "[1]", '{"host": 1}', "x" * 5000])
def test_a_file_that_is_no_lock(tmp_path, content):
    (tmp_path / LOCK_FILE).write_text(content)
    RunLock(tmp_path).release()


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="run_dir: cannot write .*run.lock"):
        RunLock(tmp_path / "file" / "run")
