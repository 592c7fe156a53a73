"""Elements of flat tensors from the ranks that hold them to those that write them: what a change of layout needs.

Each rank knows what it wants of each other. In round k it asks rank + k, is asked by rank - k, and what was asked for
goes the other way in batches of a fixed size. So nobody ever holds more than what it wants, and two batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.distributed as dist

from deepspeedlite.comm.guard import objects

_BATCH_NBYTES = 1 << 25
_ALIGNMENT = 16  # of each range in a batch: more than any dtype needs


class Range(NamedTuple):
    """Elements `[first, first + numel)` of a tensor of the rank that is asked."""

    tensor: str
    first: int
    numel: int
    itemsize: int  # bytes of an element


class Want(NamedTuple):
    """A range, and the 1-D tensor in host memory that it is for; cast as `copy_` does where dtypes differ."""

    asked: Range
    dtype: torch.dtype  # of the tensor that is asked for
    out: torch.Tensor


Read = Callable[[str, int, torch.Tensor], None]  # fill the tensor with elements of the named one, from the number on


def exchange(
    group: dist.ProcessGroup, wanted: Mapping[int, Sequence[Want]], read: Read, dtypes: Mapping[str, torch.dtype]
) -> None:
    """Fill all that this rank wants. Collective over a group whose ranks are those of the world.

    Args:
        group: gloo's.
        wanted: by the rank that has it.
        read: of this rank's own tensors.
        dtypes: of these.

    Raises:
        Exception: what `read` has raised, once nobody waits for this rank any more; what others got is worth nothing.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    failures: list[Exception] = []

    def fill(ranges: Sequence[Range]) -> torch.Tensor:
        batch = torch.zeros(sum(_padded(asked) for asked in ranges), dtype=torch.uint8)
        for asked, memory in _places(ranges, batch):
            try:
                read(asked.tensor, asked.first, memory.view(dtypes[asked.tensor]))
            except Exception as error:  # told when everybody has got something
                failures.append(error)
        return batch

    for shift in range(1, size):
        source, target = (rank + shift) % size, (rank - shift) % size
        wants = [part for want in wanted.get(source, ()) for part in _cut(want)]
        asked = _swap(group, [want.asked for want in wants], source, target)
        outs = iter(wants)
        for give, take in zip_longest(_batches(asked), _batches([want.asked for want in wants])):
            sent = fill(give) if give else None
            work = dist.isend(sent, target, group) if sent is not None else None
            if take:
                batch = torch.empty(sum(_padded(piece) for piece in take), dtype=torch.uint8)
                dist.recv(batch, source, group)
                for (_, memory), want in zip(_places(take, batch), outs):
                    want.out.copy_(memory.view(want.dtype))
            if work is not None:
                work.wait()
    if failures:
        raise failures[0]


def _swap(group: dist.ProcessGroup, mine: list[Range], source: int, target: int) -> list[Range]:
    """Tell `source` what is wanted of it; what `target` wants."""
    told = torch.frombuffer(bytearray(objects.to_bytes(mine)), dtype=torch.uint8)
    nbytes = torch.tensor([told.numel()])
    sending = [dist.isend(nbytes, source, group), dist.isend(told, source, group)]
    coming = torch.zeros_like(nbytes)
    dist.recv(coming, target, group)
    answer = torch.empty(int(coming), dtype=torch.uint8)
    dist.recv(answer, target, group)
    for work in sending:
        if work is not None:
            work.wait()
    return list(objects.from_bytes(answer.numpy().tobytes(), [Range]))


def _cut(want: Want) -> Iterator[Want]:
    """A range in parts that a batch can hold."""
    asked, step = want.asked, _BATCH_NBYTES // want.asked.itemsize
    for start in range(0, asked.numel, step):
        numel = min(step, asked.numel - start)
        part = asked._replace(first=asked.first + start, numel=numel)
        yield Want(part, want.dtype, want.out[start : start + numel])


def _padded(asked: Range) -> int:
    return -(-asked.numel * asked.itemsize // _ALIGNMENT) * _ALIGNMENT


def _batches(ranges: Sequence[Range]) -> Iterator[list[Range]]:
    """The same on both sides: as many ranges as go into a batch, in their order."""
    batch: list[Range] = []
    nbytes = 0
    for asked in ranges:
        if batch and nbytes + _padded(asked) > _BATCH_NBYTES:
            yield batch
            batch, nbytes = [], 0
        batch.append(asked)
        nbytes += _padded(asked)
    if batch:
        yield batch


def _places(ranges: Sequence[Range], batch: torch.Tensor) -> Iterator[tuple[Range, torch.Tensor]]:
    """Each range with its bytes in the batch."""
    start = 0
    for asked in ranges:
        yield asked, batch[start : start + asked.numel * asked.itemsize]
        start += _padded(asked)
