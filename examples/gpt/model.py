"""A small GPT: learned positions, pre-norm blocks, causal attention, an output head of its own or the embedding's.

The block is GPT-2's (Radford et al. 2019). Shape suffixes: B sequences, T tokens of context, D model width, H heads,
K = D / H width of a head, V vocabulary. `GPTConfig()` is the byte-level model that train.py trains on a CPU;
`GPTConfig.benchmark()` has 33.6 million parameters and is the model of benchmarks/.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the network. Raises ValueError when the heads do not divide the width."""

    vocabulary: int = 256
    context: int = 64
    width: int = 128
    layers: int = 4
    heads: int = 4
    tied_head: bool = True  # the output head shares the token embedding's weight

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")

    @classmethod
    def benchmark(cls) -> GPTConfig:
        """The 34 M-parameter model: 25.2 M in the blocks, 4.2 M each in the embedding and in the (untied) head."""
        return cls(vocabulary=8192, context=64, width=512, layers=8, heads=8, tied_head=False)


class Attention(nn.Module):
    """Multi-head self-attention in which a token sees itself and the tokens before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x_btd: Tensor) -> Tensor:
        q_bhtk, k_bhtk, v_bhtk = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x_btd).chunk(3, dim=-1)
        )
        y_bhtk = F.scaled_dot_product_attention(q_bhtk, k_bhtk, v_bhtk, is_causal=True)
        return self.out(y_bhtk.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Attention, then a feed-forward layer of four times the width; each normed before and added to what came in."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x_btd: Tensor) -> Tensor:
        x_btd = x_btd + self.attention(self.norm1(x_btd))
        return x_btd + self.down(F.gelu(self.up(self.norm2(x_btd)), approximate="tanh"))


class GPT(nn.Module):
    """Logits (B, T, V) from tokens (B, T), or with targets (B, T) the mean cross-entropy in nats, a scalar."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self._initialise()
        if config.tied_head:
            self.head.weight = self.tokens.weight

    def _initialise(self) -> None:
        """GPT-2's: normal with deviation 0.02, smaller where a layer writes to the residual stream."""
        residual_std = 0.02 / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                writes_residual = name.endswith(("attention.out.weight", "down.weight"))
                nn.init.normal_(parameter, std=residual_std if writes_residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens_bt: Tensor, targets_bt: Tensor | None = None) -> Tensor:
        where_t = torch.arange(tokens_bt.shape[1], device=tokens_bt.device)
        x_btd = self.tokens(tokens_bt) + self.positions(where_t)
        for block in self.blocks:
            x_btd = block(x_btd)
        logits_btv = self.head(self.norm(x_btd))
        if targets_bt is None:
            return logits_btv
        return F.cross_entropy(logits_btv.flatten(0, 1).float(), targets_bt.flatten())

    def numel(self) -> int:
        """How many parameters there are; shared ones count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @torch.no_grad()
    def generate(self, prompt_bt: Tensor, new_tokens: int, temperature: float = 0.8) -> Tensor:
        """The prompt (B, T) with `new_tokens` sampled ones after it. A temperature of 0 takes the likeliest."""
        tokens_bt = prompt_bt
        for _ in range(new_tokens):
            logits_bv = self(tokens_bt[:, -self.config.context :])[:, -1].float()
            if temperature > 0:
                next_b1 = torch.multinomial(torch.softmax(logits_bv / temperature, dim=-1), num_samples=1)
            else:
                next_b1 = logits_bv.argmax(dim=-1, keepdim=True)
            tokens_bt = torch.cat([tokens_bt, next_b1], dim=1)
        return tokens_bt
