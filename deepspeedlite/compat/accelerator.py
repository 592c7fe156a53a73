"""`get_accelerator()`: the machine's GPUs or its CPU behind one object, with DeepSpeed's method names.

    device = get_accelerator().current_device_name()      "cuda:1", or "cpu"
    get_accelerator().empty_cache()

For scripts; inside, the library passes a `Device` around. AMD's GPUs answer to "cuda", as in torch. `DS_ACCELERATOR`
(cuda, rocm, cpu, or torch's name of another kind) chooses; without it GPUs are used where there are any. A GPU is
touched when a method needs it. On a CPU memory is the host's, streams and events are None, and there is nothing to wait
for.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch

from deepspeedlite.metrics.memory import host_bytes, host_rss_bytes
from deepspeedlite.runtime.device import Device, pick_device
from deepspeedlite.runtime.errors import DistributedError, UnsupportedError

_KINDS = ("cuda", "rocm", "cpu")


def _tensor_class(name: str) -> property:
    return property(
        lambda self: getattr(self._module if self._on_gpu else torch, name),
        doc="Torch's constructor of tensors of this type on the device.",
    )


class DeepSpeedAccelerator:
    """The device that this process computes on. `kind` is "cuda", "rocm", "cpu", or torch's name of another one."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._name = "cuda" if kind == "rocm" else kind
        self._communication_backend_name = Device(torch.device(self._name)).backend
        self._compile_backend = "inductor"
        self._peak_bytes = 0

    @property
    def _on_gpu(self) -> bool:
        return self._name != "cpu"

    @property
    def _module(self) -> Any:
        """Torch's module of this kind of accelerator."""
        return torch.get_device_module(self._name)

    # --- what it is ---------------------------------------------------------------------------------------------------

    def is_available(self) -> bool:
        """Whether it can be used here."""
        return not self._on_gpu or self._module.is_available()

    def is_synchronized_device(self) -> bool:
        """Whether work is done when a call returns."""
        return not self._on_gpu

    use_host_timers = resolves_data_dependency = handles_memory_backpressure = is_synchronized_device

    def device_name(self, device_index: Any = None) -> str:
        """The name that torch knows it by: `cpu`, `cuda`, or `cuda:1` for an index."""
        return self._name if device_index is None or not self._on_gpu else f"{self._name}:{device_index}"

    def device(self, device_index: Any = None) -> Any:
        """A context in which this GPU is the current one; None on a CPU."""
        return self._module.device(device_index) if self._on_gpu else None

    def set_device(self, device_index: Any) -> None:
        """Make this GPU the current one."""
        if self._on_gpu:
            self._module.set_device(device_index)

    def current_device(self) -> int:
        """The current GPU's number; on a CPU this process's number on its host."""
        return self._module.current_device() if self._on_gpu else int(os.environ.get("LOCAL_RANK") or 0)

    def current_device_name(self) -> str:
        """`cuda:1`, or `cpu`."""
        return f"{self._name}:{self._module.current_device()}" if self._on_gpu else "cpu"

    def device_count(self) -> int:
        """GPUs that this process sees; on a CPU its host's ranks, as the launcher set them."""
        return self._module.device_count() if self._on_gpu else int(os.environ.get("LOCAL_SIZE") or 1)

    def synchronize(self, device_index: Any = None) -> None:
        """Wait until all work on the device is done."""
        if self._on_gpu:
            self._module.synchronize(device_index)

    def communication_backend_name(self) -> str:
        """The backend of torch.distributed for its tensors."""
        return self._communication_backend_name

    def get_compile_backend(self) -> str:
        """The backend of torch.compile."""
        return self._compile_backend

    def set_compile_backend(self, backend: str) -> None:
        """Choose it. Raises `UnsupportedError` for one that this torch does not know."""
        known = torch._dynamo.list_backends(exclude_tags=())
        if backend not in known:
            raise UnsupportedError(f"torch.compile backend {backend!r} is not known; use one of {', '.join(known)}")
        self._compile_backend = backend

    def visible_devices_envs(self) -> list[str]:
        """The variables that say which devices a process sees."""
        named = {"cuda": ["CUDA_VISIBLE_DEVICES"], "rocm": ["HIP_VISIBLE_DEVICES"], "cpu": ["CUDA_VISIBLE_DEVICES"]}
        return named.get(self.kind, [])

    def set_visible_devices_envs(self, current_env: dict[str, str], local_accelerator_ids: list[Any]) -> None:
        """Write these devices into an environment."""
        for name in self.visible_devices_envs():
            current_env[name] = ",".join(str(number) for number in local_accelerator_ids)

    def export_envs(self) -> list[str]:
        """Prefixes of variables that ranks on other machines need."""
        return ["NCCL"] if self._name == "cuda" else []

    # --- random numbers -----------------------------------------------------------------------------------------------

    def random(self) -> Any:
        """Torch's module of generators."""
        return torch.random

    def set_rng_state(self, new_state: torch.Tensor, device_index: Any = None) -> None:
        """Go on from a state of the device's generator."""
        if not self._on_gpu:
            torch.set_rng_state(new_state)
        else:
            self._module.set_rng_state(new_state, self._name if device_index is None else device_index)

    def get_rng_state(self, device_index: Any = None) -> torch.Tensor:
        """The state of the device's generator."""
        if not self._on_gpu:
            return torch.get_rng_state()
        return self._module.get_rng_state(self._name if device_index is None else device_index)

    def manual_seed(self, seed: int) -> Any:
        """Seed the device's generator."""
        return self._module.manual_seed(seed) if self._on_gpu else torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> Any:
        """Seed the generators of all devices."""
        return self._module.manual_seed_all(seed) if self._on_gpu else torch.manual_seed(seed)

    def initial_seed(self) -> int:
        """What the device's generator was last seeded with."""
        return self._module.initial_seed() if self._on_gpu else torch.initial_seed()

    def default_generator(self, device_index: int) -> torch.Generator:
        """The device's generator."""
        return self._module.default_generators[device_index] if self._on_gpu else torch.default_generator

    # --- streams ------------------------------------------------------------------------------------------------------

    @property
    def Stream(self) -> Any:  # noqa: N802  DeepSpeed's name
        """The class of streams; None on a CPU."""
        return self._module.Stream if self._on_gpu else None

    @property
    def Event(self) -> Any:  # noqa: N802  DeepSpeed's name
        """The class of events; None on a CPU."""
        return self._module.Event if self._on_gpu else None

    def stream(self, stream: Any) -> Any:
        """A context in which work goes to this stream."""
        return self._module.stream(stream) if self._on_gpu else contextlib.nullcontext()

    def current_stream(self, device_index: Any = None) -> Any:
        """The stream that work goes to now; None on a CPU."""
        return self._module.current_stream(device_index) if self._on_gpu else None

    def default_stream(self, device_index: Any = None) -> Any:
        """The stream that work goes to unless told otherwise; None on a CPU."""
        return self._module.default_stream(device_index) if self._on_gpu else None

    def is_current_stream_capturing(self) -> bool:
        """Whether the current stream is being recorded into a graph."""
        return self._name == "cuda" and torch.cuda.is_current_stream_capturing()

    def create_graph(self) -> Any:
        """An empty CUDA graph; None on a CPU."""
        return torch.cuda.CUDAGraph() if self._name == "cuda" else None

    def capture_to_graph(self, graph: Any, pool: Any = None, stream: Any = None) -> Any:
        """A context whose work is recorded into the graph."""
        return torch.cuda.graph(graph, pool, stream) if self._name == "cuda" else contextlib.nullcontext()

    def replay_graph(self, graph: Any) -> None:
        """Do what was recorded."""
        if self._on_gpu:
            graph.replay()

    def range_push(self, msg: str, domain: Any = None, category: Any = None) -> None:
        """Open a range that profilers show."""
        if self._name == "cuda":
            torch.cuda.nvtx.range_push(msg)

    def range_pop(self, domain: Any = None) -> None:
        """Close it."""
        if self._name == "cuda":
            torch.cuda.nvtx.range_pop()

    def lazy_call(self, callback: Callable[[], Any]) -> Any:
        """Call when the GPUs are initialised; at once on a CPU."""
        return torch.cuda._lazy_call(callback) if self._name == "cuda" else callback()

    # --- memory, in bytes ---------------------------------------------------------------------------------------------

    def empty_cache(self) -> None:
        """Give memory that no tensor uses back to the driver."""
        if self._on_gpu:
            self._module.empty_cache()

    def memory_allocated(self, device_index: Any = None) -> int:
        """Bytes that tensors use; on a CPU those of this process (RSS)."""
        if self._on_gpu:
            return self._module.memory_allocated(device_index)
        rss_bytes = host_rss_bytes()
        self._peak_bytes = max(self._peak_bytes, rss_bytes)
        return rss_bytes

    def max_memory_allocated(self, device_index: Any = None) -> int:
        """The most that tensors used; on a CPU the most that was seen by a call."""
        if self._on_gpu:
            return self._module.max_memory_allocated(device_index)
        return max(self._peak_bytes, self.memory_allocated())

    def reset_peak_memory_stats(self, device_index: Any = None) -> None:
        """Begin the peaks anew."""
        self._peak_bytes = 0
        if self._on_gpu:
            self._module.reset_peak_memory_stats(device_index)

    reset_max_memory_allocated = reset_max_memory_cached = reset_peak_memory_stats

    def memory_reserved(self, device_index: Any = None) -> int:
        """Bytes that the allocator holds."""
        return self._module.memory_reserved(device_index) if self._on_gpu else self.memory_allocated()

    def max_memory_reserved(self, device_index: Any = None) -> int:
        """The most that it held."""
        return self._module.max_memory_reserved(device_index) if self._on_gpu else self.max_memory_allocated()

    memory_cached, max_memory_cached = memory_reserved, max_memory_reserved

    def memory_stats(self, device_index: Any = None) -> dict[str, Any]:
        """The allocator's figures by name; on a CPU the two that exist."""
        if self._on_gpu:
            return self._module.memory_stats(device_index)
        return {
            "allocated_bytes.all.current": self.memory_allocated(),
            "allocated_bytes.all.peak": self.max_memory_allocated(),
        }

    def total_memory(self, device_index: Any = None) -> int:
        """Bytes that the device, or the host, has."""
        if self._on_gpu:
            return int(self._module.mem_get_info(device_index)[1])
        return host_bytes()[0]

    def available_memory(self, device_index: Any = None) -> int:
        """Bytes that are free."""
        return self._module.mem_get_info(device_index)[0] if self._on_gpu else host_bytes()[1]

    def pin_memory(self, tensor: torch.Tensor, make_copy: bool = True, match_shape: bool = True) -> torch.Tensor:
        """A page-locked copy, which GPUs read without waiting; the tensor itself on a CPU."""
        return tensor.pin_memory() if self._on_gpu else tensor

    def pin_empty(self, *size: Any, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
        """An empty tensor of this size in page-locked host memory; in plain memory on a CPU."""
        shape = size[0] if len(size) == 1 and isinstance(size[0], (tuple, list)) else size
        return torch.empty(*shape, dtype=dtype, device=device, pin_memory=self._on_gpu)

    def pin_empty_like(
        self, tensor: torch.Tensor, device: str = "cpu", dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """As `pin_empty`, of a tensor's shape and type."""
        return self.pin_empty(*tensor.shape, dtype=dtype or tensor.dtype, device=device)

    def unpin_memory(self, tensor: torch.Tensor) -> None:
        """Nothing: torch unlocks memory when the tensor goes."""

    def pin_memory_alignment(self) -> int:
        """Bytes of which a page-locked block's address is a multiple; any will do."""
        return 1

    def register_host_memory(self, address: int, num_bytes: int) -> bool:
        """Whether the driver was told of host memory that others have locked: it is not."""
        return False

    def unregister_host_memory(self, address: int) -> None:
        """Nothing: none is registered."""

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is page-locked."""
        return self._on_gpu and tensor.is_pinned()

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies on this device."""
        return tensor.device.type == self._name

    # --- number types -------------------------------------------------------------------------------------------------

    def is_bf16_supported(self) -> bool:
        """Whether it computes in bf16."""
        return self._name != "cuda" or torch.cuda.is_bf16_supported()

    def is_fp16_supported(self) -> bool:
        """Whether it computes in fp16."""
        return True

    is_fp64_supported = is_fp16_supported

    def supported_dtypes(self) -> list[torch.dtype]:
        """The types that it trains in."""
        return [torch.float, torch.half] + ([torch.bfloat16] if self.is_bf16_supported() else [])

    def is_triton_supported(self) -> bool:
        """Whether Triton has code for it."""
        return self._name == "cuda" and torch.cuda.get_device_capability()[0] >= 8

    def prefer_triton_grouped_mm(self) -> bool:
        """Whether a grouped product in Triton is the better one."""
        return False

    BFloat16Tensor = _tensor_class("BFloat16Tensor")
    ByteTensor = _tensor_class("ByteTensor")
    DoubleTensor = _tensor_class("DoubleTensor")
    FloatTensor = _tensor_class("FloatTensor")
    HalfTensor = _tensor_class("HalfTensor")
    IntTensor = _tensor_class("IntTensor")
    LongTensor = _tensor_class("LongTensor")

    # --- ops ----------------------------------------------------------------------------------------------------------

    def op_builder_dir(self) -> str:
        """The module that the builders are in."""
        return "deepspeedlite.ops.op_builder"

    def build_extension(self) -> Any:
        """Torch's command that compiles extensions for setuptools."""
        from torch.utils.cpp_extension import BuildExtension

        return BuildExtension

    def get_op_builder(self, class_name: str) -> Any:
        """A builder class by its name, such as `CPUAdamBuilder`; None where there is none."""
        from deepspeedlite.compat.op_builders import BUILDERS

        return BUILDERS.get(class_name)

    def create_op_builder(self, class_name: str) -> Any:
        """An instance of it; None where there is none."""
        builder = self.get_op_builder(class_name)
        return None if builder is None else builder()


class _Chosen:
    """The accelerator that scripts are given, once one was asked for."""

    accelerator: DeepSpeedAccelerator | None = None


def get_accelerator() -> DeepSpeedAccelerator:
    """This process's accelerator; the same object every time.

    Raises:
        DistributedError: DS_ACCELERATOR names none, or GPUs that are not there.
    """
    if _Chosen.accelerator is None:
        device = pick_device()
        _Chosen.accelerator = DeepSpeedAccelerator("rocm" if device.is_rocm else device.type)
    return _Chosen.accelerator


def set_accelerator(accel_obj: DeepSpeedAccelerator) -> None:
    """Give scripts this one from now on. The library's own choice is DS_ACCELERATOR's."""
    _Chosen.accelerator = accel_obj


def is_current_accelerator_supported() -> bool:
    """Whether the one in use is one that this library knows.

    Raises:
        DistributedError: DS_ACCELERATOR names none, or GPUs that are not there.
    """
    return get_accelerator().kind in _KINDS


__all__ = [
    "DeepSpeedAccelerator",
    "DistributedError",
    "get_accelerator",
    "is_current_accelerator_supported",
    "set_accelerator",
]
