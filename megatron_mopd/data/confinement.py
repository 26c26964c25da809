"""Limits that a process puts on itself before it runs what a response or a verifier may make it run.

The way back does not exist: they hold until the process ends, and for every process that it starts.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import struct

# Landlock's system calls have the same numbers on every architecture (Linux 5.13 and later).
_CREATE_RULESET, _RESTRICT_SELF = 444, 446
_VERSION_FLAG = 1
_SET_NO_NEW_PRIVILEGES = 38
# Of its access rights: all but executing, reading files and listing directories (bits 0, 2 and 3).
_MAY_STILL = 0b1101
_RIGHTS_BY_VERSION = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_NETWORK_SINCE, _BIND_AND_CONNECT = 4, 0b11


def confine(memory_bytes: int) -> bool:
    """Limit this process: address space, no core dumps, no file grows, and where the kernel has Landlock,
    nothing on any file system is written, created, renamed or removed, and no TCP connection is made.

    Files and pipes that are open stay usable. Returns whether Landlock is there.
    """
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    with contextlib.suppress(OSError, AttributeError):
        return _landlock()
    return False


def _landlock() -> bool:
    if platform.system() != "Linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION_FLAG))
    if version < 1:
        return False
    rights = (1 << _RIGHTS_BY_VERSION.get(version, 16)) - 1
    attributes = struct.pack("<Q", rights & ~_MAY_STILL)
    if version >= _NETWORK_SINCE:
        attributes += struct.pack("<Q", _BIND_AND_CONNECT)
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    if ruleset < 0:
        return False
    try:
        if libc.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
            return False
        return libc.syscall(_RESTRICT_SELF, ruleset, ctypes.c_uint32(0)) == 0
    finally:
        os.close(ruleset)
