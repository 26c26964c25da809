"""Irrevocably drops privileges of this process with kernel mechanisms: resource limits, Landlock, seccomp,
namespaces.

Restrictions last until the process ends, and apply to every process that it starts.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import resource
import signal
import struct
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

try:
    import pyseccomp
except (ImportError, OSError, RuntimeError, AttributeError):  # not installed, or libseccomp is missing
    pyseccomp = None

_SET_PARENT_DEATH_SIGNAL, _SET_SECCOMP, _SET_NO_NEW_PRIVILEGES = 1, 22, 38
_SECCOMP_FILTER = 2
_NEW_USER_IPC_NETWORK = 0x10000000 | 0x08000000 | 0x40000000

# Landlock's system calls have the same numbers on every architecture (Linux 5.13 and later).
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_READ_FILE, _READ_DIRECTORY = 1 << 2, 1 << 3
_RIGHTS_BY_VERSION = {1: 13, 2: 14, 3: 15, 4: 15}  # later versions: 16
_TRUNCATION_SINCE = 3
_NETWORK_SINCE, _BIND_AND_CONNECT = 4, 0b11
_SCOPES_SINCE, _ABSTRACT_SOCKETS_AND_SIGNALS = 6, 0b11

# Allowed system calls of a worker: memory, reading, its own pipes, clocks, and what CPython and glibc need
# for a process that does not affect others. All others are refused, including those of later kernels.
_ALLOWED = """
    brk mmap munmap mprotect mremap madvise
    read readv pread64 preadv write writev lseek close dup dup2 dup3 pipe pipe2 poll ppoll select pselect6
    fstat stat lstat newfstatat statx access faccessat faccessat2 readlink readlinkat getdents64 getcwd
    fadvise64 clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrusage getrlimit
    getpid getppid gettid getuid geteuid getgid getegid uname sysinfo sched_getaffinity sched_yield getcpu
    getrandom rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall
    futex set_robust_list set_tid_address rseq membarrier arch_prctl exit exit_group
""".split()
# Flags of `open` that write or create a file.
_WRITES = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC
# Not F_SETOWN and the like, which make the kernel send signals to other processes.
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC
_IOCTL_COMMANDS = (0x5401, 0x5413, 0x5451)  # TCGETS and TIOCGWINSZ (is this a terminal?), FIOCLEX


@dataclass(frozen=True)
class Confinement:
    """The mechanisms by which this machine's kernel confines a process."""

    system: str = platform.system()
    landlock: int = 0
    """Version of the Landlock interface; 0 if unavailable."""
    seccomp: bool = False
    """Whether workers have an allowlist of system calls."""
    network_namespace: bool = False
    """Whether the process has a separate network without interfaces; only tried without seccomp."""
    superuser: bool = False
    """Whether the process runs as root, for which the kernel does not limit the number of processes."""

    def missing(self) -> list[str]:
        """What hostile code in a confined process could do on this machine; empty if fully confined."""
        can = []
        if not self.landlock:
            can.append("read this user's files and processes")
        if not self.landlock and not self.seccomp:
            can.append("write and remove files")
        if not self.seccomp:
            if 0 < self.landlock < _TRUNCATION_SINCE:
                can.append("truncate files")
            can += ["change modes, times and attributes of files", "connect to UNIX sockets"]
            if not self.network_namespace:
                can.append("use UDP" if self.landlock >= _NETWORK_SINCE else "use the network")
            if self.landlock < _SCOPES_SINCE:
                can.append("signal and trace this user's processes")
            if self.superuser:
                can.append("start processes that outlive it")
            can.append("make any other system call")
        return can

    def advice(self) -> str:
        """How to enable the missing mechanisms; empty if none is missing."""
        if self.system != "Linux":
            return "score untrusted answers on Linux" if self.missing() else ""
        steps = []
        if not self.seccomp:
            steps.append("install libseccomp (Debian, Ubuntu: libseccomp2) and `pip install pyseccomp`")
        if not self.landlock:
            steps.append("use a kernel with Landlock (5.13 or later, `landlock` in the lsm= boot parameter)")
        return "; ".join(steps)

    def warning(self) -> str | None:
        """A one-line warning for the user; `None` if fully confined."""
        if not (missing := self.missing()):
            return None
        return (
            f"confined processes have only {self.mechanisms()} on this machine: a hostile answer could "
            f"{', '.join(missing)}. To do: {self.advice() or 'use a later kernel'} (docs/security.md)"
        )

    def mechanisms(self) -> str:
        """The active mechanisms as text."""
        found = [f"Landlock {self.landlock}"] if self.landlock else []
        found += ["seccomp"] * self.seccomp + ["network namespace"] * self.network_namespace
        return ", ".join([*found, "resource limits"])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"missing": self.missing()}


def confine(memory_bytes: int, readable: Iterable[str | Path]) -> tuple[Confinement, bytes]:
    """Confine this process, which will start workers; `confine_worker` confines those further.

    The address space grows by at most `memory_bytes`, no core is dumped, no file grows. With Landlock,
    nothing on any file system is written, created or removed, only files under `readable` are read, and no
    outside process is signalled. Open pipes remain usable. Returns the active mechanisms, and the filter for
    `confine_worker`.
    """
    # If the machine runs out of memory, this process should be killed before the trainer.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    limit = _address_space() + memory_bytes
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    found = Confinement(superuser=os.geteuid() == 0)
    if found.system != "Linux":
        return found, b""
    program = _filter_program()
    namespace = not program and _libc().unshare(_NEW_USER_IPC_NETWORK) == 0
    _libc().prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    version = _landlock(readable)
    return Confinement(found.system, version, bool(program), namespace, found.superuser), program


def confine_worker(seconds: float, program: bytes, parent: int) -> None:
    """Confine a process forked by `parent`, a confined process: it makes only the listed system calls, starts
    no process or thread, sends no signals, and ends with its parent. Its CPU time is limited to `seconds`
    from now on, rounded up, independently of any supervision.
    """
    used = sum(os.times()[:2])
    limit = math.ceil(min(used + seconds, 1e9))  # `seconds` may be infinite
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
    if hasattr(resource, "RLIMIT_NPROC"):
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    if platform.system() != "Linux":
        return
    libc = _libc()
    libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # the parent died before the line above
        os._exit(1)
    # A separate Landlock domain inside the parent's, so that the worker cannot signal the parent either.
    if landlock_version() >= _SCOPES_SINCE:
        _restrict(struct.pack("<QQQ", 0, 0, _ABSTRACT_SOCKETS_AND_SIGNALS), ())
    if program:
        instructions = ctypes.create_string_buffer(program, len(program))
        header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(instructions))
        if libc.prctl(_SET_SECCOMP, _SECCOMP_FILTER, ctypes.c_char_p(header), 0, 0):
            os._exit(1)


def landlock_version() -> int:
    """Version of this kernel's Landlock interface; 0 if unavailable or disabled."""
    if platform.system() != "Linux":
        return 0
    version = _libc().syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION_FLAG))
    return max(0, version)


def readable_by_imports() -> set[str]:
    """Paths of this process's modules, their data and their libraries, which it may need to read after its
    imports. Excludes the working directory, unless modules were imported from its top level.
    """
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and "." not in name and name != "__main__":
            path = Path(file)
            paths.add(str(path.parent if path.stem == "__init__" else path))
    paths |= {path for path in sys.path if path.endswith(("site-packages", "dist-packages"))}
    paths |= {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache"}
    paths |= {str(Path(sys.base_prefix) / "lib"), "/usr/share/zoneinfo", "/etc/localtime"}
    paths |= {"/dev/null", "/dev/urandom", "/dev/zero"}
    return paths | set(filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)))


def _address_space() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return 0


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _landlock(readable: Iterable[str | Path]) -> int:
    """Forbid this process everything except reading `readable`; the version of Landlock, 0 on failure."""
    version = landlock_version()
    if not version:
        return 0
    attributes = struct.pack("<Q", (1 << _RIGHTS_BY_VERSION.get(version, 16)) - 1)
    if version >= _NETWORK_SINCE:
        attributes += struct.pack("<Q", _BIND_AND_CONNECT)
    if version >= _SCOPES_SINCE:
        attributes += struct.pack("<Q", _ABSTRACT_SOCKETS_AND_SIGNALS)
    return version if _restrict(attributes, readable) else 0


def _restrict(attributes: bytes, readable: Iterable[str | Path]) -> bool:
    libc = _libc()
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    if ruleset < 0:
        return False
    try:
        for path in readable:
            with contextlib.suppress(OSError):  # does not exist on this machine
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    rights = _READ_FILE | (_READ_DIRECTORY if os.path.isdir(path) else 0)
                    rule = struct.pack("<Qi", rights, descriptor)
                    libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, ctypes.c_uint32(0))
                finally:
                    os.close(descriptor)
        return libc.syscall(_RESTRICT_SELF, ruleset, ctypes.c_uint32(0)) == 0
    finally:
        os.close(ruleset)


def _filter_program() -> bytes:
    """The instructions of the workers' seccomp filter; empty without libseccomp or seccomp."""
    if pyseccomp is None:
        return b""
    try:
        rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(1))  # EPERM
        for name in _ALLOWED:
            _allow(rules, name)
        for name, flags in (("open", 1), ("openat", 2)):
            _allow(rules, name, pyseccomp.Arg(flags, pyseccomp.MASKED_EQ, _WRITES, 0))
        for name, commands in (("fcntl", _FCNTL_COMMANDS), ("ioctl", _IOCTL_COMMANDS)):
            for command in commands:
                _allow(rules, name, pyseccomp.Arg(1, pyseccomp.EQ, command))
        # Reading its own limits.
        own, reading = pyseccomp.Arg(0, pyseccomp.EQ, 0), pyseccomp.Arg(2, pyseccomp.EQ, 0)
        _allow(rules, "prlimit64", own, reading)
        reader, writer = os.pipe()  # far larger than the program, and avoids writing a file
        with open(reader, "rb") as program:
            with open(writer, "wb") as file:
                rules.export_bpf(file)
            return program.read()
    except (OSError, RuntimeError, ValueError):
        return b""


def _allow(rules: Any, name: str, *arguments: Any) -> None:
    # The call may not exist on this architecture, or the library may be too old for it.
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        rules.add_rule(pyseccomp.ALLOW, name, *arguments)
