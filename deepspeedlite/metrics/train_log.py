"""What a training says of itself: progress lines, timings, memory, monitors, and the profile of one step.

The engine tells a `TrainLog` what happens; everything that is printed or written to a monitor is decided here. With
nothing switched on it costs a few attribute reads per step and never waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from deepspeedlite.config import DeepSpeedConfig
from deepspeedlite.metrics.memory import memory_breakdown
from deepspeedlite.metrics.monitor.registry import Monitor, monitor_sections
from deepspeedlite.metrics.timers import ThroughputTimer, Timers
from deepspeedlite.runtime.device import Device
from deepspeedlite.runtime.log import log_dist

if TYPE_CHECKING:
    from deepspeedlite.metrics.flops import FlopsProfiler

PHASES = ("forward", "backward", "step")


class StepReport(NamedTuple):
    """What the engine knows after a global step."""

    global_steps: int
    global_samples: int
    skipped_steps: int
    param_groups: Sequence[Mapping[str, Any]]
    loss_scale: float
    grad_norm: float | None  # None: not measured


def learning_rates(param_groups: Sequence[Mapping[str, Any]]) -> list[float]:
    """Of each group of an optimizer."""
    return [group["lr"] for group in param_groups]


def momenta(param_groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The momentum, or the betas, of each group."""
    return [group.get("betas", group.get("momentum", 0.0)) for group in param_groups]


def _mean(losses: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([loss.reshape(()) for loss in losses]).float().mean()


def _profiler(module: torch.nn.Module, config: DeepSpeedConfig) -> FlopsProfiler:
    from deepspeedlite.metrics.flops import FlopsProfiler  # 5 ms, which a training that counts none need not wait for

    return FlopsProfiler(module, recompute_fwd_factor=config.flops_profiler.recompute_fwd_factor)


class TrainLog:
    """Timers, throughput, monitors and the FLOP profile of one engine, as its configuration asks.

    Args:
        config: the engine's configuration.
        device: where the work runs.
        module: what `flops_profiler` profiles.
        batch_size: samples of one global step over all ranks.
        rank: global rank; monitors and the profile are rank 0's.

    Raises:
        ConfigError: a monitor's package is missing.
    """

    def __init__(
        self, config: DeepSpeedConfig, device: Device, module: torch.nn.Module, batch_size: int, rank: int
    ) -> None:
        every = config.steps_per_print
        self._every = int(every) if every and math.isfinite(every) else None
        self._device = device
        self._wall_clock = bool(config.wall_clock_breakdown or config.flops_profiler.enabled)
        self._memory = bool(config.memory_breakdown)
        self.timers = Timers(device, enabled=self._wall_clock)
        self.throughput = ThroughputTimer(batch_size, steps_per_output=self._every, device=device)
        sections = monitor_sections(config)
        self.monitor = Monitor(rank=rank, **sections)
        # Taking a norm is a collective: all ranks take it, though rank 0 alone writes it down.
        self.writes_norm = any(section.enabled for section in sections.values())
        self._losses: list[torch.Tensor] = []  # of the micro-batches since the last global step
        self._flops_config = config.flops_profiler
        self._profiler = _profiler(module, config) if self._flops_config.enabled and rank == 0 else None
        self._profiled = False

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        self.timers.start(name)
        try:
            yield
        finally:
            self.timers.stop(name)

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """The context to run one of `PHASES` in."""
        return self._timed(name) if self.timers.enabled else nullcontext()

    @contextmanager
    def forward_pass(self, global_steps: int, training: bool) -> Iterator[None]:
        """The context of one forward pass: timed, and profiled if it is the first of the step asked for."""
        if training:
            self.throughput.start()
        wanted = training and global_steps == self._flops_config.profile_step
        profiler = self._profiler if wanted and not self._profiled else None
        if profiler is not None:
            profiler.start_profile()
        try:
            with self.phase("forward"):
                yield
        except BaseException:
            if profiler is not None:
                profiler.end_profile()
            raise
        if profiler is not None:
            profiler.stop_profile()
            self._profiled = True

    def set_batch_size(self, batch_size: int) -> None:
        """Count so many samples a global step from now on."""
        self.throughput.batch_size = batch_size

    def saw_loss(self, loss: torch.Tensor) -> None:
        """Keep a micro-batch's loss for the monitors and the progress line."""
        if self.monitor.enabled or self._every is not None:
            self._losses.append(loss.detach())

    def end_micro_step(self, is_boundary: bool) -> None:
        """`step()` is over, whether or not it stepped."""
        self.throughput.stop(global_step=is_boundary)

    def after_step(self, report: StepReport) -> None:
        """Print and write what is due after a global step."""
        if self._profiled:
            self._print_profile(report.global_steps)
        losses, self._losses = self._losses, []
        if self.monitor.enabled:
            self._write_events(report, losses)
        if self._every is None or report.global_steps % self._every:
            return
        log_dist(
            f"step={report.global_steps}, skipped={report.skipped_steps}, lr={learning_rates(report.param_groups)}, "
            f"mom={momenta(report.param_groups)}" + (f", loss={_mean(losses).item():.4g}" if losses else "")
        )
        if self._wall_clock:
            log_dist(self.timers.report(PHASES, steps=self._every))
        if self._memory:
            log_dist(memory_breakdown(self._device))

    def _write_events(self, report: StepReport, losses: Sequence[torch.Tensor]) -> None:
        at = report.global_samples
        rates = learning_rates(report.param_groups)
        events: list[tuple[str, Any, int]] = [("Train/Samples/lr", rates[0], at)] if rates else []
        if losses:
            events.append(("Train/Samples/train_loss", _mean(losses), at))
        if report.loss_scale != 1.0:
            events.append(("Train/Samples/loss_scale", report.loss_scale, at))
        if report.grad_norm is not None:
            events.append(("Train/Samples/grad_norm", report.grad_norm, at))
        self.monitor.write_events(events)

    def _print_profile(self, global_steps: int) -> None:
        if self._profiler is None:
            return
        wanted = self._flops_config
        self._profiler.print_model_profile(
            profile_step=global_steps,
            module_depth=wanted.module_depth,
            top_modules=wanted.top_modules,
            detailed=wanted.detailed,
            output_file=wanted.output_file,
        )
        self._profiler.end_profile()
        self._profiler = None

    def close(self) -> None:
        """Close the monitors' files."""
        self.monitor.close()
