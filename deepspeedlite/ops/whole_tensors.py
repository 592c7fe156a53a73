"""Optimizers that must see each parameter whole and in its shape, where the engine has 1-D runs of many.

Adafactor averages a matrix's rows and columns, Muon orthogonalises it, L-BFGS evaluates the loss several times in a
step. Where nothing is sharded a run holds its parameters whole, so such an optimizer steps views of the runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Segment(NamedTuple):
    """Where a parameter lies in a run, and which it is."""

    start: int
    stop: int
    name: str
    param: torch.Tensor  # of the model; for its shape, and whether it is trained at the moment


class WholeTensors(torch.optim.Optimizer):
    """Steps `optimizer` on views of runs. Its groups are that one's, dict by dict; their `params` are the runs.

    `torch.optim.Optimizer.__init__` is not called: all that it makes is the wrapped optimizer's.
    """

    segments_told_as = "parameters"  # by the plug-in of this name, which calls `set_segments`

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.state = {}  # type: ignore[assignment]  # none is kept by run: see `get_extra_state`
        # The wrapped optimizer's own lists, which it may have kept elsewhere too, as L-BFGS does.
        self._lists: list[list[torch.Tensor]] = [group["params"] for group in optimizer.param_groups]
        self._segments: Mapping[torch.Tensor, Sequence[Segment]] = {}  # by run
        self._views: dict[str, torch.Tensor] = {}  # what the wrapped optimizer steps, by the parameter's name

    @classmethod
    def around(cls, optimizer: torch.optim.Optimizer) -> WholeTensors:
        """Wrap an optimizer; the wrapper's class has its class's name, for messages and checkpoints."""
        made: WholeTensors = type(type(optimizer).__name__, (cls,), {})(optimizer)
        return made

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's groups."""
        return self.optimizer.param_groups

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's defaults."""
        return self.optimizer.defaults

    @torch.no_grad()
    def set_segments(self, segments: Mapping[torch.Tensor, Sequence[Segment]]) -> None:
        """Say where each parameter lies in its run; again when there are new runs."""
        self._segments = segments
        for run, found in segments.items():
            for start, stop, name, param in found:
                if name not in self._views:
                    view = self._views[name] = run[start:stop].view(param.shape)
                    if param in self.optimizer.state:
                        self.optimizer.state[view] = self.optimizer.state.pop(param)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, on the gradients of the runs; with a closure as the wrapped optimizer takes it."""
        with self._shown():
            if closure is None:
                self._show_gradients()
                return self.optimizer.step()

            def evaluate() -> Any:
                loss = closure()
                self._show_gradients()
                return loss

            return self.optimizer.step(evaluate)

    def _show_gradients(self) -> None:
        for run, found in self._segments.items():
            grads = run.grad
            for start, stop, name, param in found:
                there = grads is not None and param.requires_grad
                self._views[name].grad = grads[start:stop].view(param.shape) if there else None  # type: ignore[index]

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """Meanwhile the groups hold the parameters' views, in the lists that they were made with."""
        runs = [group["params"] for group in self.param_groups]
        for group, held, views in zip(self.param_groups, runs, self._lists):
            views[:] = [self._views[segment.name] for run in held for segment in self._segments[run]]
            group["params"] = views
        try:
            yield
        finally:
            for group, held in zip(self.param_groups, runs):
                group["params"] = held
            for view in self._views.values():
                view.grad = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Let the wrapped optimizer take a group of parameters, whose runs `set_segments` tells of next."""
        self.optimizer.add_param_group(param_group)
        self._lists.append(self.param_groups[-1]["params"])

    def get_extra_state(self) -> dict[str, dict[str, Any]]:
        """The wrapped optimizer's state of each parameter, by name; for checkpoints."""
        kept = {name: self.optimizer.state.get(view, {}) for name, view in self._views.items()}
        return {name: dict(state) for name, state in kept.items() if state}

    def set_extra_state(self, states: Mapping[str, dict[str, Any]]) -> None:
        """Continue from `get_extra_state`; a parameter that is not in them begins anew."""
        for name, view in self._views.items():
            self.optimizer.state.pop(view, None)
            if name in states:
                self.optimizer.state[view] = dict(states[name])

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's."""
        with self._shown():
            return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        kept = [group["params"] for group in self.param_groups]
        with self._shown():
            self.optimizer.load_state_dict(state_dict)
        for group, runs in zip(self.param_groups, kept):  # the groups are new dicts
            group["params"] = runs

    def __repr__(self) -> str:
        return repr(self.optimizer)
