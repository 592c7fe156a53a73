"""Whose a module's parameters are: one engine trains them, until it is destroyed or the next one takes them over.

A `Lease` is what one engine has put on a module. `take_over` is called by the next `initialize` over parameters that
some engine has already: a notebook's cell that runs again, a second phase of training, a reference model's engine that
lives on. An engine without an optimizer only reads: it neither takes parameters from one that trains them nor keeps
them from it. Engines that train different parameters of one module leave each other alone, below stage 3.

[Note: what keeps an engine alive]
At stage 3 a module's hooks keep its flat values, and these their lease, but nothing here refers to the engine: it goes
when the script lets go of it. Its module unshards its parameters all the same, until the next engine takes it over.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from deepspeedlite.comm import Group
from deepspeedlite.runtime.errors import EngineStateError
from deepspeedlite.runtime.log import log_once
from deepspeedlite.zero.flat_params import FlatParams, make_whole, owners_of
from deepspeedlite.zero.grad_reducer import GradReducer
from deepspeedlite.zero.prefetch import ParamPrefetcher
from deepspeedlite.zero.state_dicts import StateDicts

_SHOWN = 3  # names in a message
_TAKEN = (
    "a later deepspeedlite.initialize has taken its parameters over; use the engine that it returned, or initialise "
    "the model again"
)
_BORROWED = "another engine trains its parameters; save, load and train with that one"


class Holder:
    """The engine that units belong to, while the script holds it: it is made after them, and may go before them."""

    def __init__(self) -> None:
        self._engine: Callable[[], Any] = lambda: None
        self._is_over = False  # destroyed; clients go on with it at stage 0, so it is told of passes all the same

    def held_by(self, engine: Any) -> None:
        """`engine` has the units from now on; nothing here keeps it alive."""
        self._engine = weakref.ref(engine)

    def let_go(self) -> None:
        """The engine is destroyed."""
        self._is_over = True

    @property
    def is_there(self) -> bool:
        """Whether there is an engine that was not destroyed."""
        return not self._is_over and self._engine() is not None

    def announce_backward(self) -> None:
        """See `PassListener`."""
        engine = self._engine()
        if engine is not None:
            engine.announce_backward()

    def note_clearing(self) -> None:
        """See `PassListener`."""
        engine = self._engine()
        if engine is not None:
            engine.note_clearing()


class Lease:
    """The flat values and the hooks of one engine's module.

    Args:
        reducer: of the gradients.
        state_dicts: of the module.
        prefetcher: what unshards sharded values, where there are any.
        frozen: sharded values that are not trained.
        holder: the engine.
        trains: whether there is an optimizer.
        borrows: whether some of the parameters stay another engine's.
    """

    def __init__(
        self,
        reducer: GradReducer,
        state_dicts: StateDicts,
        prefetcher: ParamPrefetcher | None,
        frozen: Sequence[FlatParams],
        *,
        holder: Holder,
        trains: bool,
        borrows: bool = False,
    ) -> None:
        self.reducer, self.frozen, self.trains = reducer, frozen, trains
        self.state_dicts, self.prefetcher = state_dicts, prefetcher
        # Why the engine may only read; empty while it may do all. What an ended lease held waits for its next owner.
        self.ended = _BORROWED if borrows and not trains else ""
        self._holder = holder
        for values in self.values():
            values.lease = self

    def values(self) -> list[FlatParams]:
        """All flat values, trained and frozen."""
        return [*(unit.flat for unit in self.reducer.units), *self.frozen]

    def held(self) -> dict[torch.Tensor, str]:
        """The parameters, with their names in the engine's module."""
        return {param: slot.name for values in self.values() for slot, param in values.slots}

    def held_by(self, engine: Any) -> None:
        """From now on the lease is this engine's; when the script lets go of it, gradients are the module's alone."""
        self._holder.held_by(engine)
        # The handles alone, which hold nothing: else what the engine trained would outlive the collection that ends it.
        weakref.finalize(engine, _unhook, [unit.hooks for unit in self.reducer.units]).atexit = False

    @property
    def in_use(self) -> bool:
        """Whether this rank's script still holds an engine that trains."""
        return self.trains and self._holder.is_there

    def refusal(self, what: str) -> str:
        """Why the engine may not do something; empty if it may. What nobody trains from may always be computed."""
        if not self.trains and what in ("backward", "train_batch"):
            return "needs an optimizer: name one in the configuration or pass one to initialize"
        reads = what in ("forward", "eval_batch") and not (self.trains and torch.is_grad_enabled())
        return "" if reads else self.ended

    def verify_attached(self) -> None:
        """Raise, in the words of what was done, when a parameter's memory was replaced; see `FlatParams`."""
        for values in self.values() if not self.ended else ():
            values.verify_attached()

    def end(self, whole: bool) -> None:
        """Take the hooks off; `whole`: and give the parameters back. Collective if so, and values are sharded."""
        self.ended = _TAKEN
        self.state_dicts.close()
        if self.prefetcher is not None:
            self.prefetcher.close()
        for unit in self.reducer.units:
            unit.detach()
        for values in self.values() if whole else ():
            make_whole(values.params)
            values.close()

    def close(self) -> None:
        """The engine is destroyed; see `FlatParams.close`."""
        self._holder.let_go()
        if self.ended == _TAKEN:
            return
        self.reducer.close()
        for values in self.frozen:
            values.close()
        if self.prefetcher is not None:
            self.prefetcher.close()
        else:
            self.state_dicts.close()  # what stays sharded is still unsharded for them

    def resume(self, what: str) -> None:
        """Go on after `close`: at stage 0 an engine is little more than its module, and clients use it again.

        Raises:
            EngineStateError: something was sharded, the parameters have got other memory, or another engine.
        """
        if self.ended or self.reducer.plan.stage > 0:
            raise EngineStateError(
                f"engine.{what}() after engine.destroy(): {self.ended or 'initialise the model again'}"
            )
        try:
            for unit in self.reducer.units:
                unit.take_back()
        except EngineStateError as error:
            raise EngineStateError(f"engine.{what}() after engine.destroy(): {error}") from None
        self.reducer.attach()
        self.state_dicts = self.state_dicts.again()
        log_once("an engine is used after destroy(): at stage 0 it goes on")


def take_over(
    module: torch.nn.Module, wanted: Iterable[torch.Tensor], *, trains: bool, shards: bool, group: Group
) -> dict[torch.Tensor, str]:
    """End the leases on parameters that a new engine is to have. Collective where there are any.

    Args:
        module: the new engine's.
        wanted: the parameters that it is to train.
        trains: whether it has an optimizer.
        shards: whether it shards parameters.
        group: its data-parallel ranks.

    Returns:
        the parameters that stay with the engine that trains them, and the names that it knows them by.

    Raises:
        EngineStateError: an engine in use trains some of the parameters, and others that this one would not get.
    """
    here = dict.fromkeys([*module.parameters(), *wanted])
    leases = dict.fromkeys(values.lease for values in owners_of(here) if values.lease is not None)
    if not leases:
        return {}
    gc.collect()  # an engine that nobody holds may wait for that, on some rank
    everyone = group.all_gather_objects([lease.in_use for lease in leases])
    left: dict[torch.Tensor, str] = {}
    for lease, in_use in zip(leases, map(any, zip(*everyone))):
        theirs = lease.held()
        apart = not shards and lease.prefetcher is None and theirs.keys().isdisjoint(wanted)
        if in_use and (apart or not trains):
            left.update(theirs)
            continue
        is_all_here = theirs.keys() <= here.keys()
        if in_use and not is_all_here:
            raise EngineStateError(
                f"another engine trains {_shown(theirs, theirs.keys() & here.keys())}, which this model has too, along "
                f"with {_shown(theirs, theirs.keys() - here.keys())}, which it has not: two engines cannot train one "
                "parameter. Initialise one engine over a module that holds both models, leave the shared part to one "
                "of them (model_parameters=... without it), or call destroy() of the engine that is no longer used"
            )
        lease.end(whole=not shards or not is_all_here)
    return left


def _shown(names: dict[torch.Tensor, str], params: Collection[torch.Tensor]) -> str:
    known = [name for param, name in names.items() if param in params]
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return ", ".join(known[:_SHOWN]) + more


def _unhook(units: list[list[RemovableHandle]]) -> None:
    for hooks in units:
        for hook in hooks:
            hook.remove()
