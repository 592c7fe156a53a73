"""What is here: accelerators and whether they work, torch, compilers, peers. The runner reads this phase's figures."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
from typing import Any

import psutil
import torch
import torch.distributed as dist

from deepspeedlite.host.text import size_text
from deepspeedlite.ops.op_builder import OPS, find_torch, why_not
from tools.gpu_check.setting import Rows, Setting

OLDEST_TORCH = (2, 10)
PEERS = ("deepspeed", "transformers", "accelerate", "triton", "flash_attn", "apex", "bitsandbytes", "pytest", "ninja")


def rows(setting: Setting) -> Rows:
    """The device works at all; then what surrounds it."""
    yield setting.tried("torch", about_torch)
    yield setting.tried("the device computes", lambda: accelerators(setting))
    yield setting.tried("compilers", lambda: compilers(setting))
    yield setting.tried("host", host, judges=False)
    yield setting.tried("peers", peers, judges=False)


def about_torch() -> dict[str, Any]:
    """Raises RuntimeError for one that is too old."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST_TORCH:
        raise RuntimeError(f"torch {torch.__version__} is older than 2.10, which the ops' stable ABI needs")
    figures = {"torch": torch.__version__, "CUDA": torch.version.cuda, "HIP": torch.version.hip}
    figures["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST")
    return {**{name: value for name, value in figures.items() if value}, "archs_of_torch": torch.cuda.get_arch_list()}


def accelerators(setting: Setting) -> dict[str, Any]:
    """Names, memory and number; a product and a copy are really made: a driver that lists a GPU may not run it."""
    device = setting.device
    figures: dict[str, Any] = {"device": device.name, "accelerators": 0, "ranks": 1, "driver": driver()}
    if device.is_accelerator:
        count = device.module.device_count()
        names = [str(device.module.get_device_name(index)) for index in range(count)]
        split = any("MIG" in name for name in names)  # slices of one GPU do not speak to each other by NCCL
        figures |= {"accelerators": count, "names": sorted(set(names)), "backend": device.backend}
        figures |= {"ranks": 1 if split else count, "free": size_text(device.free_bytes())}
        figures |= about_cuda() if device.type == "cuda" else {}
    else:
        figures["ranks"] = 2 if setting.tiny else 1
    x = torch.full((64, 64), 0.5, device=device.torch_device)
    assert float((x @ x).sum()) == 64 * 64 * 16, "a product of this device is wrong"
    host = torch.arange(1024, dtype=torch.float32)
    pinned = host.pin_memory() if device.is_accelerator else host
    assert torch.equal(pinned.to(device.torch_device, non_blocking=True).cpu(), host), "a copy to it is wrong"
    return figures


def about_cuda() -> dict[str, Any]:
    """Capability, dtypes, who reaches whose memory, the mode in which processes may share it."""
    every = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    peers = sum(
        torch.cuda.can_device_access_peer(one, other)
        for one in range(torch.cuda.device_count())
        for other in range(torch.cuda.device_count())
        if one != other
    )
    return {
        "archs": ";".join(sorted({arch_of(properties) for properties in every})),
        "total": size_text(min(properties.total_memory for properties in every)),
        "bf16": torch.cuda.is_bf16_supported(),
        "peer_pairs": peers,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else "none",
        "MPS": "CUDA_MPS_PIPE_DIRECTORY" in os.environ,
    }


def arch_of(properties: Any) -> str:
    """As TORCH_CUDA_ARCH_LIST or PYTORCH_ROCM_ARCH name it: asked of torch, since nvidia-smi may not be there."""
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return f"{properties.major}.{properties.minor}"


def driver() -> str:
    """What nvidia-smi or rocm-smi say of it, or nothing."""
    for command in (
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        ["rocm-smi", "--showdriverversion"],
    ):
        if shutil.which(command[0]):
            try:
                said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
            except subprocess.TimeoutExpired:
                return f"{command[0]} hangs"
            return " ".join(said.split("\n")[0].split())
    return ""


def compilers(setting: Setting) -> dict[str, Any]:
    """Whether ops can be compiled here, for the CPU and for the device; `kernels_run_here` is what phases ask."""
    found: dict[str, Any] = {
        name: shutil.which(name) for name in ("c++", "nvcc", "hipcc", "compute-sanitizer", "ccache")
    }
    figures = {name: path for name, path in found.items() if path}
    figures |= {name: os.environ[name] for name in ("CUDA_HOME", "ROCM_HOME", "CXX") if name in os.environ}
    figures["kernels_run_here"] = False
    error = why_not(OPS["fused_adam"])
    if error is not None:
        figures["why_no_kernels"] = str(error)
        if setting.device.is_accelerator:
            raise RuntimeError(f"ops cannot be compiled: {error}")
    elif setting.device.type != "cuda":
        figures["why_no_kernels"] = f"nvcc and hipcc compile nothing for {setting.device.type}"
    else:
        figures |= {"kernels_run_here": True, "compiles_for": find_torch().accelerator}
    return figures


def host() -> dict[str, Any]:
    """Memory, shared memory and what may be locked: pinned buffers and NCCL live there."""
    import resource

    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "free": size_text(psutil.virtual_memory().available),
        "shm": size_text(shutil.disk_usage("/dev/shm").free) if os.path.isdir("/dev/shm") else "none",
        "memlock": "unlimited" if locked == resource.RLIM_INFINITY else size_text(locked),
    }


def peers() -> dict[str, Any]:
    """Versions of what is installed."""
    figures = {}
    for name in PEERS:
        try:
            figures[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return figures
