"""State dicts of a model that an engine trains: whole, and in memory that lives on.

At stages 0 to 2 there is nothing to do but for values that were loaded: the optimizer takes them over. At stage 3 every
module, inside leaves too, unshards its own parameters while it writes or reads them; what it wrote is copied before
they go again. A leaf unshards all that is in it, once.

The ranks meet before anything is unsharded. One that is left alone unshards nothing: what it reads its state dict for
is often no value (see `MissingTensor`), and what it was to load is an error.

[Note: calls that end in an exception]
torch calls no hook then, and what was held would stay whole, and old, through the steps to come. So the calls under way
are kept in order: one that finds itself among them knows those to be dead, and so does a forward pass.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from deepspeedlite.comm.roll_call import PATIENCE_S
from deepspeedlite.runtime.errors import DistributedError
from deepspeedlite.runtime.log import logger
from deepspeedlite.zero.flat_params import FlatParams, ParamState, full_shape, owners_of
from deepspeedlite.zero.missing import MissingTensor
from deepspeedlite.zero.plain import Hook, copy_plainly, end_plain_copies


@dataclass(frozen=True)
class _Call:
    """A module's `state_dict` or `load_state_dict` under way, and what it holds."""

    module: torch.nn.Module
    held: list[FlatParams]


class StateDicts:
    """The hooks of one model's state dicts.

    Args:
        root: the model.
        leaves: modules whose parameters are unsharded as one.
    """

    def __init__(self, root: torch.nn.Module, leaves: Collection[torch.nn.Module] = ()) -> None:
        self._leaves = set(leaves)
        self._names = {module: name for name, module in root.named_modules()}
        self._calls: list[_Call] = []
        self._written: Mapping[str, Any] | None = None  # the dict that the calls under way write
        self._copies: dict[tuple[Any, ...], torch.Tensor] = {}  # in it, by what they are copies of: tied ones are one
        self._alone = ""  # why the calls under way have no values on this rank; empty if they have
        self._handles: list[Any] = []
        # torch.jit's take no hooks: what they hold is read and written with the module that has them.
        self._modules = [module for module in root.modules() if not isinstance(module, torch.jit.ScriptModule)]
        sharded = any(owner.sharded for owner in owners_of(root.parameters()))
        for module in self._modules:
            copy_plainly(module)
            self._handles += [
                module.register_load_state_dict_pre_hook(Hook(self._before_load)),
                module.register_load_state_dict_post_hook(Hook(self._after_load)),
            ]
            if sharded:
                self._handles += [
                    module.register_state_dict_pre_hook(Hook(self._before_state_dict)),
                    module.register_state_dict_post_hook(Hook(self._after_state_dict)),
                ]

    # --- what is held while a module is written or read -------------------------------------------------------------

    def _sharded_in(self, module: torch.nn.Module) -> list[FlatParams]:
        params = module.parameters() if module in self._leaves else module._parameters.values()
        return [owner for owner in owners_of(param for param in params if param is not None) if owner.sharded]

    def _meet(self, module: torch.nn.Module, call: str) -> str:
        """Wait for the other ranks where something is to be unsharded; why there are none, if they do not come."""
        away = [o for o in owners_of(module.parameters()) if o.sharded and o.state is not ParamState.UNSHARDED]
        if not away:
            return ""
        group, name = away[0].group, self._names[module]
        call = f"{call} of {name or 'the model'} ({type(module).__name__})"
        missing = group.roll_call(call, f"{away[0].key} {name} {call}", weight=sum(owner.numel for owner in away))
        return missing and (
            f"{call} was called on rank {group.ranks[group.rank]}, and not on {missing} within {PATIENCE_S:.0f} "
            "s. At ZeRO stage 3 the values are sharded over the ranks: call it on all of them (after a barrier, if "
            "some may be late), engine.save_16bit_model(folder) on all of them for a file, or use the parameters "
            "inside zero.GatheredParameters(parameters), which all of them enter"
        )

    def _enter(self, module: torch.nn.Module, what: str) -> None:
        self._leave(module)  # an earlier call of it has died
        if not self._calls:
            self._alone = self._meet(module, what)
        held = {owner for call in self._calls for owner in call.held}
        call = _Call(module, [])
        self._calls.append(call)
        try:
            for owner in self._sharded_in(module) if not self._alone else ():
                if owner not in held:
                    owner.begin_use()
                    call.held.append(owner)
        except BaseException:
            self.forget()
            raise

    def _leave(self, module: torch.nn.Module) -> None:
        """The call of this module is over, and so is whatever it called."""
        place = next((index for index, call in enumerate(self._calls) if call.module is module), len(self._calls))
        for call in self._calls[place:]:
            for owner in call.held:
                owner.end_use()
        del self._calls[place:]
        if not self._calls:
            self._written, self._copies, self._alone = None, {}, ""

    def forget(self, in_use: bool = True) -> None:
        """Calls that seem to be under way have died; `in_use`: and what they held is still counted as used."""
        if self._calls and in_use:
            self._leave(self._calls[0].module)
        self._calls.clear()

    # --- writing ----------------------------------------------------------------------------------------------------

    def _before_state_dict(self, module: torch.nn.Module, prefix: str, keep_vars: bool) -> None:
        self._enter(module, "state_dict()")
        if self._alone and len(self._calls) == 1:
            logger.warning("%s. Here are names and shapes; reading or saving a value is an error", self._alone)

    def _after_state_dict(self, module: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        if self._written is not state:
            self._written, self._copies = state, {}
        if self._alone:
            self._note_missing(module, state, prefix)
        buffers = {owner.values.untyped_storage().data_ptr(): owner for owner in self._sharded_in(module)}
        names = [prefix + name for name in module._parameters] if _writes_as_torch(module) else list(state)
        for name in names if buffers else ():
            value = state.get(name)
            if name.startswith(prefix) and isinstance(value, torch.Tensor):
                owner = buffers.get(value.untyped_storage().data_ptr())
                if owner is not None and value.numel():
                    state[name] = self._copy(owner, value)
        self._leave(module)

    def _note_missing(self, module: torch.nn.Module, state: dict[str, Any], prefix: str) -> None:
        shapes = {prefix + name: full_shape(param) for name, param in module._parameters.items() if param is not None}
        for name in shapes if _writes_as_torch(module) else list(state):
            value = state.get(name)
            if name.startswith(prefix) and isinstance(value, torch.Tensor) and not value.numel():
                missing = MissingTensor.of(shapes.get(name, value.shape), value.dtype, self._alone)
                state[name] = missing.requires_grad_(value.requires_grad)

    def _copy(self, owner: FlatParams, value: torch.Tensor) -> torch.Tensor:
        is_param = isinstance(value, torch.nn.Parameter)  # with keep_vars
        where = (owner, value.storage_offset(), value.shape, value.stride(), value.dtype)
        what = (*where, is_param, value.requires_grad)
        if what not in self._copies:
            copy = value.detach().clone()
            self._copies[what] = (torch.nn.Parameter(copy) if is_param else copy).requires_grad_(value.requires_grad)
        return self._copies[what]

    # --- reading ----------------------------------------------------------------------------------------------------

    def _before_load(self, module: torch.nn.Module, *args: Any) -> None:
        self._enter(module, "load_state_dict()")
        if self._alone:
            why = self._alone
            self.forget()
            raise DistributedError(why)

    def _after_load(self, module: torch.nn.Module, incompatible: Any) -> None:
        call = next((call for call in self._calls if call.module is module), None)
        for owner in call.held if call is not None else ():
            owner.keep_changes()
        if call is not None and call is self._calls[0]:
            for owner in owners_of(module.parameters()):
                if not owner.sharded:
                    owner.note_new_values()
        self._leave(module)

    def again(self) -> StateDicts:
        """The hooks of the same module, after `close`."""
        return StateDicts(self._modules[0], self._leaves)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        for module in self._modules:
            end_plain_copies(module)


def _writes_as_torch(module: torch.nn.Module) -> bool:
    """Whether a module's own entries are its parameters under their names, as far as can be known."""
    return (
        type(module)._save_to_state_dict is torch.nn.Module._save_to_state_dict
        and len(module._state_dict_hooks) == len(module._state_dict_pre_hooks) == 1
    )
