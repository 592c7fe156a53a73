"""Flat parameters: the one buffer behind the values of some parameters, whole on every rank or sharded over them.

    UNSHARDED   every rank holds all values; the parameters are views of the buffer. Where it stays UNSHARDED each
                has a storage of its own over that memory, so that who saves one of them does not save all
    SHARDED     each rank holds its shard; the buffer has no memory, and the parameters are empty placeholders
    UNSHARDING  the shards are on their way into the buffer

Values that are not to be sharded stay UNSHARDED; their shard is a view of the buffer, and a step that
wrote into it calls `start_sharing`. `uses` counts who needs the values: they are resharded when nobody does.

[Note: memory that comes and goes]
Autograd's graph keeps views of the buffer (a transposed weight, say) from the forward pass to the backward pass. So the
buffer is one storage for its whole life, and is resized to nothing and back: those views find the values again as soon
as they are unsharded. The placeholders make reading a sharded parameter an error of shapes instead of a read of memory
that is gone.

[Note: who reads the shard]
On the CPU ranks of one host the shard lies in memory that the others read when they unshard. A rank may be ahead of
them, so whoever writes a shard, a step or a user, calls `wait_for_readers` first.

[Note: a shard that lives elsewhere]
Where parameters are offloaded the tensor `shard` has memory only while it is unsharded from, and inside
`shard_in_memory`; its elements change there, or where the store says that they are stored.

[Note: no stream of our own]
On a GPU, NCCL runs a collective on its own stream, which first waits for what the current stream had been given when
the collective was started; waiting for the collective makes the current stream wait. All memory here is allocated, used
and freed in the order of the current stream, so the caching allocator may reuse it at once, and no event or
`record_stream` is needed. The price: an all-gather starts when the work queued before it is done, which is when the
module before the current one ends, and overlaps the current one.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from itertools import count
from typing import Any, Protocol

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from deepspeedlite.comm import Group
from deepspeedlite.offload.options import Offload
from deepspeedlite.offload.store import Store
from deepspeedlite.runtime.errors import EngineStateError
from deepspeedlite.zero.layout import FlatLayout, Run, Slot
from deepspeedlite.zero.missing import as_plain, mark_sharded, mark_whole
from deepspeedlite.zero.plain import copy_parameter_plainly
from deepspeedlite.zero.wrap import NamedParameter


class ParamState(Enum):
    """Where the values are. See the file's first lines."""

    SHARDED = "sharded"
    UNSHARDING = "unsharding"
    UNSHARDED = "unsharded"


class ZeroParamStatus(Enum):
    """What clients of DeepSpeed read as `param.ds_status`."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


_STATUS = {
    ParamState.UNSHARDED: ZeroParamStatus.AVAILABLE,
    ParamState.SHARDED: ZeroParamStatus.NOT_AVAILABLE,
    ParamState.UNSHARDING: ZeroParamStatus.INFLIGHT,
}

_WORTH_SHARING_NBYTES = 1 << 20  # smaller shards are copied when they are sent: a block of their own is not worth it

# Parameter -> weak reference to its owner, which refers to the parameter: a strong one would keep both for ever.
_OWNERS = WeakTensorKeyDictionary()
_IDS = count()


def owner_of(param: torch.Tensor) -> FlatParams | None:
    """The flat values that a parameter is part of, if an engine or `zero.Init` has taken it over."""
    reference = _OWNERS.get(param)
    return None if reference is None else reference()


def full_shape(param: torch.Tensor) -> torch.Size:
    """A parameter's shape, whether it is sharded now or not."""
    owner = owner_of(param)
    return param.shape if owner is None else torch.Size(owner.slot_of(param).shape)


class Trained(Protocol):
    """The unit that trains flat values."""

    def note_new_values(self) -> None:
        """The values were written from outside the optimizer, which may keep copies of them."""


class LiveListener(Protocol):
    """Who counts sharded values that come to life."""

    def live_changed(self, values: Any, numel: int) -> None:
        """So many more elements are whole now, or on their way; less than zero: are sharded again."""


class FlatParams:
    """The values of parameters of one dtype and device.

    Args:
        members: the parameters; their memory becomes views of the buffer.
        group: the ranks that the values are sharded over.
        sharded: let each rank keep only its shard while nobody uses the values.
        shard_count: pieces that the buffer is cut into: the group's size, or 1 where nothing is sharded.
        offload: says where the shard lives while the values are sharded.
        run_numel: see `FlatLayout`.
        live: who counts values that are whole.
        unit: what trains them; None: they are frozen, or no engine's yet.
    """

    def __init__(
        self,
        members: Sequence[NamedParameter],
        group: Group,
        *,
        sharded: bool,
        shard_count: int | None = None,
        offload: Offload | None = None,
        run_numel: int | None = None,
        live: LiveListener | None = None,
        unit: Trained | None = None,
    ) -> None:
        ordered = sorted(members, key=lambda member: member.group)
        self.params = [member.param for member in ordered]
        self.group = group
        self.sharded = sharded
        count = group.size if shard_count is None else shard_count
        self.layout = FlatLayout([(m.name, full_shape(m.param), m.group) for m in ordered], count, run_numel)
        self.index = group.rank if count > 1 else 0
        first = self.params[0]
        self.dtype, self.device = first.dtype, first.device
        self.uses = 0
        self.writes = 0
        """How often all ranks were given new values from outside the optimizer."""
        # What the engine that has the values keeps on its module (a `Lease`); None of those that `zero.Init` has made.
        self.lease: Any = None
        self._live, self.unit = live, unit
        self.state = ParamState.SHARDED if sharded else ParamState.UNSHARDED
        more = f" and {len(ordered) - 1} more" if len(ordered) > 1 else ""
        self.key = next(group.tags)
        """A number that no other values of these ranks have, the same on all of them."""
        self._call: dict[str, Any] = {"label": f"the values of {ordered[0].name}{more}", "tag": 2 * self.key}
        self._work: Any = None
        self.slots: list[tuple[Slot, torch.nn.Parameter]] = list(zip(self.layout.slots, self.params))
        self._slot_of = {id(param): slot for slot, param in self.slots}
        self._take(sharded, offload or Offload())

    # --- taking parameters over -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _take(self, sharded: bool, offload: Offload) -> None:
        former = owners_of(self.params)
        agreed = len(former) > 0 and all(owner.sharded for owner in former)
        for owner in former:
            owner.begin_use()
        self.values = torch.zeros(self.layout.numel, dtype=self.dtype, device=self.device)
        self._nbytes = self.values.untyped_storage().nbytes()
        self._views = [self.values[slot.start : slot.stop].view(slot.shape) for slot, _ in self.slots]
        if not sharded:
            self._views = [_in_storage_of_its_own(view) for view in self._views]
        for view, param in zip(self._views, self.params):
            view.copy_(param.data)
        if not agreed:
            self.group.broadcast(self.values)
        own = self.values[slice(*self.layout.shard(self.index))]
        self.shard, self.store = own, Store()
        if sharded:
            self.shard = own.data  # a tensor of its own, whose memory the store may take away
            self.store = offload.store(self.shard)
            if self.store.is_here:
                self.shard = self._kept_apart(own)
        self._placeholder = torch.empty(0, dtype=self.dtype, device=self.device)
        for owner in former:
            owner.forget(self.params)
        self.own()
        for slot, param in self.slots:
            if sharded:
                describe_as_sharded(param, slot, self)
            elif hasattr(param, "ds_id"):
                describe_as_whole(param, self.group)
        if sharded:
            self._drop()
        else:
            self._show()

    def own(self) -> None:
        """Be the parameters' owner."""
        for param in self.params:
            _OWNERS[param] = weakref.ref(self)

    def _kept_apart(self, own: torch.Tensor) -> torch.Tensor:
        if own.nbytes < _WORTH_SHARING_NBYTES:
            return own.clone()
        return self.group.alloc_shared(own.numel(), self.dtype, self.device).copy_(own)

    def forget(self, params: Iterable[torch.Tensor]) -> None:
        """Another owner has taken these parameters over."""
        taken = {id(param) for param in params}
        kept = [index for index, param in enumerate(self.params) if id(param) not in taken]
        self.params = [self.params[index] for index in kept]
        self.slots = [self.slots[index] for index in kept]
        self._slot_of = {id(param): slot for slot, param in self.slots}
        self._views = [self._views[index] for index in kept]
        self.end_use()
        if not self.params and self.sharded:
            self.shard = self._placeholder  # an engine that is kept for its module must not keep a second copy of it

    def slot_of(self, param: torch.Tensor) -> Slot:
        """The parameter's place in the layout."""
        return self._slot_of[id(param)]

    def _show(self) -> None:
        for param, view in zip(self.params, self._views):
            mark_whole(param)
            param.data = view
        self._enter(ParamState.UNSHARDED)

    def _drop(self) -> None:
        for param in self.params:
            param.data = self._placeholder
            mark_sharded(param)
        self.values.untyped_storage().resize_(0)
        self._enter(ParamState.SHARDED)

    def _enter(self, state: ParamState) -> None:
        was_live, self.state = self.state is not ParamState.SHARDED, state
        if self.sharded:
            is_live = state is not ParamState.SHARDED
            if is_live != was_live and self._live is not None:
                self._live.live_changed(self, self.numel if is_live else -self.numel)
            status = _STATUS[state]
            for param in self.params:
                param.ds_status = status  # type: ignore[attr-defined]

    # --- whole and sharded ----------------------------------------------------------------------------------------

    @property
    def numel(self) -> int:
        """Elements of the whole buffer, gaps included."""
        return self.layout.numel

    @property
    def shard_numel(self) -> int:
        """Elements of this rank's shard, gaps included."""
        return self.layout.shard_numel

    @torch.no_grad()
    def unshard(self) -> None:
        """Start making the values whole; nothing happens where they are, are on the way, or are all another's now."""
        if self.state is not ParamState.SHARDED or not self.params:
            return
        with as_plain():
            is_converted = self.params[0].dtype is not self.dtype
        if is_converted:  # else its values would undo it in silence
            raise self._detached(self.slots[0][0], self.params[0], self._placeholder)
        self.values.untyped_storage().resize_(self._nbytes)
        self.store.open()
        self._work = self.group.all_gather_into(self.values, self.shard, async_op=True, final=True, **self._call)
        self._enter(ParamState.UNSHARDING)

    def fetch(self) -> bool:
        """Begin to bring the shard from where it lives, for an `unshard` to come; whether there was memory for it."""
        return self.state is not ParamState.SHARDED or self.store.fetch()

    def wait_for_unshard(self) -> None:
        """Wait until the parameters hold their values (on GPUs: until the current stream will see them)."""
        if self.state is not ParamState.UNSHARDING:
            return
        work, self._work = self._work, None
        try:
            if work is not None:
                work.wait()
        except BaseException:
            self._drop()  # what is there is not the values
            raise
        finally:
            self.store.close()
        self._show()

    def begin_use(self) -> None:
        """Unshard the values and keep them so until the matching `end_use`."""
        self.unshard()
        self.wait_for_unshard()
        self.uses += 1

    def end_use(self, reshard: bool = True) -> None:
        """End a use; the last one reshards the values, unless they are to stay for a while."""
        self.uses -= 1
        if reshard:
            self.reshard()

    def reshard(self) -> None:
        """Free the whole values, where they are sharded and nobody uses them."""
        if not self.sharded or self.uses > 0 or self.state is ParamState.SHARDED:
            return
        self.wait_for_unshard()
        self._drop()

    def others_have_tensors(self) -> bool:
        """Whether somebody else has a tensor over the buffer of values that are whole, such as a `param.data`."""
        shown = sum(param.data_ptr() == view.data_ptr() for param, view in zip(self.params, self._views))
        return tensors_over(self.values) > 1 + len(self._views) + shown

    def give_buffer_away(self) -> None:
        """Leave the whole values' memory to the tensors over it that others have, and go on in another buffer."""
        self.values = torch.empty_like(self.values)
        self._views = [self.values[slot.start : slot.stop].view(slot.shape) for slot, _ in self.slots]
        self.values.untyped_storage().resize_(0)

    def wait_for_readers(self) -> None:
        """Wait until no other rank reads this rank's shard any more; before anything writes it."""
        self.store.forget()
        if self.sharded and self.store.is_here:
            self.group.wait_for_readers(self.shard)

    @contextmanager
    def shard_in_memory(self, write: bool = False) -> Iterator[None]:
        """`shard` holds this rank's values inside; `write`: and is changed there."""
        if not self.store.is_here:
            self.wait_for_unshard()  # which takes the shard away when it ends
        with self.store.opened(write):
            yield

    def cut_runs(self) -> list[tuple[Run, torch.Tensor]]:
        """This rank's runs: index range, and values where they lie; without memory if they come from a disk."""
        return [(run, self.store.values(self.shard, *self.layout.span(run))) for run in self.layout.runs(self.index)]

    @torch.no_grad()
    def start_sharing(self) -> None:
        """After a step wrote this rank's shard of values that stay whole: start sending it to all ranks."""
        if not self.sharded and self.layout.shard_count > 1:
            self._work = self.group.all_gather_into(self.values, self.shard, async_op=True, **self._call)

    def wait_for_sharing(self) -> None:
        """Wait until every rank's shard has come."""
        work, self._work = self._work, None
        if work is not None:
            work.wait()

    @torch.no_grad()
    def keep_changes(self) -> None:
        """The whole values were written, alike on every rank: take this rank's shard from them."""
        if self.sharded and self.state is ParamState.UNSHARDED:
            start, stop = self.layout.shard(self.index)
            self.wait_for_readers()
            with self.shard_in_memory(write=True):
                self.shard.copy_(self.values[start:stop])
        self.writes += 1
        self.note_new_values()

    def note_new_values(self) -> None:
        """The values were written from outside the optimizer."""
        if self.unit is not None:
            self.unit.note_new_values()

    def follow_memory(self) -> None:
        """The buffer's memory has gone, or has come back elsewhere: show what is there."""
        if self.sharded:
            return
        if not self.values.untyped_storage().nbytes():
            for param in self.params:
                param.data = self._placeholder
            return
        for index, (slot, _) in enumerate(self.slots):
            self._views[index] = _in_storage_of_its_own(self.values[slot.start : slot.stop].view(slot.shape))
        self._show()

    @torch.no_grad()
    def take_replaced(self) -> str:
        """The parameters, whole now, may have been given new memory (`.data =`): take the values from it.

        Returns what is wrong, with RANK for this rank, where one was given another shape; its former values are back.
        """
        wrong = ""
        for (slot, param), view in zip(self.slots, self._views):
            if param.shape != view.shape:
                wrong = wrong or (
                    f"parameter {slot.name} of shape {slot.shape} was given a tensor of shape {tuple(param.shape)} on "
                    "rank RANK in GatheredParameters; sharded parameters keep their shape: assign a new Parameter to "
                    "the module"
                )
                param.data = view
            elif param.data_ptr() != view.data_ptr():
                view.copy_(param.data)
                param.data = view
        return wrong

    def _replaced(self) -> list[tuple[Slot, torch.Tensor, torch.Tensor]]:
        """The parameters whose memory was replaced, with what they should show."""
        views = self._views if self.state is ParamState.UNSHARDED else [self._placeholder] * len(self.slots)
        with as_plain():
            return [
                (slot, param, view)
                for (slot, param), view in zip(self.slots, views)
                if param.data_ptr() != view.data_ptr() or param.shape != view.shape or param.dtype is not view.dtype
            ]

    def is_attached(self) -> bool:
        """Whether the parameters still have the buffer's memory."""
        return not self._replaced()

    def verify_attached(self) -> None:
        """Raise when a parameter's memory was replaced, since its training would then go unnoticed.

        Raises:
            EngineStateError: naming the parameter.
        """
        for replaced in self._replaced():
            raise self._detached(*replaced)

    @staticmethod
    def _detached(slot: Slot, param: torch.Tensor, expected: torch.Tensor) -> EngineStateError:
        return EngineStateError(
            f"parameter {slot.name} {_what_was_done(param, expected)} after deepspeedlite.initialize, and its "
            "optimizer no longer sees it: move and convert the model before initialize (the configuration's "
            "bf16 and fp16 sections convert it too), and copy values in place afterwards"
        )

    def close(self) -> None:
        """The engine is over. Whole parameters are given back; sharded ones stay so, as `zero.Init` would leave them.

        On one rank it waits for no other.
        """
        self._live = None
        if self.sharded:
            self.reshard()
            self.store = self.store.outlast()
            return
        for param in self.params:
            if owner_of(param) is self:
                del _OWNERS[param]


def tensors_over(tensor: torch.Tensor) -> int:
    """How many tensors are over a tensor's memory."""
    count: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return count - 1  # the handle that asks is counted too


def _in_storage_of_its_own(view: torch.Tensor) -> torch.Tensor:
    """The same memory, by a storage that begins and ends with it, and keeps the whole of it alive.

    What saves or compares tensors looks at their storages: torch.save writes all of one, safetensors takes tensors that
    have one in common for tied ones.
    """
    if not view.numel() or view.is_meta:
        return view
    raw = view.view(-1).view(torch.uint8)  # not every dtype has a name in DLPack
    alone: torch.Tensor = torch.from_dlpack(torch.utils.dlpack.to_dlpack(raw))
    return alone.view(view.dtype).view(view.shape)


def _name_if_empty(param: torch.Tensor) -> str:
    """The full name of a parameter whose values are sharded, and not here at the moment."""
    owner = owner_of(param)
    return "" if owner is None or owner.state is ParamState.UNSHARDED else owner.slot_of(param).name


def _what_was_done(param: torch.Tensor, expected: torch.Tensor) -> str:
    if param.dtype is not expected.dtype:
        name = str(param.dtype).removeprefix("torch.")
        return (
            f"was converted from {str(expected.dtype).removeprefix('torch.')} to {name} (.to(), .half(), .float(), ...)"
        )
    if param.device != expected.device:
        return f"was moved from {expected.device} to {param.device} (.to(), .cuda() or .cpu())"
    if param.shape != expected.shape:
        return f"was given the shape {tuple(param.shape)} in place of {tuple(expected.shape)} (.data = ...)"
    return "was given new memory (by .data = ..., load_state_dict(assign=True) or flatten_parameters())"


def _describe(param: torch.Tensor, shape: torch.Size) -> None:
    """What clients of DeepSpeed read on a parameter of stage 3, sharded or not."""
    if not hasattr(param, "ds_id"):
        param.ds_id = next(_IDS)  # type: ignore[attr-defined]
        param.ds_active_sub_modules = set()  # type: ignore[attr-defined]
    param.ds_shape, param.ds_numel = shape, shape.numel()  # type: ignore[attr-defined]
    copy_parameter_plainly(param, _name_if_empty)


def describe_as_sharded(param: torch.Tensor, slot: Slot, owner: FlatParams) -> None:
    """The rest of a sharded one. `partition_numel` keeps the owner alive with it."""
    _describe(param, torch.Size(slot.shape))
    param.full_name = slot.name  # type: ignore[attr-defined]  # see `ShardedParameter`
    param.ds_tensor = owner.shard  # type: ignore[attr-defined]
    param.partition_numel = lambda: owner.shard_numel  # type: ignore[attr-defined]


def describe_as_whole(param: torch.Tensor, group: Group) -> None:
    """The rest of one that is not sharded, or no longer; `group` are the ranks that hold it alike."""
    _describe(param, param.shape)
    param.ds_group = group  # type: ignore[attr-defined]
    param.ds_status = ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]
    param.partition_numel = param.numel  # type: ignore[attr-defined]
    param.__dict__.pop("ds_tensor", None)  # another owner's shard


@torch.no_grad()
def make_whole(params: Iterable[torch.Tensor]) -> None:
    """Take parameters out of sharded values: they are plain again, whole on every rank. Collective."""
    taken: dict[FlatParams, list[torch.Tensor]] = {}
    for param in params:
        owner = owner_of(param)
        if owner is not None and owner.sharded:
            taken.setdefault(owner, []).append(param)
    for owner, mine in taken.items():
        owner.begin_use()
        for param in mine:
            param.data = param.data.clone()
            del _OWNERS[param]
            describe_as_whole(param, owner.group)
        owner.forget(mine)


def owners_of(params: Iterable[torch.Tensor]) -> list[FlatParams]:
    """The distinct owners of parameters, in order."""
    found = dict.fromkeys(owner_of(param) for param in params)
    return [owner for owner in found if owner is not None]
