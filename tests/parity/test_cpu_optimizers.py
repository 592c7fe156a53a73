"""Lion and Adagrad on the CPU: their ops against float64 on every instruction set, their optimizers against torch's."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from harness import distributed
from paths import BOOT, ROOT
from programs import needs, program
from torch import Tensor

import deepspeedlite
from deepspeedlite.ops import load
from deepspeedlite.ops.adagrad import DeepSpeedCPUAdagrad, adagrad_in_torch
from deepspeedlite.ops.adam import Adam, adam_in_torch
from deepspeedlite.ops.lion import DeepSpeedCPULion, FusedLion, lion_in_torch
from deepspeedlite.ops.one_pass import OnePassUpdate
from deepspeedlite.runtime.errors import OptimizerError, UnsupportedError

pytestmark = needs("c++")
SIZES = (0, 1, 15, 1023, 1024, 1025, 40_000)  # around a vector, a tile and a block of one thread
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Rule(NamedTuple):
    """An op with one state, what it does in torch, its numbers, and the optimizers made of both."""

    op: str
    in_torch: Any
    numbers: tuple[float, ...]
    optimizer: Any
    reference: Any
    options: dict[str, float]


RULES = {
    "lion": Rule(
        "cpu_lion",
        lambda *lists_and_numbers: lion_in_torch(*lists_and_numbers[:4], None, None, None, *lists_and_numbers[4:]),
        (1e-2, 0.9, 0.99, 0.1, 0.5),
        DeepSpeedCPULion,
        FusedLion,
        {"lr": 1e-2},
    ),
    "adagrad": Rule(
        "cpu_adagrad", adagrad_in_torch, (1e-2, 1e-10, 0.1, 0.5), DeepSpeedCPUAdagrad, torch.optim.Adagrad, {"lr": 1e-2}
    ),
}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def tensors(numel: int, grad: torch.dtype, state: torch.dtype, param: torch.dtype = torch.float32) -> list[Tensor]:
    """A parameter, a gradient and a state that is not negative; unaligned views, as shards are."""
    generator = torch.Generator().manual_seed(numel)
    made = [torch.randn(numel + 1, generator=generator) * scale for scale in (1.0, 1e-1, 1e-2)]
    return [values.to(dtype)[1:] for values, dtype in zip((*made[:2], made[2].abs()), (param, grad, state))]


def apply(call: Any, values: list[Tensor], numbers: tuple[float, ...], copies: list[Tensor]) -> None:
    call(*([value] for value in values), copies, *numbers)


def check_against_float64(rule: Rule, grad: torch.dtype, state: torch.dtype, param: torch.dtype) -> None:
    for numel in SIZES:
        ours = tensors(numel, grad, state, param)
        exact = [value.double() for value in ours]
        copied = torch.empty(numel + 1, dtype=grad)[1:]
        apply(load(rule.op), ours, rule.numbers, [copied])
        start, lion = exact[2] + 0.1 * (0.5 * exact[1] - exact[2]), rule.op == "cpu_lion"
        even = (start.abs() < 1e-7) & lion  # too near to no direction at all: rounding decides the sign
        apply(rule.in_torch, exact, rule.numbers, [])
        ours[0][even] = exact[0][even].to(param)
        copied[even] = ours[0][even].to(grad)
        for found, expected in zip(ours, exact):
            rounding = max(torch.finfo(found.dtype).eps, 1e-6)
            torch.testing.assert_close(found.double(), expected, rtol=4 * rounding, atol=rounding)
        if param is torch.float32:
            assert torch.equal(copied, ours[0].to(grad))


@each_rule
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", DTYPES)
def test_it_is_that_of_float64(rule, grad, state):
    check_against_float64(rule, grad, state, torch.float32)


@each_rule
@pytest.mark.parametrize("param", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_are_stepped_in_fp32(rule, param):
    check_against_float64(rule, param, torch.float32, param)


CHECK_ONE_ISA = f"""
{BOOT}
import torch, test_cpu_optimizers as t
for rule in t.RULES.values():
    for grad in t.DTYPES:
        t.check_against_float64(rule, grad, torch.float32, torch.float32)
print("good")
"""


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_does_the_same(isa):
    environment = {**os.environ, "DEEPSPEEDLITE_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", CHECK_ONE_ISA], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.strip() == "good", done.stderr


@each_rule
def test_the_number_of_threads_changes_nothing(rule):
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        values = tensors(200_001, torch.bfloat16, torch.float32)
        apply(load(rule.op), values, rule.numbers, [])
        results.append(values[0])
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@each_rule
def test_what_is_not_finite_stays_where_it_is(rule):
    values = tensors(2048, torch.float32, torch.float32)
    values[1][777] = float("nan")
    apply(load(rule.op), values, rule.numbers, [])
    for value in (values[0], values[2]):
        assert (~value.isfinite()).nonzero().flatten().tolist() == [777]


def test_lion_does_not_move_where_there_is_no_direction():
    param, zeros = torch.ones(5), torch.zeros(5)
    load("cpu_lion")([param], [zeros], [zeros.clone()], [], 0.1, 0.9, 0.99, 0.0, 1.0)
    assert torch.equal(param, torch.ones(5))


@each_rule
@pytest.mark.parametrize(
    ("which", "value", "message"),
    [
        (1, torch.zeros(9), r"grads\[0\] has 9 elements, its parameter 10"),
        (2, torch.zeros(20)[::2], r"\[0\] is not contiguous"),
        (0, torch.zeros(10, dtype=torch.float64), r"params\[0\] must be float32, bfloat16"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(rule, which, value, message):
    values = tensors(10, torch.float32, torch.float32)
    values[which] = value
    with pytest.raises(RuntimeError, match=f"{rule.op}: .*{message}"):
        apply(load(rule.op), values, rule.numbers, [])


@pytest.mark.slow
def test_torchs_own_checks_of_an_op_pass():
    """Schema, aliasing, fake tensors and dispatch, for all ops of the CPU."""
    for rule in RULES.values():
        values = tensors(10, torch.float32, torch.float32)
        torch.library.opcheck(load(rule.op).default, (*([v] for v in values), [torch.empty(10)], *rule.numbers))
    values = tensors(10, torch.float32, torch.float32)
    how = Adam(3, 1e-2, 0.9, 0.95, 1e-8, 0.1, 0.5)
    state = [values[2].clone()]
    torch.library.opcheck(load("cpu_adam").default, (*([v] for v in values), state, [], [torch.empty(10)], *how))


@pytest.mark.slow
def test_more_elements_than_32_bits_count():
    """Rows of one tensor that is as large as that; what is read alone is the same few numbers over and over."""
    numel = (1 << 31) + 5
    param = torch.zeros(numel, dtype=torch.bfloat16)  # 4 GiB, of which only what is written takes memory
    grad = param  # adds nothing: both are zero, and a step of zero writes zero
    param[-1] = 1.0
    load("cpu_adagrad")([param], [grad], [param], [], 0.5, 0.0, 0.0, 1.0)
    # One tensor in three roles, each written after the next: what is left at the end is sum = 1 + 1 * 1.
    assert param[-1].item() == 2.0


@each_rule
def test_it_trains_as_the_reference_does_and_takes_its_state(rule):
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((7, 5), (11,), (0,))]
    theirs = [torch.nn.Parameter(param.detach().clone()) for param in ours]
    betas = {"betas": (0.9, 0.99)} if rule.optimizer is DeepSpeedCPULion else {}
    mine = rule.optimizer(ours, weight_decay=0.1, **rule.options, **betas)
    reference = rule.reference(theirs, weight_decay=0.1, **rule.options, **betas)
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


@each_rule
def test_one_pass_scales_the_gradient_and_writes_the_copy(rule):
    master, grad = torch.nn.Parameter(torch.randn(1000)), torch.randn(1000).bfloat16()
    copied = torch.empty(1000, dtype=torch.bfloat16)
    other = torch.nn.Parameter(master.detach().clone())
    optimizer, reference = rule.optimizer([master], **rule.options), rule.optimizer([other], **rule.options)
    optimizer.hand_over([OnePassUpdate(master, grad, copied)], grad_scale=0.25)
    optimizer.step()
    other.grad = grad.float() * 0.25
    reference.step()
    assert torch.equal(master, other)
    assert torch.equal(copied, master.detach().bfloat16())


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        ("Lion", {}, FusedLion),
        ("Adagrad", {}, DeepSpeedCPUAdagrad),
        ("Adagrad", {"lr_decay": 0.1}, torch.optim.Adagrad),
        ("Adagrad", {"foreach": True}, torch.optim.Adagrad),
    ],
)
@distributed(world_size=1)
def test_a_configuration_gets_the_op_unless_it_asks_for_what_the_op_has_not(name, params, expected):
    config = {"train_batch_size": 1, "optimizer": {"type": name, "params": {"lr": 1e-3, **params}}}
    engine, *_ = deepspeedlite.initialize(model=torch.nn.Linear(3, 2), config=config)
    assert type(engine.optimizer.optimizer) is expected


@each_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_the_op_torch_does_the_same(rule, dtype, monkeypatch):
    results = []
    for available in (True, False):
        if not available:
            monkeypatch.setattr(sys.modules[rule.optimizer.__module__], "is_available", lambda op: False)
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(300).to(dtype))
        optimizer = rule.optimizer([weight], weight_decay=0.1, **rule.options)
        for _ in range(3):
            weight.grad = torch.randn(300).to(dtype)
            optimizer.step()
        results.append(weight.detach().float())
    torch.testing.assert_close(*results, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_what_they_are_not_made_for_is_refused():
    weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(UnsupportedError, match="amsgrad"):
        DeepSpeedCPUAdagrad([weight], amsgrad=True)
    with pytest.raises(OptimizerError, match="betas must be two numbers"):
        DeepSpeedCPULion([weight], betas=(0.9, 1.0))
    table = torch.nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(OptimizerError, match=r"shape \(5, 3\).*sparse"):
        DeepSpeedCPULion(table.parameters()).step()


# --- another kind of processor ----------------------------------------------------------------------------------------

ON_ARM = """
#include <cstdio>
#include "cpu_optim/adam.h"
// 4 fp32 tensors of N elements and a bf16 gradient come in, param, moments and an fp16 copy go out.
static float param[N], exp_avg[N], exp_avg_sq[N];
static unsigned short grad[N], copy[N];
template <class T> void in(T& array) { if (std::fread(array, sizeof array, 1, stdin) != 1) __builtin_abort(); }
template <class T> void out(const T& array) { std::fwrite(array, sizeof array, 1, stdout); }
int main() {
    in(param), in(exp_avg), in(exp_avg_sq), in(grad);
    const dsl_adam_run run{{param, DSL_FP32}, {grad, DSL_BF16}, {exp_avg, DSL_FP32}, {exp_avg_sq, DSL_FP32},
                           {nullptr, DSL_FP32}, {copy, DSL_FP16}};
    const dsl_adam_step how = dsl::Adam{1e-2, 0.9, 0.95, 1e-8, 0.1, 0.5, true, true}.at(3);
    dsl_adam_baseline(&run, &how, 0, N);
    out(param), out(exp_avg), out(exp_avg_sq), out(copy);
}
"""


@pytest.mark.slow
def test_adam_does_the_same_on_aarch64(tmp_path):
    """The plain loops become NEON there. Compiled by a cross compiler and run by an emulator."""
    compiler, emulator = program("aarch64-linux-gnu-g++"), program("qemu-aarch64-static")
    numel = 3001
    (tmp_path / "main.cpp").write_text(ON_ARM)
    flags = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-static", f"-DN={numel}", f"-I{ROOT}/csrc"]
    sources = [tmp_path / "main.cpp", ROOT / "csrc/cpu_optim/adam_kernel.cpp"]
    subprocess.run([compiler, *flags, *sources, "-o", tmp_path / "adam"], check=True)
    param, grad, exp_avg = tensors(numel, torch.bfloat16, torch.float32)
    exp_avg_sq = exp_avg.abs().clone()
    given = b"".join(bytes(t.contiguous().view(torch.uint8).numpy()) for t in (param, exp_avg, exp_avg_sq, grad))
    done = subprocess.run([emulator, tmp_path / "adam"], input=given, capture_output=True, check=True)
    exact = [tensor.double() for tensor in (param, grad, exp_avg, exp_avg_sq)]
    adam_in_torch(*([tensor] for tensor in exact), [], [], *Adam(3, 1e-2, 0.9, 0.95, 1e-8, 0.1, 0.5))
    out = torch.frombuffer(bytearray(done.stdout[: 12 * numel]), dtype=torch.float32).view(3, numel)
    for found, expected in zip(out, (exact[0], exact[2], exact[3])):
        torch.testing.assert_close(found.double(), expected, rtol=4e-6, atol=4e-6)
    copied = torch.frombuffer(bytearray(done.stdout[12 * numel :]), dtype=torch.float16)
    assert torch.equal(copied, out[0].half())
