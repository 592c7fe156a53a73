"""What `deepspeedlite.comm` has. Written by tools/comm_stub.py."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed import ProcessGroup as ProcessGroup
from torch.distributed import ReduceOp as ReduceOp

from deepspeedlite.comm.desync import whereabouts as whereabouts
from deepspeedlite.comm.group import Group as Group
from deepspeedlite.comm.group import Observer as Observer
from deepspeedlite.comm.init import default_timeout as default_timeout
from deepspeedlite.comm.init import init_process_group as init_process_group
from deepspeedlite.comm.ranks import destroy_process_group as destroy_process_group
from deepspeedlite.comm.ranks import get_local_rank as get_local_rank
from deepspeedlite.comm.ranks import get_rank as get_rank
from deepspeedlite.comm.ranks import get_world_size as get_world_size
from deepspeedlite.comm.ranks import is_initialized as is_initialized
from deepspeedlite.comm.work import Work as Work
from deepspeedlite.compat.comm import P2POp as P2POp
from deepspeedlite.compat.comm import allgather_fn as allgather_fn
from deepspeedlite.compat.comm import configure as configure
from deepspeedlite.compat.comm import get_all_ranks_from_group as get_all_ranks_from_group
from deepspeedlite.compat.comm import get_global_rank as get_global_rank
from deepspeedlite.compat.comm import get_world_group as get_world_group
from deepspeedlite.compat.comm import has_all_gather_into_tensor as has_all_gather_into_tensor
from deepspeedlite.compat.comm import has_all_reduce_coalesced as has_all_reduce_coalesced
from deepspeedlite.compat.comm import has_coalescing_manager as has_coalescing_manager
from deepspeedlite.compat.comm import has_reduce_scatter_tensor as has_reduce_scatter_tensor
from deepspeedlite.compat.comm import inference_all_reduce as inference_all_reduce
from deepspeedlite.compat.comm import init_distributed as init_distributed
from deepspeedlite.compat.comm import initialize_mesh_device as initialize_mesh_device
from deepspeedlite.compat.comm import is_available as is_available
from deepspeedlite.compat.comm import log_summary as log_summary
from deepspeedlite.compat.comm import new_group as new_group
from deepspeedlite.compat.comm import reduce_scatter_fn as reduce_scatter_fn
from deepspeedlite.compat.comm import reset_log as reset_log
from deepspeedlite.compat.comm_backend import mpi_discovery as mpi_discovery
from deepspeedlite.metrics.comms_logger import CommsLogger as CommsLogger
from deepspeedlite.metrics.comms_logger import comms_logger as comms_logger

def all_reduce(
    tensor: torch.Tensor,
    op: Any = ReduceOp.SUM,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    *,
    prof: bool = False,
    log_name: str = "",
    debug: Any = None,
) -> Any:
    """Reduce `tensor` over the ranks in place. `op` is a `ReduceOp`, or one of "sum", "avg", "max" and "min"."""

def all_reduce_coalesced(
    tensors: Sequence[torch.Tensor],
    op: Any = ReduceOp.SUM,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    *,
    prof: bool = False,
    log_name: str = "",
    debug: Any = None,
) -> Any:
    """Reduce all `tensors` (of one dtype) as one message, in place."""

def broadcast(
    tensor: torch.Tensor,
    src: int = 0,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    *,
    prof: bool = False,
    log_name: str = "",
    debug: Any = None,
) -> Any:
    """Give every rank the values that `tensor` has on rank `src`."""

def broadcast_object_list(
    object_list: list[Any],
    src: int = 0,
    group: ProcessGroup | None = None,
    device: torch.device | None = None,
    *,
    prof: bool = False,
    log_name: str = "",
    debug: Any = None,
) -> None:
    """Replace the list's objects by rank `src`'s. They are pickled: between trusted ranks only."""

def all_gather(
    tensor_list: list[torch.Tensor],
    tensor: torch.Tensor,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    *,
    prof: bool = False,
    log_name: str = "",
    debug: Any = None,
) -> Any:
    """Every rank's `tensor`, into the tensors of the list, in rank order."""

def all_gather_object(
    object_list: list[Any],
    obj: Any,
    group: ProcessGroup | None = None,
    *,
    prof: bool = False,
    log_name: str = "",
    debug: Any = None,
) -> None:
    """Every rank's object, into the list, in rank order. They are pickled: between trusted ranks only."""

def all_gather_into_tensor(
    output_tensor: torch.Tensor,
    tensor: torch.Tensor,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    *,
    prof: bool = False,
    log_name: str = "",
    debug: Any = None,
) -> Any:
    """Concatenate every rank's `tensor` in rank order into `output_tensor`."""

def all_gather_coalesced(
    output_tensors: Sequence[torch.Tensor],
    input_tensors: Sequence[torch.Tensor],
    group: ProcessGroup | None = None,
    async_op: bool = False,
    *,
    prof: bool = False,
    log_name: str = "",
    debug: Any = None,
) -> Any:
    """`all_gather_into_tensor` for each pair."""

def reduce_scatter_tensor(
    output_tensor: torch.Tensor,
    tensor: torch.Tensor,
    op: Any = ReduceOp.SUM,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    *,
    prof: bool = False,
    log_name: str = "",
    debug: Any = None,
) -> Any:
    """Reduce `tensor` over the ranks; rank r gets part r in `output_tensor`. (An average on gloo divides `tensor`.)"""

def reduce_scatter(
    output: torch.Tensor,
    input_list: list[torch.Tensor],
    op: Any = ReduceOp.SUM,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    *,
    prof: bool = False,
    log_name: str = "",
    debug: Any = None,
) -> Any:
    """Reduce the list's tensors over the ranks; rank r gets the r-th in `output`."""

def all_to_all_single(
    output: torch.Tensor,
    tensor: torch.Tensor,
    output_split_sizes: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    *,
    prof: bool = False,
    log_name: str = "",
    debug: Any = None,
) -> Any:
    """Cut `tensor` along its first dimension, send rank r the r-th piece, and join what comes in `output`."""

def all_to_all(
    output_tensor_list: list[torch.Tensor],
    input_tensor_list: list[torch.Tensor],
    group: ProcessGroup | None = None,
    async_op: bool = False,
    *,
    prof: bool = False,
    log_name: str = "",
    debug: Any = None,
) -> Any:
    """Send rank r the r-th tensor of one list; the other is filled in rank order. (gloo has none: sent one by one.)"""

def reduce(
    tensor: torch.Tensor,
    dst: int,
    op: Any = ReduceOp.SUM,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    *,
    prof: bool = False,
    log_name: str = "",
    debug: Any = None,
) -> Any:
    """Reduce over the ranks into rank `dst`'s `tensor`; other ranks' are scratch afterwards."""

def gather(
    tensor: torch.Tensor,
    gather_list: list[torch.Tensor] | None = None,
    dst: int = 0,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    *,
    prof: bool = False,
    log_name: str = "",
    debug: Any = None,
) -> Any:
    """Every rank's `tensor`, into rank `dst`'s list; None on other ranks."""

def scatter(
    tensor: torch.Tensor,
    scatter_list: list[torch.Tensor] | None = None,
    src: int = 0,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    *,
    prof: bool = False,
    log_name: str = "",
    debug: Any = None,
) -> Any:
    """Rank r's `tensor` becomes the r-th of rank `src`'s list; None on other ranks."""

def send(
    tensor: torch.Tensor,
    dst: int,
    group: ProcessGroup | None = None,
    tag: int = 0,
    *,
    prof: bool = False,
    log_name: str = "",
    debug: Any = None,
) -> None:
    """Send `tensor` to rank `dst`; returns when it may be written again."""

def recv(
    tensor: torch.Tensor,
    src: int | None = None,
    group: ProcessGroup | None = None,
    tag: int = 0,
    *,
    prof: bool = False,
    log_name: str = "",
    debug: Any = None,
) -> int:
    """Receive into `tensor` from rank `src` (None: from any, on gloo), and return the sender's rank."""

def isend(
    tensor: torch.Tensor,
    dst: int,
    group: ProcessGroup | None = None,
    tag: int = 0,
    *,
    prof: bool = False,
    log_name: str = "",
    debug: Any = None,
) -> Any:
    """`send`, as a handle."""

def irecv(
    tensor: torch.Tensor,
    src: int | None = None,
    group: ProcessGroup | None = None,
    tag: int = 0,
    *,
    prof: bool = False,
    log_name: str = "",
    debug: Any = None,
) -> Any:
    """`recv`, as a handle."""

def batch_isend_irecv(
    p2p_op_list: list[Any], *, prof: bool = False, log_name: str = "", debug: Any = None
) -> list[Any]:
    """Start all messages together; a handle for each (with NCCL possibly one for all)."""

def barrier(
    group: ProcessGroup | None = None,
    async_op: bool = False,
    device_ids: list[int] | None = None,
    *,
    prof: bool = False,
    log_name: str = "",
    debug: Any = None,
) -> Any:
    """Return when every rank has come here."""

def monitored_barrier(
    group: ProcessGroup | None = None,
    timeout: Any = None,
    wait_all_ranks: bool = False,
    *,
    prof: bool = False,
    log_name: str = "",
    debug: Any = None,
) -> None:
    """A barrier that names the ranks that did not come within `timeout`; on gloo alone."""
