"""An exponential moving average of a network's weights (Polyak and Juditsky 1992), kept in fp32.

The average is a network of its own, built by the caller, so it holds nothing of the engine's: it can be tested,
saved and thrown away without touching the training.
"""

from __future__ import annotations

import torch
from torch import nn


class MovingAverage:
    """`module` follows the trained network: w <- w + (1 - decay) (trained - w), after every optimizer step."""

    def __init__(self, module: nn.Module, trained: nn.Module, decay: float = 0.995) -> None:
        """`module` is a fresh copy of the network on the trained one's device; it takes over its weights."""
        self.module = module.float().requires_grad_(False)
        self.decay = decay
        self._updates = 0
        self._averaged = list(module.parameters()) + list(module.buffers())
        for kept, seen in zip(self._averaged, _state_of(trained)):
            kept.copy_(seen)

    @torch.no_grad()
    def update(self, trained: nn.Module) -> None:
        """Move the average towards the trained network's weights now; faster at first, while they change most."""
        self._updates += 1
        weight = 1.0 - min(self.decay, self._updates / (self._updates + 10.0))
        for kept, seen in zip(self._averaged, _state_of(trained)):
            if kept.is_floating_point():
                kept.lerp_(seen.to(kept.dtype), weight)
            else:
                kept.copy_(seen)


def _state_of(module: nn.Module) -> list[torch.Tensor]:
    return [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]
