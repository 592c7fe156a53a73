"""The ranges that the numbers of Adam, Lion and LAMB must be in."""

from __future__ import annotations

from torch import Tensor

from deepspeedlite.runtime.errors import OptimizerError


def check_hyperparameters(name: str, lr: float | Tensor, betas: tuple[float, float], **not_negative: float) -> None:
    """Raise `OptimizerError` for betas outside [0, 1), or a negative lr or other value."""
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise OptimizerError(f"{name}: betas must be two numbers in [0, 1), got {betas}")
    for key, value in {"lr": lr, **not_negative}.items():
        if not value >= 0.0:
            raise OptimizerError(f"{name}: {key} must not be negative, got {value}")
