"""A swapped run: tensors that live on the disk together, and are in memory from `fetch` to `drop`.

The tensor objects stay the same ones: an optimizer's param groups and state go on holding them. What changes is the
memory behind them, a buffer's while they are in memory, none (a shape of `(0,)`) while they are away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from deepspeedlite.offload.swap_file import DiskTensor, Region, StagingBuffer, SwapFile, padded

# What a run's tensors are called in it; a state's own name follows the prefix.
VALUES, MASTER, STATE = "values", "master", "state "


class SwappedRun:
    """Tensors of one run.

    Args:
        swap_file: where they live.
        held: the tensors by name. Ones that appear, such as the moments that the first step makes, are on the disk from
            the next `flush` on.
        derived: names of tensors that follow from the others. A step writes them and does not read them.
    """

    def __init__(
        self, swap_file: SwapFile, held: Callable[[], Mapping[str, torch.Tensor]], derived: Sequence[str] = ()
    ) -> None:
        self.swap_file = swap_file
        self._held, self._derived = held, frozenset(derived)
        self._regions: dict[str, Region] = {}

    def set_region(self, name: str, region: Region) -> None:
        """A tensor's place on the disk, where it has one already."""
        self._regions[name] = region

    def __contains__(self, name: str) -> bool:
        return name in self._regions

    @property
    def nbytes(self) -> int:
        """Bytes of a buffer that a fetch fills."""
        return sum(padded(self._regions[name].nbytes) for name in self._held() if name in self._regions)

    def fetch(self, buffer: StagingBuffer, everything: bool = False) -> None:
        """Start reading into the buffer's memory; of derived tensors too if `everything`."""
        for name, tensor in self._held().items():
            if name in self._regions:
                memory = buffer.take(self._regions[name].nbytes)
                if everything or name not in self._derived:
                    buffer.read(memory, self._regions[name])
                tensor.data = memory.view(tensor.dtype)

    def flush(self, buffer: StagingBuffer) -> int:
        """Start writing all tensors; how many bytes."""
        nbytes = 0
        for name, tensor in self._held().items():
            region = self._regions.get(name)
            if region is None or region.nbytes != tensor.nbytes:
                region = self._regions[name] = self.swap_file.reserve(tensor.nbytes)
            buffer.write(tensor, region)
            nbytes += region.nbytes
        return nbytes

    def swap_out(self) -> None:
        """Write the tensors that are not on the disk yet, and let go of all memory."""
        with self.swap_file.borrowed_buffer() as buffer:
            for name, tensor in self._held().items():
                if name not in self._regions:
                    self._regions[name] = self.swap_file.reserve(tensor.nbytes)
                    buffer.write(tensor, self._regions[name])
            buffer.wait()
        self.drop()

    def drop(self) -> None:
        """The tensors let go of their memory: what was written has been written."""
        for name, tensor in self._held().items():
            if name in self._regions:
                tensor.data = torch.empty(0, dtype=tensor.dtype)

    def stored(self, name: str) -> DiskTensor:
        """A tensor as it is on the disk."""
        return DiskTensor(self.swap_file, self._regions[name], self._held()[name].dtype)

    @contextmanager
    def in_memory(self, write: bool = False) -> Iterator[None]:
        """The tensors are in memory inside, all of them; `write`: and changed there, so they are written back."""
        with self.swap_file.borrowed_buffer() as buffer:
            buffer.begin(self.nbytes)
            self.fetch(buffer, everything=True)
            try:
                buffer.wait()
                yield
                if write:
                    self.flush(buffer)
                    buffer.wait()
            finally:
                self.drop()
