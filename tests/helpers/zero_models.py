"""Small models for tests of sharded training, each with one trait that sharding could get wrong.

Widths are odd, so that shards end inside rows. A model maps `x` of shape (batch, WIDTH) to the same shape unless its
docstring says otherwise. What a batch holds besides `x` (a switch, a route) follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 7
VOCABULARY = 11
LENGTH = 5


class BoomError(Exception):
    """Raised by models on request."""


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


class Block(nn.Module):
    """A residual block with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 9)
        self.down = nn.Linear(9, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Chain(nn.Module):
    """Blocks between two linear layers; `frozen` names the parts that are not trained."""

    def __init__(self, blocks: int = 2, frozen: Iterable[str] = ()) -> None:
        super().__init__()
        self.first = linear()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = linear()
        for name in frozen:
            self.get_submodule(name).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Between(nn.Module):
    """`use(self, x, ...)` between two linear layers; it finds the given parts as attributes."""

    def __init__(self, use: Callable[..., Tensor], **parts: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.use = use
        self.first = linear()
        for name, make in parts.items():
            setattr(self, name, make())
        self.head = linear()

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return self.head(self.use(self, self.first(x), *more))


# --- frozen, unused, odd -------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A frozen linear layer with a trained low-rank part beside it (LoRA, arXiv:2106.09685)."""

    def __init__(self) -> None:
        super().__init__()
        self.base = linear().requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, WIDTH) * 0.3)
        self.b = nn.Parameter(torch.zeros(WIDTH, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


class Lora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = linear().requires_grad_(False)
        self.layers = nn.ModuleList(LowRank() for _ in range(3))
        self.head = linear().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.tanh(layer(x)) + x
        return self.head(x)


class SometimesUsed(nn.Module):
    """`branch` is used where the batch says so, `never` never; that comes first, and so is reduced last."""

    def __init__(self) -> None:
        super().__init__()
        self.never_scale = nn.Parameter(torch.ones(3))
        self.never = linear()
        self.first = linear()
        self.branch = Block()
        self.head = linear()

    def forward(self, x: Tensor, use_branch: bool) -> Tensor:
        x = self.first(x)
        if use_branch:
            x = self.branch(x)
        return self.head(x)


class Experts(nn.Module):
    """Sends each row to the expert that the batch names; an expert without rows is not run."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor, route: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (route == index).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]))
        return out


class MixtureOfExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = linear()
        self.gate = nn.Linear(WIDTH, 4)
        self.left = Experts()
        self.right = Experts()
        self.head = linear()

    def forward(self, x: Tensor, route: Tensor) -> Tensor:
        x = self.first(x)
        for experts in (self.left, self.right):
            weight = self.gate(x).softmax(-1).gather(1, route[:, None])
            x = x + weight * experts(x, route)
        return self.head(x)


class OddSizes(nn.Module):
    """Parameters without elements, 0-dim, of one element, and of sizes that no world size divides."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.empty(0))
        self.no_rows = nn.Parameter(torch.empty(0, WIDTH))
        self.scalar = nn.Parameter(torch.tensor(0.7))
        self.single = nn.Parameter(torch.full((1, 1, 1), 0.3))
        self.cube = nn.Parameter(torch.randn(1, WIDTH, 1) * 0.3)
        self.wide = nn.Parameter(torch.randn(13, WIDTH).T * 0.3)  # not contiguous
        self.order = nn.Parameter(torch.arange(13).flip(0), requires_grad=False)
        self.mask = nn.Parameter(torch.arange(13) != 2, requires_grad=False)
        self.narrow = nn.Linear(13, WIDTH, bias=False)
        self.only_empty = nn.ParameterList([torch.empty(0, 2), torch.empty(3, 0)])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, x @ self.no_rows.T], dim=1) + self.nothing.sum() + self.only_empty[0].sum()
        x = x * self.scalar + self.single[0, 0] + self.cube[0, :, 0]
        return self.narrow(torch.tanh(x @ self.wide)[:, self.order] * self.mask)


class FewElements(nn.Module):
    """Fewer elements than ranks in every parameter, so that some ranks' shards are empty."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.inner = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.inner(x[:, :1])


# --- shared and reused ---------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two blocks in different parents share a weight, a third shares a whole module."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(linear(), nn.Tanh(), linear())
        self.right = nn.Sequential(linear(), nn.Tanh(), linear())
        self.right[0].weight = self.left[2].weight
        self.last = nn.ModuleList([linear(), self.right[2]])

    def forward(self, x: Tensor) -> Tensor:
        x = self.left(x) + self.right(x)
        return self.last[1](torch.tanh(self.last[0](x)))


class TiedTokens(nn.Module):
    """Tokens (batch, LENGTH) to logits (batch, LENGTH, VOCABULARY); the head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.block = Block()
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(tokens)))


class CalledTwice(nn.Module):
    """`shared` is called twice in a row and once more after another module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = linear()
        self.shared = Block()
        self.other = linear()

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.shared(self.first(x)))
        return self.first(self.shared(torch.tanh(self.other(x))))


# --- parameters read by other modules ------------------------------------------------------------------------------


class ReadsChildWeight(nn.Module):
    """Uses `head.weight` without calling `head`; where `register` is told, by a name that nobody can watch."""

    def __init__(self, register: Any = None) -> None:
        super().__init__()
        self.body = Block()
        self.head = linear()
        self.aside = [] if register is None else [self.head.weight]
        if register is not None:
            register(self, self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.body(x), self.aside[0] if self.aside else self.head.weight)


class ReadsUsedWeight(nn.Module):
    """Tokens to logits; the parent multiplies by the weight of an embedding that has been called before."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.block = Block()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.block(self.embedding(tokens)) @ self.embedding.weight.T


class GivenWeight(nn.Module):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, weight))


class LateBias(nn.Linear):
    """Returns its bias beside the product, for the caller to add."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return F.linear(x, self.weight), self.bias


class ReturnsParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = LateBias(WIDTH, WIDTH)
        self.second = LateBias(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        product, bias = self.first(x)
        product, late = self.second(torch.tanh(product + bias))
        return product + late


class Containers(nn.Module):
    """Reads its ParameterList and ParameterDict, one of them nested in the other's neighbour."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH) * 0.3 for _ in range(3))
        self.biases = nn.ParameterDict({"in": torch.zeros(WIDTH), "out": torch.ones(WIDTH)})
        self.middle = linear()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x @ self.weights[0] + self.biases["in"])
        x = self.middle(x) @ self.weights[1]
        return torch.tanh(x) @ self.weights[2] + self.biases["out"]


class Attention(nn.Module):
    """(batch, LENGTH, WIDTH); nn.MultiheadAttention reads `out_proj.weight` without calling `out_proj`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = linear()
        self.attention = nn.MultiheadAttention(WIDTH, 1, batch_first=True)
        self.head = linear()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        mixed, weights = self.attention(x, x, x)
        return self.head(x + mixed) + weights.mean()


class Encoder(nn.Module):
    """(batch, LENGTH, WIDTH); in evaluation torch's fast path reads every weight of a layer without calling a child."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 8)
        layers = [nn.TransformerEncoderLayer(8, 2, 9, dropout=0.0, batch_first=True) for _ in range(2)]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class InPlace(nn.Module):
    """Changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return torch.tanh(x @ self.inner)


class FusedProduct(torch.autograd.Function):
    """`x @ weight.T` with a backward of its own, as kernels have it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (x,) = ctx.saved_tensors
        return grad @ ctx.weight, grad.T @ x


class FusedLinear(nn.Linear):
    """Has a hook on its weight's gradient, too."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.weight.register_hook(lambda grad: 2 * grad)

    def forward(self, x: Tensor) -> Tensor:
        return FusedProduct.apply(x, self.weight) + self.bias


# --- what modules return and keep ----------------------------------------------------------------------------------


@dataclass
class Pair:
    """A module's output as a dataclass."""

    hidden: Tensor
    side: Tensor
    note: str = "not a tensor"


class NamedPair(NamedTuple):
    """A module's output as a namedtuple."""

    hidden: Tensor
    side: Tensor | None


class Opaque:
    """A module's output that nobody can look into without knowing it."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class Hiding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Opaque:
        return Opaque(torch.tanh(x) * self.gain)


class Emits(nn.Module):
    """Returns two tensors in a container of the given kind, and takes the same container."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.main = linear()
        self.side = linear()

    def forward(self, given: Any, *, scale: float = 1.0) -> Any:
        x = first_tensor(given)
        hidden, side = torch.tanh(self.main(x)), self.side(x) * scale
        return {
            "dict": {"hidden": hidden, "side": side, "note": None},
            "tuple": (hidden, None, side),
            "list": [hidden, [side, 3]],
            "nested": {"deep": ({"hidden": hidden}, [side])},
            "namedtuple": NamedPair(hidden, side),
            "dataclass": Pair(hidden, side),
        }[self.kind]


def first_tensor(value: Any) -> Tensor:
    return next(iter(tensors_of(value)))


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Pair):
        return [value.hidden, value.side]
    if isinstance(value, Opaque):
        return [value.hidden]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in tensors_of(item)]


class Containing(nn.Module):
    """A chain whose modules, the last one included, hand containers of one kind to each other."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Emits(kind) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        given: Any = x
        aside = x.new_zeros(())
        for part in self.parts[:2]:
            given = part(given, scale=0.5)
            aside = aside + tensors_of(given)[1].mean()
        return self.parts[2](first_tensor(given) + aside)


class Counting(nn.Module):
    """Keeps a running mean that the output depends on, a count, and a buffer that checkpoints leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = linear()
        self.head = linear()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("last", torch.zeros(4, WIDTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.training:
            self.calls += 1
            self.mean.lerp_(x.detach().mean(0), 0.25)
            self.last = x.detach().clone()
        return self.head(x - self.mean)


class MixedDtypes(nn.Module):
    """fp32 layers around a bf16 one, and a norm that holds both dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = linear()
        self.middle = linear().bfloat16()
        self.scale = nn.Parameter(torch.ones(WIDTH, dtype=torch.bfloat16))
        self.shift = nn.Parameter(torch.zeros(WIDTH))
        self.head = linear()

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.first(x).bfloat16()) * self.scale
        return self.head(torch.tanh(x.float()) + self.shift)


# --- recomputation and failure -------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Blocks under activation checkpointing; `order` may name one more than once."""

    def __init__(self, reentrant: bool, order: tuple[int, ...] = (0, 1, 2), frozen: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.order = order
        self.first = linear()
        self.blocks = nn.ModuleList(Block() for _ in range(max(order) + 1))
        self.head = linear()
        for index in frozen:
            self.blocks[index].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for index in self.order:
            x = checkpoint(self.blocks[index], x, use_reentrant=self.reentrant)
        return self.head(x)


class CheckpointedSegment(nn.Module):
    """Recomputes a method, not a module: it calls two children and reads a parameter of its own and a child's."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first = linear()
        self.left = Block()
        self.right = Block()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def _segment(self, x: Tensor) -> Tensor:
        x = self.right(torch.tanh(self.left(x)) * self.scale)
        return F.linear(x, self.first.weight)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._segment, self.first(x), use_reentrant=self.reentrant)


class RaisesInBackward(torch.autograd.Function):
    """The identity, whose backward raises BoomError."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise BoomError("in backward")


class Fragile(nn.Module):
    """Raises BoomError where the batch says: a child, the parent after it, a checkpoint, backward, or nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first = linear()
        self.child = FragileChild()
        self.block = Block()
        self.head = linear()

    def forward(self, x: Tensor, where: str = "") -> Tensor:
        x = self.first(x)
        if where == "checkpoint":
            x = checkpoint(self.child, x, True, use_reentrant=False)
        x = self.child(x, where == "child")
        if where == "backward":
            x = RaisesInBackward.apply(x)
        x = self.block(x)
        if where == "parent":
            raise BoomError("in the parent")
        return self.head(x)


class FragileChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def forward(self, x: Tensor, fail: bool) -> Tensor:
        x = torch.tanh(self.inner(x))
        if fail:
            raise BoomError("in a child")
        return x
