"""Collectives and messages as functions, with DeepSpeed's names and arguments, for scripts that call them themselves.

They are reached as `deepspeedlite.comm`'s.

They run on torch.distributed and on CPU or GPU tensors as its backends do; `src`, `dst` and peers are ranks of the
world, as in torch. With `async_op=True` a work handle comes back, else None. Every function takes three more keywords:
`prof=True` measures this call although the section `comms_logger` has `prof_all: false`, `log_name` is what it is
called in the table, and `debug` is taken and ignored. Ranks that do not meet get an error that says where each of them
is (`comm.desync`).

Raised are `DistributedError` before `init_distributed`, when ranks do not meet, and where the backend cannot do it.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, ReduceOp

from deepspeedlite.comm.desync import LabelledWork, explained
from deepspeedlite.comm.group import Group
from deepspeedlite.comm.init import init_process_group
from deepspeedlite.comm.transport import ALL_GATHER, OPS, REDUCE_SCATTER
from deepspeedlite.config import load_config
from deepspeedlite.metrics.comms_logger import comms_logger
from deepspeedlite.metrics.stall_watch import watch_for_stalls
from deepspeedlite.runtime.device import on_accelerator
from deepspeedlite.runtime.errors import ConfigError, DistributedError
from deepspeedlite.transports.pending import PendingWork

if TYPE_CHECKING:
    from typing_extensions import Unpack

_F = TypeVar("_F", bound=Callable[..., Any])
_NAMES = {op: name for name, op in OPS.items()}


class _Logging(TypedDict, total=False):
    """The keywords of every function that are about measuring it."""

    prof: bool
    log_name: str
    debug: Any


def _collective(message: str = "tensor") -> Callable[[_F], _F]:
    """Measure and explain a function; `message` is the argument whose size counts.

    What it declares as `logging` is taken here and does not reach it.
    """

    def decorate(function: _F) -> _F:
        name, declared = function.__name__, inspect.signature(function)
        parameters = [one for one in declared.parameters.values() if one.kind is not one.VAR_KEYWORD]
        signature = declared.replace(parameters=parameters)

        @functools.wraps(function)
        def call(*args: Any, prof: bool = False, log_name: str = "", debug: Any = None, **kwargs: Any) -> Any:
            if not dist.is_initialized():
                raise DistributedError(
                    f"comm.{name} before init_distributed: call deepspeedlite.init_distributed() first"
                )
            given = signature.bind(*args, **kwargs).arguments
            group = given.get("group")
            moved = _whole(given.get(message))
            label = f"{name} of {moved.numel()} elements" if moved is not None else name
            ranks = dist.get_process_group_ranks(group)
            if not comms_logger.enabled:
                return _explained(function, args, kwargs, label, ranks)
            with comms_logger.measure(log_name or name, moved, len(ranks), wanted=prof) as measured:
                return measured.finish(_explained(function, args, kwargs, label, ranks))

        more = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default)
            for key, default in (("prof", False), ("log_name", ""), ("debug", None))
        ]
        call.__signature__ = signature.replace(parameters=[*parameters, *more])  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


def _explained(function: Callable[..., Any], args: Any, kwargs: Any, label: str, ranks: list[int]) -> Any:
    with explained(label, ranks):
        work = function(*args, **kwargs)
    return LabelledWork(work, label, ranks) if isinstance(work, dist.Work) else work


def _whole(message: Any) -> torch.Tensor | None:
    """One tensor whose size is the message's."""
    if isinstance(message, torch.Tensor):
        return message
    if not message or not isinstance(message, (list, tuple)) or not isinstance(message[0], torch.Tensor):
        return None
    numel = sum(tensor.numel() for tensor in message)
    return message[0].new_empty(0).expand(0) if not numel else message[0].flatten()[:1].expand(numel)


def _summed(tensor: torch.Tensor, op: Any, group: ProcessGroup | None) -> Any:
    """The op that the backend can do; gloo's averages are sums of what is divided first, in place."""
    if op == ReduceOp.AVG and "nccl" not in dist.get_backend(group):
        tensor.div_(dist.get_world_size(group))
        return ReduceOp.SUM
    return op


@_collective()
def all_reduce(
    tensor: torch.Tensor,
    op: Any = ReduceOp.SUM,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    **logging: Unpack[_Logging],
) -> Any:
    """Reduce `tensor` over the ranks in place. `op` is a `ReduceOp`, or one of "sum", "avg", "max" and "min"."""
    name = op if isinstance(op, str) else _NAMES.get(op)
    if name is None:
        return dist.all_reduce(tensor, op, group, async_op)
    work = Group(group).all_reduce(tensor, name, async_op)  # unobserved: the function around measures
    return work if work is not None or not async_op else PendingWork()


def inference_all_reduce(
    tensor: torch.Tensor,
    op: Any = ReduceOp.SUM,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    **logging: Unpack[_Logging],
) -> Any:
    """The same as `all_reduce`; returns the tensor, or a handle with `async_op`."""
    work = all_reduce(tensor, op, group, async_op, **logging)
    return work if async_op else tensor


@_collective("tensors")
def all_reduce_coalesced(
    tensors: Sequence[torch.Tensor],
    op: Any = ReduceOp.SUM,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    **logging: Unpack[_Logging],
) -> Any:
    """Reduce all `tensors` (of one dtype) as one message, in place."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])

    def spread() -> None:
        for tensor, piece in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(piece.view_as(tensor))

    work = PendingWork([dist.all_reduce(flat, _summed(flat, op, group), group, async_op=True)], spread)
    return work if async_op else work.wait() and None


@_collective()
def broadcast(
    tensor: torch.Tensor,
    src: int = 0,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    **logging: Unpack[_Logging],
) -> Any:
    """Give every rank the values that `tensor` has on rank `src`."""
    return dist.broadcast(tensor, src, group, async_op)


@_collective("")
def broadcast_object_list(
    object_list: list[Any],
    src: int = 0,
    group: ProcessGroup | None = None,
    device: torch.device | None = None,
    **logging: Unpack[_Logging],
) -> None:
    """Replace the list's objects by rank `src`'s. They are pickled: between trusted ranks only."""
    dist.broadcast_object_list(object_list, src, group, device)


@_collective("tensor_list")
def all_gather(
    tensor_list: list[torch.Tensor],
    tensor: torch.Tensor,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    **logging: Unpack[_Logging],
) -> Any:
    """Every rank's `tensor`, into the tensors of the list, in rank order."""
    return dist.all_gather(tensor_list, tensor, group, async_op)


@_collective("")
def all_gather_object(
    object_list: list[Any], obj: Any, group: ProcessGroup | None = None, **logging: Unpack[_Logging]
) -> None:
    """Every rank's object, into the list, in rank order. They are pickled: between trusted ranks only."""
    dist.all_gather_object(object_list, obj, group)


@_collective("output_tensor")
def all_gather_into_tensor(
    output_tensor: torch.Tensor,
    tensor: torch.Tensor,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    **logging: Unpack[_Logging],
) -> Any:
    """Concatenate every rank's `tensor` in rank order into `output_tensor`."""
    return ALL_GATHER(output_tensor, tensor, group, async_op)


def allgather_fn(
    output_tensor: torch.Tensor,
    input_tensor: torch.Tensor,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    **logging: Unpack[_Logging],
) -> Any:
    """The same as `all_gather_into_tensor`."""
    return all_gather_into_tensor(output_tensor, input_tensor, group, async_op, **logging)


@_collective("output_tensors")
def all_gather_coalesced(
    output_tensors: Sequence[torch.Tensor],
    input_tensors: Sequence[torch.Tensor],
    group: ProcessGroup | None = None,
    async_op: bool = False,
    **logging: Unpack[_Logging],
) -> Any:
    """`all_gather_into_tensor` for each pair."""
    work = PendingWork([ALL_GATHER(out, shard, group, True) for out, shard in zip(output_tensors, input_tensors)])
    return work if async_op else work.wait() and None


@_collective("tensor")
def reduce_scatter_tensor(
    output_tensor: torch.Tensor,
    tensor: torch.Tensor,
    op: Any = ReduceOp.SUM,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    **logging: Unpack[_Logging],
) -> Any:
    """Reduce `tensor` over the ranks; rank r gets part r in `output_tensor`. (An average on gloo divides `tensor`.)"""
    return REDUCE_SCATTER(output_tensor, tensor, _summed(tensor, op, group), group, async_op)


def reduce_scatter_fn(
    output_tensor: torch.Tensor,
    tensor: torch.Tensor,
    op: Any = ReduceOp.SUM,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    **logging: Unpack[_Logging],
) -> Any:
    """The same as `reduce_scatter_tensor`."""
    return reduce_scatter_tensor(output_tensor, tensor, op, group, async_op, **logging)


@_collective("input_list")
def reduce_scatter(
    output: torch.Tensor,
    input_list: list[torch.Tensor],
    op: Any = ReduceOp.SUM,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    **logging: Unpack[_Logging],
) -> Any:
    """Reduce the list's tensors over the ranks; rank r gets the r-th in `output`."""
    for tensor in input_list:
        summed = _summed(tensor, op, group)
    return dist.reduce_scatter(output, input_list, summed, group, async_op)


@_collective()
def all_to_all_single(
    output: torch.Tensor,
    tensor: torch.Tensor,
    output_split_sizes: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    **logging: Unpack[_Logging],
) -> Any:
    """Cut `tensor` along its first dimension, send rank r the r-th piece, and join what comes in `output`."""
    return dist.all_to_all_single(output, tensor, output_split_sizes, input_split_sizes, group, async_op)


@_collective("input_tensor_list")
def all_to_all(
    output_tensor_list: list[torch.Tensor],
    input_tensor_list: list[torch.Tensor],
    group: ProcessGroup | None = None,
    async_op: bool = False,
    **logging: Unpack[_Logging],
) -> Any:
    """Send rank r the r-th tensor of one list; the other is filled in rank order. (gloo has none: sent one by one.)"""
    if "gloo" not in dist.get_backend(group):
        return dist.all_to_all(output_tensor_list, input_tensor_list, group, async_op)
    ranks, me = dist.get_process_group_ranks(group), dist.get_rank(group)
    output_tensor_list[me].copy_(input_tensor_list[me])
    others = [(index, rank) for index, rank in enumerate(ranks) if index != me]
    works: list[Any] = [dist.irecv(output_tensor_list[index], src=rank, group=group) for index, rank in others]
    works += [dist.isend(input_tensor_list[index], dst=rank, group=group) for index, rank in others]
    work = PendingWork(works)
    return work if async_op else work.wait() and None


@_collective()
def reduce(
    tensor: torch.Tensor,
    dst: int,
    op: Any = ReduceOp.SUM,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    **logging: Unpack[_Logging],
) -> Any:
    """Reduce over the ranks into rank `dst`'s `tensor`; other ranks' are scratch afterwards."""
    return dist.reduce(tensor, dst, _summed(tensor, op, group), group, async_op)


@_collective()
def gather(
    tensor: torch.Tensor,
    gather_list: list[torch.Tensor] | None = None,
    dst: int = 0,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    **logging: Unpack[_Logging],
) -> Any:
    """Every rank's `tensor`, into rank `dst`'s list; None on other ranks."""
    return dist.gather(tensor, gather_list, dst, group, async_op)


@_collective()
def scatter(
    tensor: torch.Tensor,
    scatter_list: list[torch.Tensor] | None = None,
    src: int = 0,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    **logging: Unpack[_Logging],
) -> Any:
    """Rank r's `tensor` becomes the r-th of rank `src`'s list; None on other ranks."""
    return dist.scatter(tensor, scatter_list, src, group, async_op)


@_collective()
def send(
    tensor: torch.Tensor, dst: int, group: ProcessGroup | None = None, tag: int = 0, **logging: Unpack[_Logging]
) -> None:
    """Send `tensor` to rank `dst`; returns when it may be written again."""
    dist.send(tensor, dst, group, tag)


@_collective()
def recv(
    tensor: torch.Tensor,
    src: int | None = None,
    group: ProcessGroup | None = None,
    tag: int = 0,
    **logging: Unpack[_Logging],
) -> int:
    """Receive into `tensor` from rank `src` (None: from any, on gloo), and return the sender's rank."""
    return dist.recv(tensor, src, group, tag)


@_collective()
def isend(
    tensor: torch.Tensor, dst: int, group: ProcessGroup | None = None, tag: int = 0, **logging: Unpack[_Logging]
) -> Any:
    """`send`, as a handle."""
    return dist.isend(tensor, dst, group, tag)


@_collective()
def irecv(
    tensor: torch.Tensor,
    src: int | None = None,
    group: ProcessGroup | None = None,
    tag: int = 0,
    **logging: Unpack[_Logging],
) -> Any:
    """`recv`, as a handle."""
    return dist.irecv(tensor, src, group, tag)


class P2POp:
    """One message for `batch_isend_irecv`: `op` is this module's or torch's `isend` or `irecv`, `peer` a rank."""

    def __init__(
        self, op: Callable[..., Any], tensor: torch.Tensor, peer: int, group: ProcessGroup | None = None, tag: int = 0
    ) -> None:
        self.op, self.tensor, self.peer, self.group, self.tag = op, tensor, peer, group, tag


@_collective("")
def batch_isend_irecv(p2p_op_list: list[Any], **logging: Unpack[_Logging]) -> list[Any]:
    """Start all messages together; a handle for each (with NCCL possibly one for all)."""
    ours = {isend: dist.isend, irecv: dist.irecv}
    return dist.batch_isend_irecv(
        [dist.P2POp(ours.get(op.op, op.op), op.tensor, op.peer, op.group, op.tag) for op in p2p_op_list]
    )


@_collective("")
def barrier(
    group: ProcessGroup | None = None,
    async_op: bool = False,
    device_ids: list[int] | None = None,
    **logging: Unpack[_Logging],
) -> Any:
    """Return when every rank has come here."""
    if device_ids is None and on_accelerator(device := Group(group).device):
        device_ids = [device.index]
    return dist.barrier(group, async_op, device_ids)


@_collective("")
def monitored_barrier(
    group: ProcessGroup | None = None, timeout: Any = None, wait_all_ranks: bool = False, **logging: Unpack[_Logging]
) -> None:
    """A barrier that names the ranks that did not come within `timeout`; on gloo alone."""
    dist.monitored_barrier(group, timeout, wait_all_ranks)


# --- start and groups -------------------------------------------------------------------------------------------------


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Start torch.distributed for this process; return quietly where that is already done.

    Args:
        dist_backend: `nccl`, `gloo`, or any backend that this torch knows; by default the device's own.
        auto_mpi_discovery: False ignores what MPI and Slurm set; RANK and WORLD_SIZE still count.
        distributed_port: the port on rank 0's host where neither MASTER_PORT nor the job decides it.
        verbose: log one line with the backend and where the world was found.
        timeout: for the start and for each collective; None is `DEEPSPEED_TIMEOUT` minutes, or 10.
        init_method: `env://`, `tcp://host:port` or `file:///path` instead of MASTER_ADDR and MASTER_PORT.
        dist_init_required: False: the caller has initialised torch.distributed, and it is an error if not.
        config: a DeepSpeedConfig, dict or path, of which the section `comms_logger` is used.
        rank: this process's rank, together with `world_size`, instead of what the environment says.
        world_size: see `rank`.

    Raises:
        ConfigError: `config` is none.
        DistributedError: see `comm.init_process_group`.
    """
    _configure_logger(config)
    if dist_init_required is False and not dist.is_initialized():
        raise DistributedError(
            "dist_init_required=False says that torch.distributed is initialised, but it is not; call "
            "torch.distributed.init_process_group first, or pass None or True"
        )
    init_process_group(
        dist_backend,
        asks_schedulers=auto_mpi_discovery,
        port=distributed_port,
        verbose=verbose,
        timeout=timeout,
        init_method=init_method,
        rank=rank,
        world_size=world_size,
    )
    watch_for_stalls()


def _configure_logger(config: Any) -> None:
    """Apply the section `comms_logger` of a config in any of its forms."""
    if config is None:
        return
    if isinstance(config, (str, os.PathLike, Mapping)):
        config = load_config(config, peek=True)
    section = getattr(config, "comms_logger", None)
    if section is None:
        raise ConfigError(f"config of type {type(config).__name__} has no comms_logger; pass a DeepSpeedConfig or dict")
    comms_logger.configure(section)


def is_available() -> bool:
    """Whether this torch can communicate at all."""
    return dist.is_available()


def new_group(ranks: Sequence[int] | None = None) -> Any:
    """A process group of these ranks of the world; every rank of the world calls, in the same order."""
    return dist.new_group(None if ranks is None else list(ranks))


def get_world_group() -> Any:
    """The group of all ranks."""
    return dist.group.WORLD


def get_global_rank(group: dist.ProcessGroup | None = None, group_rank: int = 0) -> int:
    """The rank of the world that is `group_rank` in the group."""
    return group_rank if group is None else dist.get_global_rank(group, group_rank)


def get_all_ranks_from_group(group: dist.ProcessGroup | None = None) -> list[int]:
    """The group's ranks of the world, in its own order."""
    return list(dist.get_process_group_ranks(group))


def initialize_mesh_device(mesh_shape: Sequence[int], mesh_dim_names: Sequence[str]) -> Any:
    """All ranks as a grid with named dimensions, of which each has groups: torch's DeviceMesh."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(Group().device.type, tuple(mesh_shape), mesh_dim_names=tuple(mesh_dim_names))


def has_all_gather_into_tensor() -> bool:
    """True, as of the three below: every torch that this library runs on has it."""
    return True


has_reduce_scatter_tensor = has_all_reduce_coalesced = has_coalescing_manager = has_all_gather_into_tensor


# --- the log ----------------------------------------------------------------------------------------------------------


def configure(
    deepspeed_config: Any = None,
    enabled: bool | None = None,
    prof_all: bool | None = None,
    prof_ops: Sequence[str] | None = None,
    verbose: bool | None = None,
    debug: bool | None = None,
) -> None:
    """Set up the log of collectives, from a configuration's `comms_logger` section or switch by switch."""
    section = getattr(deepspeed_config, "comms_logger", None)
    if section is not None:
        comms_logger.configure(section)
    given = {"enabled": enabled, "prof_all": prof_all, "verbose": verbose, "debug": debug}
    given["prof_ops"] = None if prof_ops is None else tuple(prof_ops)  # type: ignore[assignment]
    for name, value in given.items():
        if value is not None:
            setattr(comms_logger, name, value)


def log_summary(show_straggler: bool = False, return_dict: bool = False) -> dict[str, dict[int, list[float]]] | None:
    """Print the table of measured collectives on rank 0; with `show_straggler` every rank must call.

    `return_dict`: also return {operation: {bytes: [calls, total ms, mean ms]}}.
    """
    comms_logger.log_summary(show_straggler)
    if not return_dict:
        return None
    found: dict[str, dict[int, list[float]]] = {}
    for (op, size_bytes), one in comms_logger.stats.items():
        found.setdefault(op, {})[size_bytes] = [one.count, one.total_ms, one.mean_ms]
    return found


def reset_log() -> None:
    """Forget what was measured."""
    comms_logger.reset()
