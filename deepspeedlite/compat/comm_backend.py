"""`deepspeed.comm.TorchBackend`, and asking MPI for the world: what scripts that start up by themselves import."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

from torch import distributed as dist

from deepspeedlite import comm
from deepspeedlite.compat import comm as functions
from deepspeedlite.runtime.errors import DistributedError
from deepspeedlite.runtime.log import log_dist


class TorchBackend:
    """torch.distributed as an object: its methods are the functions of `deepspeedlite.comm`. Making one starts it up.

    Args:
        backend: nccl or gloo; None chooses by the device.
        timeout: how long a collective may take.
        init_method: as torch.distributed takes it; None: the launcher's variables.
        rank: this process's; -1: the launcher's variables.
        world_size: likewise.
        name: what it is called; "torch".
    """

    def __init__(
        self,
        backend: str | None,
        timeout: timedelta | None,
        init_method: str | None,
        rank: int = -1,
        world_size: int = -1,
        name: str = "torch",
    ) -> None:
        self.name, self.world_group = name, None
        self.init_process_group(backend, timeout, init_method, rank, world_size)

    def init_process_group(
        self,
        backend: str | None,
        timeout: timedelta | None = None,
        init_method: str | None = None,
        rank: int = -1,
        world_size: int = -1,
    ) -> None:
        """Start torch.distributed, unless it is. Raises `DistributedError`."""
        comm.init_distributed(
            backend, timeout=timeout, init_method=init_method, rank=rank, world_size=world_size, verbose=False
        )

    def is_initialized(self) -> bool:
        """Whether torch.distributed is started."""
        return bool(comm.is_initialized())

    def get_backend(self, group: Any = None) -> str:
        """The name of a group's backend."""
        return str(dist.get_backend(group))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(functions, name, None) or getattr(comm, name)


def mpi_discovery(distributed_port: int = 29500, verbose: bool = True) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as MPI knows them; all its processes call this.

    Raises:
        DistributedError: mpi4py is not installed.
    """
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise DistributedError("asking MPI for the ranks needs mpi4py: pip install 'deepspeedlite[mpi]'") from error
    world = MPI.COMM_WORLD
    name = socket.gethostname()
    hosts = world.allgather(name)
    address = world.bcast(_address() if world.Get_rank() == 0 else None, root=0)
    found = {
        "RANK": world.Get_rank(),
        "WORLD_SIZE": world.Get_size(),
        "LOCAL_RANK": hosts[: world.Get_rank()].count(name),
        "MASTER_ADDR": address,
        "MASTER_PORT": distributed_port,
    }
    os.environ.update({variable: str(value) for variable, value in found.items()})
    if verbose:
        log_dist(f"found by MPI: {', '.join(f'{variable}={value}' for variable, value in found.items())}", ranks=[0])


def _address() -> str:
    """This host's address as other hosts know it."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"
