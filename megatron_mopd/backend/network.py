"""Network interfaces: those that this host has, and those that NCCL and gloo were told to use."""

from __future__ import annotations

import socket
from collections.abc import Collection, Mapping

NCCL_INTERFACES = "NCCL_SOCKET_IFNAME"
GLOO_INTERFACES = "GLOO_SOCKET_IFNAME"


def interface_names() -> list[str]:
    """This host's network interfaces."""
    return [name for _, name in socket.if_nameindex()]


def chosen_by_nccl(value: str, interfaces: Collection[str]) -> list[str]:
    """Interfaces that a value of `NCCL_SOCKET_IFNAME` leaves to NCCL.

    A list of beginnings of names; `=` in front: of whole names; `^` in front: all but these.
    Source: NCCL's documentation of its environment variables.
    """
    excludes, value = value.startswith("^"), value.removeprefix("^")
    exact, value = value.startswith("="), value.removeprefix("=")
    names = [name for name in value.split(",") if name]

    def is_named(interface: str) -> bool:
        return any(interface == name if exact else interface.startswith(name) for name in names)

    return [interface for interface in interfaces if is_named(interface) != excludes]


def interface_problems(environment: Mapping[str, str], interfaces: Collection[str]) -> list[str]:
    """A sentence for every variable that names an interface which this host does not have."""
    known = ", ".join(sorted(interfaces))
    problems = []
    if value := environment.get(NCCL_INTERFACES):
        if not chosen_by_nccl(value, interfaces):
            problems.append(f"{NCCL_INTERFACES}={value} matches no network interface of this host ({known})")
    if value := environment.get(GLOO_INTERFACES):  # a list of whole names
        missing = [name for name in value.split(",") if name not in interfaces]
        if missing:
            problems.append(
                f"{GLOO_INTERFACES}={value}: this host has no network interface {missing[0]!r} ({known})"
            )
    return problems
