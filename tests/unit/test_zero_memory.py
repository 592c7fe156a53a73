"""What each rank's tensors take, at every ZeRO stage, against ZeRO's formulas (arXiv:1910.02054, section 3).

bf16 with Adam needs 16 bytes per parameter: 2 the value, 2 the gradient, 12 the fp32 master and the two moments. On N
ranks stage 1 divides the 12, stage 2 also the gradient's 2, stage 3 all 16. What else is live must be one of the
buffers that `in_flight` names, which are a few *units* (here: a block each), however many units the model has.

Bytes are counted where they are allocated: torch's profiler reports every allocation and release of the CPU allocator,
storages that are resized to nothing and back included. Their running sum is what is live, its maximum the peak.
"""

from __future__ import annotations

import gc
import os
from bisect import bisect_left
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import distributed
from programs import needs
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.profiler import profile, record_function

import deepspeedlite
from deepspeedlite.comm import Group
from deepspeedlite.comm.registry import registry
from deepspeedlite.offload.swap_file import StagingBuffer, SwapFile
from deepspeedlite.sharded_params import building
from deepspeedlite.tools.memory_plan.fit import Training, fit_all
from deepspeedlite.tools.memory_plan.machine import Machine
from deepspeedlite.tools.memory_plan.states import model_states_bytes, ways_of
from deepspeedlite.transports.shared_memory import SharedMemoryLink
from deepspeedlite.zero.flat_params import FlatParams
from deepspeedlite.zero.layout import FlatLayout

WIDTH, HEADS, LAYERS, VOCABULARY, LENGTH = 96, 4, 24, 64, 2  # 2.7 M parameters, of which each block has 4 %
TOLERANCE = 0.02
FP32_BYTES = 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class SmallGPT(nn.Module):
    """Equal blocks between an embedding and a head that weigh little. Tokens to the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), tokens.flatten())


PARAMS = sum(param.numel() for param in SmallGPT().parameters())
BLOCK = sum(param.numel() for param in Block().parameters())


# --- counting -------------------------------------------------------------------------------------------------------


class Phase(NamedTuple):
    """Bytes live before and after something ran, and the most in between."""

    before: int
    peak: int
    after: int


class Live:
    """Counts the bytes that are allocated and released in a `with` block; `phases` is filled when it ends.

    What the ranks of a host share is no business of the allocator: shared memory is counted at both ends of a phase,
    and in its peak as far as it is there throughout.

    It is one profile from end to end: torch's profiler writes to freed memory when a collective that was started under
    one profile is waited for under the next, as a gather ahead of the backward pass would be.
    """

    def __init__(self) -> None:
        self.phases: dict[str, Phase] = {}
        self._shared: dict[str, tuple[int, int]] = {}
        self._profile = profile(profile_memory=True)

    def __enter__(self) -> Live:
        # What an earlier training left must not be freed in the middle of this one: its cycles, and the buffers of the
        # last collectives, which `Group` keeps on gloo.
        gc.collect()
        link()  # made now rather than by the first shards
        for _ in range(registry.kept.maxlen):
            Group().broadcast(torch.zeros(1))  # gloo's own, where a small sum would go through shared memory
        self._profile.__enter__()
        return self

    def during(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call, as the phase of that name."""
        before = shared_bytes()
        try:
            with record_function(f"phase {name}"):
                return call(*arguments)
        finally:
            self._shared[name] = (before, shared_bytes())

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        events = self._profile.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        times = [when for when, _ in changes]
        live = list(accumulate((size for _, size in changes), initial=0))  # live[i]: before change i
        for event in events:
            if event.name().startswith("phase "):
                first = bisect_left(times, event.start_ns())
                last = bisect_left(times, event.start_ns() + event.duration_ns())
                name = event.name().removeprefix("phase ")
                shared = self._shared[name]
                peak = max(live[first : last + 1]) + min(shared)
                self.phases[name] = Phase(live[first] + shared[0], peak, live[last] + shared[1])


def shared_bytes() -> int:
    """Bytes that tensors of this rank have of the memory that it shares."""
    found = link()
    return sum(block.shared_nbytes for block in found._blocks) if found else 0


def reachable_storages() -> dict[int, UntypedStorage]:
    """The distinct storages behind all tensors that Python can reach, by address: another way to count.

    Not those of the blocks through which ranks of one host exchange shards: the allocator does not know them either;
    nor those of parameters, which lie in that of their flat buffer.
    """
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), Tensor) and not isinstance(item, FakeTensor)]
    distinct = {storage._cdata: storage for storage in (item.untyped_storage() for item in tensors)}
    found = link()
    blocks = [*found._maps.values(), *(block.memory for block in found._blocks)] if found else []
    shared = {block.untyped_storage()._cdata for block in blocks}
    flat = [owner.values.untyped_storage() for owner in gc.get_objects() if type(owner) is FlatParams]
    inside = [(values.data_ptr(), values.data_ptr() + values.nbytes(), values._cdata) for values in flat]
    return {
        key: storage
        for key, storage in distinct.items()
        if key not in shared
        and not any(start <= storage.data_ptr() < stop and key != whole for start, stop, whole in inside)
    }


def link() -> SharedMemoryLink | None:
    """The link between the ranks of this host."""
    many = dist.is_initialized() and dist.get_world_size() > 1
    return Group().transport.link if many else None


def tokens(step: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(step))


def config(stage: int, dtype: str = "bf16", **more: Any) -> dict[str, Any]:
    """Units are blocks at every stage; stage 3 gathers one block ahead and keeps none that was used."""
    zero = {"stage": stage, "reduce_bucket_size": BLOCK, "sub_group_size": BLOCK, **more}
    if stage == 3:
        shapes = [(name, param.shape, 0) for name, param in Block().named_parameters()]
        one_block = FlatLayout(shapes, dist.get_world_size()).numel
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
        zero |= {"stage3_prefetch_bucket_size": one_block}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0,
        "bf16": {"enabled": dtype == "bf16"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": zero,
    }


def train(settings: dict[str, Any], steps: int = 3) -> tuple[Any, dict[str, Phase]]:
    """Some steps (from the second on the order of use is known): the engine and what was live when.

    The phases are build, initialize, and of each step N: "forward N", "backward N", "step N" and "idle N" after it.
    """
    with Live() as live:
        model = live.during("build", SmallGPT)
        engine, *_ = live.during("initialize", lambda: deepspeedlite.initialize(model=model, config=settings))
        for step in range(steps):
            loss = live.during(f"forward {step}", engine, tokens(step))
            live.during(f"backward {step}", engine.backward, loss)
            live.during(f"step {step}", engine.step)
            del loss
            live.during(f"idle {step}", lambda: None)
    return engine, live.phases


def activation_bytes(dtype: torch.dtype) -> int:
    """What the same passes need beside parameters and gradients in plain torch: activations and one fresh gradient."""
    model = SmallGPT().to(dtype)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    with Live() as live:
        live.during("passes", lambda: model(tokens(0)).backward())
    return live.phases["passes"].peak


# --- what it should be ----------------------------------------------------------------------------------------------


def states_bytes(stage: int, ranks: int) -> float:
    """ZeRO's formula for bf16 and Adam."""
    return {1: 4 * PARAMS + 12 * PARAMS / ranks, 2: 2 * PARAMS + 14 * PARAMS / ranks, 3: 16 * PARAMS / ranks}[stage]


class InFlight(NamedTuple):
    """Whole units in bytes beside the states."""

    forward: float
    backward: float
    step: float
    shared: float


def in_flight(engine: Any, stage: int, ranks: int) -> InFlight:
    """The stated buffers, from the units themselves.

    A unit's whole *values* (stage 3): the block that computes and the one gathered ahead. The step takes gradients to
    fp32 for one sub-group at a time: `sub_group_size` elements, one block's. In memory that the ranks share, which the
    allocator does not know: a unit's whole *gradient* (stages 2 and 3), the one being filled and three whose reduction
    was started, of which the first is then waited for; and messages of a shard to each other rank, three at a time,
    in blocks of two sizes.
    """
    units = engine._reducer.units
    unit = max(unit.layout.numel * unit.flat.dtype.itemsize for unit in units)
    values = 2 * unit if stage == 3 else 0
    gradients = 4 * unit if stage >= 2 else 0
    return InFlight(values, values, FP32_BYTES * BLOCK, gradients + 6 * unit * (ranks - 1) / ranks)


def assert_within(found: float, expected: float, what: str) -> None:
    off = found / expected - 1
    assert abs(off) <= TOLERANCE, f"{what}: {found:,.0f} bytes, {off:+.1%} from {expected:,.0f}"


# --- the tests ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(world_size=[2, 4])
def test_states_are_what_the_formulas_say(stage, world_size):
    before = reachable_storages()  # kept, so that what an earlier test left is not taken off what this one adds
    activations = activation_bytes(torch.bfloat16)
    engine, phases = train(config(stage))
    states = states_bytes(stage, world_size)
    assert len(engine._reducer.units) >= LAYERS, "units must be small beside the model, or the buffers hide the states"

    moments = 8 * PARAMS / world_size  # the optimizer makes them in its first step
    assert_within(phases["initialize"].after, states - moments, "after initialize")
    for step in range(3):
        assert_within(phases[f"idle {step}"].after, states, f"after step {step}")
    assert phases["idle 1"] == phases["idle 2"], "something piles up from step to step"
    added = [storage for key, storage in reachable_storages().items() if key not in before]
    assert_within(sum(storage.nbytes() for storage in added), phases["idle 2"].after, "counted from Python")
    extra = in_flight(engine, stage, world_size)
    assert 0 < link().held_nbytes - shared_bytes() <= extra.shared
    for what, allowed in (
        ("forward 2", extra.forward + activations),
        ("backward 2", extra.backward + activations),
        ("step 2", extra.step),
    ):
        found = phases[what].peak
        assert found >= (1 - TOLERANCE) * states, f"{what} cannot do with less than the states"
        assert found <= (1 + TOLERANCE) * states + allowed, (
            f"peak of {what}: {found - states:,.0f} bytes above the states, of which {allowed:,.0f} were stated"
        )


@pytest.mark.slow_unless(stage=3)
@pytest.mark.parametrize("stage", [1, 2, 3])
@distributed(world_size=2)
def test_initialize_peaks_at_the_model_as_it_was_given(stage):
    """The fp32 model is 4 bytes per parameter. What is built takes its place piece by piece, not beside it."""
    engine, phases = train(config(stage), steps=0)
    unit = max(unit.layout.numel for unit in engine._reducer.units)
    begin, peak, ready = phases["initialize"]
    assert begin == FP32_BYTES * PARAMS
    assert peak <= (1 + TOLERANCE) * max(begin, ready) + 3 * FP32_BYTES * unit


@pytest.mark.slow
@distributed(world_size=[2, 4])
def test_zero_init_never_holds_the_whole_model(world_size):
    """Each layer is cut as soon as it is built, and `initialize` moves shards, unit by unit."""

    def build() -> nn.Module:
        with deepspeedlite.zero.Init(config_dict_or_path=config(3)):
            return SmallGPT()

    small = mock.patch.object(building, "RESHARD_FROM_NUMEL", 1)  # modules as small as these wait for others
    with small, Live() as live:
        model = live.during("build", build)
        engine, *_ = live.during("initialize", lambda: deepspeedlite.initialize(model=model, config=config(3)))
    four_blocks = 4 * 2 * BLOCK
    built, ready = live.phases["build"], live.phases["initialize"]
    assert_within(built.after, 2 * PARAMS / world_size, "the shards of a model that was built in zero.Init")
    assert built.peak <= built.after + four_blocks
    assert_within(ready.after, states_bytes(3, world_size) - 8 * PARAMS / world_size, "after initialize")
    assert ready.peak <= ready.after + four_blocks
    assert engine.zero_optimization_stage() == 3


@pytest.mark.slow_unless(stage=2, dtype="bf16")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@distributed(world_size=2)
def test_the_estimate_is_right(stage, dtype, world_size):
    """`model_states_bytes` is what is live after a step; fp32 trains its parameters in place, with no second copy."""
    _, phases = train(config(stage, dtype), steps=1)
    estimate = model_states_bytes(PARAMS, BLOCK, gpus=world_size, dtype=dtype, stage=stage)
    assert_within(phases["idle 0"].after, estimate.gpu_bytes, f"stage {stage}, {dtype}")
    # A host with just so much memory trains just such a model, for all that `--fit` knows.
    room = world_size * (phases["idle 0"].after + estimate.layer_bytes)
    host = Machine("cpu", 0, 0, room, 0, 1, 1, 1, 1, 0, 0, "")
    fits = fit_all(Training(world_size, 1, dtype, 1, LAYERS, LENGTH, 1), host)
    largest = next(fit.params for fit in fits if fit.states[:2] == (stage, "none"))
    assert_within(largest, PARAMS, f"the largest model at stage {stage}, {dtype}")


@needs("c++")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("stage, offload", [way for way in ways_of() if way[1] != "none"])
@distributed(world_size=2)
def test_the_estimate_is_right_for_every_offload(stage, offload, dtype, world_size, tmp_path):
    """In memory and on the disk. On CPU ranks a GPU's memory is the host's, and fp32 needs no masters for the step."""
    tier, what = offload.split("_")
    section = {"device": tier} if tier == "cpu" else {"device": tier, "nvme_path": str(tmp_path), "buffer_count": 1}
    sections = {"offload_optimizer": section}
    if what == "all":
        sections["offload_param"] = {**section, "max_in_cpu": 0}
    engine, phases = train(config(stage, dtype, **sections), steps=2)
    estimate = model_states_bytes(PARAMS, BLOCK, gpus=world_size, dtype=dtype, stage=stage, offload=offload)
    expected = {"memory": estimate.gpu_bytes + estimate.host_bytes / world_size, "disk": estimate.nvme_bytes}
    if dtype == "fp32" and what == "optimizer":
        expected["memory" if tier == "cpu" else "disk"] -= FP32_BYTES * PARAMS / (world_size if tier == "cpu" else 1)
    disk = engine.optimizer._offload.swap_file
    found = {"memory": phases["idle 1"].after - staging_bytes(disk)}
    found["disk"] = 512 * os.stat(disk.path).st_blocks * world_size if disk else 0
    for where, nbytes in expected.items():
        assert abs(found[where] - nbytes) <= 0.02 * nbytes, (where, found, expected)


def staging_bytes(disk: SwapFile | None) -> int:
    """What the staging buffers of a disk take, which tensors pass through: no states."""
    gc.collect()
    buffers = [item for item in gc.get_objects() if type(item) is StagingBuffer and item._swap_file is disk]
    return sum(buffer._memory.untyped_storage().nbytes() for buffer in buffers)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@distributed(world_size=2)
def test_accumulation_keeps_only_shards(stage):
    """Between the micro-batches of a window each rank holds its shard of the gradients, and no whole unit."""
    model = SmallGPT()
    settings = {**config(stage), "gradient_accumulation_steps": 3}

    with Live() as live:
        engine, *_ = live.during("initialize", lambda: deepspeedlite.initialize(model=model, config=settings))

        def micro_batch(number: int) -> None:
            engine.backward(engine(tokens(number)))
            engine.step()

        for number in range(9):
            live.during(f"micro-batch {number}", micro_batch, number)
    for number in range(9):
        before, _, after = live.phases[f"micro-batch {number}"]
        makes_moments = number == 2
        assert makes_moments or after - before < 64, f"micro-batch {number} left {after - before:,} bytes behind"


@distributed(world_size=2)
def test_evaluation_leaves_nothing_whole():
    """A forward pass without gradients gathers block by block and holds nothing afterwards."""
    engine, *_ = deepspeedlite.initialize(model=SmallGPT(), config=config(3))
    with Live() as live, torch.no_grad():
        loss = live.during("evaluation", engine, tokens(0))
    evaluation = live.phases["evaluation"]
    assert evaluation.after - evaluation.before == loss.untyped_storage().nbytes()
    unit = max(unit.layout.numel * unit.flat.dtype.itemsize for unit in engine._reducer.units)
    assert unit < evaluation.peak < 3 * unit


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [4, 1000])
@distributed(world_size=2)
def test_sub_group_size_bounds_the_fp32_gradients_of_a_step(blocks, world_size):
    """It counts elements of this rank, and a sub-group is made of whole units' shards. torch's Adam needs them."""
    settings = config(2, sub_group_size=blocks * BLOCK)
    settings["optimizer"]["params"]["torch_adam"] = True
    engine, phases = train(settings, steps=2)
    most = FP32_BYTES * min(blocks * BLOCK, PARAMS / world_size)
    last_unit = FP32_BYTES * max(unit.layout.shard_numel for unit in engine._reducer.units)
    found = phases["step 1"].peak - phases["idle 1"].after
    assert most - last_unit <= found <= (1 + TOLERANCE) * most
