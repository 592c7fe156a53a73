"""Models larger than one rank's memory: build them sharded, and make parameters whole for a while.

    with deepspeedlite.zero.Init(config_dict_or_path=config):
        model = Transformer(...)            # parameters are sharded as modules are built
    with deepspeedlite.zero.GatheredParameters(model.head.weight, modifier_rank=0):
        if rank == 0:
            model.head.weight.normal_()     # rank 0's values are sent to all

Everything here is collective: every rank of the group takes part, in the same order.

What a model's constructors write into its parts counts, wherever it stands: see the note in `building`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import Any

import torch

from deepspeedlite import comm
from deepspeedlite.comm import Group
from deepspeedlite.config import load_config
from deepspeedlite.offload.options import make_offload
from deepspeedlite.offload.placement import Placement
from deepspeedlite.runtime.device import pick_device
from deepspeedlite.sharded_params.building import Building, built
from deepspeedlite.zero.flat_params import FlatParams, owner_of
from deepspeedlite.zero.wrap import NamedParameter


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

    Parameters on the meta device get memory, and values from what initialises them or the module's `reset_parameters`;
    values differing between ranks are replaced by rank 0's.

    Raises:
        UnsupportedError: `remote_device` is unknown, nothing gives a parameter of the meta device its values, or two
            parameters share memory; the latter two when the context ends.
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
        comm.init_process_group()
        group = data_parallel_group if mpu is None else mpu.get_data_parallel_group()
        self.group = group if isinstance(group, Group) else Group(group)
        self.device = pick_device(comm.get_local_rank()).torch_device
        settings = load_config({}) if source is None else load_config(source, world_size=self.group.size, peek=True)
        if source is not None:
            half = torch.float16 if settings.fp16.enabled else torch.bfloat16 if settings.bf16.enabled else None
            self.dtype = dtype or half
            self.enabled = settings.zero_optimization.stage == 3
        self._offload = make_offload(
            settings, self.group, Placement.of_built(settings.zero_optimization, remote_device)
        )
        self._building = Building(self.group, self.device, self._shard)
        if self.enabled and module is not None:
            with self:
                for part in module.modules():  # as if each was built now
                    self._building.begin(part)
                    self._building.take(part)

    def __enter__(self) -> Init:
        if self.enabled:
            self._building.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.enabled:
            try:
                if error is None:
                    self._building.end()
            finally:
                self._building.__exit__()

    @torch.no_grad()
    def _shard(self, members: Sequence[NamedParameter]) -> None:
        by_dtype: dict[torch.dtype, list[NamedParameter]] = {}
        for member in members:
            param = member.param
            if owner_of(param) is None and param.is_floating_point():
                param.data = param.data.to(self.device, self.dtype or param.dtype)
                by_dtype.setdefault(param.dtype, []).append(member)
        for entries in by_dtype.values():
            built(FlatParams(entries, self.group, sharded=True, offload=self._offload))
