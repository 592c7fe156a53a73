"""What one rank offloads and how: made of the configuration once, asked by units and by the step.

[Note: freed memory goes back]
glibc serves blocks below a threshold from heaps, and raises the threshold, up to 32 MiB, when larger blocks are freed.
Values, gradients and states that come and go in many sizes then leave holes: of a model with 340 MiB in use it held
2.3 GiB. Who offloads to a disk does so for want of memory, so the threshold is fixed there: larger blocks are mapped
one by one, and are the system's again when they are freed.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from deepspeedlite.comm import Group
from deepspeedlite.config import DeepSpeedConfig
from deepspeedlite.offload.disk_store import BufferPool, DiskStore
from deepspeedlite.offload.pinned import HostMemory
from deepspeedlite.offload.placement import Placement, Tier
from deepspeedlite.offload.store import MASTER, STATE, VALUES, HostStore, Store
from deepspeedlite.offload.swap_file import SwapFile
from deepspeedlite.offload.swap_pipeline import SwapPipeline
from deepspeedlite.offload.swapped_run import SwappedRun
from deepspeedlite.runtime.errors import OffloadError
from deepspeedlite.runtime.log import log_dist

# Elements of a run that is swapped as one: large enough for the disk, small enough to keep several of, and a little
# more than a power of two, so that a weight of that size and its bias are one.
TILE_NUMEL = (1 << 22) + (1 << 19)
RATED_TB = 600  # what makers promise of a common drive of 1 TB
_M_MMAP_THRESHOLD, _MAPPED_NBYTES = -3, 1 << 20  # glibc's number, from malloc.h


@dataclass
class OffloadOptions:
    """The numbers of the configuration's offload sections; see there."""

    pinned: bool = True
    ratio: float = 1.0
    sub_group_numel: int = TILE_NUMEL
    buffers: int = 4
    read_ahead: bool = True
    write_behind: bool = True
    param_buffers: int = 5
    max_in_cpu_numel: int = 0
    cuts_runs: bool = True  # False: an optimizer needs a unit's runs whole


class Master(NamedTuple):
    """What a step updates of one run."""

    tensor: torch.Tensor
    staged: torch.Tensor | None = None  # host memory that the device's values are copied from, if they are apart
    is_away: bool = False  # whether it and its states are among those that are offloaded


@dataclass
class Offload:
    """Where this rank's states go. `swap_file` is there where anything lives on a disk."""

    placement: Placement = field(default_factory=Placement)
    options: OffloadOptions = field(default_factory=OffloadOptions)
    swap_file: SwapFile | None = None

    def __post_init__(self) -> None:
        options = self.options
        self.host = HostMemory(options.pinned)
        self._pool: BufferPool | None = None  # for shards of values; the pipeline has buffers of its own
        self._in_cpu_numel = 0  # of shards that have been kept in memory, up to `max_in_cpu_numel`
        # Of runs so far, and of those of them whose states are offloaded: `ratio` is kept at every moment, not at the
        # end, so that what is offloaded is spread over the model and overlaps with what is not.
        self._seen_numel = self._taken_numel = 0
        self.pipeline = SwapPipeline(self.swap_file, options.buffers, options.read_ahead, options.write_behind)
        self._has_told_wear = False  # it is said once
        if self.swap_file is not None:
            _give_freed_memory_back()
            if self.placement.params is Tier.NVME:
                self._pool = BufferPool(self.swap_file, max(1, options.param_buffers))

    def __str__(self) -> str:
        pinned = self.host.pinned_nbytes
        return str(self.placement) + (f", {pinned / 2**30:.2f} GiB of host memory page-locked" if pinned else "")

    @property
    def run_numel(self) -> int | None:
        """At how many elements runs are cut; None where they need not be."""
        if not self.options.cuts_runs or self.placement == Placement():
            return None
        return min(self.options.sub_group_numel, TILE_NUMEL)

    def store(self, shard: torch.Tensor) -> Store:
        """Where a shard of sharded parameters lives from now on."""
        tier = self.placement.params if shard.numel() else Tier.DEVICE
        if tier is Tier.NVME and self._in_cpu_numel + shard.numel() <= self.options.max_in_cpu_numel:
            self._in_cpu_numel += shard.numel()
            tier = Tier.CPU
        if tier is Tier.NVME and self._pool is not None:
            return DiskStore(shard, self._pool)
        return HostStore(shard, self.host) if tier is Tier.CPU and self.is_apart(shard.device) else Store()

    def make_masters(
        self, store: Store, runs: Sequence[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype
    ) -> list[Master]:
        """What a step is to update of the runs of a shard that lives in `store`.

        Args:
            store: where the shard lives; it is open.
            runs: of each the values as `Store.values` gives them, and the part of the shard.
            dtype: of what is updated. Where it is the values' own, they are updated themselves if they are where the
                step is.
        """
        if self.placement.states is not Tier.DEVICE:
            return [self._make_master(store, values, shard, dtype) for values, shard in runs]
        if not runs or runs[0][0].dtype == dtype:
            return [Master(values) for values, _ in runs]
        numels = [shard.numel() for _, shard in runs]
        masters = torch.empty(sum(numels), dtype=dtype, device=runs[0][1].device).split(numels)
        return [Master(master.copy_(shard)) for master, (_, shard) in zip(masters, runs)]

    def _make_master(self, store: Store, values: torch.Tensor, shard: torch.Tensor, dtype: torch.dtype) -> Master:
        is_precise, device = dtype == shard.dtype, shard.device
        if not self.takes_states(shard.numel()):
            return Master(values if is_precise and values.device == device else shard.to(device, dtype, copy=True))
        if store.is_here and self.is_apart(device):  # the values are the device's, and the CPU steps
            master = self.host.empty(shard.numel(), dtype).copy_(shard)
            staged = master if is_precise else self.host.empty(shard.numel(), shard.dtype)
            return Master(master, staged, is_away=True)
        return Master(values if is_precise else shard.to("cpu", dtype, copy=True), is_away=True)

    def run_store(
        self,
        store: Store,
        span: tuple[int, int],
        values: torch.Tensor,
        master: Master,
        states: Callable[[torch.Tensor], Mapping[str, Any]],
    ) -> Store:
        """Where all that a step of a run reads and writes lives between steps.

        Args:
            store: where the shard lives of which the run is a part.
            span: the run's elements in the shard.
            values: of the run, as `Store.values` gives them.
            master: what is updated.
            states: what the optimizer keeps of a master.
        """
        updated, region = master.tensor, store.region(*span)
        on_disk = master.is_away and self.placement.states is Tier.NVME
        if self.swap_file is None or not (on_disk or region):
            return Store()

        def held() -> dict[str, torch.Tensor]:
            found = {} if region is None else {VALUES: values}
            if on_disk and updated is not values:
                found[MASTER] = updated
            for name, value in states(updated).items() if on_disk else ():
                if isinstance(value, torch.Tensor) and value.dim() == 1 and value.numel() in (span[1] - span[0], 0):
                    found[STATE + name] = value
            return found

        regions = {} if region is None else {VALUES: region}
        return SwappedRun(self.swap_file, held, regions, derived=() if updated is values else (VALUES,))

    def is_apart(self, device: torch.device) -> bool:
        """Whether a device's memory is another one than the host's."""
        return device.type != "cpu"

    def takes_states(self, numel: int) -> bool:
        """Whether the states of a run, of so many elements, are among the share that is offloaded."""
        self._seen_numel += numel
        takes = self._taken_numel + numel / 2 <= self.options.ratio * self._seen_numel
        self._taken_numel += numel * takes
        return takes

    @property
    def states_on_disk(self) -> bool:
        """Whether optimizer states live in the swap file."""
        return self.placement.states is Tier.NVME

    @property
    def takes_grads(self) -> bool:
        """Whether averaged gradients may live elsewhere than on the device."""
        return self.placement.grads is not Tier.DEVICE

    def grads(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for a shard of averaged gradients, all zeros."""
        if self.placement.grads is Tier.DEVICE or not self.is_apart(device):
            return torch.zeros(numel, dtype=dtype, device=device)
        return self.host.empty(numel, dtype).zero_()

    def tell_wear(self, ranks: int) -> None:
        """Once, when the first step has shown what each of the ranks will write: how long a drive lasts."""
        nbytes = self.pipeline.written_nbytes * ranks
        if self.swap_file is None or not nbytes or self._has_told_wear:
            return
        self._has_told_wear = True
        log_dist(
            f"every step writes {nbytes / 2**30:.3g} GiB to {self.swap_file.directory} ({ranks} x this rank's): a "
            f"drive that is rated for {RATED_TB} TB written is worn out after {RATED_TB * 1e12 / nbytes:,.0f} steps",
            level=logging.WARNING,
        )

    def close(self) -> None:
        """Give the disk its space back."""
        if self.swap_file is not None:
            self.swap_file.close()


def make_offload(
    settings: DeepSpeedConfig, group: Group, placement: Placement | None = None, cuts_runs: bool = True
) -> Offload:
    """What a configuration offloads, or what `placement` says, with this rank's file on the disk where it needs one.

    Raises:
        OffloadError: on every rank, if the disk of one cannot be used.
    """
    zero = settings.zero_optimization
    placement = placement or Placement.from_config(zero)
    states, params = zero.offload_optimizer, zero.offload_param
    options = OffloadOptions(
        pinned=states.pin_memory if placement.states is not Tier.DEVICE else params.pin_memory,
        ratio=states.ratio,
        sub_group_numel=zero.sub_group_size,
        buffers=states.buffer_count,
        read_ahead=states.pipeline_read is not False,
        write_behind=states.pipeline_write is not False,
        param_buffers=params.buffer_count,
        max_in_cpu_numel=params.max_in_cpu,
        cuts_runs=cuts_runs,
    )
    if not placement.uses_disk:
        return Offload(placement, options)
    offload, problem = None, ""
    try:
        path = states.nvme_path if placement.states is Tier.NVME else params.nvme_path
        offload = Offload(
            placement, options, SwapFile(str(path), settings.aio.model_dump(exclude={"use_gds"}), options.pinned)
        )
    except OffloadError as error:
        problem = str(error)
    problems = [(rank, told) for rank, told in enumerate(group.all_gather_objects(problem)) if told]
    if offload is None or problems:
        raise OffloadError(f"rank {problems[0][0]}: {problems[0][1]}")
    return offload


def _give_freed_memory_back() -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's alone
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_NBYTES)
