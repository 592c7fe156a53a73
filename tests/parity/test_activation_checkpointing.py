"""Activation checkpointing: gradients of the plain run, the same random numbers, sharded inputs, memory."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from harness import distributed
from models import TiedTokenModel, tied_model, tokens

import deepspeedlite
from deepspeedlite import checkpointing
from deepspeedlite.activation_checkpointing.saved_inputs import InputSaver, PartBuffers
from deepspeedlite.comm import Group
from deepspeedlite.runtime.errors import ConfigError, EngineStateError


class Mpu:
    """All ranks hold one model together."""

    def get_model_parallel_group(self) -> Any:
        return dist.group.WORLD

    def get_data_parallel_group(self) -> Any:
        return [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]


class Block(torch.nn.Module):
    """Dropout, a keyword, a mask that needs no grad, an in-place function of its input, and several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, scale: float = 1.0, more: Any = None) -> Any:
        """(hidden, a note, a number of elements)."""
        hidden = torch.nn.functional.dropout(self.inner(x).relu_() * scale, 0.5) * mask
        if more is not None:
            hidden = hidden + more["bias"]
        return hidden, "note", hidden.numel()


def gradients(run: Callable[..., Any]) -> list[torch.Tensor]:
    """Of three blocks and of the input, with every call made by `run`."""
    torch.manual_seed(5)
    blocks = torch.nn.ModuleList(Block() for _ in range(3))
    x, bias = torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    mask = (torch.rand(4, 8) > 0.2).float()
    hidden = x * 1.0
    for number, block in enumerate(blocks):
        hidden, note, numel = run(block, hidden, mask, scale=0.5 + number, more={"bias": bias})
        assert (note, numel) == ("note", 32)
    after = torch.rand(3)  # the generator goes on as if nothing had been computed twice
    hidden.square().sum().backward()
    return [x.grad, bias.grad, *(param.grad for param in blocks.parameters()), after, torch.rand(3)]


def plainly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def nested(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpointing.checkpoint(lambda *a: checkpointing.checkpoint(function, *a, **kwargs), *args)


@pytest.fixture
def unconfigured():
    """Settings as at the start, before and after."""
    checkpointing.configure(None)
    yield
    checkpointing.configure(None)


@pytest.mark.parametrize("run", [checkpointing.checkpoint, nested])
def test_gradients_equal_the_plain_run(run, unconfigured):
    for ours, plain in zip(gradients(run), gradients(plainly), strict=True):
        assert torch.equal(ours, plain)


def test_without_grad_and_without_inputs_that_need_it(unconfigured):
    """Parameters get gradients although no input requires any; without grad the function is simply called."""
    block, x = Block(), torch.randn(4, 8)
    hidden, *_ = checkpointing.non_reentrant_checkpoint(block, x, torch.ones(4, 8))
    hidden.sum().backward()
    assert block.inner.weight.grad is not None
    with torch.no_grad():
        assert checkpointing.checkpoint(lambda: "anything") == "anything"


@distributed(2)
def test_sharded_inputs():
    """Inputs are kept in parts and gathered: gradients are still the plain ones, also of nested calls and odd sizes."""
    plain = gradients(plainly)
    checkpointing.configure(Mpu(), partition_activations=True)
    for run in (checkpointing.checkpoint, nested):
        for ours, expected in zip(gradients(run), plain, strict=True):
            assert torch.equal(ours, expected)
    x = torch.randn(7, requires_grad=True)

    def in_place(y: torch.Tensor) -> torch.Tensor:
        return y.mul_(2.0) ** 2

    out = checkpointing.checkpoint(in_place, x * 1.0)
    out.sum().backward()
    torch.testing.assert_close(x.grad, 8 * x.detach())
    checkpointing.partition_activations_in_checkpoint(False)
    assert torch.equal(gradients(checkpointing.checkpoint)[0], plain[0])


LAYERS, NUMEL = 8, 2 << 20  # 8 MiB an input
M_MMAP_THRESHOLD = -3  # of glibc's mallopt: from how many bytes on what is freed goes back to the system at once


def held_bytes(run: Callable[..., Any]) -> int:
    """What this process holds of memory between the forward and the backward pass of a chain of layers."""
    gc.collect()
    x = torch.ones(NUMEL, requires_grad=True)
    before = psutil.Process().memory_info().rss
    hidden = x * 1.0
    for _ in range(LAYERS):
        hidden = run(lambda y: (y.sin() * 2.0).cos() * 0.5, hidden)
    held = psutil.Process().memory_info().rss - before
    hidden.sum().backward()
    return held


@pytest.mark.slow
@distributed(2)
def test_memory():
    """A layer keeps its input alone instead of three tensors; sharded over two ranks, half of it."""
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20), "else freed memory is kept, and taken again unseen"
    held_bytes(plainly)  # the first run allocates what stays
    plain = held_bytes(plainly)
    checkpointing.configure(Mpu())
    kept = held_bytes(checkpointing.checkpoint)
    checkpointing.configure(Mpu(), partition_activations=True)
    sharded = held_bytes(checkpointing.checkpoint)
    assert kept < 0.6 * plain and sharded < 0.7 * kept, (plain >> 20, kept >> 20, sharded >> 20)


def kept_parts(inputs: list[torch.Tensor], buffers: PartBuffers | None) -> tuple[list[Any], int, int]:
    """Of layers' inputs the savers' parts; how many separate pieces of memory they lie in, and of how many bytes.

    Between two of them a layer's own tensors come and go.
    """
    saver, kept = InputSaver(Group(), False, buffers), []
    for x in inputs:
        passing = torch.empty(x.numel() // 2)
        kept.append(saver.save(x))
        del passing
    storages = {part._part.untyped_storage().data_ptr(): part._part.untyped_storage().nbytes() for part in kept}
    return kept, len(storages), sum(storages.values())


@distributed(2)
def test_sharded_inputs_go_into_one_buffer():
    """One piece of memory of the size of all parts, instead of as many; the same in every pass, and no byte more."""
    inputs = [torch.full((1001,), float(number)) for number in range(LAYERS)]
    apart, fragments, nbytes = kept_parts(inputs, None)
    assert (fragments, nbytes) == (LAYERS, LAYERS * 501 * 4)
    buffers = PartBuffers(LAYERS)
    places = set()
    for _ in range(3):
        together, fragments, held = kept_parts(inputs, buffers)
        assert (fragments, held) == (1, nbytes)
        places.add(together[0]._part.untyped_storage().data_ptr())
        assert all(torch.equal(part.fetch(), x) for part, x in zip(together, inputs))
        assert len({part._part.data_ptr() for part in together}) == LAYERS
        del together
    assert len(places) == 1, "memory is given back and used again"
    other, fragments, _ = kept_parts([*inputs, torch.ones(10), torch.ones(1001).bfloat16()], buffers)
    assert fragments == 3, "a buffer for each size and dtype"
    beyond, fragments, _ = kept_parts([torch.ones(1001)] * 2, buffers)
    assert fragments == 2 and all(torch.equal(part.fetch(), torch.ones(1001)) for part in beyond)
    del apart, other


@distributed(2)
def test_contiguous_checkpointing_gives_the_plain_gradients():
    plain = gradients(plainly)
    config = {
        "train_batch_size": 1,
        "activation_checkpointing": {
            "partition_activations": True,
            "contiguous_memory_optimization": True,
            "number_checkpoints": 3,
        },
    }
    checkpointing.configure(Mpu(), deepspeed_config=config)
    buffers = checkpointing._settings.buffers
    for run in (checkpointing.checkpoint, nested, checkpointing.checkpoint):
        for ours, expected in zip(gradients(run), plain, strict=True):
            assert torch.equal(ours, expected)
    gc.collect()
    assert buffers._buffers and all(len(free) == 3 for free in buffers._free.values()), "all rows came back"
    checkpointing.reset()
    assert not checkpointing._settings.buffers._buffers
    checkpointing.set_num_layers(1)  # too few: the others have memory of their own
    for ours, expected in zip(gradients(checkpointing.checkpoint), plain, strict=True):
        assert torch.equal(ours, expected)


def checkpointed_model() -> TiedTokenModel:
    model = tied_model(0)
    for module in (*model.up, model.norm):
        forward = module.forward
        module.forward = lambda *a, forward=forward: checkpointing.checkpoint(forward, *a)
    return model


@distributed(2)
def test_under_zero():
    """Losses of every stage are those without checkpointing."""
    checkpointing.configure(None)

    def losses(model: TiedTokenModel, stage: int) -> list[float]:
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        }
        engine, *_ = deepspeedlite.initialize(model=model, config=config)
        found = []
        for step in range(3):
            loss = engine(*tokens(step, 0, dist.get_rank()))
            engine.backward(loss)
            engine.step()
            found.append(loss.item())
        engine.destroy()
        return found

    for stage in (0, 2, 3):
        assert losses(checkpointed_model(), stage) == losses(tied_model(0), stage)


@distributed(2)
def test_model_parallel_random_numbers():
    """Alike outside a fork, apart within; a recomputation forks into the same numbers again."""
    checkpointing.configure(Mpu())
    checkpointing.model_parallel_cuda_manual_seed(11)
    tracker = checkpointing.get_cuda_rng_tracker()
    draws = torch.zeros(2, 2)
    draws[0] = torch.rand(2)
    with tracker.fork():
        draws[1] = torch.rand(2)
    both = [torch.zeros(2, 2) for _ in range(2)]
    dist.all_gather(both, draws)
    assert torch.equal(both[0][0], both[1][0]) and not torch.equal(both[0][1], both[1][1])

    def drop(x: torch.Tensor) -> torch.Tensor:
        with tracker.fork():
            return torch.nn.functional.dropout(x * 3.0, 0.5).square()

    def grad(run: Callable[..., Any]) -> tuple[torch.Tensor, torch.Tensor]:
        checkpointing.model_parallel_cuda_manual_seed(12)
        x = torch.ones(64, requires_grad=True)
        run(drop, x * 1.0).sum().backward()
        with tracker.fork():
            return x.grad, torch.rand(4)

    for ours, plain in zip(grad(checkpointing.checkpoint), grad(plainly), strict=True):
        assert torch.equal(ours, plain)
    states = tracker.get_states()
    checkpointing.model_parallel_reconfigure_tp_seed(99)
    assert not torch.equal(states["model-parallel-rng"], tracker.get_states()["model-parallel-rng"])
    tracker.set_states(states)
    with pytest.raises(EngineStateError, match="taken"):
        tracker.add("model-parallel-rng", 5)
    tracker.reset()
    with pytest.raises(EngineStateError, match="manual_seed"), tracker.fork():
        pass


def test_configuration(unconfigured, tmp_path):
    """The section is read, arguments count more, and what cannot be is said. `profile` logs both passes."""
    assert checkpointing.is_configured()
    config = {
        "train_batch_size": 1,
        "activation_checkpointing": {"profile": True, "cpu_checkpointing": True, "number_checkpoints": 2},
    }
    checkpointing.configure(None, deepspeed_config=config, checkpoint_in_cpu=False)
    settings = checkpointing._settings
    assert (settings.profile, settings.on_host, settings.number) == (True, False, 2)
    with pytest.raises(ConfigError, match="contiguous_checkpointing needs"):
        checkpointing.configure(None, contiguous_checkpointing=True)
    assert checkpointing._settings.profile  # a refused call changes nothing
    checkpointing.configure(None, synchronize=True, profile=True)
    assert torch.equal(gradients(checkpointing.checkpoint)[0], gradients(plainly)[0])
    checkpointing.set_num_layers(3)
    checkpointing.reset()
