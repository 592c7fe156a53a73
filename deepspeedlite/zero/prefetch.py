"""When sharded parameters are whole: module hooks that unshard them before use and reshard them after it.

A module *uses* the flat values of its own parameters; a block also holds those of everything in it, so that they are
unsharded once for the whole block. In a forward pass values are held from a user's pre-hook to its post-hook. For the
backward pass every output of a user carries a hook that opens the values again; they are closed when nothing in the
pass can need them any more:

- trained values, when all their gradients have arrived: each use of a parameter comes before its gradient;
- frozen values, and those of leaf modules, when the gradients of all inputs of all opened calls have been computed;
- the rest, such as values of which one parameter was not used, when the pass ends.

The order of uses is recorded. From the second pass on, the values used next are unsharded ahead of time, and values
that are used again soon are not resharded in between.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch

from deepspeedlite.runtime.errors import EngineStateError
from deepspeedlite.runtime.tensors import tensors_in
from deepspeedlite.zero.flat_params import FlatParams, ParamState, owner_of
from deepspeedlite.zero.missing import ShardedParameter
from deepspeedlite.zero.plain import Hook
from deepspeedlite.zero.state_dicts import StateDicts
from deepspeedlite.zero.use_order import LookAhead, PrefetchLimits, UseTrace


class _Call:
    """One forward call of a module: what it holds, and the backward pass that has opened it."""

    __slots__ = ("held", "inputs", "module", "opened_in", "undone")

    def __init__(self, module: torch.nn.Module, held: list[FlatParams]) -> None:
        self.module, self.held = module, held
        self.opened_in = -1
        self.inputs = self.undone = 0  # inputs that get a gradient, and those of them whose gradient is still to come


class _WatchedParameters(dict[str, Any]):
    """A module's parameters, which tells when one that has no values at the moment is read."""

    def __init__(self, parameters: Mapping[str, Any], on_empty: Callable[[torch.Tensor], None]) -> None:
        super().__init__(parameters)
        self._on_empty = on_empty

    def __getitem__(self, name: str) -> Any:
        param = super().__getitem__(name)
        if param is not None and (type(param) is ShardedParameter or param.numel() == 0):
            self._on_empty(param)
        return param

    def items(self) -> Any:  # what Module.parameters() goes through
        if torch._guards.TracingContext.try_get() is not None:
            return super().items()  # the compiler looks for parameters of the whole model, and needs no values
        return ((name, self[name]) for name in self)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # copies of a module are plain modules


_PREFETCHERS: WeakKeyDictionary[FlatParams, ReferenceType[ParamPrefetcher]] = WeakKeyDictionary()
# Parameters that a module was said to read before there was an engine.
_EXTERNAL: WeakKeyDictionary[torch.nn.Module, list[torch.Tensor]] = WeakKeyDictionary()


def register_external_parameter(module: torch.nn.Module, parameter: torch.Tensor) -> None:
    """Say that `module`'s forward reads a parameter of another module, so that it is whole then.

    Reading `other.weight` in a forward is noticed without this; it is needed where the parameter was put aside first.

    Raises:
        EngineStateError: `parameter` is not a Parameter.
    """
    if not isinstance(parameter, torch.nn.Parameter):
        kind = type(parameter).__name__
        raise EngineStateError(f"register_external_parameter needs a torch.nn.Parameter, got {kind}")
    prefetcher = _prefetcher_of(parameter)
    if prefetcher is not None:
        prefetcher.add_user(module, parameter)
    else:
        _EXTERNAL.setdefault(module, []).append(parameter)


def _prefetcher_of(param: torch.Tensor) -> ParamPrefetcher | None:
    owner = owner_of(param)
    reference = None if owner is None else _PREFETCHERS.get(owner)
    return None if reference is None else reference()


def is_prefetched(param: torch.Tensor) -> bool:
    """Whether an engine unshards a parameter; one that `zero.Init` alone has sharded is empty in a pass."""
    return _prefetcher_of(param) is not None


class ParamPrefetcher:
    """Unshards and reshards the sharded values of one model.

    Args:
        root: the model.
        owners: its sharded flat values, trained and frozen.
        leaves: modules whose parameters are unsharded as one, whatever happens inside.
        limits: prefetching and reuse.
        trace: the order of their uses; the owners tell it when they come to life.
        state_dicts: the model's; none are under way when a pass starts.
    """

    def __init__(
        self,
        root: torch.nn.Module,
        owners: Sequence[FlatParams],
        leaves: Collection[torch.nn.Module] = (),
        limits: PrefetchLimits | None = None,
        *,
        trace: UseTrace,
        state_dicts: StateDicts,
    ) -> None:
        self.owners = list(owners)
        self._state_dicts = state_dicts
        self.limits = limits or PrefetchLimits()
        self.trace = trace
        self._unshards, self._fetches = LookAhead(self.trace), LookAhead(self.trace)
        self._owned = frozenset(self.owners)
        self._pass = 0
        self._in_backward = False
        self._recording = True
        self._open: dict[FlatParams, int] = {}  # held for backward, and how many opened calls count on it
        self._users: dict[torch.nn.Module, list[FlatParams]] = {}
        self._closers: dict[torch.nn.Module, set[FlatParams]] = {}
        # Read by modules that do not have them, perhaps detached: their gradients do not tell when they are done with.
        self._read_elsewhere: set[FlatParams] = set()
        self._running: list[_Call] = []
        self._handles: list[Any] = []
        self._is_hidden = False  # whether the hooks are hidden from torch.compile
        self._has_stores = any(not owner.store.is_here for owner in self.owners)
        self._find_users(root, set(leaves))
        for module in list(self._users):
            self._attach(module)
        for owner in self.owners:
            _PREFETCHERS[owner] = ref(self)
        for module in root.modules():
            for param in _EXTERNAL.get(module, ()):
                self.add_user(module, param)
        self._modules = [module for module in root.modules() if module._parameters]
        self._watch_reads()

    # --- who uses what --------------------------------------------------------------------------------------------

    def _find_users(self, root: torch.nn.Module, leaves: set[torch.nn.Module]) -> None:
        leaf_of = {module: leaf for leaf in leaves for module in leaf.modules()}
        holders: dict[FlatParams, list[torch.nn.Module]] = {owner: [] for owner in self.owners}
        for module in root.modules():
            if leaf_of.get(module, module) is not module:
                continue
            if any(True for _ in module.children()):
                self._users.setdefault(module, [])  # may read the parameters of others in its forward
            for param in module.parameters(recurse=module in leaves):
                owner = owner_of(param)
                if owner is not None and owner in self._owned:
                    self._add_user(module, owner)
                    holders[owner].append(module)
        for owner in self.owners:
            home = _common_home(root, owner)
            home = leaf_of.get(home, home)
            self._add_user(home, owner)
            if owner.unit is None or any(holder in leaves for holder in holders[owner]):
                inside = set(home.modules())
                for module in (home, *(holder for holder in holders[owner] if holder not in inside)):
                    self._closers.setdefault(module, set()).add(owner)

    def _add_user(self, module: torch.nn.Module, owner: FlatParams) -> None:
        owners = self._users.setdefault(module, [])
        if owner not in owners:
            owners.append(owner)

    def _attach(self, module: torch.nn.Module) -> None:
        before, after = Hook(self._hidden(self._pre_forward)), Hook(self._hidden(self._post_forward))
        self._handles += [
            module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
            module.register_forward_hook(after, always_call=True),
        ]

    def _watch_reads(self) -> None:
        on_empty = self._hidden(self._read_outside)
        for module in self._modules:
            module.__dict__["_parameters"] = _WatchedParameters(dict(module._parameters), on_empty)

    def _hidden(self, call: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compiler.disable(call, reason="parameters are sharded") if self._is_hidden else call

    def _hide_hooks(self) -> None:
        """Have compiled graphs end before what is called here, and go on after it.

        torch.compile would trace into a hook, and guard on whatever it reads of our state. This is done once somebody
        has imported the compiler, because to import it takes a second.
        """
        self._is_hidden = True
        for handle in self._handles:  # in place: users' hooks keep their order around ours
            hooks = handle.hooks_dict_ref()
            if hooks is not None and handle.id in hooks:
                hooks[handle.id] = Hook(self._hidden(hooks[handle.id].func))
        self._watch_reads()

    def add_user(self, module: torch.nn.Module, param: torch.Tensor) -> None:
        """From now on, calls of `module` make `param` whole."""
        owner = owner_of(param)
        if owner is None or owner not in self._owned:
            return
        self._read_elsewhere.add(owner)
        known = module in self._users
        self._add_user(module, owner)
        if not known:
            self._attach(module)

    # --- forward --------------------------------------------------------------------------------------------------

    def begin_forward(self, recording: bool = True) -> None:
        """A forward pass of the whole model starts; `recording` if a backward pass may follow."""
        self._running.clear()
        self._state_dicts.forget()
        self._recording = recording
        if not self._is_hidden and "torch._dynamo" in sys.modules:
            self._hide_hooks()
        if not self._in_backward:
            self.trace.begin()

    @torch.no_grad()
    def _need(self, owner: FlatParams) -> None:
        """Hold values for a use that starts now, and send for those that come after it."""
        if owner.uses == 0:
            self.trace.use(owner)
            owner.unshard()
            self._prefetch()
        owner.begin_use()

    def _prefetch(self) -> None:
        forward_only = not self._recording
        if self._has_stores:  # from where they live, as far ahead as there is memory for it
            self._fetches.each(FlatParams.fetch, None, forward_only)
        # A unit larger than what is left of the room is unsharded too: else large blocks never were.
        self._unshards.each(self._unshard_ahead, self.limits.prefetch_numel, forward_only)

    def _unshard_ahead(self, coming: FlatParams) -> bool:
        if coming.state is ParamState.SHARDED:
            if self.trace.live_numel + coming.numel > self.limits.max_live_numel:
                return False
            coming.unshard()
        return True

    def _pre_forward(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        call = _Call(module, list(self._users[module]))
        self._running.append(call)
        for owner in call.held:
            self._need(owner)
        if module in self._closers and torch.is_grad_enabled():
            self._watch_inputs(call, (args, kwargs))

    def _post_forward(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        call = next((running for running in reversed(self._running) if running.module is module), None)
        if call is None:
            return
        del self._running[self._running.index(call) :]
        recording = torch.is_grad_enabled()
        for tensor in tensors_in(output) if call.held else ():
            if isinstance(tensor, torch.nn.Parameter):
                self._hand_up(tensor)
            elif recording and tensor.requires_grad:
                tensor.register_hook(partial(self._open_for_backward, call))
        for owner in call.held:
            owner.end_use(reshard=not self._is_kept(owner, recording))

    def _is_kept(self, owner: FlatParams, recording: bool) -> bool:
        """Whether values stay whole after a forward use because the next use is near."""
        if self._in_backward:
            return True  # a recomputation: the backward pass of what was recomputed follows
        if not recording or self.trace.live_numel > self.limits.max_live_numel:
            return False
        return self.trace.used_within(owner, self.limits.max_reuse_numel)

    # --- backward -------------------------------------------------------------------------------------------------

    def begin_backward(self) -> None:
        """A backward pass starts."""
        self._in_backward = True
        self._pass += 1
        self.trace.turn()

    def _open_for_backward(self, call: _Call, grad: torch.Tensor) -> None:
        counted = call.inputs > 0 and call.opened_in != self._pass
        if counted:
            call.undone = call.inputs
        call.opened_in = self._pass
        for owner in call.held:
            if owner not in self._open:
                self._need(owner)
                self._open[owner] = 0
            if counted and owner in self._closers[call.module]:
                self._open[owner] += 1

    def _close(self, owner: FlatParams) -> None:
        if self._open.pop(owner, None) is not None:
            owner.end_use(reshard=True)

    def all_arrived(self, owner: FlatParams) -> None:
        """Every trained parameter has its gradient: nothing in this pass needs the values any more."""
        if owner not in self._read_elsewhere:
            self._close(owner)

    def _input_done(self, call: _Call, is_leaf: bool, grad: torch.Tensor) -> None:
        if call.opened_in != self._pass:
            return
        call.undone -= 1
        if call.undone == 0 and is_leaf:
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._call_done, call, self._pass))
        elif call.undone == 0:
            self._call_done(call, self._pass)

    def _call_done(self, call: _Call, in_pass: int) -> None:
        for owner in self._closers[call.module] if in_pass == self._pass else ():
            if owner in self._open:
                self._open[owner] -= 1
                if self._open[owner] <= 0:
                    self._close(owner)

    def end_backward(self) -> None:
        """The pass is over: reshard everything that is still whole."""
        for owner in list(self._open):
            self._close(owner)
        self._in_backward = False
        self.trace.end()
        self.reshard()

    def reshard(self) -> None:
        """Reshard what nobody uses."""
        for owner in self.owners:
            owner.reshard()

    def abandon(self) -> None:
        """A pass was left by an exception: forget who held what in it."""
        self._running.clear()
        self._state_dicts.forget(in_use=False)
        for owner in self.owners:
            owner.uses = 0
        self._open.clear()
        self._in_backward = False
        self.trace.end()
        self.reshard()

    # [Note: when a call's backward is over]
    # An input's gradient is complete when all its consumers have run. What made the input is older than every node
    # inside the module, and autograd runs the youngest of the nodes that are ready: the hook on the input runs after
    # all of those. Nodes that become ready later do so through another output, whose hook opens the values again.
    # A leaf's gradient is no node of that order: autograd runs its hook before nodes inside the module that are ready
    # too, such as those that accumulate the parameters' own gradients, which need the parameters' shapes. Then the
    # values are needed until autograd has run everything: the pass, or the one inside it that recomputes a block.
    def _watch_inputs(self, call: _Call, inputs: Any) -> None:
        for tensor in tensors_in(inputs):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._input_done, call, tensor.is_leaf))
                call.inputs += 1

    # --- parameters read outside the module that has them ------------------------------------------------------------

    def _read_outside(self, param: torch.Tensor) -> None:
        """A parameter was read while its values are sharded: unshard it for the module that is running.

        In a backward pass no module need be running: a checkpointed function is computed again.
        """
        owner = owner_of(param)
        if owner not in self._owned or owner.state is ParamState.UNSHARDED:
            return
        if self._running:
            self._hand_up(param)
        elif self._in_backward and owner not in self._open:
            self._need(owner)
            self._open[owner] = 0

    def _hand_up(self, param: torch.Tensor) -> None:
        """The running module has got a parameter of another one: hold it until that module ends, now and in future."""
        owner = owner_of(param)
        if owner is None or owner not in self._owned or not self._running:
            return
        reader = self._running[-1]
        self.add_user(reader.module, param)
        if owner not in reader.held:
            self._need(owner)
            reader.held.append(owner)

    def close(self) -> None:
        """Remove all hooks."""
        for owner in self.owners:
            _PREFETCHERS.pop(owner, None)
        for handle in self._handles:
            handle.remove()
        for module in self._modules:
            module.__dict__["_parameters"] = dict(module._parameters)


def _common_home(root: torch.nn.Module, owner: FlatParams) -> torch.nn.Module:
    """The smallest module that all parameters of some flat values lie in."""
    paths = [slot.name.split(".")[:-1] for slot, _ in owner.slots]
    shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths))]
    return root.get_submodule(".".join(shared))
