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


class SavedInput(Protocol):
    """One input's values, wherever they are."""

    requires_grad: bool

    def fetch(self) -> torch.Tensor:
        """A tensor with the values, on the input's device, without a graph."""


class InputSaver:
    """Decides how inputs are kept. `group`: the ranks to shard over, None: not; `on_host`: GPU inputs go to the CPU."""

    def __init__(self, group: Group | None, on_host: bool) -> None:
        self._group = group if group is not None and group.size > 1 else None
        self._on_host = on_host

    def moves(self, leaf: Any) -> bool:
        """Whether an argument is kept elsewhere than in itself: floating-point tensors, where that saves memory."""
        if not isinstance(leaf, torch.Tensor) or isinstance(leaf, torch.nn.Parameter) or not leaf.is_floating_point():
            return False
        shards = self._group is not None and leaf.numel() >= self._group.size
        return shards or (self._on_host and leaf.is_cuda)

    def save(self, tensor: torch.Tensor) -> SavedInput:
        """Take a copy of the values, or of this rank's part of them."""
        if self._group is not None and tensor.numel() >= self._group.size:
            return _Sharded(tensor, self._group, self._on_host)
        return _OnHost(tensor)


class _Sharded:
    """This rank's part of the flattened tensor; the last rank's is padded."""

    def __init__(self, tensor: torch.Tensor, group: Group, on_host: bool) -> None:
        self.requires_grad = tensor.requires_grad
        self._shape, self._group = tensor.shape, group
        part_numel = -(-tensor.numel() // group.size)
        mine = tensor.detach().reshape(-1)[group.rank * part_numel : (group.rank + 1) * part_numel]
        part = mine.new_zeros(part_numel)
        part[: mine.numel()] = mine
        self._part: torch.Tensor | _OnHost = _OnHost(part) if on_host and part.is_cuda else part

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
    _streams: dict[torch.device, torch.cuda.Stream] = {}

    def __init__(self, tensor: torch.Tensor) -> None:
        self.requires_grad = tensor.requires_grad
        self._device = tensor.device
        self._back: torch.Tensor | None = None
        self._before, _OnHost._last = _OnHost._last, weakref.ref(self)
        stream = self._stream()
        stream.wait_stream(torch.cuda.current_stream(self._device))
        source = tensor.detach()
        self._copy = torch.empty_like(source, device="cpu", pin_memory=True)
        with torch.cuda.stream(stream):
            self._copy.copy_(source, non_blocking=True)
        source.record_stream(stream)

    def _stream(self) -> torch.cuda.Stream:
        if self._device not in self._streams:
            self._streams[self._device] = torch.cuda.Stream(self._device)
        return self._streams[self._device]

    def start_back(self) -> None:
        """Start the copy to the GPU, if it is not under way."""
        if self._back is not None:
            return
        self._back = torch.empty_like(self._copy, device=self._device)
        stream = self._stream()
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._back.copy_(self._copy, non_blocking=True)
        self._back.record_stream(stream)

    def fetch(self) -> torch.Tensor:
        self.start_back()
        torch.cuda.current_stream(self._device).wait_stream(self._stream())
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
