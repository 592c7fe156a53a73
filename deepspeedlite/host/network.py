"""This machine in its network: its names and addresses, its ports, and which interface leads to another machine."""

from __future__ import annotations

import contextlib
import errno
import os
import socket

_LOWEST_PICKED = 10_000


def names() -> list[str]:
    """What this machine is called."""
    named = [os.environ.get("SLURMD_NODENAME", ""), socket.gethostname(), socket.gethostname().split(".")[0]]
    return [name for name in dict.fromkeys(named) if name]


def addresses() -> list[str]:
    """Where this machine can be reached."""
    import psutil

    found = [a.address for each in psutil.net_if_addrs().values() for a in each if a.family == socket.AF_INET]
    return [address for address in dict.fromkeys(found) if not address.startswith("127.")]


def is_here(host: str) -> bool:
    """Whether a host's name is this machine's. Name servers are not asked: one that is slow would be asked a lot."""
    own = socket.gethostname()
    if host in ("localhost", own, own.split(".")[0]):
        return True
    with contextlib.suppress(OSError), socket.socket() as probe:
        probe.bind((socket.inet_ntoa(socket.inet_aton(host)), 0))  # only an own address can be bound
        return True
    return False


def interface_towards(address: str) -> str:
    """The network interface by which this machine reaches an address, maybe its own; "" where that cannot be told."""
    import psutil

    with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.connect((address, 1))  # sends nothing
        own = probe.getsockname()[0]
        interfaces = psutil.net_if_addrs().items()
        names = [name for name, found in interfaces if any(each.address == own for each in found)]
        return names[0] if names and not own.startswith("127.") else ""
    return ""


def listen(port: int, backlog: int = 128) -> socket.socket:
    """A server at all addresses of this machine, as torch's store is one. Raises OSError."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=backlog)


def port_fault(port: int) -> str:
    """Why a server could not listen on this port, or "" when it could."""
    try:
        listen(port).close()
    except OSError as error:
        known = {errno.EADDRINUSE: "is in use by another program", errno.EACCES: "needs root (ports below 1024)"}
        return known.get(error.errno or 0, "")
    return ""


def claim_port(port: int) -> socket.socket | None:
    """Keep a port from others who claim it, until what this returns is closed; None: one of them has it.

    It is a name among Unix sockets that belong to no file: the kernel knows one of each in what has the same ports (a
    network namespace), whoever the user is, and forgets it with the process.
    """
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0deepspeedlite/port/{port}")
    except OSError:
        claim.close()
        return None
    return claim


def pick_port() -> tuple[int, socket.socket | None]:
    """A free one, claimed: where that can be below those that connections and `bind(0)` get, for it to stay free."""
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as given:
            choice = int(given.read().split()[0]) - _LOWEST_PICKED
    except (OSError, ValueError, IndexError):
        choice = 0
    for _ in range(20 if choice > 0 else 0):
        number = _LOWEST_PICKED + int.from_bytes(os.urandom(4), "big") % choice
        claim = claim_port(number)
        if claim is not None and not port_fault(number):
            return number, claim
        if claim is not None:
            claim.close()
    with listen(0) as probe:
        number = int(probe.getsockname()[1])
    return number, claim_port(number)
