"""Models larger than one rank's memory: build them sharded, and make parameters whole for a while.

    with deepspeedlite.zero.Init(config_dict_or_path=config):
        model = Transformer(...)            # every module's parameters are sharded as soon as it is built
    with deepspeedlite.zero.GatheredParameters(model.head.weight, modifier_rank=0):
        if rank == 0:
            model.head.weight.normal_()     # rank 0's values are sent to all

Everything here is collective: every rank of the group takes part, in the same order.

[Note: when a module is built]
`Init` shards a module's own parameters when the module is given to its parent, which is when its constructor has ended;
the outermost modules are sharded when the context ends. For that, `torch.nn.Module.__setattr__`, `add_module` and
`__init__` are wrapped while any `Init` is active. Values that a parent's constructor writes into a child afterwards
find an empty tensor: write them in `GatheredParameters`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from os import PathLike
from types import TracebackType
from typing import Any

import torch

from deepspeedlite import comm
from deepspeedlite.comm import Group
from deepspeedlite.config import DeepSpeedConfig, load_config
from deepspeedlite.device import pick_device
from deepspeedlite.errors import ConfigError, UnsupportedError
from deepspeedlite.memory.offload import make_offload
from deepspeedlite.memory.placement import Placement, Tier
from deepspeedlite.zero.values import FlatValues, owner_of
from deepspeedlite.zero.wrap import NamedParameter

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ACTIVE: list[Init] = []


class Init:
    """Shard parameters over the ranks as modules are built (a context), or those of a module that exists.

    Args:
        module: shard this module's parameters at once.
        data_parallel_group: the ranks to shard over; all of them by default.
        mem_efficient_linear: taken for compatibility; nothing here needs it.
        remote_device: where shards live while nobody gathers them: "none", "cpu", or "nvme", which needs the
            configuration's `offload_param`. What that section says if None.
        pin_memory: taken for compatibility; the configuration says it.
        config_dict_or_path: the configuration: its 16-bit section is the default of `dtype`, and with a stage below 3
            nothing is sharded.
        config: an older name of `config_dict_or_path`.
        enabled: False makes the context do nothing.
        dtype: floating-point parameters are cast to it; as they are built by default.
        mpu: a Megatron-style object whose data-parallel group is used.

    Parameters on the meta device get memory when they are sharded, and their values from the module's
    `reset_parameters`; values differing between ranks are replaced by rank 0's.

    Raises:
        UnsupportedError: `remote_device` is unknown, or a meta module has no `reset_parameters`.
        ConfigError: "nvme" without a configuration that says where.
        OffloadError: the disk cannot be used, or has no room.
    """

    def __init__(
        self,
        module: torch.nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: str | PathLike[str] | Mapping[str, Any] | None = None,
        config: str | PathLike[str] | Mapping[str, Any] | None = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
    ) -> None:
        self.enabled = enabled
        self.dtype = dtype
        source = config_dict_or_path if config_dict_or_path is not None else config
        if not enabled:
            return
        comm.init_distributed()
        group = data_parallel_group if mpu is None else mpu.get_data_parallel_group()
        self.group = group if isinstance(group, Group) else Group(group)
        self.device = pick_device(comm.get_local_rank()).torch_device
        settings = load_config({}) if source is None else load_config(source, world_size=self.group.size, peek=True)
        if source is not None:
            half = torch.float16 if settings.fp16.enabled else torch.bfloat16 if settings.bf16.enabled else None
            self.dtype = dtype or half
            self.enabled = settings.zero_optimization.stage == 3
        self._offload = make_offload(settings, self.group, _placement(settings, remote_device))
        self._built: list[weakref.ref[torch.nn.Module]] = []
        if self.enabled and module is not None:
            self.shard(module)

    def __enter__(self) -> Init:
        if self.enabled:
            if not _ACTIVE:
                _wrap_module()
            _ACTIVE.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if not self.enabled:
            return
        _ACTIVE.remove(self)
        if not _ACTIVE:
            _unwrap_module()
        if error is None:
            for reference in self._built:
                module = reference()
                if module is not None:
                    self.shard(module)

    def built(self, module: torch.nn.Module) -> None:
        """A module's construction has begun; whatever becomes of it, it is sharded when the context ends."""
        self._built.append(weakref.ref(module))

    @torch.no_grad()
    def shard(self, module: torch.nn.Module) -> None:
        """Shard all parameters in `module` that are not sharded yet, module by module."""
        for name, part in module.named_modules():
            if any(param is not None and param.is_meta for param in part._parameters.values()):
                self._materialise(part)
            by_dtype: dict[torch.dtype, list[NamedParameter]] = {}
            for key, param in part.named_parameters(recurse=False):
                if owner_of(param) is None and param.is_floating_point():
                    param.data = param.data.to(self.device, self.dtype or param.dtype)
                    entry = NamedParameter(f"{name}.{key}" if name else key, param, 0)
                    by_dtype.setdefault(param.dtype, []).append(entry)
            for entries in by_dtype.values():
                FlatValues(entries, self.group, sharded=True, home=self._offload.home)

    def _materialise(self, module: torch.nn.Module) -> None:
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is None:
            raise UnsupportedError(
                f"zero.Init: {type(module).__name__} was built on the meta device and has no reset_parameters() to "
                "give its parameters values; add one, or build the model without torch.device('meta')"
            )
        for key, param in module._parameters.items():
            if param is not None and param.is_meta:
                fresh = torch.empty_like(param, device=self.device)
                module._parameters[key] = torch.nn.Parameter(fresh, requires_grad=param.requires_grad)
        reset()


def _placement(settings: DeepSpeedConfig, remote_device: str | None) -> Placement:
    """Where shards live; nothing else is placed here."""
    section = settings.zero_optimization.offload_param
    device = section.device if remote_device is None else {"cuda": "none"}.get(remote_device, remote_device)
    if device not in ("none", "cpu", "nvme"):
        raise UnsupportedError(f"zero.Init(remote_device={remote_device!r}): use none, cpu or nvme")
    if device == "nvme" and not section.nvme_path:
        raise ConfigError('zero.Init(remote_device="nvme") needs zero_optimization.offload_param.nvme_path')
    return Placement(params=Tier(device))


def _wrap_module() -> None:
    """Tell the active `Init` of every module that is built, and of every one that is given to a parent."""
    kind = torch.nn.Module
    init, setattr_, add_module = kind.__init__, kind.__setattr__, kind.add_module

    def wrapped_init(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        _ACTIVE[-1].built(self)

    def wrapped_setattr(self: torch.nn.Module, name: str, value: Any) -> None:
        if isinstance(value, torch.nn.Module):
            _ACTIVE[-1].shard(value)
        setattr_(self, name, value)

    def wrapped_add(self: torch.nn.Module, name: str, module: torch.nn.Module | None) -> None:
        if isinstance(module, torch.nn.Module):
            _ACTIVE[-1].shard(module)
        add_module(self, name, module)

    _ORIGINALS.update(__init__=init, __setattr__=setattr_, add_module=add_module)
    for name, wrapper in (("__init__", wrapped_init), ("__setattr__", wrapped_setattr), ("add_module", wrapped_add)):
        setattr(kind, name, wrapper)


def _unwrap_module() -> None:
    for name, original in _ORIGINALS.items():
        setattr(torch.nn.Module, name, original)
    _ORIGINALS.clear()


_ORIGINALS: dict[str, Callable[..., Any]] = {}
