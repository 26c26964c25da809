"""Network interfaces: those that this host has, those that NCCL and gloo were told to use, and the one that
other hosts reach."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Collection, Mapping

import psutil

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


def own_address(master: str, environment: Mapping[str, str]) -> str:
    """This host's address, as a number, on the interface that leads to the rendezvous at `master`.

    Where the rendezvous is on this host, under a name that means loopback here (Debian's 127.0.1.1) and an
    interface elsewhere: the address of gloo's interface, else of the default route's. Sends nothing. Raises
    `OSError` when there is none that others could reach.
    """
    found = _source_towards(master)
    if found is not None and not _is_loopback(found):
        return found
    if master == "localhost" or found is not None and _is_loopback(master):
        return found or loopback_address()  # the other ranks can only be on this host, too
    addresses = psutil.net_if_addrs()
    for name in environment.get(GLOO_INTERFACES, "").split(","):
        for entry in addresses.get(name, []):
            if entry.family in (socket.AF_INET, socket.AF_INET6) and not _is_link_local(entry.address):
                return entry.address
    for somewhere in ("192.0.2.1", "2001:db8::1"):  # addresses of documentation (RFC 5737, RFC 3849)
        if (found := _source_towards(somewhere)) and not _is_loopback(found):
            return found
    raise OSError(
        f"MASTER_ADDR={master} gives no address that other hosts reach; set NETWORK to an interface"
    )


def loopback_address() -> str:
    """The address under which this host reaches itself and nobody else does."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return "127.0.0.1"
    return "::1"


def _source_towards(host: str) -> str | None:
    """The address from which this host's packets to `host` come. Link-local ones mean nothing elsewhere."""
    with contextlib.suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(address)  # of a datagram socket: chooses the interface, sends nothing
                if not _is_link_local(source := probe.getsockname()[0]):
                    return source
    return None


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def _is_link_local(address: str) -> bool:
    return ipaddress.ip_address(address).is_link_local
