"""Network interfaces: this host's, those that NCCL and gloo are configured to use, and the one that other
hosts reach."""

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
    """Interfaces that a value of `NCCL_SOCKET_IFNAME` selects.

    The value is a list of name prefixes; with a leading `=`, of full names; with a leading `^`, all except
    these. Source: NCCL's documentation of its environment variables.
    """
    excludes, value = value.startswith("^"), value.removeprefix("^")
    exact, value = value.startswith("="), value.removeprefix("=")
    names = [name for name in value.split(",") if name]

    def is_named(interface: str) -> bool:
        return any(interface == name if exact else interface.startswith(name) for name in names)

    return [interface for interface in interfaces if is_named(interface) != excludes]


def interface_problems(environment: Mapping[str, str], interfaces: Collection[str]) -> list[str]:
    """A sentence for every variable that names an interface which does not exist on this host."""
    known = ", ".join(sorted(interfaces))
    problems = []
    if value := environment.get(NCCL_INTERFACES):
        if not chosen_by_nccl(value, interfaces):
            problems.append(f"{NCCL_INTERFACES}={value} matches no network interface of this host ({known})")
    if value := environment.get(GLOO_INTERFACES):  # a list of full names
        missing = [name for name in value.split(",") if name not in interfaces]
        if missing:
            problems.append(
                f"{GLOO_INTERFACES}={value}: this host has no network interface {missing[0]!r} ({known})"
            )
    return problems


def own_address(master: str, environment: Mapping[str, str]) -> str:
    """This host's numeric address on the interface that leads to the rendezvous at `master`.

    If the rendezvous is on this host, under a name that resolves to loopback here (Debian's 127.0.1.1) and to
    an interface elsewhere, the address of gloo's interface, else that of the default route. Sends nothing.
    Raises `OSError` if this host has no address that others could reach.
    """
    found = _source_towards(master)
    if found is not None and not _is_loopback(found):
        return found
    if master == "localhost" or found is not None and _is_loopback(master):
        return found or loopback_address()  # the other ranks must be on this host, too
    addresses = psutil.net_if_addrs()
    for name in environment.get(GLOO_INTERFACES, "").split(","):
        for entry in addresses.get(name, []):
            if entry.family in (socket.AF_INET, socket.AF_INET6) and not _is_link_local(entry.address):
                return entry.address
    for somewhere in ("192.0.2.1", "2001:db8::1"):  # addresses for documentation (RFC 5737, RFC 3849)
        if (found := _source_towards(somewhere)) and not _is_loopback(found):
            return found
    raise OSError(
        f"MASTER_ADDR={master} gives no address that other hosts reach; set NETWORK to an interface"
    )


def loopback_address() -> str:
    """The address by which only this host reaches itself."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return "127.0.0.1"
    return "::1"


def _source_towards(host: str) -> str | None:
    """The source address of packets to `host`; not a link-local one, which is meaningless elsewhere."""
    with contextlib.suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(address)  # on a datagram socket: selects the interface, sends nothing
                if not _is_link_local(source := probe.getsockname()[0]):
                    return source
    return None


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def _is_link_local(address: str) -> bool:
    return ipaddress.ip_address(address).is_link_local
