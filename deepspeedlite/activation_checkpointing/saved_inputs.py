"""Where a checkpointed function's inputs are between the forward and the backward pass.

Sharded: each model-parallel rank keeps a part of the flattened input, and the whole is gathered when it is needed; that
is collective, and backward passes of these ranks take the same order.

[Note: copies beside the computation]
On a GPU the copy to the host runs on a stream of its own, which first waits for the input to be computed; the allocator
is told (`record_stream`) that the input's memory is read there. The way back runs on the same stream, into memory that
was allocated on the current stream, hence the wait before the copy; and the current stream waits for the copy's end.
Backward needs inputs last first, so fetching one starts the copy of the one that was kept before it.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch

from deepspeedlite.comm import Group
from deepspeedlite.runtime.device import Device, on_accelerator
from deepspeedlite.runtime.log import log_once


class SavedInput(Protocol):
    """One input's values, wherever they are."""

    requires_grad: bool

    def fetch(self) -> torch.Tensor:
        """A tensor with the values, on the input's device, without a graph."""


class PartBuffers:
    """Memory for the parts of sharded inputs that does not fall into fragments while layers' own tensors come and go.

    For each size of part, dtype and place there is one buffer with room for `count` of them, allocated when the first
    such part is kept. What is kept beyond that, because more calls wait for their backward than was said, has memory of
    its own.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._buffers: dict[tuple[Any, ...], torch.Tensor] = {}  # [count, numel]
        self._free: dict[tuple[Any, ...], list[int]] = {}  # rows that nobody has; a list, so that rows come back to it

    def take(self, numel: int, like: torch.Tensor, holder: object, pinned: bool = False) -> torch.Tensor:
        """A 1-D tensor of `like`'s dtype for as long as `holder` lives: on its device, or in page-locked CPU memory."""
        place: dict[str, Any] = {"dtype": like.dtype, "device": like.device, "pin_memory": pinned}
        if pinned:
            place["device"] = torch.device("cpu")
        key = (numel, *place.values())
        if key not in self._buffers:
            self._buffers[key] = torch.empty((self._count, numel), **place)
            self._free[key] = list(reversed(range(self._count)))
        free = self._free[key]
        if not free:
            log_once(
                f"more than {self._count} checkpointed inputs of {numel} elements a rank are kept at once: those "
                "beyond have memory of their own; raise activation_checkpointing.number_checkpoints"
            )
            return torch.empty(numel, **place)
        row = free.pop()
        weakref.finalize(holder, free.append, row)
        return self._buffers[key][row]


class InputSaver:
    """Decides how inputs are kept.

    Args:
        group: the ranks to shard over; None: not.
        on_host: GPU inputs go to the CPU.
        buffers: where the parts of sharded inputs are put; None: each has memory of its own.
    """

    def __init__(self, group: Group | None, on_host: bool, buffers: PartBuffers | None = None) -> None:
        self._group = group if group is not None and group.size > 1 else None
        self._on_host, self._buffers = on_host, buffers

    def moves(self, leaf: Any) -> bool:
        """Whether an argument is kept elsewhere than in itself: floating-point tensors, where that saves memory."""
        if not isinstance(leaf, torch.Tensor) or isinstance(leaf, torch.nn.Parameter) or not leaf.is_floating_point():
            return False
        shards = self._group is not None and leaf.numel() >= self._group.size
        return shards or (self._on_host and on_accelerator(leaf))

    def save(self, tensor: torch.Tensor) -> SavedInput:
        """Take a copy of the values, or of this rank's part of them."""
        if self._group is not None and tensor.numel() >= self._group.size:
            return _Sharded(tensor, self._group, self._on_host, self._buffers)
        return _OnHost(tensor)


class _Sharded:
    """This rank's part of the flattened tensor; the last rank's is padded."""

    def __init__(self, tensor: torch.Tensor, group: Group, on_host: bool, buffers: PartBuffers | None) -> None:
        self.requires_grad = tensor.requires_grad
        self._shape, self._group = tensor.shape, group
        part_numel = -(-tensor.numel() // group.size)
        mine = tensor.detach().reshape(-1)[group.rank * part_numel : (group.rank + 1) * part_numel]
        goes_to_host = on_host and on_accelerator(tensor)
        room = None if buffers is None else buffers.take(part_numel, mine, self, pinned=goes_to_host)
        part = mine.new_empty(part_numel) if room is None or goes_to_host else room
        part[: mine.numel()] = mine
        part[mine.numel() :] = 0
        self._part: torch.Tensor | _OnHost = _OnHost(part, room) if goes_to_host else part

    def fetch(self) -> torch.Tensor:
        part = self._part.fetch() if isinstance(self._part, _OnHost) else self._part
        whole = part.new_empty(part.numel() * self._group.size)
        self._group.all_gather_into(whole, part, label="a checkpointed input")
        # Not `whole[:numel].view(shape)`: a custom Function must not return a view that is then written in place.
        stride = torch.empty(self._shape, device="meta").stride()
        return whole.new_empty(0).set_(whole.untyped_storage(), 0, self._shape, stride)


class _OnHost:
    """A copy of a GPU's tensor in page-locked CPU memory. See the note above."""

    _last: weakref.ref[_OnHost] | None = None  # kept most recently
    _streams: dict[torch.device, torch.Stream] = {}

    def __init__(self, tensor: torch.Tensor, room: torch.Tensor | None = None) -> None:
        self.requires_grad = tensor.requires_grad
        self._device = Device(tensor.device)
        self._back: torch.Tensor | None = None
        self._before, _OnHost._last = _OnHost._last, weakref.ref(self)
        stream = self._stream()
        stream.wait_stream(self._device.current_stream())
        source = tensor.detach()
        self._copy = torch.empty_like(source, device="cpu", pin_memory=True) if room is None else room
        with self._device.in_stream(stream):
            self._copy.copy_(source, non_blocking=True)
        source.record_stream(stream)

    def _stream(self) -> torch.Stream:
        if self._device.torch_device not in self._streams:
            self._streams[self._device.torch_device] = self._device.new_stream()
        return self._streams[self._device.torch_device]

    def start_back(self) -> None:
        """Start the copy to the GPU, if it is not under way."""
        if self._back is not None:
            return
        self._back = torch.empty_like(self._copy, device=self._device.torch_device)
        stream = self._stream()
        stream.wait_stream(self._device.current_stream())
        with self._device.in_stream(stream):
            self._back.copy_(self._copy, non_blocking=True)
        self._back.record_stream(stream)

    def fetch(self) -> torch.Tensor:
        self.start_back()
        self._device.current_stream().wait_stream(self._stream())
        before = self._before() if self._before is not None else None
        if before is not None:
            before.start_back()
        back, self._back = self._back, None
        assert back is not None
        return back


class Restored(torch.autograd.Function):
    """A kept input as the function saw it: part of a graph where it requires grad, so it may be written in place."""

    @staticmethod
    def of(saved: SavedInput) -> torch.Tensor:
        """The tensor."""
        if not saved.requires_grad:
            return saved.fetch()
        tensor: torch.Tensor = Restored.apply(torch.empty(0, requires_grad=True), saved)
        return tensor

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, saved: SavedInput) -> torch.Tensor:
        return saved.fetch()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise AssertionError("a recomputation's graph is never walked")
