"""Small models and their data, shared by the tests that train.

Data is a pure function of (step, micro-batch, rank), so that any rank, and the unsharded reference, can make any part.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

VOCABULARY = 61
WIDTH = 32
LENGTH = 8


class TiedTokenModel(torch.nn.Module):
    """Token embedding, two residual blocks, LayerNorm, and a head tied to the embedding. Returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.up = torch.nn.ModuleList(torch.nn.Linear(WIDTH, 3 * WIDTH + 1) for _ in range(2))
        self.down = torch.nn.ModuleList(torch.nn.Linear(3 * WIDTH + 1, WIDTH) for _ in range(2))
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("temperature", torch.tensor(0.5))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for up, down in zip(self.up, self.down):
            x = x + down(F.gelu(up(x)))
        logits = self.head(self.norm(x)) * self.temperature
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def tied_model(seed: int = 0) -> TiedTokenModel:
    torch.manual_seed(seed)
    return TiedTokenModel()


def tokens(step: int, micro: int, rank: int, batch: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of shape (batch, LENGTH)."""
    generator = torch.Generator().manual_seed(1_000_003 * step + 1009 * micro + rank)
    drawn = torch.randint(0, VOCABULARY, (batch, LENGTH + 1), generator=generator)
    return drawn[:, :-1], drawn[:, 1:]
