"""`OnDevice`: build a module on a device and in a dtype of choice, such as on `meta`, without memory."""

from __future__ import annotations

from types import TracebackType

import torch


class OnDevice:
    """Tensors that are made in this context are on `device`, and floating-point ones in `dtype`.

    Args:
        dtype: floating point, such as torch.bfloat16.
        device: `meta` gives tensors shapes and no memory.
        enabled: False makes the context do nothing.
    """

    def __init__(self, dtype: torch.dtype, device: str | torch.device = "meta", enabled: bool = True) -> None:
        self.dtype, self.device, self.enabled = dtype, torch.device(device), enabled

    def __enter__(self) -> None:
        if self.enabled:
            self._former = torch.get_default_dtype()
            torch.set_default_dtype(self.dtype)
            self.device.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.enabled:
            self.device.__exit__(kind, error, tb)
            torch.set_default_dtype(self._former)
