"""The ops that have GPU kernels, as torch sees them: schemas, fakes, CPU implementations, and their optimizers.

The kernels themselves are tested in test_gpu_kernels.py. Where there is a GPU, these tests run on it too.
"""

from __future__ import annotations

import copy
import mmap
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from harness import distributed
from torch import Tensor

import deepspeedlite
from deepspeedlite.ops import is_available, load, one_pass
from deepspeedlite.ops import multi_tensor as mt
from deepspeedlite.ops.adam import FusedAdam, fused_adam_in_torch
from deepspeedlite.ops.lamb import FusedLamb
from deepspeedlite.ops.lion import FusedLion, lion_in_torch
from deepspeedlite.ops.one_pass import OnePassUpdate
from deepspeedlite.ops.uncorrected_adam import UncorrectedAdam
from deepspeedlite.optim import registry
from deepspeedlite.runtime.errors import OpError, OptimizerError

pytestmark = pytest.mark.slow  # all of them together: `make test-fast` is for the work at hand

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 15, 1023, 1024, 1025, 40_000)  # around a vector, a tile and a block of one thread


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    if request.param == "cuda" and not (torch.cuda.is_available() and is_available("utils", "cuda")):
        pytest.skip("needs a GPU and ops compiled for it")
    return request.param


def random(numel: int, dtype: torch.dtype, device: str, seed: int = 0, scale: float = 1.0) -> Tensor:
    """An unaligned view, as shards are."""
    generator = torch.Generator().manual_seed(seed * 100_003 + numel)
    return (torch.randn(numel + 1, generator=generator) * scale).to(device, dtype)[1:]


def lists(device: str, *dtypes: torch.dtype) -> list[list[Tensor]]:
    return [[random(numel, dtype, device, seed) for numel in SIZES] for seed, dtype in enumerate(dtypes)]


def adam_arguments(device: str, grad: torch.dtype = torch.float32, copies: bool = True) -> list:
    """Arguments of fused_adam, all of them given."""
    params, grads, exp_avgs, exp_avg_sqs, most = lists(device, torch.float32, grad, *[torch.float32] * 3)
    for tensor in (*exp_avg_sqs, *most):
        tensor.abs_()
    halves = [torch.empty_like(param, dtype=torch.bfloat16) for param in params] if copies else []
    steps = [torch.tensor(float(3 + i), device=device) for i in range(len(params))]
    on_device = [torch.tensor(number, device=device) for number in (0.02, 0.25, 0.0)]
    return [
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        most,
        halves,
        steps,
        *on_device,
        0.0,
        0.9,
        0.95,
        1e-8,
        0.1,
        0.5,
        True,
        True,
    ]


def lion_arguments(device: str, grad: torch.dtype = torch.float32) -> list:
    params, grads, exp_avgs = lists(device, torch.float32, grad, torch.float32)
    halves = [torch.empty_like(param, dtype=torch.bfloat16) for param in params]
    on_device = [torch.tensor(number, device=device) for number in (0.02, 0.25, 0.0)]
    return [params, grads, exp_avgs, halves, *on_device, 0.0, 0.9, 0.99, 0.1, 0.5]


def lamb_arguments(device: str) -> tuple[list, list]:
    params, grads, exp_avgs, exp_avg_sqs = lists(device, torch.float32, torch.bfloat16, torch.float32, torch.float32)
    for tensor in exp_avg_sqs:
        tensor.abs_()
    norms = torch.zeros(2, len(params), device=device)
    halves = [torch.empty_like(param, dtype=torch.float16) for param in params]
    steps = [torch.tensor(3.0, device=device) for _ in params]
    factor, lr = torch.tensor(0.25, device=device), torch.tensor(0.02, device=device)
    moments = [params, grads, exp_avgs, exp_avg_sqs, norms, factor, None, 0.9, 0.95, 1e-6, 0.1, 0.5, False]
    apply = [
        params,
        exp_avgs,
        exp_avg_sqs,
        halves,
        steps,
        norms,
        lr,
        None,
        0.0,
        0.9,
        0.95,
        1e-6,
        0.1,
        0.05,
        8.0,
        False,
        True,
    ]
    return moments, apply


def arguments_of(op: str, device: str) -> list:
    if op == "fused_adam":
        return adam_arguments(device)
    if op == "fused_lion":
        return lion_arguments(device)
    if op.startswith("fused_lamb"):
        return lamb_arguments(device)[op == "fused_lamb_apply"]
    inputs, outputs = lists(device, torch.float32, torch.bfloat16)
    if op == "multi_tensor_scale":
        return [inputs, outputs, torch.zeros((), device=device), torch.tensor(0.5, device=device), 2.0]
    return [inputs, torch.zeros(len(inputs), device=device)]


OPS = [
    "fused_adam",
    "fused_lion",
    "fused_lamb_moments",
    "fused_lamb_apply",
    "multi_tensor_scale",
    "multi_tensor_l2norm",
]


def doubles(arguments: list) -> list:
    def double(one):
        if isinstance(one, list):
            return [double(each) for each in one]
        return one.double().cpu() if isinstance(one, Tensor) else one

    return [double(one) for one in arguments]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        rounding = max(torch.finfo(one.dtype).eps, 1e-6)
        torch.testing.assert_close(one.double().cpu(), other, rtol=4 * rounding, atol=4 * rounding)


@pytest.mark.parametrize("op", OPS)
def test_schema_and_fake_tell_the_truth(op, device):
    torch.library.opcheck(load(op, device), tuple(arguments_of(op, device)))


@pytest.mark.parametrize("op", OPS)
def test_what_it_cannot_do_is_refused_by_name(op, device):
    def refused(change, message: str) -> None:
        arguments = arguments_of(op, device)
        change(arguments)
        with pytest.raises(RuntimeError, match=f"{op}: {message}"):
            load(op, device)(*arguments)

    def last(dtype=torch.float32, numel=40_000):
        return torch.zeros(2 * numel, device=device, dtype=dtype)

    first = {"multi_tensor_scale": "inputs", "multi_tensor_l2norm": "tensors"}.get(op, "params")
    refused(lambda a: a[0].__setitem__(6, last()[::2]), rf"{first}\[6\] is not contiguous")
    refused(lambda a: a[0].__setitem__(6, last(torch.float64)[:40_000]), rf"{first}\[6\] must be float32, bfloat16")
    if op != "multi_tensor_l2norm":
        second = {"multi_tensor_scale": "outputs", "fused_lamb_apply": "exp_avgs"}.get(op, "grads")
        refused(lambda a: a[1].__setitem__(3, last()[:7]), rf"{second}\[3\] has 7 elements, its parameter 1023")
        refused(lambda a: a[1].pop(), f"7 {first}, but 6 {second}")
    if op in ("fused_adam", "fused_lamb_apply"):
        at = 6 if op == "fused_adam" else 4
        refused(lambda a: a[at].__setitem__(2, last(torch.float16)[:1]), r"steps\[2\] must be float32")
        refused(lambda a: a[at].__setitem__(2, last()[:2]), r"steps\[2\] has 2 elements")
    if op in ("fused_lamb_apply", "fused_lamb_moments", "multi_tensor_l2norm"):
        at = next(i for i, one in enumerate(arguments_of(op, device)) if isinstance(one, Tensor))
        refused(lambda a: a.__setitem__(at, last()[:3]), "norms.* has 3 elements")


# --- against float64 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", DTYPES)
@pytest.mark.parametrize("given", ["all", "least", "infinite"])
def test_fused_adam_is_that_of_float64(grad, given, device):
    ours = adam_arguments(device, grad, copies=given == "all")
    if given == "least":
        ours[4], ours[7:11] = [], [None, None, None, 0.01]
    if given == "infinite":
        ours[9].fill_(1)
    exact, before = doubles(ours), copy.deepcopy(ours)
    load("fused_adam", device)(*ours)
    fused_adam_in_torch(*exact)
    for found, expected in zip(ours[:5], exact):
        assert_close(found, expected)
    if given == "all":
        assert all(torch.equal(half, param.bfloat16()) for half, param in zip(ours[5], ours[0]))
    if given == "infinite":
        assert all(torch.equal(a, b) for one, other in zip(ours[:5], before) for a, b in zip(one, other))


@pytest.mark.parametrize("infinite", [False, True])
@pytest.mark.parametrize("grad", DTYPES)
def test_fused_lion_is_that_of_float64(grad, infinite, device):
    ours = lion_arguments(device, grad)
    ours[6].fill_(infinite)
    ours[1][4][7] = float("nan")
    exact, before = doubles(ours), copy.deepcopy(ours)
    load("fused_lion", device)(*ours)
    lion_in_torch(*exact)
    assert exact[0][4][7].isnan() != infinite, "the sign of NaN is NaN"
    for found, expected in zip((ours[0], ours[2]), (exact[0], exact[2])):
        for one, other in zip(found, expected):
            torch.testing.assert_close(one.double().cpu(), other, rtol=1e-5, atol=1e-6, equal_nan=True)
    if infinite:
        assert all(torch.equal(a, b) for a, b in zip(ours[0] + ours[2], before[0] + before[2]))
    else:
        assert all(torch.equal(half[:7], param[:7].bfloat16()) for half, param in zip(ours[3], ours[0]))


@pytest.mark.parametrize("infinite", [False, True])
def test_fused_lamb_is_that_of_float64(infinite, device):
    moments, apply = lamb_arguments(device)
    if infinite:
        moments[6] = apply[7] = torch.ones((), device=device)
    params, _, exp_avgs, exp_avg_sqs, norms = moments[:5]
    before = copy.deepcopy(moments)
    exact = doubles(moments)
    load("fused_lamb_moments", device)(*moments)
    load("fused_lamb_apply", device)(*apply)
    if infinite:
        assert all(torch.equal(a, b) for one, other in zip(moments[:4], before) for a, b in zip(one, other))
        return
    for index, (p, g, m, v) in enumerate(zip(*exact[:4])):
        m.lerp_(g * 0.125, 0.1)
        v.mul_(0.95).add_((g * 0.125) ** 2, alpha=0.05)
        u = m / (v.sqrt() + 1e-6) + 0.1 * p
        expected = torch.stack([p.norm(), u.norm()])
        torch.testing.assert_close(norms[:, index].double().cpu(), expected, rtol=1e-5, atol=1e-6)
        ratio = float((p.norm() / u.norm()).clamp(0.05, 8.0)) if p.numel() else 1.0
        p.sub_(0.02 * (1 - 0.95**3) ** 0.5 / (1 - 0.9**3) * ratio * u)
    for found, expected in zip((params, exp_avgs, exp_avg_sqs), (exact[0], exact[2], exact[3])):
        assert_close(found, expected)
    assert all(torch.equal(half, param.half()) for half, param in zip(apply[3], params))


@pytest.mark.parametrize("in_torch", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_multi_tensor_functions(dtype, in_torch, device, monkeypatch):
    """The ops, and what torch does in their place."""
    if in_torch:
        monkeypatch.setattr(mt, "is_available", lambda *_: False)
    tensors = lists(device, dtype)[0]
    norms = torch.stack([tensor.double().norm() for tensor in tensors])
    torch.testing.assert_close(mt.multi_tensor_l2norm(tensors, True).double(), norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(mt.multi_tensor_l2norm(tensors).double(), norms.norm(), rtol=1e-5, atol=0)
    assert mt.multi_tensor_l2norm([]) == 0 and mt.multi_tensor_l2norm([tensors[0]]) == 0

    flat = mt.flatten(tensors, torch.float32)
    assert torch.equal(flat, torch.cat([tensor.float() for tensor in tensors]))
    shaped = mt.unflatten(flat, [*tensors[:-1], tensors[-1].view(200, 200)])
    assert all(torch.equal(one.flatten(), other.float()) for one, other in zip(shaped, tensors))
    assert (
        shaped[-1].shape == (200, 200) and shaped[-1].untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    )
    for out in DTYPES:
        outputs = [torch.empty_like(tensor, dtype=out) for tensor in tensors]
        mt.multi_tensor_scale(tensors, outputs, 0.5, factor_tensor=torch.tensor(0.5, device=device))
        assert all(torch.equal(one, (other.float() * 0.25).to(out)) for one, other in zip(outputs, tensors))

    found = mt.has_overflow(tensors)
    assert found == 0 and found.device == tensors[0].device
    tensors[3][-1] = float("nan")
    assert mt.has_overflow(tensors) == 1
    tensors[3][-1] = 1
    assert mt.has_overflow(tensors, torch.ones((), device=device)) == 1, "what was found before stays found"
    small = [torch.full((33,), 1000.0, device=device)]
    for factor, expected in ((60.0, 0), (70.0, 1)):  # 70000 is no fp16 number
        found = torch.zeros((), device=device)
        mt.multi_tensor_scale(small, [torch.empty(33, device=device, dtype=torch.float16)], factor, found)
        assert found == expected


def test_what_flattening_needs_is_said():
    with pytest.raises(OpError, match="no tensors"):
        mt.flatten([])
    with pytest.raises(OpError, match=r"shape \(5,\) does not hold 6"):
        mt.unflatten(torch.zeros(5), [torch.zeros(2, 3)])
    assert torch.equal(mt.flatten([torch.tensor([1, 2]), torch.tensor([[3]])]), torch.tensor([1, 2, 3]))


@pytest.mark.slow
def test_elements_beyond_2_to_the_31(device):
    """On the CPU in address space that is mostly not there: reading zeros that were never written takes no memory."""
    numel = 2**31 + 4099
    if device == "cpu":
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        tensor = torch.frombuffer(mmap.mmap(-1, 2 * numel, flags=flags), dtype=torch.bfloat16)
    else:
        tensor = torch.zeros(numel, dtype=torch.bfloat16, device=device)
    tensor[-4:] = 3.0
    assert mt.multi_tensor_l2norm([tensor]) == 6.0
    assert mt.has_overflow([tensor]) == 0
    tensor[-1] = float("inf")
    assert mt.has_overflow([tensor]) == 1


# --- the optimizers ---------------------------------------------------------------------------------------------------


def parameters(device: str, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in ((7, 5), (11,), (0,))]


def give_gradients(params: list[torch.nn.Parameter], others: list[torch.nn.Parameter]) -> None:
    for param, other in zip(params, others):
        param.grad = torch.randn_like(param)
        other.grad = param.grad.clone()


@pytest.fixture(params=["op", "in torch"])
def way(request, monkeypatch) -> str:
    """With the op, and with what torch does in its place."""
    if request.param == "in torch":
        monkeypatch.setattr(one_pass, "is_available", lambda *_: False)
    return request.param


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("adamw", [False, True])
def test_fused_adam_trains_as_torchs_does_and_takes_its_state(adamw, amsgrad, device, way):
    ours, theirs = parameters(device), parameters(device)
    options = {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": amsgrad}
    mine = FusedAdam(ours, adam_w_mode=adamw, **options)
    reference = (torch.optim.AdamW if adamw else torch.optim.Adam)(theirs, **options)
    for step in range(6):
        if step == 3:  # each goes on from the other's state
            state, other = reference.state_dict(), copy.deepcopy(mine).state_dict()
            mine.load_state_dict(state)
            reference.load_state_dict(other)
        give_gradients(ours, theirs)
        mine.step()
        reference.step()
    for param, other in zip(ours, theirs):
        torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-6)
    mine.zero_grad()
    assert all(param.grad is None for param in ours)


@pytest.mark.parametrize("cls", [FusedAdam, FusedLion])
def test_a_gradient_scaler_leaves_unscaling_and_skipping_to_it(cls, device, way):
    ours, theirs = parameters(device), parameters(device)
    mine, reference = cls(ours, lr=1e-2), cls(theirs, lr=1e-2)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    scaler.scale(torch.ones((), device=device))  # makes the scale
    for step in range(4):
        give_gradients(ours, theirs)
        for param in ours:
            param.grad *= scaler.get_scale()
        if step == 1:
            ours[0].grad[0, 0] = float("inf")
        else:
            reference.step()
        scaler.step(mine)
        scaler.update()
    if cls is FusedAdam:
        assert [float(mine.state[param]["step"]) for param in ours] == [3.0] * 3, "a skipped step does not count"
    for param, other in zip(ours, theirs):
        torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-6)


def test_one_pass_scales_the_gradient_and_writes_the_copy(device, way):
    (master,), (other,) = parameters(device)[:1], parameters(device)[:1]
    grad, model = torch.randn(7, 5).bfloat16().to(device), torch.empty(7, 5, dtype=torch.bfloat16, device=device)
    optimizer = FusedAdam([master], lr=torch.tensor(1e-2, device=device))
    optimizer.hand_over([OnePassUpdate(master, grad, model)], grad_scale=0.25)
    optimizer.step()
    other.grad = grad.float() * 0.25
    torch.optim.AdamW([other], lr=1e-2, weight_decay=0.0).step()
    torch.testing.assert_close(master, other, rtol=1e-6, atol=1e-6)
    assert torch.equal(model, master.detach().bfloat16())


@pytest.mark.parametrize("cls", [FusedLamb, FusedLion])
def test_the_op_and_torch_train_alike(cls, device, monkeypatch):
    """Through `step`, and with scaled 16-bit gradients handed over; each goes on from the other's state."""
    options = {"lr": 1e-2, "weight_decay": 0.1}
    ours, theirs = parameters(device), parameters(device)
    mine, reference = cls(ours, **options), cls(theirs, **options)

    def step_both(prepare) -> None:
        prepare(mine, ours)
        mine.step()
        with monkeypatch.context() as patch:
            patch.setattr(one_pass, "is_available", lambda *_: False)
            prepare(reference, theirs)
            reference.step()

    def hand_over(grads, optimizer, params) -> None:
        optimizer.hand_over(list(map(OnePassUpdate, params, grads, copies[id(params)])), 0.125)

    copies = {id(params): [torch.empty_like(p, dtype=torch.bfloat16) for p in params] for params in (ours, theirs)}
    for step in range(6):
        if step == 3:
            state, other = reference.state_dict(), copy.deepcopy(mine).state_dict()
            mine.load_state_dict(state)
            reference.load_state_dict(other)
        give_gradients(ours, theirs)
        if step % 2:
            step_both(lambda *_: None)
            continue
        grads = [param.grad.bfloat16() * 8 for param in ours]
        step_both(partial(hand_over, grads))
        for param, half, other in zip(ours, copies[id(ours)], copies[id(theirs)]):
            assert torch.equal(half, param.detach().bfloat16())
            torch.testing.assert_close(half, other)
    for param, other in zip(ours, theirs):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)
    if cls is FusedLamb:
        torch.testing.assert_close(mine.get_lamb_coeffs(), reference.get_lamb_coeffs(), rtol=1e-5, atol=0)


def test_parameters_that_are_not_contiguous_are_stepped_by_torch(device):
    image = torch.randn(2, 3, 4, 5, device=device)
    ours = torch.nn.Parameter(image.to(memory_format=torch.channels_last))
    theirs = torch.nn.Parameter(image.clone())
    mine, reference = FusedAdam([ours], lr=1e-2), torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        give_gradients([ours], [theirs])
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_what_it_does_not_take_is_said(device):
    table = torch.nn.Embedding(5, 3, sparse=True, device=device)
    table(torch.tensor([1], device=device)).sum().backward()
    with pytest.raises(OptimizerError, match=r"FusedAdam takes .* on the CPU or a GPU.*shape \(5, 3\).*sparse"):
        FusedAdam(table.parameters()).step()
    with pytest.raises(OptimizerError, match="betas"):
        FusedAdam(table.parameters(), betas=(0.9, 1.0))


@pytest.mark.gpu
def test_a_captured_graph_steps_anew_in_each_replay():
    if not (torch.cuda.is_available() and is_available("fused_adam", "cuda")):
        pytest.skip("needs a GPU and ops compiled for it")
    ours, theirs = parameters("cuda"), parameters("cuda")
    lr = torch.tensor(1e-2, device="cuda")
    mine, reference = FusedAdam(ours, lr=lr), torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.0)
    give_gradients(ours, theirs)
    mine.step()
    reference.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mine.step()
    for rate in (1e-2, 2e-2, 3e-2):
        for param, other in zip(ours, theirs):
            other.grad = torch.randn_like(other)
            param.grad.copy_(other.grad)
        lr.fill_(rate)
        reference.param_groups[0]["lr"] = rate
        graph.replay()
        reference.step()
    for param, other in zip(ours, theirs):
        torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-6)


# --- the engine -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False])
def test_a_configuration_gets_fused_adam_on_gpus_where_it_is_there(there, monkeypatch):
    """The GPU is a mock: an object that says where it is."""
    tensor = SimpleNamespace(device=SimpleNamespace(type="cuda"), itemsize=4)
    monkeypatch.setattr(registry, "_all_plain", lambda *_: True)
    asked = []
    monkeypatch.setattr(registry, "is_available", lambda *what: asked.append(what) or there)
    chosen = registry._by_op(torch.optim.Adam, {"lr": 0.1, "amsgrad": True, "fused": True}, [tensor])
    ours = (FusedAdam, {"lr": 0.1, "amsgrad": True, "adam_w_mode": False})
    theirs = (torch.optim.Adam, {"lr": 0.1, "amsgrad": True, "fused": True})
    assert chosen == (ours if there else theirs) and asked == [("fused_adam", "cuda")]
    options = {"maximize": True, "fused": True}
    assert registry._by_op(torch.optim.AdamW, options, [tensor]) == (torch.optim.AdamW, options)


@pytest.mark.parametrize("cls", [FusedAdam, FusedLamb, FusedLion])
@distributed(world_size=1)
def test_the_engine_hands_over_16_bit_gradients(cls, device):
    """Its own optimizers step in one pass and write the model's weights; they train as ordinary ones do there."""
    weights = []
    for in_one_pass in (True, False):
        torch.manual_seed(0)
        config = {"train_batch_size": 1, "bf16": {"enabled": True}, "gradient_clipping": 0.01}
        model = torch.nn.Linear(30, 20).to(device)
        engine, *_ = deepspeedlite.initialize(model=model, config=config, optimizer=cls(model.parameters(), lr=1e-2))
        inner, calls = engine.optimizer.optimizer, []
        assert type(inner) is cls
        inner.hand_over = lambda *a, f=inner.hand_over, c=calls: (c.append(a), f(*a))
        if not in_one_pass:
            inner.register_step_pre_hook(lambda *_: None)
        for _ in range(3):
            engine.backward(engine(torch.ones(1, 30, dtype=torch.bfloat16, device=device)).float().square().sum())
            engine.step()
        assert bool(calls) == in_one_pass
        weights.append([param.detach().clone() for param in engine.module.parameters()])
    for one, other in zip(*weights):
        torch.testing.assert_close(one, other)


def test_adam_without_bias_correction_is_stepped_by_the_op_too(device):
    ours, theirs = parameters(device), parameters(device)
    mine = registry.build_optimizer("Adam", {"bias_correction": False, "adam_w_mode": False, "weight_decay": 0.1}, ours)
    reference = UncorrectedAdam(theirs, weight_decay=0.1, adam_w_mode=False)
    assert type(mine) is FusedAdam
    for _ in range(3):
        give_gradients(ours, theirs)
        mine.step()
        reference.step()
    for param, other in zip(ours, theirs):
        torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-6)
