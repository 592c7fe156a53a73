"""The engine that `initialize` returns for a `PipelineModule`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NoReturn

import torch

from deepspeedlite.compat.engine import DeepSpeedEngine
from deepspeedlite.config import DeepSpeedConfig
from deepspeedlite.engine import EngineParts
from deepspeedlite.parallel.pipe import engine as pipe
from deepspeedlite.runtime.errors import ConfigError, UnsupportedError
from deepspeedlite.runtime.log import log_dist


class PipelineEngine(DeepSpeedEngine, pipe.PipelineEngine):
    """The engine of a `PipelineModule`, under DeepSpeed's names."""

    def coalesce_grad_reduction(self) -> NoReturn:
        """Not of a pipeline: `train_batch` runs all passes of a batch, and averages once.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("coalesce_grad_reduction of a pipeline: train_batch averages once for all its passes")

    step = pipe.PipelineEngine.step

    @classmethod
    def prepare(cls, model: torch.nn.Module, config: DeepSpeedConfig) -> None:
        """See `Engine.prepare`.

        Raises:
            ConfigError: the accumulation is the script's, which in a pipeline `train_batch` sees to.
        """
        if not config.managed_gradient_accumulation:
            raise ConfigError("managed_gradient_accumulation: false does not go with a pipeline; leave the key out")
        super().prepare(model, config)

    def __init__(self, module: Any, parts: EngineParts) -> None:
        super().__init__(module, parts)
        self._batches_s = 0.0  # since the last line that `train_batch` has logged

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> torch.Tensor:
        """See `parallel.pipe.engine`; every `steps_per_print` steps it logs loss, seconds and samples per second."""
        started_s = time.perf_counter()
        loss = super().train_batch(data_iter)
        every = self.steps_per_print()
        due = every is not None and self.global_steps % every == 0
        shown = float(loss) if due else 0.0  # which waits for the device
        self._batches_s += time.perf_counter() - started_s
        if due:
            batch_s, self._batches_s = self._batches_s / every, 0.0
            speed = self.train_batch_size() / batch_s
            log_dist(
                f"steps: {self.global_steps} loss: {shown:.4f} iter time (s): {batch_s:.3f} samples/sec: {speed:.3f}"
            )
        return loss
