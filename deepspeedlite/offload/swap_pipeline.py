"""The ring: work on one group of parcels after another while the next is being read and the last one written.

    slot A   read 0 | work 0 | write 0 | read 3 | work 3 | ...
    slot B            read 1 | work 1  | write 1 | read 4 | ...
    slot C                     read 2  | work 2  | write 2 | ...

Groups without parcels are in memory already, and are worked on where they are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from deepspeedlite.offload.swap_file import Disk, Slot
from deepspeedlite.offload.swapped_run import Parcel

Group = Sequence[Parcel]


def run_through(groups: Sequence[Group], work: Callable[[int], None], ring: Ring | None) -> None:
    """`work(i)` for every group in order, with its parcels in memory; only groups without parcels need no ring."""
    if ring is not None:
        ring.run(groups, work)
        return
    for index in range(len(groups)):
        work(index)


class Ring:
    """Slots that groups of parcels pass through.

    Args:
        disk: where the parcels live.
        slots: groups in memory at a time, at least 1; three read, work and write at once.
        read_ahead: read a group while another one is worked on.
        write_behind: go on while a group is being written.
    """

    def __init__(self, disk: Disk, slots: int = 4, read_ahead: bool = True, write_behind: bool = True) -> None:
        self._slots = [disk.slot() for _ in range(max(1, slots))]
        # Reading further ahead than a slot is left for what is being written would wait for that instead of working.
        self._ahead = min(max(len(self._slots) - 2, 1), 2, len(self._slots) - 1) if read_ahead else 0
        self._behind = write_behind
        self.written_nbytes = 0

    def run(self, groups: Sequence[Group], work: Callable[[int], None]) -> None:
        """`work(i)` for every group, in order, with its parcels in memory; what it changed is written back.

        Raises:
            OffloadError: a read or a write failed; groups before it may have been worked on.
        """
        turn = _Turn(self._slots, groups)
        self.written_nbytes = 0
        try:
            for index in range(len(groups)):
                turn.fetch_until(index)
                turn.wait_for(index)
                turn.fetch_until(min(index + self._ahead, len(groups) - 1))
                work(index)
                self.written_nbytes += turn.flush(index)
                if not self._behind:
                    turn.end_writes()
        finally:
            turn.settle()


class _Turn:
    """One time around: which slot has which group."""

    def __init__(self, slots: Sequence[Slot], groups: Sequence[Group]) -> None:
        self._groups = groups
        self._free = deque(slots)
        self._here: dict[int, Slot] = {}
        self._leaving: deque[tuple[int, Slot]] = deque()
        self._fetched = 0

    def fetch_until(self, last: int) -> None:
        """Start reading groups up to this one, as far as slots can be had without waiting for work to be done."""
        while self._fetched <= last and (self._free or self._leaving or not self._groups[self._fetched]):
            index, self._fetched = self._fetched, self._fetched + 1
            if not self._groups[index]:
                continue
            if not self._free:
                self._end_leaving()
            slot = self._here[index] = self._free.popleft()
            slot.begin(sum(parcel.nbytes for parcel in self._groups[index]))
            for parcel in self._groups[index]:
                parcel.fetch(slot)

    def wait_for(self, index: int) -> None:
        if index in self._here:
            self._here[index].wait()

    def flush(self, index: int) -> int:
        """Start writing a group; how many bytes."""
        if index not in self._here:
            return 0
        slot = self._here.pop(index)
        self._leaving.append((index, slot))
        return sum(parcel.flush(slot) for parcel in self._groups[index])

    def end_writes(self) -> None:
        """Wait for all that is being written."""
        while self._leaving:
            self._end_leaving()

    def _end_leaving(self) -> None:
        index, slot = self._leaving.popleft()
        try:
            slot.wait()
        finally:
            self._drop(index, slot)

    def _drop(self, index: int, slot: Slot) -> None:
        for parcel in self._groups[index]:
            parcel.drop()
        self._free.append(slot)

    def settle(self) -> None:
        """Wait for everything that is under way; nothing is in memory afterwards, whatever has failed."""
        failures = []
        for index, slot in [*self._leaving, *self._here.items()]:
            try:
                slot.wait()
            except Exception as error:  # told below; the others are waited for first
                failures.append(error)
            self._drop(index, slot)
        self._leaving.clear()
        self._here.clear()
        if failures:
            raise failures[0]
