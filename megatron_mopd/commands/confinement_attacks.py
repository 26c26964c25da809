"""Attacks that hostile code may try in a confined process. `python tools/doctor.py --confinement` runs them
with the same code that scores answers, and prints which of them the machine refuses.

Every function raises if it is refused, and otherwise returns what it obtained. Run as a module, this file is
a confined process.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from megatron_mopd.confinement.server import WorkerLimits, serve

_IO_URING_SETUP = 425  # the same number on every architecture
_PTRACE_ATTACH = 16


def write_new(folder: str) -> None:
    (Path(folder) / "new").write_text("x")


def overwrite(folder: str) -> None:
    (Path(folder) / "kept").write_text("x")


def truncate(folder: str) -> None:
    os.truncate(Path(folder) / "kept", 0)


def remove(folder: str) -> None:
    (Path(folder) / "kept").unlink()


def rename(folder: str) -> None:
    (Path(folder) / "kept").rename(Path(folder) / "moved")


def link(folder: str) -> None:
    (Path(folder) / "new").symlink_to("/")


def make_directory(folder: str) -> None:
    (Path(folder) / "new").mkdir()


def change_mode(folder: str) -> None:
    (Path(folder) / "kept").chmod(0o777)


def change_times(folder: str) -> None:
    os.utime(Path(folder) / "kept", (0, 0))


def change_attributes(folder: str) -> None:
    os.setxattr(Path(folder) / "kept", "user.attack", b"x")


def change_own_module() -> None:
    with open(__file__, "a") as file:
        file.write("\n")


def read_file(folder: str) -> str:
    return (Path(folder) / "kept").read_text()


def list_directory(folder: str) -> list[str]:
    return os.listdir(folder)


def read_password_file() -> int:
    return len(Path("/etc/passwd").read_text())


def read_environment_of(process: int) -> int:
    return len(Path(f"/proc/{process}/environ").read_bytes())


def own_environment() -> list[str]:
    """Reading it is allowed, but it is empty."""
    if not os.environ:
        raise PermissionError("empty")
    return sorted(os.environ)


def fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def start_program() -> None:
    subprocess.run([sys.executable, "-c", ""], check=True)


def replace_program() -> None:
    os.execv("/bin/true", ["true"])


def start_thread() -> None:
    threading.Thread(target=int).start()


def connect_tcp(port: int) -> None:
    socket.create_connection(("127.0.0.1", port), timeout=2)


def listen_tcp() -> None:
    socket.create_server(("127.0.0.1", 0))


def send_udp(port: int) -> None:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", port))


def connect_unix(address: str) -> None:
    socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).connect(address)


def terminate(process: int) -> None:
    os.kill(process, signal.SIGTERM)


def kill_supervisor() -> None:
    os.kill(os.getppid(), signal.SIGKILL)


def signal_by_pipe(process: int) -> None:
    """Make the kernel send SIGIO to a descriptor's owner, which kills a process that does not handle it."""
    reader, writer = os.pipe()
    fcntl.fcntl(reader, fcntl.F_SETOWN, process)
    fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC)
    os.write(writer, b"x")


def trace(process: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(_PTRACE_ATTACH, process, 0, 0):
        raise OSError(ctypes.get_errno(), "ptrace")


def read_memory_of(process: int) -> None:
    Path(f"/proc/{process}/mem").open("rb").close()


def new_namespace() -> None:
    _call("unshare", 0x10000000)


def asynchronous_calls() -> None:
    """io_uring makes system calls that a filter does not see."""
    parameters = ctypes.create_string_buffer(120)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_IO_URING_SETUP, 1, parameters) < 0:
        raise OSError(ctypes.get_errno(), "io_uring_setup")


def outlive_supervisor() -> None:
    _call("prctl", 1, 0, 0, 0, 0)  # PR_SET_PDEATHSIG


def leave_session() -> None:
    os.setsid()


def raise_limits() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def be_preferred() -> None:
    os.nice(-10)


def use_memory() -> int:
    return len(bytearray(8 << 30))


def map_memory() -> int:
    return len(mmap.mmap(-1, 8 << 30))


def use_time() -> None:
    while True:
        pass


def _call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        raise OSError(ctypes.get_errno(), name)


if __name__ == "__main__":
    attacks = {name: value for name, value in list(globals().items()) if callable(value) and name[0] != "_"}
    serve(attacks, WorkerLimits(), checks_evaluation=False)
