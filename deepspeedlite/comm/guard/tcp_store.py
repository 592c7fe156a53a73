"""The store that the ranks of a job meet in: rank 0 hosts it, at the one address that the others connect to.

torch would have it listen at all addresses of the host.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from deepspeedlite.comm.guard.signed_store import signed
from deepspeedlite.comm.registry import registry
from deepspeedlite.runtime.env import LOCALHOST, World
from deepspeedlite.runtime.errors import DistributedError

_POLL_S = 0.2
_CONNECT_TRY_S = 2.0
_BACKLOG = 2048


def tcp_store(host: str, port: int, rank: int, timeout_s: float) -> dist.Store:
    """The store at rank 0's address; rank 0 hosts it, unless torchrun's agent already does.

    It stays open until the process ends, so that a later start-up can use it again.

    Raises:
        DistributedError: rank 0 cannot listen there, or another rank cannot reach it within `timeout_s`.
    """
    host = LOCALHOST if host == "localhost" else host  # which is two addresses, and one of them may be another's
    hosts_it = rank == 0 and not _is_torchruns()
    key = (host, port, rank, hosts_it, timeout_s)
    if key not in registry.stores:
        registry.stores[key] = signed(_open_store(host, port, rank, hosts_it, timeout_s))
    return registry.stores[key]


def _open_store(host: str, port: int, rank: int, hosts_it: bool, timeout_s: float) -> dist.Store:
    deadline = time.monotonic() + timeout_s
    if not hosts_it:
        _await_listener(host, port, rank, deadline, timeout_s)
    left = timedelta(seconds=max(1.0, deadline - time.monotonic()))
    fd = _listener(host, port) if hosts_it else None
    try:
        store = dist.TCPStore(
            *(host, port),
            is_master=hosts_it,
            timeout=left,
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=fd,
        )
        store.set_timeout(timedelta(seconds=timeout_s))
        return store
    except RuntimeError as error:
        if not hosts_it:
            raise DistributedError(
                f"rank {rank} reached {host}:{port}, but what listens there is not rank 0's store; another program "
                f"may hold the port: choose a free MASTER_PORT ({first_line(error)})"
            ) from error
        raise DistributedError(
            f"rank 0 cannot listen on port {port} (MASTER_PORT): another job or program holds it, or two processes "
            f"both claim rank 0; choose a free port, or check RANK on each process ({first_line(error)})"
        ) from error


def _await_listener(host: str, port: int, rank: int, deadline: float, timeout_s: float) -> None:
    """Try until something accepts connections at rank 0's address; the last reason is what is reported."""
    while True:
        try:
            with socket.create_connection((host, port), timeout=_CONNECT_TRY_S):
                return
        except OSError as error:
            reason = error
        if time.monotonic() >= deadline:
            break
        time.sleep(min(_POLL_S, max(0.0, deadline - time.monotonic())))
    if isinstance(reason, socket.gaierror):
        hint = f"the name {host!r} cannot be resolved on this host; set MASTER_ADDR to an address that all hosts know"
    elif isinstance(reason, ConnectionRefusedError):
        hint = "nothing listens there: rank 0 did not start, ended early (see its output), or MASTER_PORT differs"
    else:
        hint = "the host does not answer: check MASTER_ADDR, the network between the hosts and their firewalls"
    raise DistributedError(
        f"rank {rank} could not reach rank 0 at {host}:{port} within {timeout_s:g} s ({reason}); {hint}"
    ) from reason


def address_of(world: World) -> str:
    """Where its ranks meet: within this host, if all are on it, whatever name or address of it was given."""
    given = world.master_addr or LOCALHOST
    is_alone = world.local_size == world.world_size and not _is_torchruns()
    return LOCALHOST if is_alone and not _is_loopback(given) else given


def _is_torchruns() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _is_loopback(host: str) -> bool:
    """Whether it is an address that reaches no further than this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listener(host: str, port: int) -> int | None:
    """The descriptor of a server there, for torch's store, which closes it. None: torch is to listen everywhere.

    That is so for a name, which other hosts may know as another of this one's addresses, and for an address that is
    not this host's own, such as a load balancer's.
    """
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        return None
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG).detach()
    except OSError:  # taken, by this process as it may be: torch knows, or says so
        return None


def first_line(error: BaseException) -> str:
    text = ""
    with contextlib.suppress(IndexError):
        text = str(error).strip().splitlines()[0]
    return text[:200]
