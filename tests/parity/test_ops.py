"""Compiled ops: every instruction set against float64, the optimizer against torch's, and builds that go wrong."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from harness import distributed
from paths import BOOT, ROOT
from programs import needs
from torch import Tensor

import deepspeedlite
from deepspeedlite.ops import load
from deepspeedlite.ops.adam import Adam, DeepSpeedCPUAdam, adam_in_torch
from deepspeedlite.ops.one_pass import OnePassUpdate
from deepspeedlite.ops.op_builder import OPS, OpBuildError, built, jit
from deepspeedlite.ops.op_builder.toolchain import Toolchain
from deepspeedlite.runtime.errors import OptimizerError

SIZES = (0, 1, 15, 1023, 1024, 1025, 40_000)  # around a vector, a tile and a block of one thread
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HOW = Adam(3, 1e-2, 0.9, 0.95, 1e-8, 0.1, 0.5)


def tensors(numel: int, grad: torch.dtype, state: torch.dtype, param: torch.dtype = torch.float32) -> list[Tensor]:
    """A parameter, a gradient, both moments and AMSGrad's maximum; unaligned views, as shards are."""
    generator = torch.Generator().manual_seed(numel)

    def make(dtype: torch.dtype, scale: float, positive: bool = False) -> Tensor:
        values = torch.randn(numel + 1, generator=generator) * scale
        return (values.abs() if positive else values).to(dtype)[1:]

    moments = [make(state, 1e-2), make(state, 1e-4, True), make(state, 1e-4, True)]
    return [make(param, 1.0), make(grad, 1e-1), *moments]


def run(apply, values: list[Tensor], how: Adam, amsgrad: bool, copy: Tensor | None) -> None:
    param, grad, exp_avg, exp_avg_sq, most = values
    copies = [] if copy is None else [copy]
    apply([param], [grad], [exp_avg], [exp_avg_sq], [most] if amsgrad else [], copies, *how)


def check_against_float64(how: Adam, grad: torch.dtype, state: torch.dtype, copy: torch.dtype, amsgrad: bool) -> None:
    for numel in SIZES:
        ours = tensors(numel, grad, state)
        exact = [value.double() for value in ours]
        copied = torch.empty(numel + 1, dtype=copy)[1:]
        run(load("cpu_adam"), ours, how, amsgrad, copied)
        run(adam_in_torch, exact, how, amsgrad, None)
        names = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        for name, found, expected in zip(names, ours, exact):
            rounding = max(torch.finfo(found.dtype).eps, 1e-6)
            # Where numbers cancel, the error is relative to those that did: parameters and gradients of about 1.
            torch.testing.assert_close(
                found.double(), expected, rtol=4 * rounding, atol=rounding * (1e-2 if "exp" in name else 4), msg=name
            )
        assert torch.equal(copied, ours[0].to(copy))


@needs("c++")
@pytest.mark.slow_unless(state=torch.float32, amsgrad=True)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", DTYPES)
def test_adam_is_that_of_float64(grad, state, amsgrad):
    for how in (HOW, HOW._replace(decoupled=False), HOW._replace(bias_correction=False, weight_decay=0.0)):
        check_against_float64(how, grad, state, grad, amsgrad)


CHECK_ONE_ISA = f"""
{BOOT}
import torch, test_ops
for grad in test_ops.DTYPES:
    test_ops.check_against_float64(test_ops.HOW, grad, torch.float32, grad, False)
    test_ops.test_every_16_bit_number_is_widened_and_narrowed_as_torch_does()
print("good")
"""


@needs("c++")
@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_does_the_same(isa):
    """A better one than the processor has is not taken, so this passes, for less, on an old processor."""
    environment = {**os.environ, "DEEPSPEEDLITE_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", CHECK_ONE_ISA], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.strip() == "good", done.stderr


@needs("c++")
def test_every_16_bit_number_is_widened_and_narrowed_as_torch_does():
    """With lr = beta = 0 the first moment is the gradient, and a copy of an unchanged parameter its rounding."""
    still = Adam(1, 0.0, 0.0, 0.0, 1.0, 0.0)
    everything = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        grad, zeros = everything.view(dtype), torch.zeros(65536)
        exp_avg = zeros.clone()
        load("cpu_adam")([zeros.clone()], [grad], [exp_avg], [zeros.clone()], [], [], *still)
        same = (exp_avg == grad.float()) | (grad.isnan() & exp_avg.isnan())
        assert same.all(), grad[~same]

        # Every 16-bit number, halfway to the next one, and a hair beside that.
        middle = (
            everything.view(dtype).float().view(torch.int32) + (1 << (12 if dtype == torch.float16 else 15))
        ).view(torch.float32)
        tiny = torch.tensor([1e-8, 2**-25, 2**-24, 1.5 * 2**-24, 65519.99, 65520.0, 3e38, 1e-45])
        hair = (middle.view(torch.int32) + 1).view(torch.float32)
        for param in (everything.view(dtype).float(), middle, hair, tiny, -tiny):
            before, copy = param.clone(), torch.empty(param.numel(), dtype=dtype)
            nothing = [torch.zeros(param.numel()) for _ in range(3)]
            load("cpu_adam")([param], [nothing[0]], [nothing[1]], [nothing[2]], [], [copy], *still)
            expected = before.to(dtype)
            same = (copy.view(torch.int16) == expected.view(torch.int16)) | (copy.isnan() & expected.isnan())
            assert same.all(), (before[~same][:5], copy[~same][:5], expected[~same][:5])


@needs("c++")
def test_the_number_of_threads_changes_nothing():
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        values = tensors(200_001, torch.bfloat16, torch.float32)
        run(load("cpu_adam"), values, HOW, False, None)
        results.append(values[0])
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs("c++")
def test_what_is_not_finite_stays_where_it_is():
    for bad in (float("nan"), float("inf")):
        values = tensors(2048, torch.float32, torch.float32)
        values[1][777] = bad
        run(load("cpu_adam"), values, HOW, True, None)
        assert (~values[0].isfinite()).nonzero().flatten().tolist() == [777]
        assert not values[4][777].isfinite(), "AMSGrad's maximum does not hide it"


@needs("c++")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.__setitem__(1, torch.zeros(9)), r"grads\[0\] has 9 elements, its parameter 10"),
        (lambda v: v.__setitem__(2, torch.zeros(20)[::2]), r"exp_avgs\[0\] is not contiguous"),
        (lambda v: v.__setitem__(0, torch.zeros(10, dtype=torch.float64)), r"params\[0\] must be float32, bfloat16"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(change, message):
    values = tensors(10, torch.float32, torch.float32)
    change(values)
    with pytest.raises(RuntimeError, match=message):
        run(load("cpu_adam"), values, HOW, False, None)


# --- the optimizer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("adamw", [False, True])
def test_it_trains_as_torchs_does_and_takes_its_state(adamw, amsgrad):
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((7, 5), (11,), (0,))]
    theirs = [torch.nn.Parameter(param.detach().clone()) for param in ours]
    options = {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": amsgrad}
    mine = DeepSpeedCPUAdam(ours, adamw_mode=adamw, **options)
    reference = (torch.optim.AdamW if adamw else torch.optim.Adam)(theirs, **options)
    for step in range(6):
        if step == 3:  # each goes on from the other's state
            state, other = reference.state_dict(), copy.deepcopy(mine).state_dict()
            mine.load_state_dict(state)
            reference.load_state_dict(other)
        for param, other in zip(ours, theirs):
            param.grad = torch.randn_like(param)
            other.grad = param.grad.clone()
        mine.step()
        reference.step()
    for param, other in zip(ours, theirs):
        torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-6)


def test_one_pass_scales_the_gradient_and_writes_the_copy():
    master, grad = torch.nn.Parameter(torch.randn(1000)), torch.randn(1000).bfloat16()
    copy = torch.empty(1000, dtype=torch.bfloat16)
    other = torch.nn.Parameter(master.detach().clone())
    optimizer = DeepSpeedCPUAdam([master])
    optimizer.hand_over([OnePassUpdate(master, grad, copy)], grad_scale=0.25)
    optimizer.step()
    reference = torch.optim.AdamW([other], weight_decay=0.0)
    other.grad = grad.float() * 0.25
    reference.step()
    torch.testing.assert_close(master, other, rtol=1e-6, atol=1e-6)
    assert torch.equal(copy, master.detach().bfloat16())


def train_engine(prepare=lambda optimizer: None) -> list[Tensor]:
    """A few bf16 steps through an engine, after which the weights; `prepare` gets the inner optimizer first."""
    torch.manual_seed(0)
    config = {"train_batch_size": 1, "bf16": {"enabled": True}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}}
    engine, *_ = deepspeedlite.initialize(model=torch.nn.Linear(30, 20), config=config)
    prepare(engine.optimizer.optimizer)
    for _ in range(3):
        engine.backward(engine(torch.ones(1, 30, dtype=torch.bfloat16)).float().square().sum())
        engine.step()
    return [param.detach().clone() for param in engine.module.parameters()]


@distributed(world_size=1)
def test_hooks_on_the_optimizer_and_a_scheduler_around_it_see_every_step():
    """Hooks find the gradients on the parameters; torch's schedulers count calls of `step`."""
    seen: list[bool] = []
    schedulers: list[torch.optim.lr_scheduler.LambdaLR] = []

    def watch(optimizer):
        optimizer.register_step_pre_hook(
            lambda *_: seen.append(optimizer.param_groups[0]["params"][0].grad is not None)
        )

    def schedule(optimizer):
        schedulers.append(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))

    with warnings.catch_warnings(record=True) as warned:
        plain, watched, scheduled = train_engine(), train_engine(watch), train_engine(schedule)
        schedulers[0].step()
    assert seen == [True] * 3
    for one, *others in zip(plain, watched, scheduled):
        assert all(torch.equal(one, other) for other in others)
    assert not [str(w.message) for w in warned if "lr_scheduler.step()" in str(w.message)]


def test_a_sparse_gradient_is_refused():
    table = torch.nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(OptimizerError, match=r"shape \(5, 3\).*sparse"):
        DeepSpeedCPUAdam(table.parameters()).step()


@needs("c++")
@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, DeepSpeedCPUAdam),
        ({"torch_adam": True}, torch.optim.AdamW),
        ({"fused": True}, torch.optim.AdamW),
        ({"maximize": True}, torch.optim.AdamW),
    ],
)
@distributed(world_size=1)
def test_a_configuration_gets_the_op_unless_it_asks_for_torchs(params, expected):
    config = {"train_batch_size": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, **params}}}
    engine, *_ = deepspeedlite.initialize(model=torch.nn.Linear(3, 2), config=config)
    assert type(engine.optimizer.optimizer) is expected


# --- building -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cold(tmp_path, monkeypatch):
    """A cache in which nothing is compiled yet."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path / "deepspeedlite"


BUILD = "from deepspeedlite.ops import op_builder as b; print(b.built(b.OPS['cpu_adam']))"


def start_building() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", BUILD], cwd=ROOT, stdout=subprocess.PIPE, text=True)


@needs("c++")
@pytest.mark.slow
def test_two_that_start_at_once_compile_once_and_a_killed_one_leaves_no_lock(cold, monkeypatch):
    monkeypatch.setenv("CCACHE_DISABLE", "1")  # else it may be done before it is killed
    killed = start_building()
    while not list(cold.glob("*.tmp")):
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert list(cold.glob("*.lock")) and list(cold.glob("*.tmp"))

    both = [start_building() for _ in range(2)]
    paths = {process.communicate(timeout=120)[0].strip() for process in both}
    assert len(paths) == 1 and Path(paths.pop()).parent == cold
    assert len(list(cold.glob("*.so"))) == 1 and not list(cold.glob("*.tmp"))
    started_s = time.perf_counter()
    built(OPS["cpu_adam"])
    assert time.perf_counter() - started_s < 1, "nothing is compiled again"


@needs("c++")
@pytest.mark.slow
def test_a_compile_error_shows_the_first_error_and_the_command(cold, tmp_path, monkeypatch):
    sources = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    kernel = sources / "cpu_optim" / "adam_kernel.cpp"
    kernel.write_text(kernel.read_text() + "\nint broken = nonsense;\n")
    monkeypatch.setattr(jit, "csrc", lambda: sources)
    with pytest.raises(OpBuildError, match=r"(?s)cpu_adam does not compile: .*nonsense.*\n  .*-c .*adam_kernel\.cpp"):
        built(OPS["cpu_adam"])
    assert not list(cold.glob("*.tmp")) and not list(cold.glob("*.so"))


@needs("c++")
def test_the_name_depends_on_sources_and_compiler(tmp_path, monkeypatch):
    spec = OPS["cpu_adam"]
    toolchain = Toolchain.find(spec)
    before = jit._key(spec, toolchain)
    compiler = tmp_path / "c++"
    compiler.write_text("another compiler")
    assert jit._key(spec, Toolchain(compiler, toolchain.torch)) != before
    sources = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    monkeypatch.setattr(jit, "csrc", lambda: sources)
    assert jit._key(spec, toolchain) == before, "where the sources lie does not matter"
    header = sources / "common" / "tile.h"
    header.write_text(header.read_text() + "\n")
    assert jit._key(spec, toolchain) != before


WITHOUT_COMPILER = """
import sys, torch, deepspeedlite
config = {"train_batch_size": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
engine, *_ = deepspeedlite.initialize(model=torch.nn.Linear(3, 2), config=config)
from deepspeedlite.ops.adam import DeepSpeedCPUAdam
weight = torch.nn.Parameter(torch.ones(3)); weight.grad = torch.ones(3)
DeepSpeedCPUAdam([weight], lr=0.5).step()
print(type(engine.optimizer.optimizer).__name__, [round(w, 5) for w in weight.tolist()])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("variable", "value", "reason"), [
    ("CXX", "/no/such/compiler", "CXX=/no/such/compiler is not"),
    pytest.param("TORCH_EXTENSIONS_DIR", "/dev/null/x", "writ", marks=needs("c++")),
])  # fmt: skip
def test_without_it_torch_does_the_work_and_the_reason_is_said(variable, value, reason, tmp_path):
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), variable: value}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.strip().splitlines()[-1] == "AdamW [0.5, 0.5, 0.5]", done.stderr
    assert reason in done.stdout + done.stderr
