"""A swapped run: tensors that are in the swap file together, and in memory from `fetch` to `close`.

The tensor objects stay the same ones: an optimizer's param groups and state go on holding them. What changes is the
memory behind them, a staging buffer's while they are in memory, none (a shape of `(0,)`) while they are away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from deepspeedlite.offload.store import Store
from deepspeedlite.offload.swap_file import DiskTensor, Region, StagingBuffer, SwapFile, padded


class SwappedRun(Store):
    """Tensors of one run.

    Args:
        swap_file: where they live.
        held: the tensors by name. Ones that appear, such as the moments that the first step makes, are on the disk from
            the next `flush` on.
        regions: of tensors that have a place in the file already.
        derived: names of tensors that follow from the others. A step writes them and does not read them.
    """

    def __init__(
        self,
        swap_file: SwapFile,
        held: Callable[[], Mapping[str, torch.Tensor]],
        regions: Mapping[str, Region] | None = None,
        derived: Sequence[str] = (),
    ) -> None:
        self._swap_file, self._held, self._derived = swap_file, held, frozenset(derived)
        self._regions = dict(regions or {})  # by name; left, for good, only where a tensor has another size now

    @property
    def nbytes(self) -> int:
        """Bytes of a buffer that reading fills."""
        return sum(padded(self._regions[name].nbytes) for name in self._held() if name in self._regions)

    def read_into(self, buffer: StagingBuffer, everything: bool = False) -> None:
        """Start reading into the buffer's memory; of derived tensors too if `everything`."""
        for name, tensor in self._held().items():
            if name in self._regions:
                memory = buffer.take(self._regions[name].nbytes)
                if everything or name not in self._derived:
                    buffer.read(memory, self._regions[name])
                tensor.data = memory.view(tensor.dtype)

    def write_from(self, buffer: StagingBuffer, only_new: bool = False) -> int:
        """Start writing the tensors, all or those that are not in the file yet; how many bytes."""
        nbytes = 0
        for name, tensor in self._held().items():
            region = self._regions.get(name)
            if only_new and region is not None:
                continue
            if region is None or region.nbytes != tensor.nbytes:
                region = self._regions[name] = self._swap_file.reserve(tensor.nbytes)
            buffer.write(tensor, region)
            nbytes += region.nbytes
        return nbytes

    def keep(self) -> None:
        """Write what is not in the file yet."""
        with self._swap_file.borrowed_buffer() as buffer:
            self.write_from(buffer, only_new=True)
            buffer.wait()

    def close(self) -> None:
        """The tensors let go of their memory: what was written has been written."""
        for name, tensor in self._held().items():
            if name in self._regions:
                tensor.data = torch.empty(0, dtype=tensor.dtype)

    def stored(self, name: str, tensor: torch.Tensor) -> torch.Tensor | DiskTensor:
        """A tensor as it is in the file, where it has a place there."""
        return DiskTensor(self._swap_file, self._regions[name], tensor.dtype) if name in self._regions else tensor

    @contextmanager
    def opened(self, write: bool = False) -> Iterator[None]:
        """All are in memory inside."""
        with self._swap_file.borrowed_buffer() as buffer:
            buffer.begin(self.nbytes)
            self.read_into(buffer, everything=True)
            try:
                buffer.wait()
                yield
                if write:
                    self.write_from(buffer)
                    buffer.wait()
            finally:
                self.close()
