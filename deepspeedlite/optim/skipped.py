"""Steps that are left out because gradients are not finite: what becomes of the loss scale, and what is said."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from deepspeedlite.optim.precision import LossScaler
from deepspeedlite.runtime.errors import LossScaleError
from deepspeedlite.runtime.log import log_dist, logger

_SHOWN = 8  # names in a message


class SkippedSteps:
    """Accounts for the skipped steps of one optimizer, whose loss scale `scaler` is."""

    def __init__(self, scaler: LossScaler) -> None:
        self._scaler = scaler
        self._has_told = False

    def account(self, guilty: Sequence[str]) -> None:
        """One more, for the gradients of these parameters.

        Raises:
            LossScaleError: at the smallest loss scale.
        """
        before = self._scaler.scale
        try:
            self._scaler.update(overflow=True)
        except LossScaleError as error:
            more = f" and {len(guilty) - _SHOWN} more" if len(guilty) > _SHOWN else ""
            raise LossScaleError(
                f"{error}; the gradients that are not finite belong to: {', '.join(guilty[:_SHOWN])}{more}. The run "
                "has diverged: lower the learning rate, clip gradients, or train in bf16"
            ) from None
        if self._scaler.dynamic:
            logger.info("gradients overflowed: step skipped, loss scale %g -> %g", before, self._scaler.scale)
        elif not self._has_told:
            self._has_told = True
            others = f" and of {len(guilty) - 1} more parameters" if len(guilty) > 1 else ""
            key = "" if before != 1.0 else '; "check_grad_overflow": false takes them all the same'
            log_dist(
                f"step skipped: the gradient of {guilty[0]}{others} is not finite; the weights stay as they were. "
                f"engine.skipped_steps counts such steps, which are not said again{key}",
                level=logging.WARNING,
            )
