"""Models whose constructors initialise, copy, tie and rewrite their parts: the same under `zero.Init` as without."""

from __future__ import annotations

import copy
import gc
import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from torch import nn
from torch.nn.utils import parametrizations

import deepspeedlite
from deepspeedlite.runtime.errors import UnsupportedError
from deepspeedlite.sharded_params import building
from deepspeedlite.zero import GatheredParameters, Init


class Block(nn.Module):
    """Parameters of its own before, between and after its children's."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(width))
        self.up = nn.Linear(width, 2 * width)
        self.scale = nn.Parameter(torch.randn(2 * width))
        self.down = nn.Linear(2 * width, width)
        self.shift = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.gate)
        nn.init.uniform_(self.shift)

    def forward(self, x):
        return x * self.gate + self.down(torch.tanh(self.up(x)) * self.scale) + self.shift


class Model(nn.Module):
    """A stack of blocks, initialised by `ways` in the constructor's order."""

    def __init__(self, *ways: str, width: int = 6, depth: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width, padding_idx=0)
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 11, bias=False)
        for way in ways:
            getattr(self, way)()

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, -2), tokens.flatten())

    def by_apply(self):
        def initialise(module):
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, Block):
                module.gate.data.uniform_(1, 2)

        self.apply(initialise)

    def by_child(self):
        nn.init.orthogonal_(self.blocks[0].up.weight)
        nn.init.zeros_(self.blocks[1].down.bias)
        nn.init.kaiming_uniform_(tensor=self.head.weight, a=math.sqrt(5))

    def by_loop(self):
        for name, param in self.named_parameters():
            if param.dim() > 1:
                param.data.mul_(2 / math.sqrt(param.shape[1])).add_(0.01)
            elif name.endswith("bias"):
                nn.init.constant_(param, 0.5)

    def by_number(self):
        with torch.no_grad():
            for number, param in enumerate(list(self.parameters())):
                param[0] += number / param.numel()
                param *= 2 - len(param) / 100

    def by_memory_kept(self):
        kept = [param.data for param in self.parameters()]
        for number, values in enumerate(kept):
            values.add_(number)

    def by_another(self):
        self.blocks[0].up.weight.data.copy_(self.blocks[1].up.weight + self.blocks[2].up.weight)
        self.blocks[2].gate.data = self.blocks[0].gate.detach() * self.blocks[1].gate
        torch._foreach_add_([block.shift.data for block in self.blocks], [self.norm.weight.data] * len(self.blocks))

    def by_state_dict(self):
        state = {name: value.flip(0) for name, value in self.state_dict().items()}
        self.load_state_dict(state)

    def tied(self):
        self.head.weight = self.embedding.weight

    def resized(self):
        more = torch.cat([self.head.weight.data, torch.randn(3, self.head.weight.shape[1])])
        self.head.weight.data = more
        self.norm.weight = nn.Parameter(torch.randn(self.norm.weight.numel()))
        self.blocks.append(copy.deepcopy(self.blocks[-1]))

    def partly_frozen(self):
        self.blocks[0].requires_grad_(False)
        self.embedding.weight.requires_grad = False
        self.blocks[1].up.bias.data.fill_(3)

    def halved(self):
        self.blocks[0].to(torch.bfloat16)
        nn.init.ones_(self.blocks[0].up.weight)

    def more_blocks(self):  # children that come when others have been initialised
        self.more = nn.Sequential(Block(), nn.Linear(6, 6))
        nn.init.normal_(self.blocks[0].gate)
        self.last = nn.Linear(6, 6)
        self.more.apply(lambda module: [nn.init.normal_(p) for p in module.parameters(recurse=False)])

    def normed(self):
        self.normed_head = parametrizations.weight_norm(nn.Linear(6, 6))
        self.blocks[0].up = parametrizations.weight_norm(self.blocks[0].up)
        nn.init.normal_(self.blocks[0].up.parametrizations.weight.original1)
        with GatheredParameters(self.blocks[1].up.weight, modifier_rank=0):  # as transformers does
            parametrizations.weight_norm(self.blocks[1].up)
        self.spectral = parametrizations.spectral_norm(nn.Linear(6, 6))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.recurrent = nn.LSTM(4, 3, num_layers=2, bidirectional=True)
        self.listed = nn.ParameterList([nn.Parameter(torch.randn(3)) for _ in range(3)])
        for param in self.encoder.layers[1].parameters():
            nn.init.normal_(param)
        nn.init.eye_(self.attention.out_proj.weight)
        self.listed[1].data.zero_()


WAYS = [
    *[["by_apply"], ["by_child"], ["by_loop"], ["by_number"], ["by_memory_kept"], ["by_another"], ["by_state_dict"]],
    *[["tied", "by_apply"], ["by_child", "tied", "by_loop"], ["resized", "by_loop"], ["partly_frozen", "by_number"]],
    *[["halved"], ["more_blocks", "by_apply"], ["normed"]],
]


def built(make, **keys) -> nn.Module:
    """Built under Init, of which rank 0's values count."""
    torch.manual_seed(dist.get_rank())
    with Init(**keys):
        return make()


def plain(make) -> nn.Module:
    torch.manual_seed(0)
    return make()


def assert_same(model: nn.Module, expected: nn.Module, what: object) -> None:
    assert all(param.numel() == 0 and tuple(param.ds_shape) for param in model.parameters()), what
    names = dict(expected.named_parameters(remove_duplicate=False))
    assert names.keys() == {name for name, _ in model.named_parameters(remove_duplicate=False)}, what
    with GatheredParameters(list(model.parameters())):
        for name, param in model.named_parameters(remove_duplicate=False):
            same = torch.equal(param, names[name]) and param.dtype == names[name].dtype
            assert same and param.requires_grad == names[name].requires_grad, (what, name)


def settled_from(numel: int):
    """Modules that are as small as these would wait for each other otherwise."""
    return mock.patch.object(building, "RESHARD_FROM_NUMEL", numel)


@pytest.mark.slow_unless(numel=100)
@pytest.mark.parametrize("numel", [1, 100])
@distributed(world_size=2)
def test_values_are_those_that_constructors_asked_for(numel):
    with settled_from(numel):
        for ways in WAYS:
            assert_same(built(lambda ways=ways: Model(*ways)), plain(lambda ways=ways: Model(*ways)), ways)
        assert_same(built(Encoder), plain(Encoder), Encoder)
        both = [make(lambda: nn.Transformer(8, 2, 1, 2, 8)) for make in (built, plain)]
        assert_same(*both, "torch's")


@distributed(world_size=1)
def test_so_does_a_rank_alone():
    for ways in WAYS:
        assert_same(built(lambda ways=ways: Model(*ways)), plain(lambda ways=ways: Model(*ways)), ways)


@distributed(world_size=2)
def test_in_another_dtype_and_on_the_meta_device():
    model = built(lambda: Model("by_loop", "tied", "by_apply"), dtype=torch.bfloat16)
    with GatheredParameters(list(model.parameters())):
        assert all(param.dtype == torch.bfloat16 for param in model.parameters())
        assert (model.norm.bias == 0.5).all() and (model.blocks[1].gate >= 1).all()
    torch.manual_seed(dist.get_rank())
    with Init(), torch.device("meta"):
        model = Stack()
        tied = [nn.Linear(3, 3), nn.Linear(3, 3)]
        tied[0].weight = tied[1].weight
    assert model.head.weight is model.embedding.weight and tied[0].weight is tied[1].weight
    with GatheredParameters([*model.parameters(), *tied[0].parameters()]):
        weight = model.layers[0].weight
        assert torch.allclose(weight.T @ weight, torch.eye(6), atol=1e-5) and not model.layers[1].bias.any()
        assert model.layers[1].weight.std() > 0.1 and model.head.weight.std() > 0.5 and tied[0].weight.std() > 0.1


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.orthogonal_(self.layers[0].weight)
        nn.init.zeros_(self.layers[1].bias)


class GivenBefore(nn.Module):
    """Its scale has its values before it is a parameter: on the meta device they are lost."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(3))


class GivenAgain(GivenBefore):
    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, 5)


@distributed(world_size=2)
def test_what_the_meta_device_has_lost_is_an_error_unless_it_is_given_again():
    said = r"GivenBefore was built on the meta device.*reset_parameters"
    with pytest.raises(UnsupportedError, match=said), torch.device("meta"), Init():
        GivenBefore()
    with Init(), torch.device("meta"):
        model = GivenAgain()
    with GatheredParameters(model.scale):
        assert (model.scale == 5).all()


@pytest.mark.slow
@distributed(world_size=2)
def test_they_train_as_those_built_whole():
    for ways in (["by_apply", "tied", "partly_frozen"], ["by_child", "normed"]):
        model, expected = built(lambda ways=ways: Model(*ways)), plain(lambda ways=ways: Model(*ways))
        engine, *_ = deepspeedlite.initialize(
            model=model,
            config={
                "train_micro_batch_size_per_gpu": 2,
                "gradient_clipping": 0,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.0}},
                "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            },
        )
        optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.0)
        data = torch.randint(1, 11, (3, 2, 2, 5), generator=torch.Generator().manual_seed(3))
        for step in data:
            loss = engine(step[dist.get_rank()])
            engine.backward(loss)
            engine.step()
            optimizer.zero_grad()
            theirs = [expected(part) for part in step]
            (sum(theirs) / 2).backward()
            optimizer.step()
            assert abs(loss.item() - theirs[dist.get_rank()].item()) < 1e-5, ways
        engine.destroy()


class Watched(nn.Module):
    """Blocks and leaves made in list comprehensions, then written by apply, in a loop, by their parent, and copied."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.__dict__.update(peaks={}, made=[])
        self.blocks = nn.ModuleList([self.watch("blocks", Block(width)) for _ in range(depth)])
        self.leaves = nn.ModuleList([self.watch("leaves", nn.Linear(width, 2 * width)) for _ in range(depth)])
        self.apply(lambda module: self.watch("apply", [nn.init.normal_(p) for p in module.parameters(recurse=False)]))
        for param in list(self.parameters()):
            self.watch("loop", param.data.add_(1))
        for leaf in self.leaves:
            self.watch("parent", nn.init.zeros_(leaf.bias))
        self.copies = nn.ModuleList([self.watch("copies", copy.deepcopy(self.blocks[0])) for _ in range(depth)])

    def watch(self, when: str, made):
        """Note what all parameters made so far take, with other tensors over their memory."""
        if isinstance(made, nn.Module):
            self.made.append(made)
        with torch._C.DisableTorchFunction():
            params = [param for module in (self, *self.made) for param in module.parameters()]
            storages = {param.untyped_storage()._cdata: param.untyped_storage().nbytes() for param in params}
        self.peaks[when] = max(self.peaks.get(when, 0), sum(storages.values()))
        return made


@pytest.mark.slow
@distributed(world_size=2)
def test_one_module_is_whole_at_a_time():
    width, depth = 64, 3
    with settled_from(1):
        model = built(lambda: Watched(width, depth))
    largest = 4 * (2 * width * width + 2 * width)
    peaks = {when: nbytes / largest for when, nbytes in model.peaks.items()}
    assert len(peaks) == 6 and all(peak <= 1.01 for peak in peaks.values()), peaks
    assert all(peaks[when] > 0.9 for when in ("leaves", "apply", "loop")), peaks
    assert all(param.numel() == 0 for param in model.parameters())


@distributed(world_size=2)
def test_two_parameters_over_one_memory_are_refused():
    def make():
        model = Model()
        model.head.weight.data = model.embedding.weight.data
        return model

    with pytest.raises(
        UnsupportedError, match=r"(Embedding|Linear)\.weight and (Embedding|Linear)\.weight share memory"
    ):
        built(make)


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        nn.init.zeros_(self.linear.weight)
        raise ValueError("in the constructor")


@distributed(world_size=2)
def test_a_constructor_that_raises_leaves_nothing_behind():
    before = {name: getattr(nn.Module, name) for name in ("__init__", "register_parameter", "__setstate__")}
    with pytest.raises(ValueError, match="in the constructor"), Init():
        Fails()
    assert before == {name: getattr(nn.Module, name) for name in before}
    assert not torch.overrides._get_current_function_mode_stack()
    assert nn.Linear(2, 2).weight.numel() == 4
    with Init():
        with pytest.raises(ValueError, match="in the constructor"):
            Fails()
        model = nn.Linear(2, 2)
    assert model.weight.numel() == 0


@pytest.mark.slow
@distributed(world_size=2)
def test_modules_that_are_dropped_are_collected_when_ranks_like():
    if dist.get_rank() == 0:
        gc.disable()
    try:
        with settled_from(1), Init():
            for number in range(4):
                module = Model("by_child")
                module.itself = [module]  # a cycle
                kept = module.blocks[0].up.weight.data
                kept.itself = kept  # and one that refers to memory
                del module, kept
                if dist.get_rank() == number % 2:
                    gc.collect()
            model = Model("by_child")
            if dist.get_rank() == 1:
                gc.collect()
        with GatheredParameters(list(model.parameters())):
            assert not model.blocks[1].down.bias.any()
    finally:
        gc.enable()


@distributed(world_size=2)
def test_touched_after_construction_and_from_another_context():
    with settled_from(1), Init() as context:
        first = Model()
        with torch.no_grad():
            first.norm.weight.fill_(2)
        assert first.norm.weight.shape == (6,) and first.norm.weight.ds_shape == (6,) and len(first.norm.bias) == 6
        loss = first(torch.arange(1, 5))
        with GatheredParameters(first.norm.bias, modifier_rank=1):
            first.norm.bias.data.fill_(dist.get_rank() + 1)
        fresh = nn.Linear(3, 3)
        with GatheredParameters(fresh.weight, modifier_rank=1):
            fresh.weight.data.fill_(dist.get_rank() + 1)
    assert math.isfinite(loss.item())
    with Init():
        second = nn.Sequential(first, nn.Linear(6, 6))
        nn.init.constant_(first.head.weight, 7)
        nn.init.constant_(second[1].bias, 8)
    with context:
        nn.init.constant_(first.embedding.weight, 9)
    assert all(param.numel() == 0 for param in second.parameters())
    with GatheredParameters([*second.parameters(), fresh.weight]):
        assert (first.norm.weight == 2).all() and (first.norm.bias == 2).all() and (fresh.weight == 2).all()
        assert (first.head.weight == 7).all() and (second[1].bias == 8).all() and (first.embedding.weight == 9).all()
