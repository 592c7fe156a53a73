"""What passes between neighbouring stages: activations forward, gradients backward.

A *message* is one tensor or a tuple of tensors. What it consists of (its `Outline`) goes ahead of the first micro-batch
of every batch, so that the next stage can make room; ahead of every one where shapes change.

[Note: no stage waits for a send]
Sends are started and left under way; the tensors are kept until they must have arrived. When a neighbour's message of
micro-batch m is here, it has run the passes before that in its order, and so has received what they needed. What is
left at the end of a batch is waited for then. A receive is posted as soon as the one before it is over, so that data
moves while a stage computes.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from deepspeedlite.comm.desync import explained
from deepspeedlite.parallel.pipe.schedule import Schedule, before
from deepspeedlite.parallel.pipe.topology import PipelineParallelGrid
from deepspeedlite.runtime.errors import PipelineError

_HEADER_NBYTES = 4096
_FAILED = b"null".ljust(_HEADER_NBYTES)  # in the place of an outline: no activation will come any more


class Outline(NamedTuple):
    """What a message consists of: per tensor its dtype's name, its shape, and whether it requires grad."""

    is_tuple: bool
    tensors: tuple[tuple[str, tuple[int, ...], bool], ...]

    @classmethod
    def of(cls, message: Any, stage: int) -> Outline:
        """The outline of a stage's output.

        Raises:
            PipelineError: it holds something else than tensors.
        """
        items = message if isinstance(message, tuple) else (message,)
        for item in items:
            if not isinstance(item, torch.Tensor) or item.layout is not torch.strided:
                raise PipelineError(
                    f"the last layer of pipeline stage {stage} returned {_shown(message)}; only dense tensors, or a "
                    "tuple of them, pass to the next stage"
                )
        described = [(str(t.dtype).removeprefix("torch."), tuple(t.shape), t.requires_grad) for t in items]
        return cls(isinstance(message, tuple), tuple(described))

    def to_bytes(self) -> bytes:
        """As it is sent."""
        raw = json.dumps(self).encode()
        if len(raw) > _HEADER_NBYTES:
            raise PipelineError(f"{len(self.tensors)} tensors are too many to pass between pipeline stages; join some")
        return raw.ljust(_HEADER_NBYTES)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Outline | None:
        """What `to_bytes` gave; None where the sender has failed."""
        if raw == _FAILED:
            return None
        is_tuple, tensors = json.loads(raw)
        return cls(is_tuple, tuple((dtype, tuple(shape), grad) for dtype, shape, grad in tensors))

    def room(self, device: torch.device, grads: bool = False) -> list[torch.Tensor]:
        """Tensors to receive it in; with `grads`, those of its tensors that require grad."""
        return [
            torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            for dtype, shape, requires_grad in self.tensors
            if requires_grad or not grads
        ]


def _shown(message: Any) -> str:
    kind = type(message).__name__
    return (
        f"a {kind} of {', '.join(type(item).__name__ for item in message)}"
        if isinstance(message, tuple)
        else f"a {kind}"
    )


class _Channel:
    """One direction between this stage and a neighbour: messages under way to it, or from it.

    Args:
        group: of the pipeline's stages.
        peer: the neighbour's place in it.
        what: what is moved, for errors.
    """

    def __init__(self, group: dist.ProcessGroup, peer: int, what: str) -> None:
        self._group, self._peer, self._what = group, peer, what
        self._rank = dist.get_global_rank(group, peer)
        self._sent: deque[tuple[list[Any], Sequence[torch.Tensor]]] = deque()
        self._finished = 0
        self._posted: deque[tuple[list[Any], list[torch.Tensor]]] = deque()

    def send(self, tensors: Sequence[torch.Tensor]) -> None:
        """Start sending the next message."""
        whole = [tensor.detach().contiguous() for tensor in tensors]
        with explained(f"sending {self._what} to rank {self._rank}", [self._rank]):
            works = [dist.isend(t, group=self._group, group_dst=self._peer) for t in whole if t.numel()]
        self._sent.append((works, whole))

    def finish_sends(self, messages: int) -> None:
        """Forget the first `messages` messages of this batch, which have arrived."""
        with explained(f"sending {self._what} to rank {self._rank}", [self._rank]):
            while self._sent and self._finished < messages:
                for work in self._sent.popleft()[0]:
                    work.wait()
                self._finished += 1

    def end_batch(self) -> None:
        """Wait for what is under way, and count from 0 again."""
        self.finish_sends(self._finished + len(self._sent))
        self._finished = 0

    def post(self, room: list[torch.Tensor]) -> None:
        """Say where the next message is to be received."""
        with explained(f"receiving {self._what} from rank {self._rank}", [self._rank]):
            works = [dist.irecv(t, group=self._group, group_src=self._peer) for t in room if t.numel()]
        self._posted.append((works, room))

    @property
    def expects(self) -> bool:
        """Whether a receive is posted."""
        return bool(self._posted)

    def take(self) -> list[torch.Tensor]:
        """The oldest message that was posted, when it is here."""
        works, room = self._posted.popleft()
        with explained(f"receiving {self._what} from rank {self._rank}", [self._rank]):
            for work in works:
                work.wait()
        return room


class StageComm:
    """All that a stage sends and receives in a batch.

    Args:
        grid: the pipeline's groups.
        device: where the tensors are.
        schedule: of the passes.
        dynamic_shape: whether every message is announced.
    """

    def __init__(
        self, grid: PipelineParallelGrid, device: torch.device, schedule: Schedule, dynamic_shape: bool
    ) -> None:
        self._stage, self._stages, self._schedule = grid.stage_id, grid.pipe_parallel_size, schedule
        self._device, self._dynamic = device, dynamic_shape
        self._to_next = self._from_next = self._to_previous = self._from_previous = None
        self._headers_out = self._headers_in = None
        if self._stage + 1 < self._stages:
            self._to_next = _Channel(grid.activations, self._stage + 1, "activations")
            self._from_next = _Channel(grid.gradients, self._stage + 1, "gradients")
            self._headers_out = _Channel(grid.headers, self._stage + 1, "an activation's shape")
        if self._stage > 0:
            self._from_previous = _Channel(grid.activations, self._stage - 1, "activations")
            self._to_previous = _Channel(grid.gradients, self._stage - 1, "gradients")
            self._headers_in = _Channel(grid.headers, self._stage - 1, "an activation's shape")
        self.begin_batch(0)

    def begin_batch(self, micro_batches: int) -> None:
        """Micro-batches begin whose shapes may be others than before."""
        self.micro_batches = micro_batches
        self._coming: Outline | None = None  # of activations that come
        self._going: list[Outline] = []  # of those that were sent
        self._taken = self._grads_posted = self._grads_taken = 0
        self._is_cut_before = self._is_cut_behind = False  # whether no activation comes, or goes, any more
        # Per message that comes: how many of those that went to the same neighbour have arrived.
        if self._stage > 0:
            passes = self._schedule(self._stages, self._stage - 1, micro_batches)
            self._read_by_previous = before(passes, "forward", "backward")
        if self._stage + 1 < self._stages:
            passes = self._schedule(self._stages, self._stage + 1, micro_batches)
            self._read_by_next = before(passes, "backward", "forward")

    def end_batch(self) -> None:
        """Wait until all that was sent has arrived."""
        for channel in (self._to_next, self._to_previous, self._headers_out):
            if channel is not None:
                channel.end_batch()

    # --- forward --------------------------------------------------------------------------------------------------

    def receive_activation(self, training: bool) -> Any:
        """The next micro-batch's input; with `training`, what required grad there does so here, as a leaf.

        None if a stage before this one has failed.
        """
        channel, previous = self._from_previous, self._to_previous
        assert channel is not None and previous is not None
        if not channel.expects and not self._is_cut_before:
            self._post_activation(channel)
        if self._is_cut_before:
            return None
        outline = self._coming
        assert outline is not None
        tensors = channel.take()
        if training:
            previous.finish_sends(self._read_by_previous[self._taken])
        self._taken += 1
        if self._taken < self.micro_batches and not self._dynamic:
            self._post_activation(channel)
        for tensor, (_, _, requires_grad) in zip(tensors, outline.tensors):
            tensor.requires_grad_(requires_grad and training)
        return tuple(tensors) if outline.is_tuple else tensors[0]

    def _post_activation(self, channel: _Channel) -> None:
        if self._coming is None or self._dynamic:
            assert self._headers_in is not None
            header = torch.empty(_HEADER_NBYTES, dtype=torch.uint8)
            self._headers_in.post([header])
            self._headers_in.take()
            self._coming = Outline.from_bytes(header.numpy().tobytes())
        self._is_cut_before = self._coming is None
        if self._coming is not None:
            channel.post(self._coming.room(self._device))

    def outline(self, output: Any) -> tuple[Outline, bytes]:
        """What the next micro-batch's output consists of, and that in the bytes that announce it.

        Raises:
            PipelineError: it cannot be passed on, or has another shape than the first of the batch.
        """
        outline = Outline.of(output, self._stage)
        if self._going and not self._dynamic and outline != self._going[0]:
            raise PipelineError(
                f"the output of pipeline stage {self._stage} for micro-batch {len(self._going)} is "
                f"{_described(outline)}, and that of micro-batch 0 was {_described(self._going[0])}; give all the same "
                "shape, or make the PipelineModule with dynamic_shape=True"
            )
        return outline, outline.to_bytes()

    def send_activation(self, output: Any, described: tuple[Outline, bytes] | None, training: bool) -> None:
        """Pass on a micro-batch's output, of which `described` is the `outline`; None if this stage has failed.

        Without training nothing comes back, and two at most are under way.
        """
        channel, headers = self._to_next, self._headers_out
        assert channel is not None and headers is not None
        if self._is_cut_behind:
            return
        is_announced = not self._going or self._dynamic
        self._is_cut_behind = described is None and is_announced
        if is_announced:
            header = _FAILED if described is None else described[1]
            headers.send([torch.frombuffer(bytearray(header), dtype=torch.uint8)])
        if self._is_cut_behind:
            return
        outline = self._going[0] if described is None else described[0]
        if described is None:
            output = tuple(tensor.zero_() for tensor in outline.room(self._device))
        self._going.append(outline)
        channel.send(output if isinstance(output, tuple) else (output,))
        if training:
            self._post_gradients()
        else:
            channel.finish_sends(len(self._going) - 2)

    # --- backward -------------------------------------------------------------------------------------------------

    def _post_gradients(self) -> None:
        """Be ready for the gradients of one more micro-batch, if it was sent and asked for any."""
        if self._grads_posted < len(self._going) and self._grads_posted <= self._grads_taken:
            assert self._from_next is not None
            self._from_next.post(self._going[self._grads_posted].room(self._device, grads=True))
            self._grads_posted += 1

    def receive_gradients(self) -> list[torch.Tensor]:
        """Of the next micro-batch's outputs that require grad, in order; none of one that was not passed on."""
        assert self._from_next is not None and self._to_next is not None
        if self._grads_taken == len(self._going):
            return []
        grads = self._from_next.take()
        self._to_next.finish_sends(self._read_by_next[self._grads_taken])
        self._grads_taken += 1
        self._post_gradients()
        return grads

    def send_gradients(self, inputs: Sequence[torch.Tensor]) -> None:
        """Give the stage before this one the gradients of what it had sent; zeros for what nothing depended on."""
        assert self._to_previous is not None
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        self._to_previous.send([t.grad if t.grad is not None else torch.zeros_like(t) for t in wanted])


def _described(outline: Outline) -> str:
    return ", ".join(f"{dtype}{list(shape)}{'' if grad else ' without grad'}" for dtype, shape, grad in outline.tensors)
