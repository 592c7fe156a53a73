"""What a rank does: check each collective once, then time it at every size, together with the others."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from deepspeedlite._version import __version__
from deepspeedlite.comm import Group, destroy_process_group, get_local_rank, init_process_group
from deepspeedlite.host.text import size_text
from deepspeedlite.metrics.comms_logger import bus_factor
from deepspeedlite.runtime.device import Device, pick_device
from deepspeedlite.runtime.errors import DistributedError
from deepspeedlite.tools.bench.points import Plan, Point
from deepspeedlite.tools.bench.report import show

_BATCHES = 5
_MOST_CALLS = 1000  # of a batch
_FACTOR_NAMES = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}


def run(plan: Plan) -> None:
    """Meet the other ranks, measure, and let rank 0 show it.

    Raises:
        DistributedError: there is one rank only, ranks did not come, or a collective's result is wrong.
        OSError: rank 0 cannot write the files asked for, which is seen before anything is measured.
    """
    init_process_group(verbose=False)
    group, device = Group(), pick_device(get_local_rank())
    if group.size < 2:
        raise DistributedError("one rank has nobody to talk to; start at least two: dslite_bench --num_gpus 2")
    trouble = group.broadcast_object(_unwritable(plan) if group.rank == 0 else "")
    if trouble:
        raise OSError(trouble)
    points = [point for dtype in plan.dtypes for point in measure(group, device, plan, dtype)]
    hosts = len(set(group.all_gather_objects(socket.gethostname())))
    if group.rank == 0:
        about = {
            "ranks": group.size,
            "hosts": hosts,
            "backend": group.backend,
            "device": device.name,
            "torch": torch.__version__,
            "deepspeedlite": __version__,
        }
        show(about, points, plan)
    group.barrier()
    destroy_process_group()


def _unwritable(plan: Plan) -> str:
    for path in filter(None, (plan.json, plan.plot)):
        try:
            path.open("a").close()
        except OSError as error:
            return f"{path} cannot be written by rank 0 on {socket.gethostname()}: {error.strerror}"
    return ""


def measure(group: Group, device: Device, plan: Plan, dtype_name: str) -> list[Point]:
    """The points of one number type, by collective and size. Sizes are rounded to what the ranks can share out."""
    dtype: torch.dtype = getattr(torch, dtype_name)
    numels = [max(size // dtype.itemsize // group.size, 1) * group.size for size in plan.sizes_bytes]
    whole = torch.zeros(max(numels), dtype=dtype, device=device.torch_device)
    shard = torch.zeros(max(numels) // group.size, dtype=dtype, device=device.torch_device)
    points = []
    for name in plan.collectives:
        for numel in dict.fromkeys(numels):
            buffers = whole[:numel], shard[: numel // group.size]
            _check(group, name, *buffers)
            call = _calls(group, *buffers)[name]
            calls, times_s = _time(call, group, device, plan.seconds)
            middle_s, size_bytes = statistics.median(times_s), numel * dtype.itemsize
            algbw_gb_s = size_bytes / middle_s / 1e9
            points.append(
                Point(
                    collective=name,
                    dtype=dtype_name,
                    size_bytes=size_bytes,
                    calls=calls * _BATCHES,
                    time_us=middle_s * 1e6,
                    fastest_us=min(times_s) * 1e6,
                    slowest_us=max(times_s) * 1e6,
                    algbw_gb_s=algbw_gb_s,
                    busbw_gb_s=algbw_gb_s * bus_factor(_FACTOR_NAMES.get(name, name), group.size),
                )
            )
    return points


def _calls(group: Group, whole: torch.Tensor, shard: torch.Tensor) -> Mapping[str, Callable[[], object]]:
    return {
        "all_reduce": lambda: group.all_reduce(whole),
        "reduce_scatter": lambda: group.reduce_scatter_into(shard, whole),
        "all_gather": lambda: group.all_gather_into(whole, shard),
        "broadcast": lambda: group.broadcast(whole),
    }


def _check(group: Group, name: str, whole: torch.Tensor, shard: torch.Tensor) -> None:
    """One call whose result is known; afterwards the buffers are zero, which stays so however often they are summed."""
    mine = [rank % 3 for rank in range(group.size)]  # sums of these are exact in 16 bits too
    whole.fill_(mine[group.rank])
    shard.fill_(mine[group.rank])
    _calls(group, whole, shard)[name]()
    if name == "all_gather":
        wanted = torch.tensor(mine).repeat_interleave(shard.numel()).to(whole)
    else:
        wanted = torch.full_like(whole, mine[0] if name == "broadcast" else sum(mine))
    got = shard if name == "reduce_scatter" else whole
    if not torch.equal(got, wanted[: got.numel()]):
        raise DistributedError(
            f"{name} of {size_text(whole.nbytes)} of {whole.dtype} gave a wrong result on rank {group.rank}: "
            f"{group.backend} does not work between these ranks; look at `python -m deepspeedlite.env_report`"
        )
    whole.zero_()
    shard.zero_()


def _time(call: Callable[[], object], group: Group, device: Device, seconds: float) -> tuple[int, list[float]]:
    """How many calls a batch had, and each batch's seconds per call, by its slowest rank: alike on all ranks."""
    _batch(call, 2, group, device)  # warm
    once_s = _batch(call, 3, group, device)
    calls = min(max(int(seconds / _BATCHES / once_s), 1), _MOST_CALLS)
    return calls, [_batch(call, calls, group, device) for _ in range(_BATCHES)]


def _batch(call: Callable[[], object], calls: int, group: Group, device: Device) -> float:
    group.barrier()
    device.synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        call()
    device.synchronize()
    elapsed = torch.tensor([time.perf_counter() - started], dtype=torch.float64, device=device.torch_device)
    group.all_reduce(elapsed, "max")
    return float(elapsed) / calls
