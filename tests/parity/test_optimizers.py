"""Optimizers by name: trajectories against formulas and torch, flat runs against whole tensors, mistakes named."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeedlite.ops.lamb import FusedLamb
from deepspeedlite.ops.lion import FusedLion
from deepspeedlite.ops.uncorrected_adam import UncorrectedAdam
from deepspeedlite.optim import registry
from deepspeedlite.optim.registry import build_optimizer, choose_fused
from deepspeedlite.preflight import elementwise
from deepspeedlite.preflight.elementwise import check_flat_compatible
from deepspeedlite.runtime.errors import OptimizerError, UnsupportedError

SHAPES = ((3, 4), (5,), (2, 2, 2), (1,))


def make_parameters(dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def gradients(step: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) * (i + 1) for i, s in enumerate(SHAPES)]


def run(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: range = range(6)) -> None:
    for step in steps:
        for param, grad in zip(params, gradients(step, params[0].dtype)):
            param.grad = grad
        optimizer.step()


def reference(rule, steps: int = 6) -> list[list[float]]:
    """Apply `rule(p, g, state, t)`, plain Python on lists of floats, to each parameter."""
    values = [p.detach().flatten().tolist() for p in make_parameters()]
    states: list[dict] = [{} for _ in values]
    for t in range(1, steps + 1):
        for p, g, state in zip(values, gradients(t - 1), states):
            p[:] = rule(p, g.flatten().tolist(), state, t)
    return values


def assert_matches(params: list[torch.nn.Parameter], expected: list[list[float]], tolerance: float = 1e-12) -> None:
    for param, values in zip(params, expected):
        torch.testing.assert_close(
            param.detach().flatten(), torch.tensor(values, dtype=param.dtype), rtol=tolerance, atol=tolerance
        )


def moments(g, state, beta1, beta2):
    m = state["m"] = [beta1 * a + (1 - beta1) * b for a, b in zip(state.get("m", [0.0] * len(g)), g)]
    v = state["v"] = [beta2 * a + (1 - beta2) * b * b for a, b in zip(state.get("v", [0.0] * len(g)), g)]
    return m, v


def lion_rule(lr, beta1, beta2, decay):
    def rule(p, g, state, t):
        m = state.get("m", [0.0] * len(g))
        moved = [x * (1 - lr * decay) - lr * math.copysign(1, beta1 * a + (1 - beta1) * b) for x, a, b in zip(p, m, g)]
        state["m"] = [beta2 * a + (1 - beta2) * b for a, b in zip(m, g)]
        return moved

    return rule


def lamb_rule(lr, beta1, beta2, eps, decay, corrected=True, inside=False, bounds=(0.01, 10.0)):
    def rule(p, g, state, t):
        m, v = moments(g, state, beta1, beta2)
        roots = [math.sqrt(b + eps) if inside else math.sqrt(b) + eps for b in v]
        u = [a / root + decay * x for a, root, x in zip(m, roots, p)]
        norm_p, norm_u = math.hypot(*p), math.hypot(*u)
        ratio = min(max(norm_p / norm_u, bounds[0]), bounds[1]) if norm_p and norm_u else 1.0
        scale = math.sqrt(1 - beta2**t) / (1 - beta1**t) if corrected else 1.0
        return [x - lr * scale * ratio * y for x, y in zip(p, u)]

    return rule


def adam_rule(lr, beta1, beta2, eps, decay, decoupled, corrected):
    def rule(p, g, state, t):
        g = g if decoupled else [b + decay * x for b, x in zip(g, p)]
        m, v = moments(g, state, beta1, beta2)
        c1, c2 = (1 - beta1**t, 1 - beta2**t) if corrected else (1.0, 1.0)
        shrink = 1 - lr * decay if decoupled else 1.0
        return [x * shrink - lr * (a / c1) / (math.sqrt(b / c2) + eps) for x, a, b in zip(p, m, v)]

    return rule


@pytest.mark.parametrize("name", ["Adam", "adamw", "ADAM"])
@pytest.mark.parametrize("adam_w_mode", [True, False, None])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_adam_follows_its_formula(name, adam_w_mode, bias_correction):
    options = {"lr": 0.03, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1, "bias_correction": bias_correction}
    if adam_w_mode is not None:
        options["adam_w_mode"] = adam_w_mode
    params = make_parameters()
    run(build_optimizer(name, options, params), params)
    decoupled = name == "adamw" or adam_w_mode is not False
    assert_matches(params, reference(adam_rule(0.03, 0.8, 0.95, 1e-6, 0.1, decoupled, bias_correction)), 1e-9)


def test_decay_default_is_deepspeeds_unless_torch_adam():
    assert build_optimizer("AdamW", {}, make_parameters()).defaults["weight_decay"] == 0.0
    assert build_optimizer("AdamW", {"torch_adam": True}, make_parameters()).defaults["weight_decay"] == 0.01
    assert build_optimizer("Lion", {}, make_parameters()).defaults["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_lion_follows_its_formula(decay):
    params = make_parameters()
    run(build_optimizer("lion", {"lr": 0.02, "betas": [0.7, 0.9], "weight_decay": decay}, params), params)
    assert_matches(params, reference(lion_rule(0.02, 0.7, 0.9, decay)))


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("bounds", [(0.01, 10.0), (0.3, 0.5)])
def test_lamb_follows_its_formula(corrected, inside, bounds):
    params = make_parameters()
    options = {"lr": 0.05, "betas": [0.7, 0.9], "eps": 1e-4, "weight_decay": 0.2, "bias_correction": corrected}
    options |= {"eps_inside_sqrt": inside, "min_coeff": bounds[0], "max_coeff": bounds[1]}
    run(build_optimizer("LAMB", options, params), params)
    assert_matches(params, reference(lamb_rule(0.05, 0.7, 0.9, 1e-4, 0.2, corrected, inside, bounds)), 1e-10)


def test_lamb_ratio_is_one_where_a_norm_is_zero():
    zero, still = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = FusedLamb([zero, still], lr=0.1)
    zero.grad, still.grad = torch.ones(3), torch.zeros(3)
    optimizer.step()
    assert optimizer.get_lamb_coeffs() == [1.0, 1.0]
    assert torch.equal(still, torch.ones(3))
    torch.testing.assert_close(zero.detach(), torch.full((3,), -0.1), rtol=1e-5, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    gaps=st.lists(st.integers(0, 3), min_size=7, max_size=7),
    cut=st.integers(0, 6),
)
def test_lamb_on_runs_with_padding_equals_lamb_on_tensors(lengths, gaps, cut):
    generator = torch.Generator().manual_seed(3)
    pieces = [torch.randn(n, generator=generator, dtype=torch.float64) * (k + 1) for k, n in enumerate(lengths)]
    whole = [torch.nn.Parameter(p.clone()) for p in pieces]
    parts = [range(min(cut, len(pieces))), range(min(cut, len(pieces)), len(pieces))]

    def flatten(tensors):
        padded = [[torch.cat([torch.zeros(gaps[i]).double(), tensors[i]]) for i in part] for part in parts]
        return [torch.cat(part) if part else torch.zeros(0) for part in padded]

    runs = [torch.nn.Parameter(t.double()) for t in flatten(pieces)]
    segments, places = {}, {}
    for tensor, part in zip(runs, parts):
        at, segments[tensor] = 0, []
        for i in part:
            places[i] = (tensor, at + gaps[i])
            segments[tensor].append((at + gaps[i], at + gaps[i] + lengths[i], i))
            at += gaps[i] + lengths[i]
    options = {"lr": 0.1, "weight_decay": 0.05}
    plain, flat = FusedLamb(whole, **options), FusedLamb(runs, **options)
    flat.set_segments(segments)
    for _ in range(3):
        grads = [torch.randn(n, generator=generator, dtype=torch.float64) for n in lengths]
        for param, grad in zip(whole, grads):
            param.grad = grad
        for param, grad in zip(runs, flatten(grads)):
            param.grad = grad.double()
        plain.step()
        flat.step()
    for i, param in enumerate(whole):
        tensor, start = places[i]
        torch.testing.assert_close(tensor[start : start + lengths[i]], param, rtol=1e-13, atol=1e-14)
        assert not tensor[start - gaps[i] : start].any()


def test_lamb_steps_what_no_segment_covers_with_ratio_one():
    flat = torch.nn.Parameter(torch.arange(1.0, 7.0))
    optimizer = FusedLamb([flat], lr=0.1)
    optimizer.set_segments({flat: [(2, 3, 1), (3, 4, 0)]})
    flat.grad = torch.ones(6)
    optimizer.step()
    update = 0.1 / math.sqrt(0.001)  # of every element
    rate = 0.1 * math.sqrt(0.001) / 0.1  # lr c
    assert optimizer.get_lamb_coeffs() == pytest.approx([4 / update, 3 / update], rel=1e-5)
    expected = [x - rate * update * r for x, r in zip(range(1, 7), [1, 1, 3 / update, 4 / update, 1, 1])]
    assert flat.tolist() == pytest.approx(expected, rel=1e-5)


def test_lamb_without_segments_differs_on_a_run():
    """The test above can fail: one norm for the whole run is another optimizer."""
    params, flat = make_parameters(), torch.nn.Parameter(torch.cat([p.detach().flatten() for p in make_parameters()]))
    run(FusedLamb(params, lr=0.1), params, range(1))
    optimizer = FusedLamb([flat], lr=0.1)
    flat.grad = torch.cat([g.flatten() for g in gradients(0)])
    optimizer.step()
    assert not torch.allclose(flat, torch.cat([p.detach().flatten() for p in params]), rtol=1e-3)


@pytest.mark.parametrize(
    "segments",
    [
        [(0, 4, 0), (3, 5, 1)],
        [(2, 11, 0)],
        [(4, 6, 0), (0, 2, 1)],
        [(3, 2, 0)],
        [(-1, 2, 0)],
        [(0, 2, -1)],
        [(0, 2, 2)],
    ],
)
def test_lamb_refuses_impossible_segments(segments):
    flat = torch.nn.Parameter(torch.ones(10))
    with pytest.raises(OptimizerError, match="set_segments"):
        FusedLamb([flat]).set_segments({flat: segments}, parameter_count=2)
    with pytest.raises(OptimizerError, match="not a 1-D run"):
        FusedLamb([flat]).set_segments({torch.ones(10): [(0, 1, 0)]})


@pytest.mark.parametrize(
    ("name", "options"),
    [("Adam", {"bias_correction": False}), ("Lion", {}), ("Lamb", {}), ("AdamW", {}), ("SGD", {"momentum": 0.9})],
)
def test_state_dict_continues_the_same_trajectory(name, options):
    straight = make_parameters(torch.float32)
    run(build_optimizer(name, {**options, "lr": 0.01}, straight), straight)
    first = make_parameters(torch.float32)
    optimizer = build_optimizer(name, {**options, "lr": 0.01}, first)
    run(optimizer, first, range(3))
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    resumed = build_optimizer(name, {**options, "lr": 0.01}, second)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(resumed, second, range(3, 6))
    for a, b in zip(straight, second):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["RAdam", "nadam", "RMSprop", "Adamax", "asgd", "Adadelta", "Rprop", "Adagrad", "SGD"])
def test_torch_classes_by_name(name):
    params, expected = make_parameters(), make_parameters()
    cls = next(c for n, c in vars(torch.optim).items() if n.lower() == name.lower())
    run(build_optimizer(name, {"lr": 0.03}, params), params)
    run(cls(expected, lr=0.03, foreach=False), expected)
    assert_matches(params, [p.detach().flatten().tolist() for p in expected], 1e-9)
    check_flat_compatible(cls(expected))


def test_every_torch_optimizer_is_either_known_or_refused():
    known = {cls.__name__.lower() for cls in elementwise._ELEMENTWISE}
    assert set(registry.TORCH_CLASSES) <= known | set(elementwise.WHOLE_TENSOR)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_fused_is_chosen_and_can_be_overridden(name):
    # What otherwise is an op: see test_ops.py and test_cpu_optimizers.py.
    torchs = {"Adam": {"torch_adam": True}, "AdamW": {"torch_adam": True}, "Adagrad": {"lr_decay": 0.1}}.get(name, {})
    assert build_optimizer(name, torchs, make_parameters(torch.float32)).defaults["fused"] is True
    assert build_optimizer(name, {"fused": False}, make_parameters()).defaults["fused"] is False
    unfused = build_optimizer(name, {"foreach": True}, make_parameters())
    assert unfused.defaults["foreach"] is True and not unfused.defaults["fused"]
    complex_valued = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    assert not build_optimizer(name, {}, [complex_valued]).defaults["fused"]


def test_groups_generators_and_names():
    model = torch.nn.Linear(3, 2)
    made = build_optimizer("AdamW", {"lr": 0.1}, ({"params": p} for p in model.parameters()))
    assert [group["lr"] for group in made.param_groups] == [0.1, 0.1]
    lazy = [{"params": model.parameters(), "lr": 0.5}]
    assert len(build_optimizer("AdamW", {}, lazy).param_groups[0]["params"]) == 2
    assert build_optimizer("Lamb", {}, model.named_parameters()).param_groups[0]["params"][0] is model.weight
    with pytest.raises(OptimizerError, match="no parameters"):
        build_optimizer("AdamW", {}, iter(()))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("AdamW", {"weight_decya": 0.1}, ["optimizer.params.weight_decya", 'did you mean "weight_decay"', "accepted:"]),
        ("Adam", {"learning_rate": 1}, ["optimizer.params.learning_rate", '"lr"']),
        ("AdamW", {"lr": "1e-3"}, ["optimizer.params.lr", "'1e-3'", "without quotes, 0.001"]),
        ("AdamW", {"lr": "auto"}, ["optimizer.params.lr", '"auto"']),
        ("AdamW", {"lr": True}, ["optimizer.params.lr", "finite number"]),
        ("SGD", {"lr": float("nan")}, ["optimizer.params.lr", "finite number"]),
        ("AdamW", {"lr": -1}, ["optimizer.params.lr", "not be negative"]),
        ("AdamW", {"betas": [0.9, 1.5]}, ["optimizer.params.betas[1]", "1.5"]),
        ("Lion", {"betas": [0.9]}, ["optimizer.params.betas", "2 numbers"]),
        ("Lamb", {"betas": 0.9}, ["optimizer.params.betas", "2 numbers"]),
        ("AdamW", {"amsgrad": "false"}, ["optimizer.params.amsgrad", "true or false"]),
        ("AdamW", {"fused": 1}, ["optimizer.params.fused", "true or false"]),
        ("Lamb", {"max_grad_norm": 1.0}, ["optimizer.params.max_grad_norm", "gradient_clipping"]),
        ("Adam", {"freeze_step": 100}, ["optimizer.params.freeze_step", "1-bit"]),
        ("SGD", {"betas": [0.9, 0.99]}, ["optimizer.params.betas", "momentum"]),
        ("SGD", {"nesterov": True}, ["SGD", "momentum"]),
        ("AdamW", {"lr": "x", "epz": 1, "betas": [2, 2]}, ["params.lr", "params.epz", "betas[0]", "betas[1]"]),
        ("AdmaW", {}, ["optimizer.type AdmaW", 'did you mean "AdamW"', "known:"]),
        ("", {}, ["optimizer.type", "known:"]),
        (None, {}, ["optimizer.type", "known:"]),
    ],
)
def test_mistakes_are_named(name, options, words):
    with pytest.raises(OptimizerError) as caught:
        build_optimizer(name, options, make_parameters())
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("OneBitAdam", ["1 bit", "use Adam"]),
        ("ZeroOneAdam", ["use Adam"]),
        ("OneBitLamb", ["use Lamb"]),
        ("MuAdam", ["mup.MuAdam"]),
        ("Muon", ["whole matrices"]),
        ("LBFGS", ["closure"]),
        ("Adafactor", ["row and column"]),
        ("SparseAdam", ["sparse"]),
    ],
)
def test_names_not_done_here_are_refused_with_an_alternative(name, words):
    with pytest.raises(UnsupportedError) as caught:
        build_optimizer(name, {"lr": 1e-3}, make_parameters())
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "options", [{"bias_correction": False, "amsgrad": True}, {"fp32_optimizer_states": False}], ids=str
)
def test_combinations_not_done_here(options):
    with pytest.raises(UnsupportedError, match=list(options)[-1]):
        build_optimizer("Adam", options, make_parameters())


class PlainDescent(torch.optim.Optimizer):
    """A stranger's elementwise optimizer."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"])


class NormedDescent(PlainDescent):
    """A stranger's optimizer whose step depends on the norm of each parameter."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad / p.grad.norm(), alpha=-group["lr"])


class Muon(PlainDescent):
    """Refused by its name."""


class Unbuildable(PlainDescent):
    """Cannot be built from its groups alone."""

    def __init__(self, params, secret):
        super().__init__(params)


def test_flat_check_knows_refuses_and_tries_out():
    params = make_parameters(torch.float32)
    for made in (
        FusedLion(params),
        FusedLamb(params),
        UncorrectedAdam(params),
        PlainDescent(params),
        Unbuildable(params, 1),
    ):
        check_flat_compatible(made)
    with pytest.raises(UnsupportedError, match="NormedDescent gives other results"):
        check_flat_compatible(NormedDescent(params))
    check_flat_compatible(NormedDescent(params), allow_untested=True)
    with pytest.raises(UnsupportedError, match="whole matrices"):
        check_flat_compatible(Muon(params), allow_untested=True)
    with pytest.raises(UnsupportedError, match="row and column"):
        check_flat_compatible(torch.optim.Adafactor(params))


def test_the_trial_finds_every_known_elementwise_class_elementwise():
    for cls in elementwise._ELEMENTWISE - {FusedLamb}:
        assert elementwise._is_elementwise(cls(make_parameters(torch.float32))), cls
    assert not elementwise._is_elementwise(FusedLamb(make_parameters(torch.float32)))
    state = torch.random.get_rng_state()
    check_flat_compatible(PlainDescent(make_parameters()))
    assert torch.equal(state, torch.random.get_rng_state())


def test_sparse_gradients_are_refused_by_name():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    for optimizer in (FusedLion(embedding.parameters()), FusedLamb(embedding.parameters())):
        with pytest.raises(UnsupportedError, match="sparse"):
            optimizer.step()


@pytest.mark.parametrize(
    "options, chosen",
    [({}, True), ({"foreach": False}, None), ({"fused": False}, False), ({"lr": torch.tensor(0.1)}, None)],
)
def test_a_passed_optimizer_is_fused_where_its_maker_left_it_to_torch(options, chosen):
    """Every group of it; not where it has states already, nor what has no such kernel or is a class of its own."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    adam = torch.optim.AdamW([{"params": [p]} for p in params], **{"lr": 0.1, **options})
    choose_fused(adam)
    assert [group["fused"] for group in adam.param_groups] == [chosen, chosen]

    class Mine(torch.optim.AdamW):
        pass

    stepped = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    params[0].grad = torch.ones(3)
    stepped.step()
    for other in (Mine(params, lr=0.1), stepped, torch.optim.RMSprop(params, lr=0.1)):
        choose_fused(other)
        assert not other.param_groups[0].get("fused")
