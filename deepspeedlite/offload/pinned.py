"""Host memory that a GPU copies from and to: page-locked as far as that can be had."""

from __future__ import annotations

import logging

import torch

from deepspeedlite.runtime.log import log_once


class HostMemory:
    """Where tensors in host memory come from.

    Args:
        pinned: page-lock it, which copies several times as fast, and while other work goes on.
    """

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self.pinned_nbytes = 0

    def empty(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A 1-D tensor of arbitrary content; pageable, with a warning, where no more can be page-locked."""
        if self.pinned:
            try:
                tensor = torch.empty(numel, dtype=dtype, pin_memory=True)
                self.pinned_nbytes += tensor.nbytes
                return tensor
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                log_once(
                    f"host memory cannot be page-locked beyond {self.pinned_nbytes / 2**30:.2f} GiB ({reason}); the "
                    "rest is pageable, which copies more slowly. Raise ulimit -l, or offload less",
                    level=logging.WARNING,
                )
                self.pinned = False
        return torch.empty(numel, dtype=dtype)
