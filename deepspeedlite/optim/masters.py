"""What the step updates: a master of each run, the optimizer's state for it, and where they live between steps.

Where the model is fp32 (or fp64) a run's master is the view of the unit's values, and nothing is held twice. Where it
is 16-bit, masters are slices of one fp32 arena for each unit, or copies where offloading wants them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from deepspeedlite.offload.options import Offload
from deepspeedlite.offload.store import Store
from deepspeedlite.ops.one_pass import OnePassUpdate
from deepspeedlite.optim.registry import built_like
from deepspeedlite.runtime.errors import OptimizerError
from deepspeedlite.zero.layout import Run
from deepspeedlite.zero.unit import ShardUnit


class SteppedRun(NamedTuple):
    """One run as the step sees it: what the optimizer updates, and the unit's views that it comes from and goes to."""

    master: torch.Tensor
    values: torch.Tensor
    grads: torch.Tensor
    store: Store  # where all that lives between steps
    staged: torch.Tensor | None = None  # host memory that the device's values are copied from, if they are apart

    def in_one_pass(self) -> OnePassUpdate:
        """The update that reads and writes all three at once."""
        copy = self.values if self.staged is None else self.staged
        copy_apart = copy.device != self.master.device  # states on the device, values offloaded: see `send`
        return OnePassUpdate(
            self.master, self.grads.to(self.master.device), None if copy is self.master or copy_apart else copy
        )

    def send(self, updated: bool = True) -> None:
        """Give the model the master's values; `updated`: where a one-pass update could, it has."""
        if self.master is self.values:
            return
        if self.staged is not None:
            if not updated and self.staged is not self.master:
                self.staged.copy_(self.master)
            self.values.copy_(self.staged, non_blocking=True)
        elif not updated or self.values.device != self.master.device:
            self.values.copy_(self.master)


class MasterMaker:
    """Makes the runs that an optimizer steps in place of parameters.

    Args:
        optimizer: whose state for single parameters the runs' states are made of.
        offload: where masters and states live.
        low_precision: update 16-bit values in place.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, offload: Offload, low_precision: bool) -> None:
        self._optimizer, self._offload, self._low_precision = optimizer, offload, low_precision

    @torch.no_grad()
    def adopt(self, unit: ShardUnit) -> list[SteppedRun]:
        """The unit's runs, for the optimizer in place of the unit's parameters, and in their groups."""
        runs = self._make_runs(unit)
        for (cut, _, _), run in zip(unit.runs(), runs):
            self._optimizer.param_groups[cut.group]["params"].append(run.master)
            self._adopt_state(unit, cut, run.master)
            run.store.keep()
            run.store.close()
        for param in unit.flat.params:
            self._optimizer.state.pop(param, None)
        return runs

    def _make_runs(self, unit: ShardUnit) -> list[SteppedRun]:
        flat = unit.flat
        is_precise = self._low_precision or flat.dtype in (torch.float32, torch.float64)
        spans = [unit.layout.span(run) for run, _, _ in unit.runs()]
        with flat.shard_in_memory():
            parts = [(values, flat.shard[slice(*span)]) for span, (_, values, _) in zip(spans, unit.runs())]
            masters = self._offload.make_masters(flat.store, parts, flat.dtype if is_precise else torch.float32)
        made = []
        for span, (_, values, grads), master in zip(spans, unit.runs(), masters):
            store = self._offload.run_store(flat.store, span, values, master, self._state_of)
            made.append(SteppedRun(master.tensor, values, grads, store, master.staged))
        return made

    def _state_of(self, master: torch.Tensor) -> Mapping[str, Any]:
        return self._optimizer.state.get(master, {})

    def _adopt_state(self, unit: ShardUnit, run: Run, master: torch.Tensor) -> None:
        """Join the states that the optimizer holds for single parameters (Adagrad makes them at once)."""
        owners = {slot.name: param for slot, param in zip(unit.layout.slots, unit.flat.params)}
        segments = unit.layout.segments(run)
        states = [self._optimizer.state.get(owners[segment.slot.name], {}) for segment in segments]
        joined: dict[str, Any] = {}
        if any(
            isinstance(value, torch.Tensor) and value.shape == (0,) != segment.slot.shape
            for state, segment in zip(states, segments)
            for value in state.values()
        ):
            self._optimizer.state[master] = self._fresh_state(run, master)
            return
        for key in states[0] if states else ():
            parts = [state.get(key) for state in states]
            per_element = all(
                key != "step" and isinstance(part, torch.Tensor) and part.shape == segment.slot.shape
                for part, segment in zip(parts, segments)
            )
            if per_element:
                joined[key] = torch.zeros(run.numel, dtype=master.dtype, device=master.device)
                for (slot, start, stop), part in zip(segments, parts):
                    first = run.start + start - slot.start
                    joined[key][start:stop] = part.flatten()[first : first + stop - start]
            elif all(torch.equal(torch.as_tensor(part), torch.as_tensor(parts[0])) for part in parts):
                joined[key] = parts[0]
            else:
                raise OptimizerError(
                    f"{type(self._optimizer).__name__} holds a different {key!r} for {segments[0].slot.name} than for "
                    "others of its group; pass the optimizer fresh, and load its state after initialize"
                )
        if joined:
            self._optimizer.state[master] = joined

    def _fresh_state(self, run: Run, master: torch.Tensor) -> dict[str, Any]:
        """What the optimizer would hold, had it been built over the run.

        Parameters that `zero.Init` has sharded are empty to an optimizer that makes its state at once.
        """
        try:
            alike = built_like(self._optimizer, self._optimizer.param_groups[run.group], [master])
            return dict(alike.state[master])
        except (TypeError, ValueError, RuntimeError, KeyError) as error:
            raise OptimizerError(
                f"{type(self._optimizer).__name__} makes its state for the parameters that it is given, zero.Init had "
                f"sharded them before, and it cannot be built again from its defaults ({error}); build the model "
                "without zero.Init, or name the optimizer in the configuration"
            ) from error
