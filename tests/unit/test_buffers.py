"""Buffers keep their types whatever the parameters train in, unless `data_types` says otherwise."""

from __future__ import annotations

import pytest
import torch
from harness import distributed

import deepspeedlite
from deepspeedlite.config import ConfigError

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Rotary(torch.nn.Module):
    """Angles of positions: the frequencies are far from right in 16 bits."""

    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", 1 / 10000 ** torch.linspace(0, 1, 4))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, x):
        angles = torch.arange(300.0, 300.0 + len(x))[:, None] * self.frequencies
        return x * torch.cos(angles).to(x.dtype)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.rotary = Rotary()
        self.norm = torch.nn.BatchNorm1d(4)
        self.plain_norm = torch.nn.BatchNorm1d(4, affine=False)
        self.register_buffer("order", torch.arange(4))
        self.register_buffer("exact", torch.full((2,), 1 / 3, dtype=torch.float64))
        self.register_buffer("nothing", None)

    def forward(self, x):
        return self.plain_norm(self.norm(self.rotary(self.first(x))))


def config_of(stage, dtype="bf16", **types):
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
    }
    if dtype in HALF:
        config[dtype] = {"enabled": True}
    return {**config, "data_types": types} if types else config


def types_of(module):
    return {name: buffer.dtype for name, buffer in module.named_buffers()}


def expected(half):
    """Every type as it was built; a batch norm that has weights takes its statistics in theirs alone."""
    return {**types_of(Net()), "norm.running_mean": half, "norm.running_var": half}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("stage", [0, 1, 3])
@distributed(world_size=1)
def test_buffers_keep_their_types(stage, dtype):
    net = Net()
    frequencies, statistics = net.rotary.frequencies, net.plain_norm.running_mean.clone()
    engine, *_ = deepspeedlite.initialize(model=net, config=config_of(stage, dtype))
    assert net.first.weight.dtype == HALF[dtype] and types_of(net) == expected(HALF[dtype])
    assert net.rotary.frequencies is frequencies and net.nothing is None
    for _ in range(2):
        engine.backward(engine(torch.randn(4, 4, dtype=HALF[dtype])).square().sum())
        engine.step()
    assert types_of(net) == expected(HALF[dtype])
    assert not torch.equal(net.plain_norm.running_mean, statistics)  # counted on, in fp32


@distributed(world_size=2)
def test_init_and_checkpoints_keep_them_too(tmp_path):
    """Built sharded with a dtype, saved, loaded by a stage without Init; an fp32 value that bf16 has not survives."""
    config = config_of(3)
    with deepspeedlite.zero.Init(config_dict_or_path=config):
        net = Net()
    assert net.first.weight.dtype == torch.bfloat16 and types_of(net) == types_of(Net())
    engine, *_ = deepspeedlite.initialize(model=net, config=config)
    engine.backward(engine(torch.randn(4, 4, dtype=torch.bfloat16)).square().sum())
    engine.step()
    net.rotary.frequencies.mul_(1.0001)
    engine.save_checkpoint(str(tmp_path))
    for stage in (0, 3):
        other, *_ = deepspeedlite.initialize(model=Net(), config=config_of(stage))
        other.load_checkpoint(str(tmp_path))
        assert types_of(other.module) == expected(torch.bfloat16)
        for name, buffer in net.named_buffers():
            assert torch.equal(dict(other.module.named_buffers())[name], buffer), name


@distributed(world_size=1)
def test_buffer_dtype_and_what_it_leaves():
    """By experiment with DeepSpeed 0.19.8: patterns are searched for in the buffers' full names; what stays is fp32."""

    def types(**chosen):
        net = Net()
        deepspeedlite.initialize(model=net, config=config_of(0, **chosen))
        return {name: dtype for name, dtype in types_of(net).items() if dtype.is_floating_point}

    assert set(types(buffer_dtype="bf16").values()) == {torch.bfloat16}
    some = types(buffer_dtype="bf16", keep_in_fp32_modules=["rot", "^exact"])
    assert {name for name, dtype in some.items() if dtype == torch.float32} == {
        "rotary.frequencies",
        "rotary.scratch",
        "exact",
    }
    every = types(buffer_dtype="bf16", keep_in_fp32_modules=["*"])
    assert {name for name, dtype in every.items() if dtype != torch.float32} == {
        "norm.running_mean",
        "norm.running_var",
    }
    assert types(buffer_dtype="fp32")["exact"] == torch.float32


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("buffer_dtype", ["bf16", "fp16"])
@distributed(world_size=1)
def test_a_model_says_itself_what_stays(strict, buffer_dtype):
    net = Net()
    setattr(net, "_keep_in_fp32_modules_strict" if strict else "_keep_in_fp32_modules", ["rotary"])
    deepspeedlite.initialize(model=net, config=config_of(1, buffer_dtype=buffer_dtype))
    stays = strict or buffer_dtype == "fp16"
    assert net.rotary.frequencies.dtype == (torch.float32 if stays else HALF[buffer_dtype])
    assert net.exact.dtype == HALF[buffer_dtype]


@distributed(world_size=1)
def test_full_precision_leaves_everything_alone_but_what_it_is_told():
    net = Net()
    deepspeedlite.initialize(model=net, config=config_of(0, "fp32"))
    assert types_of(net) == types_of(Net())
    deepspeedlite.initialize(model=net, config=config_of(0, "fp32", buffer_dtype="bf16"))
    assert net.rotary.frequencies.dtype == torch.bfloat16 and net.norm.running_mean.dtype == torch.float32


@distributed(world_size=1)
def test_a_type_of_parameters_that_nothing_trains_in_is_refused():
    for dtype, said in (("fp32", "bf16"), ("bf16", "fp32"), ("fp16", "bf16")):
        with pytest.raises(ConfigError, match=r"data_types.param_dtype.*enable the section of that type"):
            deepspeedlite.initialize(model=Net(), config=config_of(0, dtype, param_dtype=said))
    with pytest.raises(ConfigError, match=r"data_types.keep_in_fp32_modules.*no list of regular expressions"):
        deepspeedlite.initialize(model=Net(), config=config_of(0, keep_in_fp32_modules=["("]))
    deepspeedlite.initialize(model=Net(), config=config_of(0, "bf16", param_dtype="bf16"))
