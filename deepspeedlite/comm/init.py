"""`init_process_group`: find this process's world, meet the other ranks, start torch.distributed.

The world comes from the arguments, else from the launcher's variables (`runtime.env`), else from MPI itself (mpi4py,
only when MPI spans hosts and nothing else tells where rank 0 is), else it is this process alone. The backend follows
the device: NCCL on GPUs, gloo on CPUs. A process group that exists is used as it is.

Waiting for the others takes `timeout` at most, 10 minutes as in DeepSpeed, or `DEEPSPEED_TIMEOUT` minutes; rank 0
names whom it waits for every 30 s, and the error names the ranks that never came (`comm.rendezvous`).
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlparse

import torch.distributed as dist

from deepspeedlite.comm import rendezvous
from deepspeedlite.comm.guard.signed_store import for_backend
from deepspeedlite.comm.guard.tcp_store import address_of, tcp_store
from deepspeedlite.comm.registry import registry
from deepspeedlite.runtime.device import Device, pick_device
from deepspeedlite.runtime.env import World, discover_world
from deepspeedlite.runtime.errors import DistributedError
from deepspeedlite.runtime.log import log_dist
from deepspeedlite.runtime.plugins import plugins

TIMEOUT_VARIABLE = "DEEPSPEED_TIMEOUT"
_DEFAULT_TIMEOUT_MIN = 10.0
_THREADS_FINISH_S = 0.05
_LOOKS_AT_THREADS = 100
_RUNNING_GLOO = "(pt_gloo_runloop) R"  # or would if a processor were free; nothing is found where there is no /proc


def init_process_group(
    backend: str | None = None,
    *,
    asks_schedulers: bool = True,
    port: int = 29500,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Start torch.distributed for this process; return quietly where that is already done.

    Args:
        backend: `nccl`, `gloo`, or any backend that this torch knows; by default the device's own.
        asks_schedulers: False ignores what MPI and Slurm set; RANK and WORLD_SIZE still count.
        port: the port on rank 0's host where neither MASTER_PORT nor the job decides it.
        verbose: log one line with the backend and where the world was found.
        timeout: for the start and for each collective; None is `DEEPSPEED_TIMEOUT` minutes, or 10.
        init_method: `env://`, `tcp://host:port` or `file:///path` instead of MASTER_ADDR and MASTER_PORT.
        rank: this process's rank, together with `world_size`, instead of what the environment says.
        world_size: see `rank`.

    Raises:
        DistributedError: contradictory variables, ranks that did not arrive (by number), two processes with one
            rank, rank 0 unreachable, a backend that this torch lacks.
    """
    atexit.unregister(_leave)
    atexit.register(_leave)
    if dist.is_initialized():
        _check_existing(rank, world_size)
        return
    limit = default_timeout() if timeout is None else timeout
    world = _find_world(rank, world_size, asks_schedulers)
    device = pick_device(world.local_rank)
    device.make_current()
    backend = backend or device.backend
    _check_backend(backend, device)
    store, world = _open_store(world, init_method, port, limit.total_seconds())
    if store is None:
        dist.init_process_group(backend, init_method, limit, world.world_size, world.rank)
    else:
        if world.world_size > 1:
            address = init_method if init_method and init_method.startswith("file") else _address(world)
            store = rendezvous.join(store, address, world.rank, world.world_size, limit.total_seconds())
        dist.init_process_group(
            backend,
            store=for_backend(store, backend),
            rank=world.rank,
            world_size=world.world_size,
            timeout=limit,
            device_id=device.torch_device if backend == "nccl" else None,
        )
        registry.use_store(store)
    _export(world)
    if verbose:
        where = f", rank 0 at {_address(world)}" if world.master_addr else ""
        log_dist(f"distributed: {world.world_size} rank(s), {backend} on {device.name}, found by {world.source}{where}")


def _leave() -> None:
    """End the process group while the interpreter still runs.

    [Note: gloo's threads and the interpreter's end]
    A gloo thread drops a finished collective, and with it tensors that Python owns, a moment after `wait` has returned.
    If Python (before 3.14) is being finalised by then, the thread cannot take the interpreter's lock, is unwound
    through C++ that does not expect it, and the process aborts after a training that went well. A transport over gloo
    keeps the last collectives (`Registry.kept`), so that the thread's reference is not the last one. For those that
    users start by torch itself, the lock is given up here until the threads have nothing to do, and after a clean run
    destroying the group joins them where nothing in torch holds on to it. After an exception that could wait for ranks
    that wait for this one. A group that the user has destroyed may have left its threads behind too.
    """
    for _ in range(_LOOKS_AT_THREADS):
        time.sleep(_THREADS_FINISH_S)
        with contextlib.suppress(OSError):  # of a thread that has just ended
            if not any(_RUNNING_GLOO in stat.read_text() for stat in Path("/proc/self/task").glob("*/stat")):
                break
    is_up, is_clean = dist.is_initialized(), getattr(sys, "last_value", None) is None
    if is_clean:
        registry.close()
    if is_up and is_clean:
        dist.destroy_process_group()


def default_timeout() -> timedelta:
    """`DEEPSPEED_TIMEOUT` minutes, or 10 minutes.

    Raises:
        DistributedError: the variable is not a positive number.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, "").strip() or str(_DEFAULT_TIMEOUT_MIN)
    minutes = 0.0
    with contextlib.suppress(ValueError):
        minutes = float(text)
    if not 0 < minutes < float("inf"):
        raise DistributedError(f"{TIMEOUT_VARIABLE}={text!r} is not a positive number of minutes; correct or unset it")
    return timedelta(minutes=minutes)


def _find_world(rank: int, world_size: int, schedulers: bool) -> World:
    if rank < 0 and world_size < 0:
        return discover_world(os.environ, schedulers)
    if rank < 0 or world_size < 1 or rank >= world_size:
        raise DistributedError(
            f"rank={rank} and world_size={world_size} were passed; pass both with 0 <= rank < world_size, or neither"
        )
    told = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world_size)}
    if "LOCAL_RANK" not in told:
        around = discover_world(os.environ, schedulers)
        told["LOCAL_RANK"] = str(around.local_rank if around.world_size == world_size else rank)
    return dataclasses.replace(discover_world(told, schedulers=False), source="arguments")


def _open_store(
    world: World, init_method: str | None, default_port: int, timeout_s: float
) -> tuple[dist.Store | None, World]:
    """Where the ranks meet. None: torch itself is to make something of `init_method`."""
    url = urlparse(init_method or "env://")
    if url.scheme == "file":
        return dist.FileStore(url.netloc + url.path, world.world_size), world
    if url.scheme == "tcp":
        if url.hostname is None or url.port is None:
            raise DistributedError(f"init_method {init_method!r} lacks a host or port; write tcp://host:port")
        world = dataclasses.replace(world, master_addr=url.hostname, master_port=url.port)
    elif url.scheme != "env":
        return None, world
    if world.world_size == 1 and init_method is None:
        return dist.HashStore(), world
    world = _with_master(world, default_port)
    assert world.master_addr is not None and world.master_port is not None, "_with_master sets both"
    return tcp_store(world.master_addr, world.master_port, world.rank, timeout_s), world


def _address(world: World) -> str:
    return f"{world.master_addr}:{world.master_port}"


def _with_master(world: World, default_port: int) -> World:
    """The world with rank 0's address and port filled in."""
    port = world.master_port or default_port
    if world.master_addr is not None or world.world_size == 1:
        return dataclasses.replace(world, master_addr=address_of(world), master_port=port)
    ask = plugins.find("address of rank 0", world.source)
    if ask is None:
        raise DistributedError(
            f"rank {world.rank} of {world.world_size} was found by {world.source}, but MASTER_ADDR is not set; set it "
            "to the host of rank 0 (127.0.0.1 where all ranks are on one host) and MASTER_PORT to a free port there"
        )
    addr, port = ask(world, port)
    return dataclasses.replace(world, master_addr=addr, master_port=port)


def _check_existing(rank: int, world_size: int) -> None:
    """The process group that exists must be the one that the arguments describe."""
    here, size = dist.get_rank(), dist.get_world_size()
    if (rank >= 0 and rank != here) or (world_size > 0 and world_size != size):
        raise DistributedError(
            f"rank={rank}, world_size={world_size} were passed, but torch.distributed is already initialised as rank "
            f"{here} of {size}; pass neither, or destroy that process group first"
        )
    if size > 1:
        os.environ.setdefault("RANK", str(here))
        os.environ.setdefault("WORLD_SIZE", str(size))


def _check_backend(backend: str, device: Device) -> None:
    if backend == "nccl" and device.backend != "nccl":
        raise DistributedError(
            f"backend nccl needs a GPU, but this process runs on {device.name} "
            f"(DS_ACCELERATOR={os.environ.get('DS_ACCELERATOR', 'unset')}); use gloo"
        )
    known = {"nccl": dist.is_nccl_available, "gloo": dist.is_gloo_available, "mpi": dist.is_mpi_available}
    lacks = [name for name, is_available in known.items() if name in backend and not is_available()]
    if lacks:
        raise DistributedError(f"this torch was built without the backend {lacks[0]}; use {device.backend}")
    if ":" not in backend and backend.lower() not in dist.Backend.backend_list:
        names = ", ".join(name for name in dist.Backend.backend_list if name != "undefined")
        raise DistributedError(f"backend {backend!r} is not known to this torch, which has {names}")


def _export(world: World) -> None:
    """Tell logging, and code that reads the variables, what was found. A process alone sets nothing: a child that
    it starts under mpirun or torchrun must not inherit a world of one.
    """
    if world.world_size == 1:
        return
    found = {
        "RANK": world.rank,
        "WORLD_SIZE": world.world_size,
        "LOCAL_RANK": world.local_rank,
        "LOCAL_WORLD_SIZE": world.local_size,
        "MASTER_ADDR": world.master_addr,
        "MASTER_PORT": world.master_port,
    }
    os.environ.update({name: str(value) for name, value in found.items() if value is not None})
    if world.source == "Azure ML":  # its hosts' docker bridge answers but leads nowhere
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "^docker0,lo")
