"""Sharded parameters made whole for a while, to be read or written.

    with deepspeedlite.zero.GatheredParameters(model.head.weight, modifier_rank=0):
        if rank == 0:
            model.head.weight.normal_()     # rank 0's values are sent to all

Every rank of the group takes part, in the same order. Where nothing is sharded nothing happens, and nobody waits.

[Note: one order]
Parameters are unsharded and sent in the order in which they were sharded, which is the same on every rank, whatever the
order in which they are given: clients pass sets of them.

[Note: tensors that are kept]
`values = param.data` is a tensor over the buffer that the values are unsharded into. Who keeps one beyond the context
keeps its memory too, as it was, and the next gathering takes another buffer.

[Note: ranks leave together]
A context that makes values whole ends with the same collectives on every rank, also on one that leaves it by an
exception: a rank that catches its exception and goes on is then still in step with the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch

from deepspeedlite.runtime.errors import EngineStateError
from deepspeedlite.sharded_params.building import reshard_active
from deepspeedlite.zero.flat_params import FlatParams, owner_of
from deepspeedlite.zero.prefetch import register_external_parameter

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SHOWN = 3  # names in a message


class GatheredParameters:
    """Parameters are whole in this context.

    Args:
        params: a parameter, or any iterable of them; None, and those that are not sharded, are passed over.
        modifier_rank: the global rank whose values are kept and sent to all, whatever the others write; None: nobody
            changes anything.
        fwd_module: the parameters are read in this module's forward too: see `register_external_parameter`.
        enabled: False makes the context do nothing.

    Raises:
        EngineStateError: on every rank, if one changed a parameter and there is no `modifier_rank` (the change is
            dropped); something that is no tensor was given; a parameter's ranks do not include `modifier_rank`.
    """

    def __init__(
        self,
        params: torch.Tensor | Iterable[torch.Tensor | None] | None,
        modifier_rank: int | None = None,
        fwd_module: torch.nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        self._given = _listed(params) if enabled else []
        self._modifier = modifier_rank
        self._held: list[FlatParams] = []
        self._kept: set[FlatParams] = set()  # of those, the ones of which somebody keeps tensors
        self._plain: list[torch.Tensor] = []  # of stage 3, but whole all the time, and nobody's
        self._readings: list[_Reading] = []
        if fwd_module is not None:
            for param in self._given:
                if owner_of(param) is not None:
                    register_external_parameter(fwd_module, param)

    def __enter__(self) -> None:
        reshard_active()
        pairs = [(param, owner_of(param)) for param in self._given]
        ours = [(param, owner) for param, owner in pairs if owner is not None and _is_of_stage_3(param)]
        ours.sort(key=lambda pair: pair[0].ds_id)  # type: ignore[attr-defined]  # clients pass sets of parameters
        owners = list(dict.fromkeys(owner for _, owner in ours))
        self._plain = sorted(
            (param for param, owner in pairs if owner is None and _is_of_stage_3(param)),
            key=lambda param: int(param.ds_id),  # type: ignore[attr-defined]
        )
        self._check_modifier(owners)
        try:
            for owner in owners:
                self._held.append(owner)
                owner.begin_use()
        except BaseException:
            self._end_uses()
            raise
        self._readings = [_Reading(param, owner, self._modifier is None) for param, owner in ours]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        changed: list[str] = []
        # Asked before anything is sent: messages are tensors too.
        self._kept = {owner for owner in self._held if owner.sharded and owner.others_have_tensors()}
        try:
            if error is None or isinstance(error, Exception):  # else this rank is being ended: it waits for nobody
                if self._modifier is None:
                    changed = self._agreed_changes()
                else:
                    self._spread()
        finally:
            self._end_uses()
        if changed and error is None:
            raise EngineStateError(
                f"{'; '.join(changed)}, inside GatheredParameters(modifier_rank=None), and the change is dropped; pass "
                "the rank whose values count as modifier_rank, on every rank"
            )

    def _end_uses(self) -> None:
        held, self._held, self._readings = self._held, [], []
        for owner in held:
            owner.end_use(reshard=False)
            if owner in self._kept and owner.sharded and owner.uses == 0:
                owner.give_buffer_away()
            owner.reshard()

    def _check_modifier(self, owners: list[FlatParams]) -> None:
        for owner in owners:
            if self._modifier is not None and self._modifier not in owner.group.ranks:
                raise EngineStateError(
                    f"GatheredParameters(modifier_rank={self._modifier}): {owner.slots[0][0].name} is held by ranks "
                    f"{owner.group.ranks}; name one of them, as the rank in the world"
                )

    @torch.no_grad()
    def _spread(self) -> None:
        """The modifier's values, to all."""
        wrong = self._agree([(owner, said) for owner in self._held if (said := owner.take_replaced())])
        if wrong:
            raise EngineStateError(wrong[0])
        for reading in self._readings:
            group = reading.owner.group
            if reading.param.numel():
                group.broadcast(reading.param.data, src=group.ranks.index(self._modifier or 0))
        for param in self._plain:
            group = param.ds_group  # type: ignore[attr-defined]
            if param.numel() and self._modifier in group.ranks:
                values = param.data.contiguous()
                group.broadcast(values, src=group.ranks.index(self._modifier))
                param.data.copy_(values)
        for owner in self._held:
            owner.keep_changes()

    def _agreed_changes(self) -> list[str]:
        """Which rank has changed what, the same on every rank."""
        wrong = [reading for reading in self._readings if reading.was_changed()]
        return self._agree([(reading.owner, f"parameter {reading.name} was changed on rank RANK") for reading in wrong])

    def _agree(self, mine: list[tuple[FlatParams, str]]) -> list[str]:
        """What the ranks have to say of values that they hold, with their number for RANK; the same on every rank."""
        told: list[str] = []
        for group in dict.fromkeys(owner.group for owner in self._held):
            said = [words for owner, words in mine if owner.group is group]
            someone = torch.tensor([float(bool(said))], device=group.device)
            group.all_reduce(someone, "max", label="what a rank did with the parameters it gathered")
            if someone.item():
                everyone = zip(group.ranks, group.all_gather_objects(said[:_SHOWN]))
                told += [words.replace("RANK", str(rank)) for rank, said in everyone for words in said]
        return told[:_SHOWN]


class _Reading:
    """A parameter that nobody is to change, and how to tell. What cannot be unsharded again is put back."""

    def __init__(self, param: torch.Tensor, owner: FlatParams, watched: bool) -> None:
        self.param, self.owner = param, owner
        self._writes = owner.writes
        self._copy = param.detach().clone() if watched and not owner.sharded else None
        self._fingerprint = _fingerprint(param) if watched else (0, 0)

    @property
    def name(self) -> str:
        return self.owner.slot_of(self.param).name

    @torch.no_grad()
    def was_changed(self) -> bool:
        """Whether this rank has. Not if all ranks were given new values meanwhile, or another engine has it now."""
        if owner_of(self.param) is not self.owner or self.owner.writes != self._writes:
            return False
        changed = _fingerprint(self.param) != self._fingerprint
        if changed and self._copy is not None:
            self.param.data.copy_(self._copy)
        return changed


def _listed(params: torch.Tensor | Iterable[torch.Tensor | None] | None) -> list[torch.Tensor]:
    if params is None or isinstance(params, torch.Tensor):
        params = [params]
    listed = list({id(param): param for param in params if param is not None}.values())
    wrong = [param for param in listed if not isinstance(param, torch.Tensor)]
    if wrong:
        raise EngineStateError(
            f"GatheredParameters takes parameters, got {type(wrong[0]).__name__} {wrong[0]!r:.40}; of a module pass "
            "module.parameters(), of a dict its values()"
        )
    return listed


def _is_of_stage_3(param: torch.Tensor) -> bool:
    """Whether an engine or `zero.Init` of stage 3 has it; persistent parameters, which stay whole, included."""
    return hasattr(param, "ds_id")


def _fingerprint(param: torch.Tensor) -> tuple[int, int]:
    """Numbers that change, practically always, when any element does or two change places."""
    if not param.numel():
        return 0, 0
    bits = param.detach().view(_INTEGERS[param.element_size()]).reshape(param.shape[0] if param.dim() else 1, -1)
    return _weighted_sum(bits.sum(1, dtype=torch.int64)), _weighted_sum(bits.sum(0, dtype=torch.int64))


def _weighted_sum(sums: torch.Tensor) -> int:
    odd = torch.arange(1, 2 * sums.numel(), 2, device=sums.device)
    return int((sums * odd).sum())


@contextmanager
def unwrap_model_for_generation(model: Any, enabled: bool = True) -> Iterator[torch.nn.Module]:
    """The module behind an engine with all its parameters whole, for many forward passes without training.

    Args:
        model: an engine, or a module.
        enabled: False gives the module as it is.
    """
    module = getattr(model, "module", model)
    with GatheredParameters(list(module.parameters()), enabled=enabled):
        yield module
