"""The accelerator this process trains on: the one place that asks torch for CUDA, ROCm, another device, or the CPU.

Each kind of accelerator has a module of torch's (`torch.cuda`, `torch.xpu`; a backend of its own registers one), whose
functions have the same names; a `Device` asks the module of its kind, so a further kind needs nothing here. torch's
ROCm build answers to the name "cuda"; `Device.is_rocm` tells them apart where it matters. A `Device` is made once by
`pick_device` and passed to whoever needs it; importing this module touches no accelerator.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from deepspeedlite.runtime.errors import DistributedError

_NO_ACCELERATORS = ("cpu", "meta")
# Kinds that are always known; others are asked for by the name under which torch has them.
_ALIASES = {"rocm": "cuda", "gpu": "cuda"}


def on_accelerator(what: torch.Tensor | torch.device) -> bool:
    """Whether a tensor, or a device, is of an accelerator rather than the host."""
    device = what.device if isinstance(what, torch.Tensor) else what
    return device.type not in _NO_ACCELERATORS


@dataclass(frozen=True)
class Device:
    """One accelerator (or the CPU) and what the rest of the library asks of it."""

    torch_device: torch.device

    @property
    def type(self) -> str:
        """Torch's name of its kind: `cuda` (NVIDIA and AMD), `xpu`, ..., or `cpu`."""
        return self.torch_device.type

    @property
    def is_accelerator(self) -> bool:
        """Whether it is another device than the CPU."""
        return on_accelerator(self.torch_device)

    @property
    def is_rocm(self) -> bool:
        """Whether torch was built for AMD GPUs and this is one."""
        return self.type == "cuda" and torch.version.hip is not None

    @property
    def module(self) -> Any:
        """Torch's module of this kind of accelerator, such as `torch.cuda`."""
        return torch.get_device_module(self.type)

    @property
    def backend(self) -> str:
        """The torch.distributed backend that moves this device's tensors: `nccl`, `xccl`, ... or `gloo`."""
        if not self.is_accelerator:
            return "gloo"
        try:
            return str(dist.get_default_backend_for_device(self.type))
        except ValueError:
            return "gloo"

    @property
    def name(self) -> str:
        """What a person calls it, such as `NVIDIA H200` or `cpu`."""
        return str(self.module.get_device_name(self.torch_device)) if self.is_accelerator else "cpu"

    @property
    def current(self) -> torch.device:
        """The device of this kind that is this thread's current one."""
        return torch.device(self.type, self.module.current_device()) if self.is_accelerator else self.torch_device

    def synchronize(self) -> None:
        """Wait until all work queued on the device is done. Returns at once on the CPU."""
        if self.is_accelerator:
            self.module.synchronize(self.torch_device)

    def manual_seed(self, seed: int) -> None:
        """Seed its generator: the CPU's, or the accelerator's alone."""
        (self.module if self.is_accelerator else torch).manual_seed(seed)

    def get_rng_state(self) -> torch.Tensor:
        """Of its generator."""
        state = self.module.get_rng_state(self.torch_device) if self.is_accelerator else torch.get_rng_state()
        assert isinstance(state, torch.Tensor), "torch gives states of generators as tensors"
        return state

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Go on from such a state."""
        if self.is_accelerator:
            self.module.set_rng_state(state, self.torch_device)
        else:
            torch.set_rng_state(state)

    def event(self) -> torch.Event | None:
        """A fresh timing event on accelerators; None on the CPU, where the clock is exact."""
        return self.module.Event(enable_timing=True) if self.is_accelerator else None

    def new_stream(self) -> torch.Stream:
        """A further queue of work of an accelerator."""
        stream: torch.Stream = self.module.Stream(device=self.torch_device)
        return stream

    def current_stream(self) -> torch.Stream:
        """The queue that this thread's work on it goes to."""
        stream: torch.Stream = self.module.current_stream(self.torch_device)
        return stream

    def in_stream(self, stream: torch.Stream) -> AbstractContextManager[Any]:
        """A context whose work on the accelerator goes to that queue."""
        context: AbstractContextManager[Any] = self.module.stream(stream)
        return context

    @property
    def is_idle(self) -> bool:
        """Whether its default stream has nothing left to do; always, on the CPU."""
        return not self.is_accelerator or bool(torch.accelerator.current_stream(self.torch_device).query())

    def make_current(self) -> None:
        """Make this accelerator the process's current one, so that NCCL and bare `.cuda()` calls use it."""
        if self.is_accelerator:
            self.module.set_device(self.torch_device)

    def memory_stats(self) -> dict[str, int]:
        """Bytes allocated and reserved now and at their peak on the device, and how many allocations there were; empty
        on the CPU, and where torch counts none.
        """
        if not self.is_accelerator or not hasattr(self.module, "memory_stats"):
            return {}
        stats: dict[str, Any] = self.module.memory_stats(self.torch_device)
        return {
            "allocated_bytes": stats.get("allocated_bytes.all.current", 0),
            "peak_allocated_bytes": stats.get("allocated_bytes.all.peak", 0),
            "reserved_bytes": stats.get("reserved_bytes.all.current", 0),
            "peak_reserved_bytes": stats.get("reserved_bytes.all.peak", 0),
            "allocations": stats.get("allocation.all.allocated", 0),
        }

    def reset_peak_memory(self) -> None:
        """Count peaks from here."""
        if self.is_accelerator:
            self.module.reset_peak_memory_stats(self.torch_device)

    def empty_cache(self) -> None:
        """Give memory that no tensor uses back to the device."""
        if self.is_accelerator:
            self.module.empty_cache()

    def free_bytes(self) -> int:
        """What of the accelerator's memory can be had; 0 on the CPU."""
        return int(self.module.mem_get_info(self.torch_device)[0]) if self.is_accelerator else 0


def accelerators() -> Device:
    """The kind of accelerator that this process could use, whichever of them is current, or the CPU."""
    return Device(torch.device(_kind()))


def device_in_use() -> Device:
    """The accelerator that this process has started, or the CPU; none is started by asking."""
    kind = accelerators()
    return Device(kind.current) if kind.is_accelerator and kind.module.is_initialized() else Device(torch.device("cpu"))


@cache
def accelerator() -> Device:
    """The process's current accelerator, whichever that is, or the CPU: what random numbers and waiting are about."""
    return Device(torch.device(pick_device().type))


def _kind() -> str:
    """Torch's name of the kind of device to train on, by `DS_ACCELERATOR` or by what there is."""
    wanted = os.environ.get("DS_ACCELERATOR", "").strip().lower()
    kind = _ALIASES.get(wanted, wanted)
    if kind == "cpu":
        return kind
    if not kind:
        found = torch.accelerator.current_accelerator(check_available=False)
        kind = found.type if found is not None else "cuda"
        # One that no backend of torch.distributed serves, such as a Mac's, trains nothing here.
        usable = dist.Backend.default_device_backend_map.get(kind, "gloo") != "gloo"
        return kind if usable and torch.get_device_module(kind).device_count() else "cpu"
    try:
        module = torch.get_device_module(kind)
    except RuntimeError:
        raise DistributedError(f"DS_ACCELERATOR={wanted!r} is not known; use cuda, rocm, xpu or cpu") from None
    if not hasattr(module, "device_count") or not module.device_count():
        raise DistributedError(f"DS_ACCELERATOR={wanted} was asked for, but torch {torch.__version__} sees none")
    return kind


def pick_device(local_rank: int = 0) -> Device:
    """The device for the process with this local rank: its accelerator where there is one, else the CPU.

    `DS_ACCELERATOR=cpu` keeps training off the accelerators.

    Raises:
        DistributedError: there are accelerators, but fewer than this local rank needs, or none of the wanted kind.
    """
    kind = _kind()
    if kind == "cpu":
        return Device(torch.device("cpu"))
    count = torch.get_device_module(kind).device_count()
    if count == 1 and "SLURM_LOCALID" in os.environ:
        return Device(torch.device(kind, 0))  # Slurm's --gpus-per-task shows each rank its own GPU as number 0
    if local_rank >= count:
        raise DistributedError(
            f"local rank {local_rank} needs GPU {local_rank}, but this process sees {count} GPU(s) "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}); start at most {count} ranks "
            "on this machine, or set DS_ACCELERATOR=cpu"
        )
    return Device(torch.device(kind, local_rank))
