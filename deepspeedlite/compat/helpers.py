"""Small functions that training scripts import from `deepspeed.runtime.utils` and `deepspeed.utils`."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy
import torch

from deepspeedlite.comm import Group
from deepspeedlite.compat.accelerator import get_accelerator
from deepspeedlite.metrics.memory import memory_breakdown
from deepspeedlite.parallel.mpu import replica_of
from deepspeedlite.parallel.replica import Replica
from deepspeedlite.parallel.replica import is_model_parallel_parameter as is_model_parallel_parameter
from deepspeedlite.runtime.device import device_in_use
from deepspeedlite.runtime.errors import ConfigError, UnsupportedError
from deepspeedlite.runtime.log import log_dist, log_once, logger
from deepspeedlite.runtime.tensors import map_tensors

_F = TypeVar("_F", bound=Callable[..., Any])
_LEVELS = ("debug", "info", "warning", "error", "critical")


# --- seeds, devices, memory -------------------------------------------------------------------------------------------


def move_to_device(item: Any, device: Any, criterion_func: Callable[[torch.Tensor], bool] | None = None) -> Any:
    """`item` with its tensors on `device`; those alone that `criterion_func` says yes to."""
    return map_tensors(
        item, lambda tensor: tensor.to(device) if criterion_func is None or criterion_func(tensor) else tensor
    )


def set_random_seed(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators, the GPUs' too."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def copy_to_device(item: Any, device: Any, criterion_func: Callable[[torch.Tensor], bool]) -> Any:
    """As `move_to_device`, but those that are moved are detached copies that require grad as their originals do."""

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        if not criterion_func(tensor):
            return tensor
        return tensor.detach().to(device, copy=True).requires_grad_(tensor.requires_grad)

    return map_tensors(item, copied)


def empty_cache() -> None:
    """Give memory that the GPU's allocator holds and no tensor uses back to the driver."""
    get_accelerator().empty_cache()


def get_ma_status() -> int:
    """Bytes of the device that tensors use; 0 on a CPU."""
    return device_in_use().memory_stats().get("allocated_bytes", 0)


def memory_status(msg: str, print_rank: int = -1, reset_max: bool = False) -> None:
    """Log `msg` and the memory in use, from one rank or (-1) from all."""
    log_dist(f"{msg} | {memory_breakdown()}", ranks=[print_rank])
    if reset_max:
        get_accelerator().reset_peak_memory_stats()


def get_tensor_bytes(item: Any) -> int:
    """Bytes of all tensors in lists, tuples and dicts."""
    total = 0

    def add(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.nbytes
        return tensor

    map_tensors(item, add)
    return total


def clone_tensors_for_torch_save(item: Any, device: Any = "cpu") -> Any:
    """Copies of tensors that are views of larger storages, which `torch.save` would write whole.

    Tied tensors stay tied: the same memory, seen alike, is copied once, and written once by those who look for it.
    """
    copies: dict[Any, torch.Tensor] = {}

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() == 0 or tensor.is_meta or tensor.layout is not torch.strided:
            return tensor.detach().to(device, copy=True)
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in copies:
            copies[key] = tensor.detach().to(device, copy=True)
        return copies[key]

    return map_tensors(item, copy)


# --- norms ------------------------------------------------------------------------------------------------------------


def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor], max_norm: float, norm_type: float = 2, mpu: Any = None
) -> torch.Tensor:
    """Scale gradients in place so that their norm is at most `max_norm`, and return the norm before.

    With an `mpu` the norm is that of the whole model over its model-parallel group: pieces of every rank, and what all
    ranks hold alike once.
    """
    listed = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    with_grad = [param for param in listed if param.grad is not None]
    replica = Replica() if mpu is None else replica_of(mpu)
    counted = [param.grad for param in with_grad if replica.counts(param)]
    device = with_grad[0].grad.device if with_grad else device_in_use().torch_device  # type: ignore[union-attr]
    total = _total_norm([grad for grad in counted if grad is not None], float(norm_type), replica.group, device)
    scale = float(max_norm) / (total + 1e-6)
    for param in with_grad:
        assert param.grad is not None
        param.grad.mul_(scale.clamp(max=1.0).to(param.grad.device))
    return total


def _total_norm(tensors: Sequence[torch.Tensor], norm_type: float, group: Group, device: torch.device) -> torch.Tensor:
    norms = [torch.linalg.vector_norm(tensor.detach().float(), norm_type).to(device) for tensor in tensors]
    if math.isinf(norm_type):
        total = torch.stack(norms).max() if norms else torch.zeros((), device=device)
        group.all_reduce(total, "max")
        return total
    total = torch.stack(norms).pow(norm_type).sum() if norms else torch.zeros((), device=device)
    group.all_reduce(total, "sum")
    return total.pow(1.0 / norm_type)


def get_global_norm(norm_list: Iterable[float]) -> float:
    """The 2-norm of what has these 2-norms."""
    return math.sqrt(sum(float(norm) ** 2 for norm in norm_list))


def get_global_norm_of_tensors(
    input_tensors: Iterable[torch.Tensor], norm_type: float = 2, mpu: Any = None, moe_ep_group: Any = None
) -> torch.Tensor:
    """The norm of all tensors together, over the `mpu`'s model-parallel group too.

    Raises:
        UnsupportedError: an expert-parallel group was given.
    """
    if moe_ep_group is not None:
        raise UnsupportedError(
            "get_global_norm_of_tensors(moe_ep_group=...): expert parallelism is not in this release"
        )
    listed = list(input_tensors)
    device = listed[0].device if listed else device_in_use().torch_device
    group = Group.alone() if mpu is None else replica_of(mpu).group
    return _total_norm(listed, float(norm_type), group, device)


def clip_tensors_by_global_norm(
    input_tensors: Iterable[torch.Tensor],
    max_norm: float = 1.0,
    global_norm: Any = None,
    mpu: Any = None,
    eps: float = 1e-6,
) -> Any:
    """Scale tensors in place so that their norm (`global_norm`, if known) is at most `max_norm`; return the norm."""
    listed = list(input_tensors)
    norm = get_global_norm_of_tensors(listed, mpu=mpu) if global_norm is None else global_norm
    scale = max_norm / (float(norm) + eps)
    if scale < 1:
        for tensor in listed:
            tensor.detach().mul_(scale)
    return norm


def has_inf_or_nan(x: torch.Tensor) -> torch.Tensor:
    """Whether a tensor has an element that is no finite number, as a tensor on its device."""
    return ~torch.isfinite(x.detach()).all()


# --- odds and ends ----------------------------------------------------------------------------------------------------


class DummyOptim:
    """Stands for an optimizer where parameters are only to be held: `param_groups` of one group, no step."""

    def __init__(self, params: Any) -> None:
        self.param_groups = [{"params": params}]


def noop_decorator(func: _F) -> _F:
    """`func` itself."""
    return func


def ensure_directory_exists(filename: str) -> None:
    """Make the folder that a file is to be written to."""
    os.makedirs(os.path.dirname(filename) or ".", exist_ok=True)


def get_only_unique_item(items: Iterable[Any]) -> Any:
    """The one value that all items have. Raises `RuntimeError` where there are several, or none."""
    distinct = set(items)
    if len(distinct) != 1:
        raise RuntimeError(f"expected one distinct value, got {len(distinct)}: {sorted(map(str, distinct))}")
    return distinct.pop()


def instrument_w_nvtx(func: _F) -> _F:
    """Mark `func`'s calls as ranges that NVIDIA's and AMD's profilers show; on a CPU it costs one check."""

    @functools.wraps(func)
    def marked(*args: Any, **kwargs: Any) -> Any:
        accelerator = get_accelerator()
        accelerator.range_push(func.__qualname__)
        try:
            return func(*args, **kwargs)
        finally:
            accelerator.range_pop()

    return marked  # type: ignore[return-value]


def is_compile_supported() -> bool:
    """True: every torch that this library runs on can compile."""
    return True


def required_torch_version(min_version: float | None = None, max_version: float | None = None) -> bool:
    """Whether torch's version lies within bounds, both given as numbers such as 2.1; at least one is needed."""
    if min_version is None and max_version is None:
        raise ConfigError("required_torch_version needs min_version or max_version")
    here = tuple(int(part) for part in torch.__version__.split(".")[:2])
    least, most = ((int(v), round(v * 10 % 10)) if v is not None else None for v in (min_version, max_version))
    return (least is None or here >= least) and (most is None or here <= most)


def print_dist(message: str, ranks: list[int] | None = None) -> None:
    """Log a line from the given ranks (None or -1: all of them)."""
    log_dist(message, ranks=ranks or [-1])


def warning_once(message: str) -> None:
    """Log a warning the first time it is met."""
    log_once(message, logging.WARNING)


def set_log_level_from_string(log_level_str: str, custom_logger: logging.Logger | None = None) -> None:
    """Set how much is logged: debug, info, warning, error or critical. Raises `ConfigError` for another word."""
    if log_level_str.lower() not in _LEVELS:
        raise ConfigError(f"log level {log_level_str!r} is not known; use one of {', '.join(_LEVELS)}")
    (custom_logger or logger).setLevel(log_level_str.upper())


# --- around the engine ------------------------------------------------------------------------------------------------


def autocast_if_enabled(engine: Any) -> contextlib.AbstractContextManager[Any]:
    """torch.autocast as the engine's configuration has it; where its section is off, a context that does nothing."""
    dtype = engine.torch_autocast_dtype()
    return torch.autocast(engine.device.type, dtype) if dtype is not None else contextlib.nullcontext()


def recursive_getattr(model: Any, module_name: str) -> Any:
    """The attribute of this dotted name, such as "encoder.layers.0"."""
    return functools.reduce(getattr, module_name.split("."), model)


def recursive_setattr(model: Any, module_name: str, module: Any) -> None:
    """Put `module` where the dotted name leads."""
    parent, _, name = module_name.rpartition(".")
    setattr(recursive_getattr(model, parent) if parent else model, name, module)
