"""Reading and writing what training keeps of a parameter: its fp32 values, its gradient, its optimizer states.

The names and signatures are DeepSpeed's. `full` functions speak of whole tensors of the parameter's shape, `local` ones
of this rank's part, flattened. At stage 3 that is DeepSpeed's: the ranks' parts are equal, and the last ones are padded
with zeros. At stages 1 and 2, where DeepSpeed has none, it is the fragment that this rank's optimizer updates, empty
where it updates none of the parameter; at stage 0 everything.

[Note: parts of stage 3] A rank's optimizer updates other elements here than the rank's part has, since flat buffers of
many parameters are cut, and not each parameter. So at stage 3 the local functions are collective too: each rank sends
what the parts of others have of its fragment, and nothing twice. In DeepSpeed they are not; one that is called on some
ranks alone is an error on them here, after a few seconds.

- What is read is a copy, in fp32 (fp64 for fp64 parameters). Of a frozen parameter None is read.
- Full readers are collective at stages 1 to 3: every rank of the group calls them, and each gets the whole tensor. Full
  writers are given the same tensor on every rank. Below stage 3 one writer, `safe_set_local_fp32_param`, is collective.
- A gradient is there between the backward pass and the step: the average over the ranks, without the loss scale, as
  `param.grad` would be, with zeros where no gradient came. Before the pass that averages (stages 0 and 1 average at the
  end of an accumulation window, 2 and 3 in every pass) the full functions speak of what this rank has accumulated.
- Optimizer states are there from the first step on; before it None is read.

Raised are `EngineStateError` for a parameter that requires grad and that no engine trains, during a backward pass, and
where there is nothing to write to (a frozen parameter, no gradient, no states yet); and `OptimizerError` for a value of
another shape and for a state that the optimizer does not keep. Full readers raise on every rank, writers and local
readers may find a wrong state's name only on the ranks that hold a part of the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from deepspeedlite.comm.roll_call import PATIENCE_S
from deepspeedlite.runtime.errors import EngineStateError, OptimizerError
from deepspeedlite.zero.flat_params import ParamState, full_shape
from deepspeedlite.zero.grad_buffer import GradState
from deepspeedlite.zero.unit import ShardUnit, Stepper, unit_of

_T = TypeVar("_T")
_FINE, _NOT_MADE, _UNKNOWN = range(3)


class _Pieces:
    """A fragment of a parameter in some kind of tensor, which may lie in several runs."""

    def __init__(self, numel: int, like: torch.Tensor) -> None:
        self._like, self._numel = like, numel
        self._views: list[tuple[slice, torch.Tensor]] = []

    def add(self, where: slice, view: torch.Tensor) -> None:
        """Elements `where` of the fragment are in this view."""
        self._views.append((where, view))

    def read(self) -> torch.Tensor:
        """The fragment; a copy."""
        whole = self._like.new_empty(self._numel)
        for where, view in self._views:
            whole[where] = view
        return whole

    def write(self, fragment: torch.Tensor) -> None:
        """Change it."""
        for where, view in self._views:
            view.copy_(fragment[where])


class _Place:
    """Where a parameter lies in its unit, and which part of it this rank's optimizer updates.

    What offloading keeps on a disk is in memory `inside`: use `master`, `values` (the model's) and `states` there.
    """

    def __init__(self, param: torch.Tensor, unit: ShardUnit, stepper: Stepper) -> None:
        self.unit, self.slot, self.loss_scale = unit, unit.flat.slot_of(param), stepper.loss_scale
        self.dtype = torch.float64 if unit.flat.dtype is torch.float64 else torch.float32
        self.is_split = unit.layout.shard_count > 1
        self.in_slot, self.in_shard = unit.grads.own_part(self.slot)
        start, stop = self.slot.start + self.in_slot.start, self.slot.start + self.in_slot.stop
        self.numel, self._stepper = stop - start, stepper
        self.is_cut_alone = self.is_split and hasattr(param, "ds_id")  # at stage 3: see [Note: parts of stage 3]
        self.part_numel = -(-self.slot.numel // unit.flat.group.size) if self.is_cut_alone else self.numel
        self._runs = [
            (run, values, master, store)
            for (run, values, _), master, store in zip(unit.runs(), unit.masters, unit.run_stores)
            if max(run.start, start) < min(run.stop, stop)
        ]
        self._start, self._stop = start, stop
        self.master, self.values = _Pieces(self.numel, self._empty), _Pieces(self.numel, self._empty)
        self.states: dict[str, _Pieces] = {}

    @property
    def _empty(self) -> torch.Tensor:
        return torch.empty(0, dtype=self.dtype, device=self.unit.flat.device)

    @contextmanager
    def inside(self, write: bool = False) -> Iterator[None]:
        """`write`: what is changed inside is kept."""
        with ExitStack() as stack:
            for run, values, master, store in self._runs:
                stack.enter_context(store.opened(write))
                start, stop = max(run.start, self._start), min(run.stop, self._stop)
                where, in_run = (
                    slice(start - self._start, stop - self._start),
                    slice(start - run.start, stop - run.start),
                )
                self.master.add(where, master[in_run])
                self.values.add(where, values[in_run])
                for key, value in self._stepper.state.get(master, {}).items():
                    if isinstance(value, torch.Tensor) and value.shape == master.shape:  # not a count of steps
                        pieces = self.states.setdefault(key, _Pieces(self.numel, self._empty.to(value.dtype)))
                        pieces.add(where, value[in_run])
            yield

    def state(self, key: str, collective: bool = False) -> _Pieces | None:
        """The fragment of an optimizer state, None before the first step; all ranks agree where `collective`."""
        found = _FINE if key in self.states or self.numel == 0 else _UNKNOWN if self.states else _NOT_MADE
        collective = collective and self.is_split
        if collective:  # a rank that holds nothing of the parameter cannot know
            worst = torch.tensor([found], device=self.unit.flat.device)
            self.unit.flat.group.all_reduce(worst, "max")
            found = int(worst)
        if found == _UNKNOWN:
            everyone = self.unit.flat.group.all_gather_objects(list(self.states)) if collective else [list(self.states)]
            shown = ", ".join(sorted({name for names in everyone for name in names}))
            raise OptimizerError(
                f"the optimizer keeps no state {key!r} per element of {self.slot.name}; it keeps {shown}"
            )
        return self.states.get(key, self.master) if found == _FINE else None

    def grad(self) -> tuple[torch.Tensor | None, bool]:
        """The gradient in the unit's memory, times the loss scale: 1-D, and whether it is more than the fragment."""
        self.unit.take_in()
        own = self._own_grad()
        if own is None and self.unit.grads.state is GradState.AVERAGED:
            return self.unit.grads.shard[self.in_shard], False
        return own, self.is_split

    def _own_grad(self) -> torch.Tensor | None:
        """What this rank alone has accumulated of the gradient: a 1-D view; None where it is not LOCAL."""
        grads, name = self.unit.grads, self.slot.name
        if self.unit.arrivals.in_pass:
            raise EngineStateError(f"the gradient of {name} was asked for while a backward pass is under way")
        if grads.state is not GradState.LOCAL:
            return None
        if grads.is_partly_averaged:
            raise EngineStateError(
                f"the gradient of {name} is averaged over the ranks but for what the last pass, without "
                "averaging, has added; read it after the pass that ends the accumulation"
            )
        view = grads.view(self.unit.layout.place(self.slot))
        return None if view is None else view.view(-1)

    def local_grad(self) -> torch.Tensor | None:
        """The fragment of a gradient that needs no more averaging, in the unit's memory."""
        grad, is_more = self.grad()
        return None if is_more else grad

    def join(self, fragment: torch.Tensor) -> torch.Tensor:
        """The whole tensor from all ranks' fragments; a copy."""
        whole = torch.zeros(self.slot.numel, dtype=self.dtype, device=self.unit.flat.device)
        whole[self.in_slot] = fragment
        if self.is_split:  # each element is one rank's and 0 elsewhere; as integers the sum is exact to the bit
            self.unit.flat.group.all_reduce(whole.view(torch.int64 if self.dtype is torch.float64 else torch.int32))
        return whole.view(self.slot.shape)

    def part_of(self, fragment: torch.Tensor) -> torch.Tensor:
        """This rank's part, from all ranks' fragments. Collective at stage 3."""
        if not self.is_cut_alone:
            return fragment
        part = torch.zeros(self.part_numel, dtype=self.dtype, device=self.unit.flat.device)
        sent, received = self._shared()
        self._exchange(part[: sum(received)], fragment.to(self.dtype).contiguous(), received, sent)
        return part

    def fragment_of(self, part: torch.Tensor) -> torch.Tensor:
        """This rank's fragment, from all ranks' parts. Collective at stage 3."""
        if not self.is_cut_alone:
            return part
        fragment = torch.empty(self.numel, dtype=self.dtype, device=self.unit.flat.device)
        received, sent = self._shared()
        self._exchange(fragment, part[: sum(sent)], received, sent)
        return fragment

    def _shared(self) -> tuple[list[int], list[int]]:
        """Elements of this rank's fragment in each rank's part, and of this rank's part in each rank's fragment.

        Fragments and parts both lie in the order of the ranks, so that what is exchanged is in order too.
        """
        ranks = range(self.unit.flat.group.size)
        parts = [(rank * self.part_numel, min((rank + 1) * self.part_numel, self.slot.numel)) for rank in ranks]
        shards = [self.unit.layout.shard(rank) for rank in ranks]
        fragments = [(first - self.slot.start, last - self.slot.start) for first, last in shards]
        mine, own = self.unit.flat.group.rank, (self.in_slot.start, self.in_slot.stop)
        return [_common(own, part) for part in parts], [_common(parts[mine], other) for other in fragments]

    def _exchange(self, into: torch.Tensor, out_of: torch.Tensor, received: list[int], sent: list[int]) -> None:
        group, call = self.unit.flat.group, f"access to a rank's own part of {self.slot.name}"
        if missing := group.roll_call(call, f"{self.unit.flat.key} {call}", weight=self.slot.numel):
            raise EngineStateError(
                f"{call} was asked for on rank {group.ranks[group.rank]}, and not on {missing} within {PATIENCE_S:.0f} "
                "s. At stage 3 safe_get_local_* and safe_set_local_* move what lies on other ranks: call them on all"
            )
        dist.all_to_all_single(into, out_of, received, sent, group=group.process_group)

    def checked(self, value: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """A value that is to be written, flat and precise."""
        if not isinstance(value, torch.Tensor) or value.shape != torch.Size(shape):
            given = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise OptimizerError(f"{self.slot.name} needs a value of shape {tuple(shape)} here, not {given}")
        return value.detach().to(self.unit.flat.device, self.dtype).flatten()

    def existing(self, target: _T | None, what: str) -> _T:
        """What is to be overwritten."""
        if target is None:
            raise EngineStateError(f"{self.slot.name} has no {what}")
        return target

    def store(self, fragment: torch.Tensor, whole: torch.Tensor | None) -> None:
        """Write the master and the model's values; `whole` is joined where it is needed and not given."""
        self.unit.flat.wait_for_unshard()
        self.unit.flat.wait_for_readers()
        self.master.write(fragment)
        self.values.write(fragment)
        if self.unit.flat.state is ParamState.UNSHARDED:
            everything = self.join(fragment).flatten() if whole is None else whole
            self.unit.flat.values[self.slot.start : self.slot.stop] = everything


def _common(one: tuple[int, int], other: tuple[int, int]) -> int:
    """How many elements two ranges share."""
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))


def _readable(param: torch.Tensor) -> _Place | None:
    """The parameter's place; None for a frozen one."""
    unit = unit_of(param)
    if unit is not None and unit.stepper is not None:
        return _Place(param, unit, unit.stepper)
    kind = "Parameter" if isinstance(param, torch.nn.Parameter) else type(param).__name__
    if kind == "Parameter" and not param.requires_grad:
        return None
    raise EngineStateError(
        f"no engine trains this {kind} of shape {tuple(full_shape(param))}: pass a parameter of a "
        "model given to deepspeedlite.initialize, which its optimizer updates, before engine.destroy()"
    )


def _read(param: torch.Tensor, value_in: Callable[[_Place], torch.Tensor | None]) -> torch.Tensor | None:
    """What is found in the parameter's place while its states are there; None for a frozen one."""
    place = _readable(param)
    if place is None:
        return None
    with place.inside():
        return value_in(place)


def _writable(param: torch.Tensor) -> _Place:
    place = _readable(param)
    if place is None:
        raise EngineStateError(
            f"a parameter of shape {tuple(full_shape(param))} is frozen (requires_grad=False): its engine keeps no "
            "fp32 values, gradient or states of it; write its values in deepspeedlite.zero.GatheredParameters"
        )
    return place


# --- whole tensors ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def safe_get_full_fp32_param(param: torch.Tensor) -> torch.Tensor | None:
    """The values that the optimizer updates, which a 16-bit model holds rounded."""
    return _read(param, lambda place: place.join(place.master.read()))


@torch.no_grad()
def safe_set_full_fp32_param(param: torch.Tensor, value: torch.Tensor) -> None:
    """Write the values that the optimizer updates, and the model's."""
    place = _writable(param)
    whole = place.checked(value, place.slot.shape)
    with place.inside(write=True):
        place.store(whole[place.in_slot], whole)


@torch.no_grad()
def safe_get_full_grad(param: torch.Tensor) -> torch.Tensor | None:
    """The gradient, or None where there is none at this time. Collective once it is averaged."""
    place = _readable(param)
    grad, is_more = (None, False) if place is None else place.grad()
    if place is None or grad is None:
        return None
    unscaled = grad.to(place.dtype) / place.loss_scale
    return unscaled.view(place.slot.shape) if is_more else place.join(unscaled)


@torch.no_grad()
def safe_set_full_grad(param: torch.Tensor, value: torch.Tensor) -> None:
    """Write the gradient. In fp16 it is held times the loss scale, and may overflow."""
    place = _writable(param)
    whole = place.checked(value, place.slot.shape) * place.loss_scale
    grad, is_more = place.grad()
    place.existing(grad, _NO_GRAD).copy_(whole if is_more else whole[place.in_slot])
    place.unit.grads.forget_norm()


def safe_update_full_grad_vectorized(
    param_list: Iterable[torch.Tensor], update_func: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> None:
    """Replace the gradient of each parameter that has one by `update_func(gradient, parameter)`. Collective."""
    for param in param_list:
        grad = safe_get_full_grad(param)
        if grad is not None:
            safe_set_full_grad(param, update_func(grad, param))


@torch.no_grad()
def safe_get_full_optimizer_state(param: torch.Tensor, optim_state_key: str) -> torch.Tensor | None:
    """An optimizer state, such as AdamW's `exp_avg`; None before the first step."""

    def joined(place: _Place) -> torch.Tensor | None:
        state = place.state(optim_state_key, collective=True)
        return None if state is None else place.join(state.read())

    return _read(param, joined)


@torch.no_grad()
def safe_set_full_optimizer_state(param: torch.Tensor, value: torch.Tensor, optim_state_key: str) -> None:
    """Write an optimizer state."""
    place = _writable(param)
    whole = place.checked(value, place.slot.shape)
    with place.inside(write=True):
        place.existing(place.state(optim_state_key), _NO_STATE).write(whole[place.in_slot])


# --- this rank's parts -----------------------------------------------------------------------------------------------


@torch.no_grad()
def safe_get_local_fp32_param(param: torch.Tensor) -> torch.Tensor | None:
    """This rank's part of what `safe_get_full_fp32_param` reads."""
    return _read(param, lambda place: place.part_of(place.master.read()))


@torch.no_grad()
def safe_set_local_fp32_param(param: torch.Tensor, value: torch.Tensor) -> None:
    """Write this rank's part. Collective at stages 1 to 3: the model's values stay equal on all ranks."""
    place = _writable(param)
    fragment = place.fragment_of(place.checked(value, (place.part_numel,)))
    with place.inside(write=True):
        place.store(fragment, None)


@torch.no_grad()
def safe_get_local_grad(param: torch.Tensor) -> torch.Tensor | None:
    """This rank's part of the averaged gradient, or None where it is not averaged at this time."""
    place = _readable(param)
    grad = None if place is None else place.local_grad()
    return None if place is None or grad is None else place.part_of(grad.to(place.dtype) / place.loss_scale)


@torch.no_grad()
def safe_set_local_grad(param: torch.Tensor, value: torch.Tensor) -> None:
    """Write this rank's part of the averaged gradient."""
    place = _writable(param)
    fragment = place.fragment_of(place.checked(value, (place.part_numel,))) * place.loss_scale
    place.existing(place.local_grad(), _NO_GRAD).copy_(fragment)
    place.unit.grads.forget_norm()


@torch.no_grad()
def safe_get_local_optimizer_state(param: torch.Tensor, optim_state_key: str) -> torch.Tensor | None:
    """This rank's part of an optimizer state; None before the first step (below stage 3 empty, where it has none)."""

    def part(place: _Place) -> torch.Tensor | None:
        state = place.state(optim_state_key, collective=place.is_cut_alone)
        return None if state is None else place.part_of(state.read().to(place.dtype))

    return _read(param, part)


@torch.no_grad()
def safe_set_local_optimizer_state(param: torch.Tensor, value: torch.Tensor, optim_state_key: str) -> None:
    """Write this rank's part of an optimizer state."""
    place = _writable(param)
    fragment = place.fragment_of(place.checked(value, (place.part_numel,)))
    with place.inside(write=True):
        place.existing(place.state(optim_state_key, collective=place.is_cut_alone), _NO_STATE).write(fragment)


_NO_GRAD = "averaged gradient to write to: there is one between the backward pass and the step"
_NO_STATE = "optimizer states yet: the first step makes them"
