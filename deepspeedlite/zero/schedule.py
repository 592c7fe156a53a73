"""When gradients are reduced: during the backward pass where that is possible, at its end for the rest.

Buckets are always launched in the same order, on every rank, whatever the order in which gradients arrive: collectives
are matched by order, so a rank whose parameters were used differently would otherwise average the wrong buffers. A
bucket therefore waits for those before it; what is left when the pass ends is launched then, and what no pass
launched (a rank that had nothing to compute) is launched by the step. Every rank reduces every bucket exactly once
per reducing pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from deepspeedlite.errors import EngineStateError
from deepspeedlite.zero.unit import GradState, ReducePolicy, ShardUnit
from deepspeedlite.zero.wrap import TrainedParameter


class GradientSchedule:
    """The units of one engine and the progress of their reduction.

    Args:
        buckets: the parameters of each unit, in launch order.
        policy: how gradients are averaged.
        grad_dtype: dtype in which gradients accumulate; each parameter's own if None.
        overlap: launch a bucket as soon as it is complete rather than at the end of the pass.
        shard_count: into how many shards the optimizer's view of each unit is cut.
    """

    def __init__(
        self,
        buckets: Sequence[Sequence[TrainedParameter]],
        policy: ReducePolicy,
        *,
        grad_dtype: torch.dtype | None = None,
        overlap: bool = True,
        shard_count: int = 1,
    ) -> None:
        self._overlap = overlap
        self._launched_units = 0
        self._reducing = False
        self.in_backward = False
        # Called when gradients arrive in a pass that nobody began; must call `begin_backward`. The engine sets it.
        self.on_unannounced: Callable[[], None] = lambda: self.begin_backward(1.0, reduce=False)
        self.units = [
            ShardUnit(
                bucket,
                policy=policy,
                grad_dtype=grad_dtype,
                shard_count=shard_count,
                on_complete=self._launch_complete,
                on_unannounced=lambda: self.on_unannounced(),
            )
            for bucket in buckets
        ]

    def begin_backward(self, scale: float, reduce: bool) -> None:
        """A backward pass starts, whose gradients count `scale` times; `reduce` if it ends an accumulation window."""
        if self.in_backward:
            raise EngineStateError("a backward pass began before the previous one had ended")
        self.in_backward = True
        self._reducing = reduce
        self._launched_units = 0
        for unit in self.units:
            unit.begin_backward(scale, reduce)

    def _launch_complete(self) -> None:
        if not (self._reducing and self._overlap and self.in_backward):
            return
        while self._launched_units < len(self.units) and self.units[self._launched_units].complete:
            self.units[self._launched_units].reduce()
            self._launched_units += 1

    def end_backward(self) -> None:
        """The backward pass is over: reduce what is left, wait for all of it and show the gradients."""
        if not self.in_backward:
            return
        self.in_backward = False
        if self._reducing and any(unit.state is not GradState.EMPTY for unit in self.units):
            for unit in self.units[self._launched_units :]:
                unit.reduce()
            self._wait()
        for unit in self.units:
            unit.end_backward()

    def finish(self) -> None:
        """Before a step: make every unit hold the average, also on a rank that ran no backward pass."""
        self.end_backward()
        for unit in self.units:
            if unit.state is not GradState.AVERAGED:
                unit.reduce()
        self._wait()

    def _wait(self) -> None:
        for unit in self.units:
            unit.wait_for_reduce()

    @property
    def has_grads(self) -> bool:
        """Whether any gradient has arrived since the last `clear`."""
        return any(unit.state is not GradState.EMPTY for unit in self.units)

    def clear(self) -> None:
        """Forget all gradients and any pass in progress."""
        self.in_backward = False
        for unit in self.units:
            unit.clear()

    def grad_norm(self) -> torch.Tensor:
        """The 2-norm of all gradients as the buffers hold them: a 0-dim tensor, fp32 (fp64 for fp64 gradients)."""
        if not self.units:
            return torch.zeros(())
        norms = []
        for unit in self.units:
            dtype = torch.float64 if unit.grad_dtype is torch.float64 else torch.float32
            norms.append(torch.linalg.vector_norm(unit.grads, dtype=dtype))
        return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].dtype) for norm in norms]))

    def overflowed(self) -> list[str]:
        """Names of the parameters whose gradients are not finite."""
        return [name for unit in self.units for name in unit.overflowed()]

    def close(self) -> None:
        """Remove all hooks from the parameters."""
        for unit in self.units:
            unit.close()
