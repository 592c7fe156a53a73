"""The accelerator this process trains on: where the library asks torch for cuda, rocm or cpu.

torch's ROCm build answers to the name "cuda", so two types suffice; `Device.is_rocm` tells them apart where it
matters. A `Device` is made once by `pick_device` and passed to whoever needs it; importing this module touches
no GPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from deepspeedlite.runtime.errors import DistributedError


@dataclass(frozen=True)
class Device:
    """One accelerator (or the CPU) and what the rest of the library asks of it."""

    torch_device: torch.device

    @property
    def type(self) -> str:
        """`cuda` (NVIDIA and AMD) or `cpu`."""
        return self.torch_device.type

    @property
    def is_rocm(self) -> bool:
        """Whether torch was built for AMD GPUs and this is one."""
        return self.type == "cuda" and torch.version.hip is not None

    @property
    def backend(self) -> str:
        """The torch.distributed backend that moves this device's tensors: `nccl` or `gloo`."""
        return "nccl" if self.type == "cuda" else "gloo"

    @property
    def name(self) -> str:
        """What a person calls it, such as `NVIDIA H200` or `cpu`."""
        return torch.cuda.get_device_name(self.torch_device) if self.type == "cuda" else "cpu"

    def synchronize(self) -> None:
        """Wait until all work queued on the device is done. Returns at once on the CPU."""
        if self.type == "cuda":
            torch.cuda.synchronize(self.torch_device)

    def manual_seed(self, seed: int) -> None:
        """Seed its generator: the CPU's, or the GPU's alone."""
        (torch.cuda if self.type == "cuda" else torch).manual_seed(seed)

    def get_rng_state(self) -> torch.Tensor:
        """Of its generator."""
        return torch.cuda.get_rng_state(self.torch_device) if self.type == "cuda" else torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Go on from such a state."""
        if self.type == "cuda":
            torch.cuda.set_rng_state(state, self.torch_device)
        else:
            torch.set_rng_state(state)

    def event(self) -> torch.cuda.Event | None:
        """A fresh timing event on GPUs; None on the CPU, where the clock is exact."""
        return torch.cuda.Event(enable_timing=True) if self.type == "cuda" else None

    def make_current(self) -> None:
        """Make this GPU the process's current one, so that NCCL and bare `.cuda()` calls use it."""
        if self.type == "cuda":
            torch.cuda.set_device(self.torch_device)

    def memory_stats(self) -> dict[str, int]:
        """Bytes allocated and reserved now and at their peak on the device; empty on the CPU."""
        if self.type != "cuda":
            return {}
        stats: dict[str, Any] = torch.cuda.memory_stats(self.torch_device)
        return {
            "allocated_bytes": stats.get("allocated_bytes.all.current", 0),
            "peak_allocated_bytes": stats.get("allocated_bytes.all.peak", 0),
            "reserved_bytes": stats.get("reserved_bytes.all.current", 0),
            "peak_reserved_bytes": stats.get("reserved_bytes.all.peak", 0),
        }


@cache
def accelerator() -> Device:
    """The process's current GPU, whichever that is, or the CPU: what random numbers and waiting are about."""
    return Device(torch.device(pick_device().type))


def pick_device(local_rank: int = 0) -> Device:
    """The device for the process with this local rank: its GPU where there is one, else the CPU.

    `DS_ACCELERATOR=cpu` keeps training off the GPUs.

    Raises:
        DistributedError: there are GPUs, but fewer than this local rank needs.
    """
    wanted = os.environ.get("DS_ACCELERATOR", "").strip().lower()
    if wanted not in ("", "cpu", "cuda", "rocm"):
        raise DistributedError(f"DS_ACCELERATOR={wanted!r} is not known; use cuda, rocm or cpu")
    count = 0 if wanted == "cpu" else torch.cuda.device_count()
    if count == 0:
        if wanted in ("cuda", "rocm"):
            raise DistributedError(f"DS_ACCELERATOR={wanted} was asked for, but torch {torch.__version__} sees no GPU")
        return Device(torch.device("cpu"))
    if count == 1 and "SLURM_LOCALID" in os.environ:
        return Device(torch.device("cuda", 0))  # Slurm's --gpus-per-task shows each rank its own GPU as number 0
    if local_rank >= count:
        raise DistributedError(
            f"local rank {local_rank} needs GPU {local_rank}, but this process sees {count} GPU(s) "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}); start at most {count} ranks "
            "on this machine, or set DS_ACCELERATOR=cpu"
        )
    return Device(torch.device("cuda", local_rank))
