"""The doctor's examination of the confined process in which answers are scored."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mopd.backend.finding import Finding, Level
from megatron_mopd.confinement.kernel import Confinement
from megatron_mopd.confinement.process import ConfinedProcess, HandlerError, Unanswered, examine

_MODULE = "megatron_mopd.commands.confinement_attacks"
_SECONDS = 30.0
_SECONDS_OF_A_LOOP = 1.0
_STOPPED_BY_KILLING = ("use_time", "use_memory", "map_memory")


# Title in the table, function in `confinement_attacks`, and kind of target.
_ATTACKS = (
    ("write a new file", "write_new", "folder"),
    ("overwrite a file", "overwrite", "folder"),
    ("truncate a file", "truncate", "folder"),
    ("remove a file", "remove", "folder"),
    ("rename a file", "rename", "folder"),
    ("make a link", "link", "folder"),
    ("make a directory", "make_directory", "folder"),
    ("change a file's mode", "change_mode", "folder"),
    ("change a file's times", "change_times", "folder"),
    ("set an extended attribute", "change_attributes", "folder"),
    ("change this package", "change_own_module", ""),
    ("read a file", "read_file", "folder"),
    ("list a directory", "list_directory", "folder"),
    ("read /etc/passwd", "read_password_file", ""),
    ("read the trainer's environment", "read_environment_of", "trainer"),
    ("find secrets in its own environment", "own_environment", ""),
    ("fork", "fork", ""),
    ("start a program", "start_program", ""),
    ("become another program", "replace_program", ""),
    ("start a thread", "start_thread", ""),
    ("connect by TCP", "connect_tcp", "tcp"),
    ("listen on a TCP port", "listen_tcp", ""),
    ("send by UDP", "send_udp", "udp"),
    ("connect to a UNIX socket", "connect_unix", "unix"),
    ("signal a process of this user", "terminate", "process"),
    ("kill its supervisor", "kill_supervisor", ""),
    ("have the kernel signal a process", "signal_by_pipe", "signalled process"),
    ("trace a process", "trace", "process"),
    ("read another process's memory", "read_memory_of", "process"),
    ("enter a new namespace", "new_namespace", ""),
    ("make calls through io_uring", "asynchronous_calls", ""),
    ("outlive its supervisor", "outlive_supervisor", ""),
    ("leave its session", "leave_session", ""),
    ("raise its limits", "raise_limits", ""),
    ("raise its priority", "be_preferred", ""),
    ("use 8 GiB of memory", "use_memory", ""),
    ("map 8 GiB of memory", "map_memory", ""),
    ("run for ever", "use_time", ""),
)


@dataclass(frozen=True)
class _Target:
    arguments: tuple[Any, ...]
    victim: subprocess.Popen | None = None
    """A process whose death shows that the attack had an effect."""

    def is_unharmed(self) -> bool:
        if self.victim is None:
            return False
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.victim.wait(0.5)
        return self.victim.poll() is None


def confinement_findings() -> list[Finding]:
    """Whether answers and chat templates are confined on this machine, in one line."""
    try:
        return [_finding(examine())]
    except Unanswered as error:
        return [Finding(Level.PROBLEM, "confined process", str(error))]


def attack_findings(module: str = _MODULE) -> list[Finding]:
    """Run the attacks in a confined process: one finding each, a warning if the attack is possible.

    `module`: runs in the confined process; tests pass another one.
    """
    process, found = ConfinedProcess(module), []
    try:
        found.append(_finding(process.start()))
        for title, name, kind in _ATTACKS:
            with _target(kind) as target:
                found.append(_attack(process, title, name, target))
    except Unanswered as error:
        found.append(Finding(Level.PROBLEM, "confined process", str(error)))
    finally:
        process.close()
    return found


def attack_summary(findings: list[Finding]) -> str:
    """The last line: how many attacks are possible."""
    attacks = findings[1:]
    possible = sum(finding.level != Level.OK for finding in attacks)
    if possible:
        return f"{possible} of {len(attacks)} attacks are possible on this machine"
    return f"all {len(attacks)} attacks were refused or without effect"


def _attack(process: ConfinedProcess, title: str, name: str, target: _Target) -> Finding:
    seconds = _SECONDS_OF_A_LOOP if name == "use_time" else _SECONDS
    try:
        got = process.ask(name, *target.arguments, seconds=seconds, alone=True)
    except HandlerError as error:
        return Finding(Level.OK, title, f"refused: {error}")
    except Unanswered as error:
        if name in _STOPPED_BY_KILLING:
            return Finding(Level.OK, title, f"stopped: {error}")
        return Finding(Level.WARNING, title, f"POSSIBLE: {error}")
    if target.is_unharmed():
        return Finding(Level.OK, title, "without effect")
    return Finding(Level.WARNING, title, "POSSIBLE" if got is None else f"POSSIBLE: {str(got)[:60]!r}")


def _finding(confinement: Confinement) -> Finding:
    missing = confinement.missing()
    if not missing:
        text = f"answers are scored behind {confinement.mechanisms()}"
        return Finding(Level.OK, "confined process", text)
    text = f"only {confinement.mechanisms()}: a hostile answer could {', '.join(missing)}"
    return Finding(Level.WARNING, "confined process", text, confinement.advice())


@contextlib.contextmanager
def _target(kind: str) -> Iterator[_Target]:
    """A new folder, socket or process to attack."""
    with contextlib.ExitStack() as stack:
        folder = tempfile.mkdtemp(prefix="confinement-")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        (Path(folder) / "kept").write_text("kept")
        if kind == "folder":
            yield _Target((folder,))
        elif kind == "tcp":
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            yield _Target((server.getsockname()[1],))
        elif kind == "udp":
            server = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            server.bind(("127.0.0.1", 0))
            yield _Target((server.getsockname()[1],))
        elif kind == "unix":
            server = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            server.bind(f"{folder}/socket")
            server.listen()
            yield _Target((f"{folder}/socket",))
        elif kind in ("process", "signalled process"):
            victim = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
            stack.callback(victim.wait)
            stack.callback(victim.kill)
            yield _Target((victim.pid,), victim if kind == "signalled process" else None)
        elif kind == "trainer":
            yield _Target((os.getpid(),))
        else:
            yield _Target(())
