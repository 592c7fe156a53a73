"""Random small models and configurations for sharded training, each a pure function of its seed.

`Scenario.draw(seed)` says everything: which parts the model is made of, what of it is frozen, tied, adapted or built
under `zero.Init`, the optimizer and its groups, the stage and its keys. A part maps (batch, LENGTH, WIDTH) to the same
shape; parts that choose are told the number of the micro-batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH, LENGTH, BATCH = 6, 3, 2
CLIP = 0.3


def linear(bias: bool = True) -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH, bias=bias)


class Part(nn.Module):
    def forward(self, x: Tensor, index: int) -> Tensor:
        raise NotImplementedError


class Plain(Part):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.linear = linear(bias)

    def forward(self, x: Tensor, index: int) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Block(Part):
    """What it contains is called in another order than it is held."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(9, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 9)

    def forward(self, x: Tensor, index: int) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Attention(Part):
    """torch's own, which reads the weights of a child that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor, index: int) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


class Encoder(Part):
    """Deep copies of a layer."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, index: int) -> Tensor:
        return self.encoder(x)


class Recurrent(Part):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor, index: int) -> Tensor:
        return x + self.gru(x)[0]


class Convolution(Part):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor, index: int) -> Tensor:
        return x + torch.tanh(self.convolution(x.transpose(1, 2)).transpose(1, 2))


class Bare(Part):
    """Parameters of its own beside a child, one of them without elements; a buffer saved and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.nothing = nn.Parameter(torch.empty(0, 5))
        self.linear = linear()
        self.register_buffer("offset", torch.linspace(-0.1, 0.1, WIDTH))
        self.register_buffer("fixed", torch.ones(1), persistent=False)

    def forward(self, x: Tensor, index: int) -> Tensor:
        x = x * self.scale + self.offset.to(x.dtype)  # buffers stay fp32
        return self.linear(x) * self.fixed.to(x.dtype) + self.nothing.sum()


class Reader(Part):
    """Reads a child's parameters without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def forward(self, x: Tensor, index: int) -> Tensor:
        return F.linear(x, self.inner.weight, self.inner.bias)


class Twice(Part):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor, index: int) -> Tensor:
        return self.block(torch.tanh(self.block(x, index)), index)


class LowRank(Part):
    """A frozen layer with a trained low-rank part beside it (LoRA, arXiv:2106.09685)."""

    def __init__(self) -> None:
        super().__init__()
        self.base = linear().requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, WIDTH) * 0.3)
        self.b = nn.Parameter(torch.randn(WIDTH, 2) * 0.3)

    def forward(self, x: Tensor, index: int) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


class Chooser(Part):
    """A leaf: another child in each micro-batch, so on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(linear() for _ in range(3))

    def forward(self, x: Tensor, index: int) -> Tensor:
        return x + self.experts[index % 3](x)


class Branch(Part):
    """A child that is used in every second step only, on all ranks, and one that never is."""

    def __init__(self) -> None:
        super().__init__()
        self.never = linear()
        self.branch = Block()

    def forward(self, x: Tensor, index: int) -> Tensor:
        return self.branch(x, index) if (index // 100) % 2 == 0 else x


class Recomputed(Part):
    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first, self.second = Block(), Plain()

    def forward(self, x: Tensor, index: int) -> Tensor:
        x = checkpoint(self.first, x, index, use_reentrant=self.reentrant)
        return checkpoint(self.second, x, index, use_reentrant=self.reentrant)


class Initialised(Part):
    """A constructor that gives its children's parameters other values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linear(), linear()
        self.apply(self._reset)
        nn.init.constant_(self.second.bias, 0.25)
        for name, param in self.named_parameters():
            if name.endswith("first.bias"):
                param.data.fill_(-0.125)

    @staticmethod
    def _reset(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(std=0.3)

    def forward(self, x: Tensor, index: int) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class Named(Part):
    """A dictionary of modules, and an output in a tuple between them."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"left": linear(), "right": linear(bias=False)})

    def forward(self, x: Tensor, index: int) -> Tensor:
        both = {name: part(x) for name, part in self.parts.items()}
        return both["left"] * torch.sigmoid(both["right"])


PARTS: dict[str, Callable[[], Part]] = {
    "plain": Plain,
    "no bias": lambda: Plain(bias=False),
    "block": Block,
    "attention": Attention,
    "encoder": Encoder,
    "recurrent": Recurrent,
    "convolution": Convolution,
    "bare": Bare,
    "reader": Reader,
    "twice": Twice,
    "low rank": LowRank,
    "chooser": Chooser,
    "branch": Branch,
    "recomputed": Recomputed,
    "reentrant": lambda: Recomputed(reentrant=True),
    "initialised": Initialised,
    "named": Named,
}
LEAVES = [Chooser]


class Model(nn.Module):
    """A first layer, the parts, an adapter where there is one, and a head."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__()
        self.first = linear()
        self.parts = nn.ModuleList(PARTS[kind]() for kind in scenario.parts)
        self.head = linear()
        self.adapter: nn.Module | None = None
        if scenario.tied:
            self.head.weight = self.first.weight

    def forward(self, x: Tensor, index: int) -> Tensor:
        x = self.first(x)
        for part in self.parts:
            x = part(x, index)
        if self.adapter is not None:
            x = x + self.adapter(x)
        return self.head(x).float().square().mean()


@dataclass(frozen=True)
class Scenario:
    """One model, and how it is trained. `micro_batches` of a step are dealt to whatever ranks there are."""

    seed: int
    parts: tuple[str, ...]
    tied: bool
    frozen: tuple[int, ...]
    adapter: bool
    stage: int
    under_init: bool
    persistence: tuple[int | None, int | None]  # at Init, at initialize
    zero: tuple[tuple[str, Any], ...]
    optimizer: str
    passed: bool  # the optimizer is made by the user, not named in the configuration
    groups: int
    micro_batches: int
    clip: bool
    dtype: str
    starts_on: int  # ranks; the checkpoint is then loaded on the other number, 1 or 2
    resumed_stage: int

    @classmethod
    def draw(cls, seed: int) -> Scenario:
        r = random.Random(seed)
        stage = r.choice([0, 1, 2, 3, 3, 3])
        parts = tuple(r.choice(list(PARTS)) for _ in range(r.randint(1, 5)))
        zero: dict[str, Any] = {
            "stage": stage,
            "reduce_bucket_size": r.choice([30, 400, 500_000_000]),
            "allgather_bucket_size": r.choice([30, 500_000_000]),
            "overlap_comm": r.random() < 0.7,
            "sub_group_size": r.choice([50, 1_000_000_000]),
        }
        if stage == 3:
            zero["stage3_max_reuse_distance"] = r.choice([0, 60, 1_000_000_000])
            zero["stage3_prefetch_bucket_size"] = r.choice([0, 80, 50_000_000])
            zero["stage3_max_live_parameters"] = r.choice([0, 150, 1_000_000_000])
        if stage >= 1 and r.random() < 0.25:
            zero["offload_optimizer"] = {"device": "cpu"}
        if stage == 3 and r.random() < 0.2:
            zero["offload_param"] = {"device": "cpu"}
        thresholds = [None, 0, 10, 40, 1000]
        return cls(
            seed=seed,
            parts=parts,
            tied=r.random() < 0.2,
            frozen=tuple(i for i in range(len(parts)) if r.random() < 0.2),
            adapter=r.random() < 0.3,
            stage=stage,
            under_init=stage == 3 and r.random() < 0.6,
            persistence=(r.choice(thresholds), r.choice(thresholds)),
            zero=tuple(zero.items()),
            optimizer=r.choice(["Adam", "AdamW", "SGD", "Adagrad", "RMSprop"]),
            passed=r.random() < 0.4,
            groups=r.choice([1, 1, 2, 3]),
            micro_batches=r.choice([2, 4]),
            clip=r.random() < 0.5,
            dtype=r.choice(["fp32"] * 4 + ["bf16"]),
            starts_on=r.choice([1, 2]),
            resumed_stage=r.choice([stage, r.choice([0, 1, 2, 3])]),
        )

    # --- what it asks for -----------------------------------------------------------------------------------------

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]

    def config(self, ranks: int, stage: int | None = None, at_init: bool = False) -> dict[str, Any]:
        """For `initialize`, or as a client hands it to `zero.Init`. Another stage leaves the keys of this one away."""
        zero = dict(self.zero)
        if stage is not None and stage != self.stage:
            zero = {"stage": stage, "reduce_bucket_size": zero["reduce_bucket_size"]}
        threshold = self.persistence[0 if at_init else 1]
        if zero["stage"] == 3 and threshold is not None:
            zero["stage3_param_persistence_threshold"] = threshold
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": BATCH,
            "gradient_accumulation_steps": self.micro_batches // ranks,
            "gradient_clipping": CLIP if self.clip else 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
        }
        if self.dtype == "bf16":
            config["bf16"] = {"enabled": True}
        if not self.passed:
            name, options = self.optimizer_options
            config["optimizer"] = {"type": name, "params": options}
        return config

    @property
    def optimizer_options(self) -> tuple[str, dict[str, Any]]:
        # epsilons are large, so that what a step moves is continuous in the gradient
        options: dict[str, dict[str, Any]] = {
            "Adam": {"lr": 5e-3, "eps": 1e-3, "weight_decay": 0.0},
            "AdamW": {"lr": 5e-3, "eps": 1e-3, "weight_decay": 0.1},
            "SGD": {"lr": 2e-2, "momentum": 0.9},
            "Adagrad": {"lr": 1e-2, "eps": 1e-3},
            "RMSprop": {"lr": 2e-3, "eps": 1e-3},
        }
        return self.optimizer, options[self.optimizer]

    def groups_of(self, trained: list[nn.Parameter]) -> list[dict[str, Any]]:
        """The optimizer's groups: parameters dealt in turn, each group with a rate of its own."""
        _, options = self.optimizer_options
        dealt = [trained[first :: self.groups] for first in range(self.groups)]
        return [{"params": each, "lr": options["lr"] / (1 + i)} for i, each in enumerate(dealt) if each]

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        name, options = self.optimizer_options
        return getattr(torch.optim, name)(groups, **options)

    def finish(self, model: Model) -> Model:
        """What a user does to a model that is built: freeze, then give it an adapter."""
        for index in self.frozen:
            model.parts[index].requires_grad_(False)
        if self.adapter:
            torch.manual_seed(self.seed + 1)
            model.adapter = linear(bias=False)
        return model

    def batch(self, step: int, micro: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + 1009 * step + micro)
        x = torch.randn(BATCH, LENGTH, WIDTH, generator=generator)
        return x.to(self.torch_dtype), 100 * step + micro
