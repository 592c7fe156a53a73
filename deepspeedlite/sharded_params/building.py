"""What `zero.Init` does while a model is built: which parameters are whole, and when they are sharded.

[Note: what is whole while a model is built]
A parameter is whole from the moment that its module gets it until the next module begins to be built. Then it is
sharded, also where the constructor of its own module is still running: sharded does not mean out of reach. Whatever
torch function is given a sharded parameter (`.data`, an initialiser, `copy_`, `clone` for a deep copy) makes its
module's parameters whole first, wherever that is written: in a parent's constructor, by `apply`, in a loop over
`named_parameters`. They are sharded again when another module's are made whole, or the next module begins; rank 0's
values count. So at most these are whole at a time: one module's own parameters, those that one call is given, and those
whose memory somebody still refers to by a tensor (`.data` kept in a variable), which nobody else could keep for him.
Small modules wait for each other until they have RESHARD_FROM_NUMEL elements together.

All that is collective. Which memory is still referred to is the one thing that may differ between ranks (a cycle that
is not yet collected, say), so they agree on it: what one rank refers to stays whole on all of them.

[Note: parameters on the meta device]
They get memory when their module gets them, and their constructor's initialisers fill it as if there were no meta
device. One that nothing has written when the context ends was given its values before it was a parameter, where they
are lost: then `reset_parameters` has to give them, or it is an error.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from deepspeedlite.comm import Group
from deepspeedlite.preflight.usable import refuse_unusable_parameters
from deepspeedlite.runtime.errors import UnsupportedError
from deepspeedlite.runtime.tensors import tensors_in
from deepspeedlite.zero.flat_params import FlatParams, ParamState, full_shape, make_whole, owner_of, tensors_over
from deepspeedlite.zero.missing import OF_KIND, OF_SHAPE, name_of
from deepspeedlite.zero.wrap import NamedParameter

Shard = Callable[[Sequence[NamedParameter]], None]

RESHARD_FROM_NUMEL = 1 << 20


@contextmanager
def _plain() -> Iterator[None]:
    """What we do ourselves is neither listened to nor recorded."""
    with torch._C.DisableTorchFunction(), torch.no_grad():
        yield


@dataclass(eq=False)
class _Whole:
    """Parameters that are whole for now: new ones of a module, or those of `owner` that were touched."""

    module: torch.nn.Module | None = None
    members: dict[int, NamedParameter] = field(default_factory=dict)
    owner: FlatParams | None = None

    def is_referred_to(self) -> bool:
        """Whether somebody has a tensor over the memory of one of them."""
        moved = [member.param for member in self.members.values()]
        if self.owner is not None:
            if self.owner.others_have_tensors():
                return True
            moved = [] if self.owner.is_attached() else self.owner.params
        return any(tensors_over(param) > 1 for param in moved)


class Building:
    """What is whole while one `zero.Init` is active.

    Args:
        group: the ranks to shard over.
        device: where parameters of the meta device get their memory.
        shard: shards parameters for good.
    """

    def __init__(self, group: Group, device: torch.device, shard: Shard) -> None:
        self._group, self._device, self._shard = group, device, shard
        self._whole: list[_Whole] = []
        self._whole_ids: set[int] = set()  # of the parameters in it
        self._whole_numel = 0
        self._begun: list[weakref.ref[torch.nn.Module]] = []
        # Of parameters on the meta device: what they became, and what of that nobody has written yet.
        self._became = WeakTensorKeyDictionary()
        self._unwritten: dict[int, tuple[torch.nn.Module, str, torch.Tensor]] = {}

    def __enter__(self) -> None:
        if not _ACTIVE:
            _wrap_module()
            _TOUCHES.__enter__()
        _ACTIVE.append(self)

    def __exit__(self, *error: object) -> None:
        _ACTIVE.remove(self)
        if not _ACTIVE:
            _TOUCHES.__exit__(None, None, None)
            _unwrap_module()
        self._whole, self._begun, self._unwritten = [], [], {}
        self._count()

    # --- what happens ---------------------------------------------------------------------------------------------

    def begin(self, module: torch.nn.Module) -> None:
        """A module's construction begins, which ends those before it, or interrupts them."""
        if self._whole_numel >= RESHARD_FROM_NUMEL:
            self.reshard()
        self._begun.append(weakref.ref(module))

    @_plain()
    def receive(self, module: torch.nn.Module, key: str) -> None:
        """A module has got a parameter."""
        param = module._parameters.get(key)
        if param is None or is_lazy(param) or not param.is_floating_point() or owner_of(param) is not None:
            return
        if param.is_meta:
            param = module._parameters[key] = self._with_memory(module, key, param)
        if id(param) in self._whole_ids:
            return
        if not self._whole or self._whole[-1].module is not module:
            self._whole.append(_Whole(module))
        name = f"{type(module).__name__}.{key}"
        self._whole[-1].members[id(param)] = NamedParameter(name, param, 0)
        self._whole_ids.add(id(param))
        self._whole_numel += param.numel()

    def _with_memory(self, module: torch.nn.Module, key: str, param: torch.nn.Parameter) -> torch.nn.Parameter:
        known = self._became.get(param)
        if known is not None:
            return known  # tied before it had memory
        real = torch.nn.Parameter(torch.empty_like(param, device=self._device), requires_grad=param.requires_grad)
        real.__dict__.update(param.__dict__)
        self._became[param] = real
        self._unwritten[id(real)] = (module, key, real)
        return real

    @_plain()
    def touch(self, owners: Sequence[FlatParams], params: Sequence[torch.Tensor]) -> None:
        """Make the values of `owners` whole for a call that is given `params`."""
        if self._whole_numel >= RESHARD_FROM_NUMEL:
            self.reshard(kept={id(param) for param in params})
        for owner in owners:
            owner.begin_use()
            members = {id(param): NamedParameter(slot.name, param, 0) for slot, param in owner.slots}
            self._whole.append(_Whole(None, members, owner))
            self._whole_ids.update(members)
            self._whole_numel += owner.numel

    def wrote(self, params: Iterable[torch.Tensor | None]) -> None:
        """A function was given these parameters, and may have written them."""
        for param in params if self._unwritten else ():
            self._unwritten.pop(id(param), None)

    def take(self, module: torch.nn.Module) -> None:
        """A module was there before, or has got parameters past `register_parameter`."""
        for key in module._parameters:
            self.receive(module, key)

    def end(self) -> None:
        """The context ends: shard all that is still whole."""
        begun = [reference() for reference in self._begun]
        # What came into a module past `register_parameter`. Modules that were dropped may be gone on some ranks only.
        seen: set[torch.nn.Module] = set()
        for module, is_gone in zip(begun, self._on_any_rank([module is None for module in begun])):
            for _, part in module.named_modules(seen) if module is not None and not is_gone else ():
                self.take(part)
        for module, key, param in list(self._unwritten.values()):
            if id(param) in self._unwritten and module._parameters.get(key) is param:
                give_values(module)
                self.wrote(module._parameters.values())
        self._refuse_unusable({id(p) for module in begun if module is not None for p in module._parameters.values()})
        self.reshard(last=True)

    @_plain()
    def _refuse_unusable(self, held: Set[int]) -> None:
        members = [member for whole in self._whole for key, member in whole.members.items() if key in held]
        refuse_unusable_parameters([member for member in members if member.param.requires_grad])

    # --- sharding -------------------------------------------------------------------------------------------------

    @_plain()
    def reshard(self, kept: Set[int] = frozenset(), last: bool = False) -> None:
        """Shard what is whole, but the parameters with ids in `kept`, and those whose memory somebody refers to.

        Args:
            kept: ids of parameters that are being used.
            last: shard the latter too: what refers to their memory keeps it, and no longer sees the parameter.
        """
        entries = [whole for whole in self._whole if kept.isdisjoint(whole.members)]
        referred = self._on_any_rank([whole.is_referred_to() for whole in entries])
        done = [(whole, is_referred) for whole, is_referred in zip(entries, referred) if last or not is_referred]
        gone = {whole for whole, _ in done}
        self._whole = [whole for whole in self._whole if whole not in gone]
        self._count()
        for whole, is_referred in done:
            self._take_back(whole, is_referred)

    def _count(self) -> None:
        self._whole_ids = {key for whole in self._whole for key in whole.members}
        self._whole_numel = sum(member.param.numel() for whole in self._whole for member in whole.members.values())

    def _take_back(self, whole: _Whole, is_referred: bool) -> None:
        owner = whole.owner
        if owner is None:
            self._shard(list(whole.members.values()))
        elif not is_referred and owner.is_attached():
            owner.group.broadcast(owner.values)
            owner.keep_changes()
            owner.end_use()
        else:  # with other memory, of another shape perhaps
            make_whole(param for param in owner.params if owner_of(param) is owner)
            owner.end_use(reshard=False)
            self._shard(list(whole.members.values()))

    def _on_any_rank(self, facts: Sequence[bool]) -> list[bool]:
        if not facts or self._group.size == 1:
            return list(facts)
        flags = torch.tensor(facts, dtype=torch.int32, device=self._group.device)
        self._group.all_reduce(flags, "max", label="what refers to the parameters of modules being built")
        return [bool(flag) for flag in flags.tolist()]


def give_values(module: torch.nn.Module) -> None:
    """Have a module that was built on the meta device fill its parameters.

    Raises:
        UnsupportedError: it has no way to.
    """
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if reset is None:
        raise UnsupportedError(
            f"zero.Init: {type(module).__name__} was built on the meta device and has no reset_parameters() to "
            "give its parameters values; add one, or build the model without torch.device('meta')"
        )
    reset()


def reshard_active() -> None:
    """Shard what may be sharded of the models that are being built. Collective."""
    for building in _ACTIVE:
        building.reshard()


# --- listening to torch -----------------------------------------------------------------------------------------------

_ACTIVE: list[Building] = []
_BUILT: weakref.WeakSet[FlatParams] = weakref.WeakSet()
"""What contexts have sharded, and no engine has taken over yet."""


def built(values: FlatParams) -> None:
    """These values were sharded by `zero.Init`: they are made whole for whoever touches them in one."""
    _BUILT.add(values)


class _Touches(TorchFunctionMode):
    """Makes sharded parameters whole for the torch functions that are given them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        params = [item for item in tensors_in((args, kwargs), inside_objects=0) if isinstance(item, torch.nn.Parameter)]
        if params:
            asked = name_of(func)
            if asked in OF_SHAPE:
                args = tuple(_of_full_shape(item) for item in args)
            elif asked not in OF_KIND:
                _bring(params)
        return func(*args, **(kwargs or {}))


_TOUCHES = _Touches()


def _bring(params: Sequence[torch.Tensor]) -> None:
    absent = [owner for owner in dict.fromkeys(map(_sharded, params)) if owner is not None]
    if absent:
        _ACTIVE[-1].touch(absent, params)
    for building in _ACTIVE:
        building.wrote(params)


def _sharded(param: torch.Tensor) -> FlatParams | None:
    """The values of a parameter that are not here, and that a context has sharded."""
    owner = owner_of(param)
    return owner if owner is not None and owner.state is ParamState.SHARDED and owner in _BUILT else None


def _of_full_shape(item: Any) -> Any:
    if not isinstance(item, torch.nn.Parameter) or _sharded(item) is None:
        return item
    return torch.empty(full_shape(item), dtype=item.dtype, device="meta")


def _wrap_module() -> None:
    """Tell the active context of modules that begin, and of parameters that they get."""
    kind = torch.nn.Module
    init, register, set_state = kind.__init__, kind.register_parameter, kind.__setstate__

    def wrapped_init(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        _ACTIVE[-1].begin(self)
        init(self, *args, **kwargs)

    def wrapped_register(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        register(self, name, param)
        _ACTIVE[-1].receive(self, name)

    def wrapped_set_state(self: torch.nn.Module, state: Any) -> None:  # of copies, which no constructor makes
        _ACTIVE[-1].begin(self)
        set_state(self, state)
        _ACTIVE[-1].take(self)

    _ORIGINALS.update(__init__=init, register_parameter=register, __setstate__=set_state)
    wrappers = {"__init__": wrapped_init, "register_parameter": wrapped_register, "__setstate__": wrapped_set_state}
    for name, wrapper in wrappers.items():
        setattr(kind, name, wrapper)


def _unwrap_module() -> None:
    for name, original in _ORIGINALS.items():
        setattr(torch.nn.Module, name, original)
    _ORIGINALS.clear()


_ORIGINALS: dict[str, Callable[..., Any]] = {}
