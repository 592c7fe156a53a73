"""Random number states: by name for layers that are split over ranks, and as they were for a recomputation.

Layers whose pieces lie on several ranks drop different elements on each of them, others the same: so Megatron's layers
draw from a second state, `with get_cuda_rng_tracker().fork(): dropout(x)`. On a CPU the states are those of its
generator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from deepspeedlite.runtime.device import accelerator, device_in_use
from deepspeedlite.runtime.errors import EngineStateError


class CudaRNGStatesTracker:
    """States of the device's generator by name; only the one that is forked into moves on."""

    MODEL_PARALLEL = "model-parallel-rng"

    def __init__(self) -> None:
        self.states_: dict[str, torch.Tensor] = {}
        self.seeds_: set[int] = set()

    def reset(self) -> None:
        """Forget all."""
        self.states_.clear()
        self.seeds_.clear()

    def get_states(self) -> dict[str, torch.Tensor]:
        """A copy of all states."""
        return dict(self.states_)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        """Go on from such a copy."""
        self.states_ = dict(states)

    def add(self, name: str, seed: int) -> None:
        """A new state, as the generator has it after `seed`.

        Raises:
            EngineStateError: the name or the seed is taken; two states with one seed give the same numbers.
        """
        if seed in self.seeds_ or name in self.states_:
            raise EngineStateError(f"random number state {name!r} with seed {seed}: the name or the seed is taken")
        device = accelerator()
        before = device.get_rng_state()
        device.manual_seed(seed)
        self.seeds_.add(seed)
        self.states_[name] = device.get_rng_state()
        device.set_rng_state(before)

    @contextlib.contextmanager
    def fork(self, name: str = MODEL_PARALLEL) -> Iterator[None]:
        """Draw from the state of this name; the generator's own is as before afterwards.

        Raises:
            EngineStateError: there is no such state.
        """
        if name not in self.states_:
            raise EngineStateError(
                f"there is no random number state {name!r}: call model_parallel_cuda_manual_seed, or add it"
            )
        device = accelerator()
        before = device.get_rng_state()
        device.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = device.get_rng_state()
            device.set_rng_state(before)


class Generators:
    """The state of every generator that a function may draw from, when this is made."""

    def __init__(self, tracker: CudaRNGStatesTracker) -> None:
        self._tracker = tracker
        self._cpu, self._gpu, self._named = self._now()

    def _now(self) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
        device = device_in_use()
        gpu = device.get_rng_state() if device.is_accelerator else None
        return torch.get_rng_state(), gpu, self._tracker.get_states()

    def _set(self, cpu: torch.Tensor, gpu: torch.Tensor | None, named: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(cpu)
        if gpu is not None:
            device_in_use().set_rng_state(gpu)
        self._tracker.set_states(named)

    @contextlib.contextmanager
    def as_they_were(self) -> Iterator[None]:
        """Draw the same numbers again; afterwards everything goes on from where it is now."""
        present = self._now()
        self._set(self._cpu, self._gpu, self._named)
        try:
            yield
        finally:
            self._set(*present)
