"""Layers for pipelines, and the same model trained on one process without deepspeedlite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from models import VOCABULARY, WIDTH, tokens

from deepspeedlite.pipe import LayerSpec, TiedLayerSpec

SEED = 1234
HYPER = {"lr": 5e-3, "eps": 1e-4, "weight_decay": 0.1}


class Block(torch.nn.Module):
    """A residual block. A tuple's second tensor, of integers, passes through: which positions count."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(width, 3 * width + 1), torch.nn.Linear(3 * width + 1, width)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, inputs: Any) -> Any:
        x, *mask = inputs if isinstance(inputs, tuple) else (inputs,)
        y = self.dropout(self.down(F.gelu(self.up(x))))
        return (x + y * mask[0].unsqueeze(-1), mask[0]) if mask else x + y


def embed(module: torch.nn.Embedding, inputs: Any) -> Any:
    """(token ids, mask) to (hidden, mask)."""
    return (module(inputs[0]), inputs[1]) if isinstance(inputs, tuple) else module(inputs)


def head(module: torch.nn.Embedding, inputs: Any) -> torch.Tensor:
    """Logits by the embedding's own weight."""
    hidden = inputs[0] if isinstance(inputs, tuple) else inputs
    return F.linear(hidden, module.weight)


def scaled(inputs: Any) -> Any:
    """A layer that is a function."""
    return (inputs[0] * 0.5, inputs[1]) if isinstance(inputs, tuple) else inputs * 0.5


def loss_fn(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def layers(tied: bool = True, blocks: int = 3, dropout: float = 0.0) -> list[Any]:
    """A small language model."""
    if tied:
        ends = [
            TiedLayerSpec("embed", torch.nn.Embedding, VOCABULARY, WIDTH, forward_fn=embed),
            TiedLayerSpec("embed", torch.nn.Embedding, VOCABULARY, WIDTH, forward_fn=head),
        ]
    else:
        ends = [LayerSpec(torch.nn.Embedding, VOCABULARY, WIDTH), LayerSpec(torch.nn.Linear, WIDTH, VOCABULARY)]
    return [ends[0], scaled, *[LayerSpec(Block, WIDTH, dropout) for _ in range(blocks)], ends[1]]


class Sequential(torch.nn.Module):
    """The same layers one after the other, with the names and the seeds that a PipelineModule gives them."""

    def __init__(self, specs: Sequence[Any]) -> None:
        super().__init__()
        self.tied_modules = torch.nn.ModuleDict()
        self.run: list[Any] = []
        self.passes = 0
        for index, spec in enumerate(specs):
            torch.manual_seed(SEED + index)
            if isinstance(spec, TiedLayerSpec):
                if spec.key not in self.tied_modules:
                    self.tied_modules[spec.key] = spec.build()
                self.run.append(partial(spec.forward_fn, self.tied_modules[spec.key]))
                continue
            self.run.append(spec.build() if isinstance(spec, LayerSpec) else spec)
            if isinstance(self.run[-1], torch.nn.Module):
                self.add_module(str(index), self.run[-1])

    def forward(self, value: Any) -> Any:
        self.passes += 1
        for index, layer in enumerate(self.run):
            torch.manual_seed(SEED * self.passes + index)
            value = layer(value)
        return value


def batches(replica: int, micro_batches: int, masked: bool = False) -> Iterator[tuple[Any, torch.Tensor]]:
    """The micro-batches of one replica, step after step, without end."""
    step = 0
    while True:
        for micro in range(micro_batches):
            x, y = tokens(step, micro, replica)
            yield ((x, (x % 3 > 0).long()) if masked else x), y
        step += 1


class Reference:
    """Trains `Sequential` with torch alone, on the batches of all replicas."""

    def __init__(
        self, specs: Sequence[Any], micro_batches: int, replicas: int, clip: float = 0.0, masked: bool = False
    ):
        self.model = Sequential(specs)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **HYPER)
        self.data = [batches(replica, micro_batches, masked) for replica in range(replicas)]
        self.micro_batches, self.clip = micro_batches, clip

    def step(self) -> tuple[float, float]:
        """One optimizer step: (mean loss, gradient norm)."""
        self.optimizer.zero_grad()
        total = 0.0
        share = 1 / (self.micro_batches * len(self.data))
        for _ in range(self.micro_batches):
            passes = self.model.passes
            for data in self.data:
                self.model.passes = passes  # each replica counts its own
                x, y = next(data)
                loss = loss_fn(self.model(x), y) * share
                loss.backward()
                total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip or 1e9).item()
        self.optimizer.step()
        return total, norm
