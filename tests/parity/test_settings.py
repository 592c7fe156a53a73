"""Settings that change how gradients become a step, beside a loop of plain torch on all ranks' data."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from models import tied_model, tokens

import deepspeedlite
from deepspeedlite.runtime.errors import ConfigError, EngineStateError

LR, STEPS = 0.05, 4


def start(stage: int, **more):
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "SGD", "params": {"lr": LR, "momentum": 0.9}},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        **more,
    }
    return deepspeedlite.initialize(model=tied_model(), config=config)[0]


def weights(engine) -> dict[str, torch.Tensor]:
    state = {name: p.detach().clone() for name, p in engine.module.state_dict().items()}
    return {name: state[name] for name, _ in tied_model().named_parameters()}


def plain(factor: float = 1.0, micros: tuple[int, ...] = (1,) * STEPS) -> dict[str, torch.Tensor]:
    """Weights after steps of `micros` micro-batches each, on gradients summed over ranks and micro-batches x factor."""
    model = tied_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    for step, count in enumerate(micros):
        for micro in range(count):
            for rank in range(dist.get_world_size()):
                (model(*tokens(step, micro, rank)) * factor).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


def assert_alike(engine, expected: dict[str, torch.Tensor]) -> None:
    for name, weight in weights(engine).items():
        torch.testing.assert_close(weight, expected[name].detach(), rtol=1e-5, atol=2e-6, msg=name)


def train(engine) -> None:
    for step in range(STEPS):
        engine.backward(engine(*tokens(step, 0, dist.get_rank())))
        engine.step()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@distributed(world_size=2)
def test_gradients_of_ranks_are_summed(stage):
    """`gradient_allreduce_op`: the step of "sum" is that of "mean" on a loss twice as large."""
    engine = start(stage, gradient_allreduce_op="sum")
    train(engine)
    assert_alike(engine, plain(1.0))


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("op, factor", [("mean", 0.5), ("sum", 1.0)])
@distributed(world_size=2)
def test_where_the_division_happens_changes_nothing(stage, op, factor):
    for more in ({"gradient_predivide_factor": 4.0}, {"prescale_gradients": True, "gradient_predivide_factor": 4.0}):
        engine = start(stage, gradient_allreduce_op=op, **more)
        train(engine)
        assert_alike(engine, plain(factor))
        engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@distributed(world_size=2)
def test_every_step_is_a_boundary_where_accumulation_is_the_scripts(stage):
    """`managed_gradient_accumulation: false`: as many micro-batches as it likes; losses are divided as ever."""
    engine = start(stage, managed_gradient_accumulation=False, gradient_accumulation_steps=2)
    micros = (1, 3, 2)
    for step, count in enumerate(micros):
        for micro in range(count):
            engine.backward(engine(*tokens(step, micro, dist.get_rank())))
            assert not engine.is_gradient_accumulation_boundary()
        engine.step()
        assert engine.was_step_applied()
    assert (engine.global_steps, engine.global_samples) == (3, sum(micros) * 4 * 2)
    assert_alike(engine, plain(0.5 / 2, micros))
    with pytest.raises(EngineStateError, match="managed_gradient_accumulation"):
        engine.set_gradient_accumulation_boundary(True)


def test_a_pipeline_counts_by_itself():
    from deepspeedlite.compat.pipeline_engine import PipelineEngine
    from deepspeedlite.config import load_config

    config = load_config({"train_batch_size": 1, "managed_gradient_accumulation": False})
    with pytest.raises(ConfigError, match="does not go with a pipeline"):
        PipelineEngine.prepare(torch.nn.Linear(1, 1), config)


@pytest.mark.parametrize("half, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@distributed(world_size=1)
def test_inputs_are_cast_or_the_error_says_how(half, dtype):
    def build(**more):
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW"},
            half: {"enabled": True, **more},
        }
        return deepspeedlite.initialize(model=torch.nn.Linear(4, 2), config=config)[0]

    inputs = torch.randn(2, 4)
    assert build(auto_cast=True)(inputs).dtype == dtype
    with pytest.raises(RuntimeError) as caught:
        build()(inputs)
    torchs, *ours = str(caught.value).splitlines()
    assert "same dtype" in torchs and len(ours) == 1
    assert f".to({dtype})" in ours[0] and f"{half}.auto_cast" in ours[0]
    with pytest.raises(RuntimeError) as caught:
        build()(inputs[:, :2].to(dtype))
    assert "auto_cast" not in str(caught.value)


@pytest.mark.parametrize("stage", [0, 2, 3])
@distributed(world_size=2)
def test_bf16_weights_under_autocast(stage):
    """Products run in bf16; what autocast keeps in fp32, such as a softmax, is fp32, of weights that are bf16."""
    engine = start(stage, bf16={"enabled": True}, torch_autocast={"enabled": True, "dtype": "bf16"})
    seen = {}
    block = engine.module.up[0]
    block.register_forward_hook(lambda module, args, out: seen.update(out=out.dtype, weight=module.weight.dtype))
    losses = []
    for _ in range(6):
        loss = engine(*tokens(0, 0, dist.get_rank()))
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
    assert seen == {"out": torch.bfloat16, "weight": torch.bfloat16} and loss.dtype == torch.float32
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("stage", [0, 1, 2])
@distributed(world_size=2)
def test_parameters_stay_where_they_are_below_stage_3(stage):
    engine = start(stage, zero_optimization={"stage": stage, "offload_param": {"device": "nvme"}})
    train(engine)
    assert_alike(engine, plain(0.5))


@pytest.mark.parametrize("name", ["model_params", "parameters"])
@distributed(world_size=1)
def test_older_names_of_model_parameters(name):
    model = tied_model()
    config = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "SGD", "params": {"lr": LR}}}
    engine, optimizer, _, _ = deepspeedlite.initialize(model=model, config=config, **{name: model.norm.parameters()})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train(engine)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"norm.weight", "norm.bias"} and len(optimizer.param_groups) == 1
    with pytest.raises(TypeError, match="twice"):
        deepspeedlite.initialize(model=model, config=config, model_parameters=[], **{name: []})
    with pytest.raises(TypeError, match="unexpected keyword argument 'params'"):
        deepspeedlite.initialize(model=model, config=config, params=[])
