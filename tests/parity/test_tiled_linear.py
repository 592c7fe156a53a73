"""`zero.TiledLinear` beside the layer that it is cut from: what it gives, its gradients, training at stages 0 to 3."""

from __future__ import annotations

import pytest
import torch
from harness import distributed
from torch import Tensor, nn

import deepspeedlite
from deepspeedlite import zero
from deepspeedlite.runtime.errors import EngineStateError
from deepspeedlite.zero import TiledLinear, TiledLinearReturnBias

IN, OUT = 13, 9


class LinearReturnBias(nn.Linear):
    """As Megatron's: who calls it adds the bias."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        return nn.functional.linear(x, self.weight), self.bias


def whole_grad(layer: TiledLinear) -> Tensor:
    return torch.cat([torch.cat([tile.weight.grad for tile in row], dim=1) for row in layer.linears])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("in_splits, out_splits", [(1, 1), (1, 4), (3, 1), (5, 4), (IN, OUT)])
@pytest.mark.parametrize("already", [True, False])
def test_it_is_the_layer_that_it_was_cut_from(in_splits, out_splits, bias, already):
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT, bias=bias).double()
    tiled = TiledLinear(IN, OUT, bias, in_splits, out_splits, already, init_linear=linear, dtype=torch.float64)
    assert sum(p.numel() for p in tiled.parameters()) == sum(p.numel() for p in linear.parameters())
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    given = x.split([end - begin for begin, end in zip(tiled.in_parts, tiled.in_parts[1:])], dim=-1)
    torch.testing.assert_close(out := tiled(given if already else x), expected := linear(x))
    (grad,) = torch.autograd.grad(expected.square().sum(), x, retain_graph=True)
    expected.square().sum().backward()
    (found,) = torch.autograd.grad(out.square().sum(), x, retain_graph=True)
    out.square().sum().backward()
    torch.testing.assert_close(found, grad)
    torch.testing.assert_close(whole_grad(tiled), linear.weight.grad)
    if bias:
        torch.testing.assert_close(torch.cat([row[-1].bias.grad for row in tiled.linears]), linear.bias.grad)


def test_rows_may_stay_apart():
    linear = nn.Linear(IN, OUT)
    tiled = TiledLinear(IN, OUT, out_splits=4, in_splits=2, combine_out_splits=False, init_linear=linear)
    x = torch.randn(3, IN)
    assert [part.shape[-1] for part in tiled(x)] == [3, 2, 2, 2] and tiled.out_parts == [0, 3, 5, 7, 9]
    torch.testing.assert_close(torch.cat(tiled(x), dim=-1), linear(x))


@pytest.mark.parametrize("combine", [True, False])
def test_a_bias_may_be_returned(combine):
    linear = nn.Linear(IN, OUT)
    tiled = TiledLinearReturnBias(
        IN, OUT, True, 3, 2, combine_out_splits=combine, linear_cls=LinearReturnBias, init_linear=linear
    )
    x = torch.randn(3, IN)
    out, bias = tiled(x) if combine else (torch.cat(parts, dim=-1) for parts in zip(*tiled(x)))
    torch.testing.assert_close(out + bias, linear(x))
    assert torch.equal(bias, linear.bias)
    assert TiledLinearReturnBias(IN, OUT, False, 3, 2, linear_cls=LinearReturnBias)(x)[1] is None
    with pytest.raises(EngineStateError, match=r"must return \(output, bias\), got Tensor"):
        TiledLinearReturnBias(IN, OUT)(x)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: TiledLinear(4, 4, in_splits=5), "in_splits must be at least 1 and at most 4, got 5"),
        (lambda: TiledLinear(4, 4, out_splits=0), "out_splits must be at least 1 and at most 4, got 0"),
        (lambda: TiledLinear(4, 4)(torch.ones(2, 5)), r"takes a tensor of 4 features, got \(2, 5\)"),
        (lambda: TiledLinear(4, 4, True, 2, 1, True)([torch.ones(2, 3)] * 2), r"2 parts of \[2, 2\].*got \[3, 3\]"),
        (lambda: TiledLinear(4, 4, init_linear=nn.Linear(4, 5)), r"4 x 4 .* cannot copy a weight of shape \(5, 4\)"),
        (lambda: TiledLinear(4, 4, bias=False, init_linear=nn.Linear(4, 4)), "bias=False cannot copy .* bias=True"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(EngineStateError, match=message):
        call()


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.layer = nn.Linear(6, IN), layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.first(x).tanh()).square().mean()


def linear() -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(IN, OUT)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@distributed(world_size=2)
def test_it_trains_as_the_whole_layer_does(stage: int, world_size: int) -> None:
    """A layer built under `zero.Init` is copied from one that is whole, and one that is sharded."""
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    rank = torch.distributed.get_rank()
    with zero.Init(config_dict_or_path=settings, enabled=stage == 3):
        sharded = linear()
        tiled = TiledLinear(IN, OUT, in_splits=3, out_splits=2, init_linear=sharded)
    if stage == 3:
        assert all(param.numel() == 0 for param in tiled.parameters())
    again = TiledLinear(IN, OUT, in_splits=3, out_splits=2, init_linear=linear())
    with zero.GatheredParameters(list(tiled.parameters())):
        for one, other in zip(tiled.parameters(), again.parameters()):
            torch.testing.assert_close(one.data, other.data)
    engine, *_ = deepspeedlite.initialize(model=Net(tiled), config=settings)
    plain = Net(linear())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(4):
        x = torch.randn(4 * world_size, 6, generator=torch.Generator().manual_seed(step))
        loss = engine(x[4 * rank : 4 * rank + 4])
        engine.backward(loss)
        engine.step()
        plain(x).backward()
        optimizer.step()
        optimizer.zero_grad()
    back = TiledLinear(IN, OUT, in_splits=3, out_splits=2, init_linear=plain.layer)
    state, expected = engine.module.state_dict(), back.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(state[f"layer.{name}"], value, atol=1e-5, rtol=1e-5)


class Block(nn.Module):
    """A block of a list, which stage 3 makes whole as one where nothing says otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.tiled = nn.LayerNorm(64), TiledLinear(64, 64, in_splits=4, out_splits=4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.tiled(self.norm(x))


@pytest.mark.parametrize("under_init", [True, False])
@distributed(world_size=2)
def test_stage_3_holds_a_tile_at_a_time(under_init: bool) -> None:
    """Also inside a block, and where the values are sharded as modules are built."""
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 1e-2}},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        },
    }
    with zero.Init(config_dict_or_path=settings, enabled=under_init):
        model = nn.Sequential(Block(), Block())
    engine, *_ = deepspeedlite.initialize(model=model, config=settings)
    whole: list[int] = []
    params = list(engine.module.parameters())  # reading them in a forward would make them whole

    def look(module: nn.Module, args: object) -> None:
        whole.append(sum(param.numel() for param in params))

    for tile in engine.module.modules():
        if isinstance(tile, nn.Linear):
            tile.register_forward_pre_hook(look)
    for _ in range(3):
        engine.backward(engine(torch.randn(1, 64)).mean())
        engine.step()
    assert 16 * 16 <= max(whole) <= 3 * 16 * 16, whole
