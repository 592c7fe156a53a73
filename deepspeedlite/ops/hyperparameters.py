"""The ranges that the numbers of Adam, Adagrad, Lion and LAMB must be in."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deepspeedlite.runtime.errors import OptimizerError


def checked_defaults(
    name: str, lr: float | Tensor, betas: tuple[float, float] | None = None, **not_negative: float
) -> dict[str, Any]:
    """These numbers as an optimizer's defaults; `betas` None for one without.

    Raises:
        OptimizerError: betas outside [0, 1), or a negative lr or other value.
    """
    if betas is not None and (len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas)):
        raise OptimizerError(f"{name}: betas must be two numbers in [0, 1), got {betas}")
    for key, value in {"lr": lr, **not_negative}.items():
        if not value >= 0.0:
            raise OptimizerError(f"{name}: {key} must not be negative, got {value}")
    return {"lr": lr, **({} if betas is None else {"betas": tuple(betas)}), **not_negative}
