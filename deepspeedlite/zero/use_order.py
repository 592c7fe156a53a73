"""The order in which sharded values are used, and how far gathering may run ahead along it.

The last pass tells what the next one will use. Uses are numbered; where each of some values' uses are, and how many
elements lie before a use, is worked out once a pass, so that a use costs the same however many there are.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import accumulate

from deepspeedlite.config.sections.zero import ZeroOptimization
from deepspeedlite.zero.flat_params import FlatParams


@dataclass(frozen=True)
class PrefetchLimits:
    """How far gathering may run ahead, in elements of whole buffers."""

    prefetch_numel: int = 50_000_000
    max_live_numel: int = 1_000_000_000
    max_reuse_numel: int = 1_000_000_000

    @classmethod
    def from_config(cls, zero: ZeroOptimization) -> PrefetchLimits:
        """What the section zero_optimization asks for."""
        return cls(
            prefetch_numel=zero.stage3_prefetch_bucket_size,
            max_live_numel=zero.stage3_max_live_parameters,
            max_reuse_numel=zero.stage3_max_reuse_distance,
        )


class UseTrace:
    """The order in which values were used in the last pass, and where the present one stands in it."""

    def __init__(self) -> None:
        self.known: list[FlatParams] = []  # the uses of the last pass, in order
        self._recorded: list[FlatParams] = []
        self._known_forward = self._recorded_forward = 0  # how many of the uses were forward's
        self._position = 0  # of the next use expected
        self._places: dict[FlatParams, list[int]] = {}  # the known uses of each
        self._before: list[int] = [0]  # elements of all known uses before each, and before the end
        self._looks: list[LookAhead] = []
        self.live_numel = 0
        """Elements of sharded values that are whole now, or on the way."""

    def begin(self) -> None:
        """A forward pass of the whole model starts."""
        if not self.known:  # the last one had no backward pass: this one may be alike
            self._learn(self._recorded, len(self._recorded))
        self._recorded = []
        self._recorded_forward = 0
        self._go_to(0)

    def turn(self) -> None:
        """What is used from now on is used by a backward pass."""
        if self._known_forward == len(self.known):  # it was not learnt from one that had a backward pass
            self._learn([], 0)
        self._recorded_forward = self._recorded_forward or len(self._recorded)

    def end(self) -> None:
        """A backward pass is over: what was recorded is what the next one will look like."""
        if self._recorded:
            self._learn(self._recorded, self._recorded_forward)
        self.begin()

    def _learn(self, uses: list[FlatParams], forward: int) -> None:
        self._known_forward = forward
        if uses == self.known:
            return
        self.known = uses
        self._before = [0, *accumulate(values.numel for values in uses)]
        self._places = {}
        for index, values in enumerate(uses):
            self._places.setdefault(values, []).append(index)

    def use(self, values: FlatParams) -> None:
        """`values` are used now."""
        self._recorded.append(values)
        if self._position < len(self.known) and self.known[self._position] is values:
            self._position += 1
            return
        places = self._places.get(values)
        if places:  # another order than last time: go on from where it was used then
            later = self._next_use(values)
            self._go_to(1 + (places[0] if later is None else later))

    def _go_to(self, position: int) -> None:
        back, self._position = position <= self._position, position
        for look in self._looks if back else ():
            look.start_at(position)

    def _next_use(self, values: FlatParams) -> int | None:
        """The number of their next use in this pass."""
        places = self._places.get(values, ())
        at = bisect_left(places, self._position)
        return places[at] if at < len(places) else None

    def used_within(self, values: FlatParams, numel: int) -> bool:
        """Whether `values` are used again in this pass after at most `numel` elements of others."""
        index = self._next_use(values)
        return index is not None and self._before[index] - self._before[self._position] <= numel

    def live_changed(self, values: FlatParams, numel: int) -> None:
        """So many more elements of `values` are whole now, or on the way; less than zero: are sharded again."""
        self.live_numel += numel
        if numel < 0:  # what was done about their next use is undone
            index = self._next_use(values)
            for look in self._looks:
                look.look_again(index)


class LookAhead:
    """Does something about the uses to come, soonest first, and about each of them once.

    It stops where that cannot be done yet, and goes on from there. Values that are dropped between two of their uses
    are looked at again.
    """

    def __init__(self, trace: UseTrace) -> None:
        self._trace = trace
        self._cursor = 0  # the first use that was not looked at
        self._again: list[int] = []  # a heap: uses before the cursor whose values were dropped since
        trace._looks.append(self)

    def start_at(self, position: int) -> None:
        """Nothing was done about uses from `position` on."""
        self._cursor = position
        self._again.clear()

    def look_again(self, index: int | None) -> None:
        """What was done about this use, if it is one, is undone."""
        if index is not None and index < self._cursor:
            heappush(self._again, index)

    def each(self, act: Callable[[FlatParams], bool], numel: int | None, forward_only: bool) -> None:
        """Call `act` with the values of uses to come, as long as it returns True.

        Args:
            act: does it; False if it cannot be done now.
            numel: only for uses before which there are fewer elements to come; None: for all.
            forward_only: only for those of the forward pass.
        """
        trace, known = self._trace, self._trace.known
        position, before = trace._position, trace._before
        stop = trace._known_forward if forward_only else len(known)
        while self._again and self._again[0] < stop:
            index = self._again[0]
            if index >= position and not act(known[index]):
                return
            heappop(self._again)
            if index < position:  # passed over: what was dropped is still so
                self.look_again(trace._next_use(known[index]))
        self._cursor = max(self._cursor, position)
        while self._cursor < stop and (numel is None or before[self._cursor] - before[position] < numel):
            if not act(known[self._cursor]):
                return
            self._cursor += 1
