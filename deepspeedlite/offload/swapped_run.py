"""A parcel: tensors that live on the disk together, and are in memory from `fetch` to `drop`.

The tensor objects stay the same ones: an optimizer's param groups and state go on holding them. What changes is the
memory behind them, a slot's while they are in memory, none (a shape of `(0,)`) while they are away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from deepspeedlite.offload.swap_file import Disk, Region, Slot, Stored, padded

# What a run's tensors are called in its parcel; a state's own name follows the prefix.
VALUES, MASTER, STATE = "values", "master", "state "


class Parcel:
    """Tensors of one run.

    Args:
        disk: where they live.
        held: the tensors by name. Ones that appear, such as the moments that the first step makes, are on the disk from
            the next `flush` on.
        derived: names of tensors that follow from the others. A step writes them and does not read them.
    """

    def __init__(self, disk: Disk, held: Callable[[], Mapping[str, torch.Tensor]], derived: Sequence[str] = ()) -> None:
        self.disk = disk
        self._held, self._derived = held, frozenset(derived)
        self._regions: dict[str, Region] = {}

    def settle_in(self, name: str, region: Region) -> None:
        """A tensor's place on the disk, where it has one already."""
        self._regions[name] = region

    def __contains__(self, name: str) -> bool:
        return name in self._regions

    @property
    def nbytes(self) -> int:
        """Bytes of a slot that a fetch fills."""
        return sum(padded(self._regions[name].nbytes) for name in self._held() if name in self._regions)

    def fetch(self, slot: Slot, everything: bool = False) -> None:
        """Start reading into the slot's memory; of derived tensors too if `everything`."""
        for name, tensor in self._held().items():
            if name in self._regions:
                memory = slot.take(self._regions[name].nbytes)
                if everything or name not in self._derived:
                    slot.read(memory, self._regions[name])
                tensor.data = memory.view(tensor.dtype)

    def flush(self, slot: Slot) -> int:
        """Start writing all tensors; how many bytes."""
        nbytes = 0
        for name, tensor in self._held().items():
            region = self._regions.get(name)
            if region is None or region.nbytes != tensor.nbytes:
                region = self._regions[name] = self.disk.reserve(tensor.nbytes)
            slot.write(tensor, region)
            nbytes += region.nbytes
        return nbytes

    def move_in(self) -> None:
        """Write the tensors that are not on the disk yet, and let go of all memory."""
        with self.disk.borrowed_slot() as slot:
            for name, tensor in self._held().items():
                if name not in self._regions:
                    self._regions[name] = self.disk.reserve(tensor.nbytes)
                    slot.write(tensor, self._regions[name])
            slot.wait()
        self.drop()

    def drop(self) -> None:
        """The tensors let go of their memory: what was written has been written."""
        for name, tensor in self._held().items():
            if name in self._regions:
                tensor.data = torch.empty(0, dtype=tensor.dtype)

    def stored(self, name: str) -> Stored:
        """A tensor as it is on the disk."""
        return Stored(self.disk, self._regions[name], self._held()[name].dtype)

    @contextmanager
    def in_memory(self, write: bool = False) -> Iterator[None]:
        """The tensors are in memory inside, all of them; `write`: and changed there, so they are written back."""
        with self.disk.borrowed_slot() as slot:
            slot.begin(self.nbytes)
            self.fetch(slot, everything=True)
            try:
                slot.wait()
                yield
                if write:
                    self.flush(slot)
                    slot.wait()
            finally:
                self.drop()
