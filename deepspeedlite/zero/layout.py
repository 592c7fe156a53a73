"""Index arithmetic of one flat buffer: where each parameter lies, and what each rank's optimizer sees of it.

    buffer   | w1 ....pad| b1 pad| w2 ........pad|  tail pad |        one dtype, one allocation
    groups   |<-- optimizer group 0 -->|<- group 1 ->|
    shards   |<---- rank 0 ---->|<---- rank 1 ------------>|          equal and contiguous
    runs     |<-- r0 g0 ------->|<g0-->|<- r1 g1 --->|                 (shard, group) intersections, or pieces of them

Parameters of one optimizer group lie side by side, so that a *run* (one 1-D tensor per shard and group) is all that
an elementwise optimizer needs. Every parameter starts at a multiple of `ALIGN_NUMEL` elements, which keeps vector
loads and matrix kernels on aligned addresses; the gaps hold zeros in values and gradients alike, and an elementwise
optimizer leaves zeros there. No torch in this file: it is plain integers, tested by property.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from math import prod
from typing import NamedTuple

ALIGN_NUMEL = 64
_PAGE_NUMEL = 4096  # pieces that are multiples of it begin at pages of a disk, whatever the dtype


class Slot(NamedTuple):
    """One parameter's place: elements `[start, start + numel)` of the buffer."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    group: int

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.numel


class Run(NamedTuple):
    """Elements `[start, stop)` of the buffer, all of one optimizer group and one shard."""

    group: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Elements in the run, gaps included."""
        return self.stop - self.start


class Segment(NamedTuple):
    """The part of one parameter that lies in a run, in the run's own coordinates."""

    slot: Slot
    start: int
    stop: int


def _padded(numel: int, multiple: int) -> int:
    return -(-numel // multiple) * multiple


class FlatLayout:
    """The places of parameters `(name, shape, optimizer group)` in one buffer cut into `shard_count` equal shards.

    Slots are ordered by group, and inside a group as given. With `run_numel`, runs are cut into pieces of so
    many elements at most, or of `ALIGN_NUMEL`.
    """

    def __init__(
        self, entries: Iterable[tuple[str, Sequence[int], int]], shard_count: int = 1, run_numel: int | None = None
    ) -> None:
        if shard_count < 1:
            raise ValueError(f"shard_count must be at least 1, not {shard_count}")
        self._run_numel = run_numel
        slots = []
        cursor = 0
        for name, shape, group in sorted(entries, key=lambda entry: entry[2]):
            numel = prod(shape)
            slots.append(Slot(name, tuple(shape), cursor, numel, group))
            cursor += _padded(numel, ALIGN_NUMEL)
        self.slots: tuple[Slot, ...] = tuple(slots)
        self._starts = [slot.start for slot in slots]
        self.shard_count = shard_count
        self.numel = _padded(cursor, ALIGN_NUMEL * shard_count)
        self.shard_numel = self.numel // shard_count

    def place(self, slot: Slot) -> int:
        """Where one of the slots stands among them."""
        return self.slots.index(slot, bisect_left(self._starts, slot.start))

    def shard(self, index: int) -> tuple[int, int]:
        """The buffer's elements `[start, stop)` that shard `index` holds."""
        return index * self.shard_numel, (index + 1) * self.shard_numel

    def span(self, run: Run) -> tuple[int, int]:
        """Where a run lies in its shard."""
        start = run.start % self.shard_numel
        return start, start + run.numel

    def _group_spans(self) -> list[Run]:
        spans: list[Run] = []
        for slot in self.slots:
            stop = slot.start + _padded(slot.numel, ALIGN_NUMEL)
            if spans and spans[-1].group == slot.group:
                spans[-1] = Run(slot.group, spans[-1].start, stop)
            else:
                spans.append(Run(slot.group, slot.start, stop))
        return spans

    def runs(self, index: int = 0) -> list[Run]:
        """The non-empty runs of shard `index`: one per optimizer group that reaches into it, or its pieces."""
        start, stop = self.shard(index)
        step = self._piece_numel()
        edges = range(start, stop, step)
        cut = (
            Run(span.group, max(span.start, edge), min(span.stop, edge + step, stop))
            for span in self._group_spans()
            for edge in edges
        )
        return [run for run in cut if run.numel > 0]

    def _piece_numel(self) -> int:
        """The elements between two cuts: equal pieces, of no more than `run_numel`, rather than a small last one."""
        if self._run_numel is None or self.shard_numel == 0:
            return max(1, self.shard_numel)
        multiple = _PAGE_NUMEL if self._run_numel >= _PAGE_NUMEL else ALIGN_NUMEL
        most = max(multiple, self._run_numel // multiple * multiple)
        count = -(-self.shard_numel // most)
        return _padded(-(-self.shard_numel // count), multiple)

    def segments(self, run: Run) -> list[Segment]:
        """The parts of parameters inside a run, in order; gaps belong to none."""
        found = []
        first = max(0, bisect_right(self._starts, run.start) - 1)
        for slot in islice(self.slots, first, bisect_left(self._starts, run.stop)):
            start, stop = max(slot.start, run.start), min(slot.stop, run.stop)
            if start < stop:
                found.append(Segment(slot, start - run.start, stop - run.start))
        return found

    def spans(self, index: int, wanted: Collection[str]) -> list[tuple[int, int]]:
        """The elements of the parameters named, in the coordinates of shard `index`, in the fewest ranges.

        Gaps between them are in the ranges; if all are wanted, the whole shard is one.
        """
        begin, end = self.shard(index)
        edges = [slot.start for slot in self.slots[1:]]
        found: list[tuple[int, int]] = []
        for slot, start, stop in zip(self.slots, [0, *edges], [*edges, self.numel]):
            start, stop = max(start, begin) - begin, min(stop, end) - begin
            if slot.name not in wanted or start >= stop:
                continue
            if found and found[-1][1] == start:
                start = found.pop()[0]
            found.append((start, stop))
        return found
