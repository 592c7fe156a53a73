"""The swap pipeline: one group of runs is worked on while the next is read and the last written.

    buffer A   read 0 | work 0 | write 0 | read 3 | work 3 | ...
    buffer B            read 1 | work 1  | write 1 | read 4 | ...
    buffer C                     read 2  | work 2  | write 2 | ...

Groups of which nothing is in the swap file are in memory already, and are worked on where they are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from deepspeedlite.offload.store import Store
from deepspeedlite.offload.swap_file import StagingBuffer, SwapFile
from deepspeedlite.offload.swapped_run import SwappedRun

Runs = Sequence[SwappedRun]


class SwapPipeline:
    """Buffers that groups of swapped runs pass through.

    Args:
        swap_file: where the runs live; None: nothing does.
        buffers: groups in memory at a time, at least 1; three read, work and write at once.
        read_ahead: read a group while another one is worked on.
        write_behind: go on while a group is being written.
    """

    def __init__(
        self, swap_file: SwapFile | None, buffers: int = 4, read_ahead: bool = True, write_behind: bool = True
    ) -> None:
        self._buffers = [] if swap_file is None else [swap_file.buffer() for _ in range(max(1, buffers))]
        # Reading further ahead than a buffer is left for what is being written would wait for that instead of working.
        self._ahead = min(max(len(self._buffers) - 2, 1), 2, len(self._buffers) - 1) if read_ahead else 0
        self._behind = write_behind
        self.written_nbytes = 0  # in the last run: what a step wears the drive by

    def run(self, groups: Sequence[Sequence[Store]], work: Callable[[int], None]) -> None:
        """`work(i)` for every group, in order, with its runs in memory; what it changed is written back.

        Raises:
            OffloadError: a read or a write failed; groups before it may have been worked on.
        """
        turn = _Turn(self._buffers, [[run for run in group if isinstance(run, SwappedRun)] for group in groups])
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
            turn.drain()


class _Turn:
    """One time around: which buffer has which group."""

    def __init__(self, buffers: Sequence[StagingBuffer], groups: Sequence[Runs]) -> None:
        self._groups = groups
        self._free = deque(buffers)  # of no group: what was in it has been written
        self._here: dict[int, StagingBuffer] = {}  # by group, from the start of its reading to its work's end
        # Being written, the oldest first. A buffer may be filled anew only when its writes have ended.
        self._leaving: deque[tuple[int, StagingBuffer]] = deque()
        self._fetched = 0  # groups whose reading has been started, in order

    def fetch_until(self, last: int) -> None:
        """Start reading groups up to this one, as far as buffers can be had without waiting for work to be done."""
        while self._fetched <= last and (self._free or self._leaving or not self._groups[self._fetched]):
            index, self._fetched = self._fetched, self._fetched + 1
            if not self._groups[index]:
                continue
            if not self._free:
                self._end_leaving()
            buffer = self._here[index] = self._free.popleft()
            buffer.begin(sum(run.nbytes for run in self._groups[index]))
            for run in self._groups[index]:
                run.read_into(buffer)

    def wait_for(self, index: int) -> None:
        if index in self._here:
            self._here[index].wait()

    def flush(self, index: int) -> int:
        """Start writing a group; how many bytes."""
        if index not in self._here:
            return 0
        buffer = self._here.pop(index)
        self._leaving.append((index, buffer))
        return sum(run.write_from(buffer) for run in self._groups[index])

    def end_writes(self) -> None:
        """Wait for all that is being written."""
        while self._leaving:
            self._end_leaving()

    def _end_leaving(self) -> None:
        index, buffer = self._leaving.popleft()
        try:
            buffer.wait()
        finally:
            self._drop(index, buffer)

    def _drop(self, index: int, buffer: StagingBuffer) -> None:
        for run in self._groups[index]:
            run.close()
        self._free.append(buffer)

    def drain(self) -> None:
        """Wait for everything that is under way; nothing is in memory afterwards, whatever has failed."""
        failures = []
        for index, buffer in [*self._leaving, *self._here.items()]:
            try:
                buffer.wait()
            except Exception as error:  # told below; the others are waited for first
                failures.append(error)
            self._drop(index, buffer)
        self._leaving.clear()
        self._here.clear()
        if failures:
            raise failures[0]
