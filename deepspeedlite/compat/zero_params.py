"""What DeepSpeed puts on parameters of stage 3 beside what `zero` says of them: gathering by hand, a summary.

    param.all_gather()      # collective; its values are there, until
    param.partition()       # or partition(has_been_updated=True), which keeps what every rank wrote into its part

`zero.GatheredParameters` does the same for many at once, also leaves by an exception, and sends one rank's changes to
all. `describe` is called for every parameter that `zero.Init` or an engine has sharded or left whole.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from deepspeedlite.comm import Group
from deepspeedlite.compat.zero import ZeroParamType
from deepspeedlite.runtime.errors import EngineStateError
from deepspeedlite.sharded_params import init
from deepspeedlite.sharded_params.building import reshard_active
from deepspeedlite.zero import prefetch
from deepspeedlite.zero.flat_params import FlatParams, describe_as_whole, owner_of
from deepspeedlite.zero.wrap import NamedParameter


class Init(init.Init):
    __doc__ = init.Init.__doc__

    def _shard(self, members: Sequence[NamedParameter]) -> None:
        super()._shard(members)
        describe((member.param for member in members), self.group)


def describe(parameters: Iterable[torch.Tensor], group: Group) -> None:
    """Give parameters at stage 3 what clients ask of them, sharded or not; `group` are the ranks that they are over."""
    for param in parameters:
        if not hasattr(param, "ds_id"):
            describe_as_whole(param, group)
        owner = owner_of(param)
        if not isinstance(getattr(param, "all_gather", None), _Method):
            methods = _Methods(param)
            for name in ("all_gather", "partition", "ds_summary", "aligned_size", "padding_size", "item"):
                setattr(param, name, _Method(methods, name))
            param.all_gather_coalesced = param.all_gather  # type: ignore[attr-defined]
        held_by = group if owner is None else owner.group
        world = dist.group.WORLD if dist.is_initialized() else None
        vars(param).update(
            ds_param_type=ZeroParamType.PARTITIONED,
            ds_persist=owner is None or not owner.sharded,
            ds_process_group=held_by.process_group or world,
            ds_zero_partition_rank=held_by.rank,
            ds_zero_partition_world_size=held_by.size,
            ds_secondary_tensor=None,
            is_external_param=False,
        )


def register_external_parameter(module: torch.nn.Module, parameter: torch.Tensor) -> None:
    """Say that `module`'s forward reads a parameter of another module, so that it is whole then.

    Reading `other.weight` in a forward, or being returned by another module, is noticed without this; it is needed
    where the parameter was put aside first.

    Raises:
        EngineStateError: `parameter` is not a Parameter.
    """
    prefetch.register_external_parameter(module, parameter)
    vars(parameter).setdefault("ds_read_by", weakref.WeakSet()).add(module)


def unregister_external_parameter(module: torch.nn.Module, parameter: torch.Tensor) -> None:
    """Take back what `register_external_parameter` said. An engine that has learnt of it still makes the parameter
    whole for the module's calls, which costs time and changes no result.

    Raises:
        EngineStateError: `parameter` is not a Parameter, or was not registered for this module.
    """
    if not isinstance(parameter, torch.nn.Parameter) or module not in vars(parameter).get("ds_read_by", ()):
        raise EngineStateError(
            f"unregister_external_parameter: {type(parameter).__name__} of shape {tuple(parameter.shape)} is not "
            f"registered as an external parameter of this {type(module).__name__}"
        )
    vars(parameter)["ds_read_by"].discard(module)


class _Methods:
    """The methods of one parameter, which holds them; so they know it weakly."""

    def __init__(self, param: torch.Tensor) -> None:
        self._param = weakref.ref(param)
        self._held: FlatParams | None = None  # what `all_gather` has made whole

    @property
    def param(self) -> Any:
        return self._param()

    def all_gather(
        self, param_list: Iterable[torch.Tensor] | None = None, async_op: bool = False, hierarchy: int = 0
    ) -> None:
        """Make this parameter, or those given, whole on every rank until `partition`. Collective.

        Raises:
            UnsupportedError: see `zero.GatheredParameters`.
        """
        reshard_active()
        for methods in self._of(param_list):
            owner = owner_of(methods.param)
            if methods._held is None and owner is not None and owner.sharded:
                owner.begin_use()
                methods._held = owner

    def partition(
        self,
        param_list: Iterable[torch.Tensor] | None = None,
        hierarchy: int = 0,
        has_been_updated: bool = False,
        free_data: bool = True,
    ) -> None:
        """End what `all_gather` began, unless something else needs the values too. Every rank of the group calls it.

        Args:
            param_list: other parameters than this one.
            hierarchy: taken for DeepSpeed's sake.
            has_been_updated: keep what was written meanwhile, of each element what the rank wrote that has it.
            free_data: taken for DeepSpeed's sake: memory is freed when nobody needs the values.
        """
        for methods in self._of(param_list):
            owner, methods._held = methods._held, None
            if owner is None or owner_of(methods.param) is not owner:
                continue
            if has_been_updated:
                if wrong := owner.take_replaced():
                    raise EngineStateError(wrong)
                owner.keep_changes()
            owner.end_use(reshard=False)
            if owner.sharded and owner.uses == 0 and owner.others_have_tensors():
                owner.give_buffer_away()
            owner.reshard()

    def ds_summary(self, use_debug_name: bool = False) -> dict[str, Any]:
        """What DeepSpeed prints of a parameter in its messages."""
        param = self.param
        shard = getattr(param, "ds_tensor", None)
        return {
            "id": param.ds_id,
            "status": param.ds_status.name,
            "numel": param.numel(),
            "ds_numel": param.ds_numel,
            "shape": tuple(param.shape),
            "ds_shape": tuple(param.ds_shape),
            "requires_grad": param.requires_grad,
            "grad_shape": None if param.grad is None else tuple(param.grad.shape),
            "persist": param.ds_persist,
            "active_sub_modules": param.ds_active_sub_modules,
            "ds_tensor.shape": None if shard is None else shard.shape,
        }

    def aligned_size(self) -> int:
        """Its elements, up to a multiple of the ranks."""
        return int(self.param.ds_numel) + self.padding_size()

    def padding_size(self) -> int:
        """What is missing to a multiple of the ranks."""
        return -int(self.param.ds_numel) % int(self.param.ds_zero_partition_world_size)

    def item(self) -> Any:
        """The value of a parameter of one element. Collective where it is sharded."""
        was_held = self._held is not None
        self.all_gather()
        try:
            return torch.Tensor.item(self.param)
        finally:
            if not was_held:
                self.partition()

    def _of(self, params: Iterable[torch.Tensor] | None) -> list[_Methods]:
        """Those of other parameters, in the order in which they were sharded: the same on every rank."""
        if params is None:
            return [self]
        described = [param for param in params if isinstance(getattr(param, "all_gather", None), _Method)]
        return [param.all_gather.methods for param in sorted(described, key=lambda param: param.ds_id)]  # type: ignore[attr-defined]


class _Method:
    """One of a parameter's methods."""

    def __init__(self, methods: _Methods, name: str) -> None:
        self.methods, self._name = methods, name
        self.__doc__ = getattr(methods, name).__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.methods, self._name)(*args, **kwargs)
