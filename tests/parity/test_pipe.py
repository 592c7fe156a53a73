"""Pipelines of real processes against the same layers one after the other: training, evaluation, faults."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from models import VOCABULARY, WIDTH
from pairwise import each_pair
from paths import BOOT
from pipe_models import HYPER, Block, Reference, Sequential, batches, layers, loss_fn

import deepspeedlite
from deepspeedlite.parallel.pipe.topology import (
    PipeDataParallelTopology,
    PipeModelDataParallelTopology,
    ProcessTopology,
)
from deepspeedlite.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeedlite.runtime.errors import ConfigError, DistributedError, PipelineError, UnsupportedError

MICRO_BATCHES = 3
DTYPES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}},
}


def config(stage: int = 1, micro_batches: int = MICRO_BATCHES, dtype: str = "fp32", **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 0,
        "optimizer": {"type": "AdamW", "params": dict(HYPER)},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 3000},
        **DTYPES[dtype],
        **more,
    }


def pipeline(specs: Any, stages: int, settings: dict[str, Any] | None = None, **more: Any) -> Any:
    """An engine of a PipelineModule."""
    options = {"loss_fn": loss_fn, "seed_layers": True, **more}
    module = PipelineModule(specs, num_stages=stages, **options)
    return deepspeedlite.initialize(model=module, config=settings or config())[0]


def assert_same_values(engine: Any, reference: torch.nn.Module, atol: float = 3e-6) -> None:
    for name, param in engine.module.named_parameters():
        torch.testing.assert_close(param.float(), reference.get_parameter(name), rtol=0, atol=atol, msg=name)


def assert_copies_are_equal(engine: Any) -> None:
    """Tied modules are the same on all stages, to the bit."""
    for tie in engine.module.ties:
        for param in tie.module.parameters():
            copies = tie.group.all_gather_objects(param.detach().clone())
            assert all(torch.equal(copy, param) for copy in copies)


@each_pair(3, stages=[1, 2, 4], stage=[0, 1, 2], micro_batches=[1, 5], schedule=["1f1b", "gpipe"])  # and every three
@pytest.mark.slow_unless(stages=2, stage=1)
@distributed(4)
def test_training_equals_the_sequential_model(stages, stage, micro_batches, schedule):
    """Four ranks as stages and replicas; an embedding that is the head too; clipping that bites."""
    engine = pipeline(layers(), stages, config(stage, micro_batches, gradient_clipping=0.5), schedule=schedule)
    replicas = 4 // stages
    assert (engine.num_stages, engine.grid.data_parallel_size) == (stages, replicas)
    reference = Reference(layers(), micro_batches, replicas, clip=0.5)
    data = batches(engine.grid.data_parallel_id, micro_batches)
    for _ in range(3):
        loss = engine.train_batch(data)
        expected, norm = reference.step()
        assert loss.item() == pytest.approx(expected, rel=2e-5)
        assert engine.get_global_grad_norm() == pytest.approx(norm, rel=2e-5)
    assert_same_values(engine, reference.model)
    assert_copies_are_equal(engine)
    assert engine.global_steps == 3 and engine.micro_steps == 3 * micro_batches


@pytest.mark.slow_unless(stage=1)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1])
@distributed(2)
def test_sixteen_bits(dtype, stage):
    engine = pipeline(layers(), 2, config(stage, dtype=dtype, gradient_clipping=0.5))
    reference = Reference(layers(), MICRO_BATCHES, 1, clip=0.5)
    data = batches(0, MICRO_BATCHES)
    for _ in range(4):
        loss = engine.train_batch(data)
        assert loss.item() == pytest.approx(reference.step()[0], rel=5e-3 if dtype == "bf16" else 1e-3)
    assert_copies_are_equal(engine)


@distributed(2)
def test_an_overflow_on_one_stage_skips_the_step_on_all():
    engine = pipeline(
        layers(tied=False), 2, config(dtype="fp16", fp16={"enabled": True, "initial_scale_power": 8, "hysteresis": 1})
    )
    data = batches(0, MICRO_BATCHES)
    engine.train_batch(data)
    before = [param.detach().clone() for param in engine.module.parameters()]
    if engine.is_first_stage():
        hook = next(engine.module.parameters()).register_hook(lambda grad: grad * float("inf"))
    engine.train_batch(data)
    assert engine.skipped_steps == 1 and not engine.was_step_applied() and engine.optimizer.cur_scale == 128
    assert all(torch.equal(was, now) for was, now in zip(before, engine.module.parameters()))
    if engine.is_first_stage():
        hook.remove()
    engine.train_batch(data)
    assert engine.was_step_applied() and not torch.equal(before[-1], list(engine.module.parameters())[-1])


@pytest.mark.slow_unless(interval=2)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("interval", [1, 2])
@distributed(2)
def test_activation_checkpointing_changes_nothing(interval, dropout):
    """Masks (integers) pass between stages; dropout is that of one process, by the layers' seeds."""
    specs = layers(dropout=dropout)
    engine = pipeline(specs, 2, config(micro_batches=2), activation_checkpoint_interval=interval)
    reference = Reference(specs, 2, 1, masked=True)
    data = batches(0, 2, masked=True)
    for _ in range(3):
        assert engine.train_batch(data).item() == pytest.approx(reference.step()[0], rel=2e-5)
    assert_same_values(engine, reference.model)


@distributed(2)
def test_a_stage_holds_no_more_than_it_must():
    """1F1B: the first of two stages holds two micro-batches, the last one; GPipe: all. Of what autograd keeps."""
    for schedule, most in (("1f1b", (2, 1)), ("gpipe", (6, 6))):
        engine = pipeline(layers(), 2, config(micro_batches=6), schedule=schedule)
        alive = peak = 0

        class Kept(torch.autograd.Function):
            """Counts forward passes whose backward pass has not run."""

            @staticmethod
            def forward(ctx, x):
                nonlocal alive, peak
                alive += 1
                peak = max(peak, alive)
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                nonlocal alive
                alive -= 1
                return grad

        block = next(module for module in engine.module.modules() if isinstance(module, Block))
        block.up.register_forward_hook(lambda module, args, out, kept=Kept: kept.apply(out))
        engine.train_batch(batches(0, 6))
        assert peak == most[engine.stage_id] and alive == 0
        engine.destroy()


@distributed(4)
def test_evaluation():
    engine = pipeline(layers(), 2)
    replica, reference = engine.grid.data_parallel_id, Sequential(layers())
    inputs = [[next(data) for _ in range(2)] for data in (batches(0, 2), batches(1, 2))]
    with torch.no_grad():
        logits = [[reference(x) for x, _ in part] for part in inputs]
        losses = [[loss_fn(out, y) for out, (_, y) in zip(*both)] for both in zip(logits, inputs)]
    mean = torch.tensor(losses).mean()
    result = engine.eval_batch(iter(inputs[replica]), num_micro_batches=2)
    torch.testing.assert_close(result, mean)
    assert engine.module.training and engine.global_steps == 0
    result, out = engine.eval_batch(iter(inputs[replica]), return_logits=True, bcast_loss=False, num_micro_batches=2)
    if engine.is_last_stage():
        torch.testing.assert_close(result, mean)
        torch.testing.assert_close(out, torch.cat(logits[replica]))
    else:
        assert result is None and out is None
    out = engine.eval_batch(iter(inputs[replica]), compute_loss=False, reduce_output=None, num_micro_batches=2)
    if engine.is_last_stage():
        torch.testing.assert_close(out, logits[replica])
    else:
        assert out is None
    engine.train_batch(batches(replica, MICRO_BATCHES))  # and training goes on
    with pytest.raises(PipelineError, match="reduce_output='max'"):
        engine.eval_batch(iter(inputs[replica]), reduce_output="max")


@distributed(2)
def test_shapes_that_change():
    """From batch to batch always; between micro-batches with dynamic_shape, and a clear error without."""

    def ragged(lengths):
        for length in lengths:
            x = torch.arange(2 * length).view(2, length) % VOCABULARY
            yield x, (x + 1) % VOCABULARY

    engine = pipeline(layers(), 2, config(micro_batches=2))
    for length in (5, 9, 3):
        engine.train_batch(ragged([length] * 2))
    losses = []
    for stages in (1, 2):
        module = PipelineModule(layers(), num_stages=stages, loss_fn=loss_fn, seed_layers=True, dynamic_shape=True)
        changing = deepspeedlite.initialize(model=module, config=config(micro_batches=4))[0]
        losses.append([changing.train_batch(ragged([5, 7, 2, 7])).item() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)
    with pytest.raises(PipelineError, match=r"micro-batch 1 is float32\[2, 7, 32\].*0 was.* 5, 32\].*dynamic_shape"):
        engine.train_batch(ragged([5, 7]))


@pytest.mark.parametrize("rank", [0, 3])
@distributed(4)
def test_batches_that_end_do_so_on_every_rank(rank):
    """A replica without data, or a loader that fails, stops all ranks at once; a further batch trains."""
    engine = pipeline(layers(), 2)
    replica = engine.grid.data_parallel_id
    data = batches(replica, MICRO_BATCHES)
    few = iter([next(data) for _ in range(MICRO_BATCHES - 1)])
    with pytest.raises(StopIteration, match="nothing was trained"):
        engine.train_batch(few if dist.get_rank() == rank else data)

    def broken():
        yield next(data)
        raise OSError("the disk is gone")

    with pytest.raises(OSError if dist.get_rank() == rank else PipelineError, match="disk is gone"):
        engine.train_batch(broken() if dist.get_rank() == rank else data)
    assert engine.global_steps == 0
    engine.train_batch(batches(replica, MICRO_BATCHES))
    assert engine.global_steps == 1


@distributed(2)
def test_batches_come_from_where_they_are_said_to():
    dataset = [(torch.tensor([i % VOCABULARY] * 4), torch.tensor([(i + 1) % VOCABULARY] * 4)) for i in range(24)]
    module = PipelineModule(layers(), num_stages=2, loss_fn=loss_fn)
    engine, _, loader, _ = deepspeedlite.initialize(model=module, config=config(), training_data=dataset)
    assert len(loader) == 6
    for _ in range(3):  # 9 micro-batches: the loader begins anew
        engine.train_batch()
    assert engine.global_samples == 36
    engine.set_batch_fn(lambda batch: (batch["x"], batch["y"]))
    engine.set_dataloader([{"x": x, "y": y} for (x, y), _ in zip(batches(0, 1), range(MICRO_BATCHES))])
    engine.train_batch()
    engine.set_dataiterator(iter([]))
    with pytest.raises(StopIteration):
        engine.train_batch()
    engine.set_batch_fn(lambda batch: batch)
    with pytest.raises(PipelineError, match=r"\(inputs, labels\), not a Tensor"):
        engine.train_batch(iter([torch.zeros(1)] * 3))
    with pytest.raises(PipelineError, match="reads from an iterator, not a list"):
        engine.train_batch([1, 2, 3])


@distributed(2)
def test_what_a_pipeline_engine_refuses():
    engine = pipeline(layers(), 2)
    for call in (engine, engine.backward, engine.step):
        with pytest.raises(PipelineError, match=r"call engine\.train_batch"):
            call(torch.zeros(1))
    with pytest.raises(UnsupportedError, match="stage 3 with a PipelineModule"):
        pipeline(layers(), 2, config(stage=3))
    with pytest.raises(ConfigError, match="has its own mpu"):
        module = PipelineModule(layers(), num_stages=2, loss_fn=loss_fn)
        deepspeedlite.initialize(model=module, config=config(), mpu=module.mpu())


@distributed(2)
def test_what_a_pipeline_module_refuses():
    block = Block(WIDTH)
    linear = [LayerSpec(torch.nn.Linear, 2, 2), LayerSpec(torch.nn.ReLU)]
    tied = [TiedLayerSpec("t", torch.nn.Linear, 2, width) for width in (2, 3)]
    two: dict[str, Any] = {"layers": layers(), "num_stages": 2}
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ConfigError, "num_stages= or topology=", {"layers": layers()}),
        (DistributedError, "2 ranks cannot be divided into 3", {"layers": layers(), "num_stages": 3}),
        (ConfigError, "1 layers cannot fill 2", {"layers": layers()[:1], "num_stages": 2}),
        (ConfigError, r"stage 1 \(ReLU\) has no parameters", {"layers": linear, "num_stages": 2}),
        (ConfigError, "'best guess' is not known", {**two, "partition_method": "best guess"}),
        (ConfigError, "no layer's class has a name", {**two, "partition_method": "type:LSTM"}),
        (ConfigError, "schedule='zigzag'", {**two, "schedule": "zigzag"}),
        (ConfigError, "shares its up.weight with a layer of another", {"layers": [block, block], "num_stages": 2}),
        (ConfigError, "tied as 't' are not alike", {"layers": tied, "num_stages": 2, "partition_method": "uniform"}),
        (ConfigError, "has 4 ranks, and 2 are", {"layers": layers(), "topology": PipeDataParallelTopology(2, 2)}),
        (ConfigError, "axes pipe, data", {"layers": layers(), "topology": ProcessTopology(["pipe"], [2])}),
        (ConfigError, "num_stages=1, and the topology has 2",
         {"layers": layers(), "num_stages": 1, "topology": PipeDataParallelTopology(2, 1)}),
    ]  # fmt: skip
    for error, message, arguments in cases:
        if "has no parameters" in message and dist.get_rank() == 0:
            error, message = PipelineError, rf"rank 1 \(pipeline stage 1\) failed: ConfigError: .*{message}"
        with pytest.raises(error, match=message):
            PipelineModule(**arguments)


class NotATensor(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> Any:
        return {"hidden": super().forward(x)}


@distributed(2)
def test_only_tensors_pass():
    specs = [LayerSpec(NotATensor, 4, 4), LayerSpec(torch.nn.Linear, 4, 4)]
    engine = pipeline(specs, 2, loss_fn=lambda out, y: out.sum())
    with pytest.raises(PipelineError, match="stage 0 returned a dict; only dense tensors"):
        engine.train_batch(iter([(torch.zeros(2, 4), torch.zeros(2))] * 3))


class Two(torch.nn.Linear):
    """Of its two outputs the next stage uses only the first."""

    def forward(self, x: torch.Tensor) -> Any:
        y = super().forward(x)
        return y, y * 2, torch.empty(0)


class First(torch.nn.Linear):
    def forward(self, x: Any) -> torch.Tensor:
        return super().forward(x[0])


@distributed(3)
def test_outputs_that_nothing_depends_on_and_frozen_stages():
    """A gradient of zeros comes back for an unused output; no gradient for what a frozen stage sends."""
    specs = [LayerSpec(Two, 4, 4), LayerSpec(First, 4, 4), LayerSpec(torch.nn.Linear, 4, 1)]
    engine = pipeline(specs, 3, loss_fn=lambda out, y: (out - y).square().mean())
    data = [(torch.randn(4, 4, generator=torch.Generator().manual_seed(i)), torch.ones(4, 1)) for i in range(3)]
    losses = [engine.train_batch(iter(data)).item() for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]
    module = PipelineModule([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)], num_stages=3,
                            loss_fn=lambda out, y: (out - y).square().mean(), partition_method="uniform")  # fmt: skip
    if module.stage_id == 0:
        module.forward_funcs[0].weight.requires_grad_(False)  # its bias is trained
    if module.stage_id == 1:
        module.forward_funcs[0].bias.requires_grad_(False)
    engine = deepspeedlite.initialize(model=module, config=config())[0]
    frozen = [param for param in module.parameters() if not param.requires_grad]
    before = [param.detach().clone() for param in frozen]
    losses = [engine.train_batch(iter(data)).item() for _ in range(8)]
    assert losses[-1] < losses[0] and all(torch.equal(a, b) for a, b in zip(before, frozen))


@distributed(2)
def test_a_stage_may_begin_in_place():
    """As AlexNet's do, cut before a ReLU: the gradients are those of one stage."""
    specs = [
        LayerSpec(torch.nn.Linear, 4, 4),
        LayerSpec(torch.nn.Linear, 4, 8),
        LayerSpec(torch.nn.ReLU, inplace=True),
        LayerSpec(torch.nn.Linear, 8, 1),
    ]
    data = [(torch.randn(4, 4, generator=torch.Generator().manual_seed(i)), torch.ones(4, 1)) for i in range(3)]
    found = []
    for cut in ({"num_stages": 1}, {"num_stages": 2, "partition_method": "uniform"}):
        module = PipelineModule(specs, seed_layers=True, loss_fn=lambda out, y: (out - y).square().mean(), **cut)
        engine = deepspeedlite.initialize(model=module, config=config())[0]
        found.append([engine.train_batch(iter(data)).item() for _ in range(5)])
        assert module.parts in ([0, 4], [0, 2, 4])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@distributed(2)
def test_without_a_loss_function_the_last_layer_is_the_loss():
    specs = [LayerSpec(torch.nn.Linear, 4, 4), LayerSpec(torch.nn.Linear, 4, 1), lambda out: out.square().mean()]
    engine = pipeline(specs, 2, loss_fn=None)
    data = [(torch.ones(4, 4), torch.zeros(1))] * 3
    losses = [engine.train_batch(iter(data)).item() for _ in range(5)]
    assert losses[-1] < losses[0]
    assert engine.eval_batch(iter(data)).item() < losses[-1]


@distributed(4)
def test_stages_of_parts():
    """An axis `model`: both ranks of a stage hold the same here, which must count once in the norm."""
    topology = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=1)
    module = PipelineModule(layers(), topology=topology, loss_fn=loss_fn, seed_layers=True)
    engine = deepspeedlite.initialize(model=module, config=config(gradient_clipping=0.5))[0]
    reference = Reference(layers(), MICRO_BATCHES, 1, clip=0.5)
    data = batches(0, MICRO_BATCHES)
    for _ in range(2):
        loss = engine.train_batch(data)
        expected, norm = reference.step()
        assert loss.item() == pytest.approx(expected, rel=2e-5)
        assert engine.get_global_grad_norm() == pytest.approx(norm, rel=2e-5)
    assert_same_values(engine, reference.model)
    grid = engine.grid
    assert engine.is_model_parallel and grid.get_model_parallel_world_size() == 4
    assert grid.get_tensor_model_parallel_world_size() == 2 and grid.get_pipe_parallel_rank() == dist.get_rank() // 2
    assert [grid.stage_to_global(stage) for stage in (0, 1)] == [dist.get_rank() % 2, dist.get_rank() % 2 + 2]


@distributed(2)
def test_offloaded_optimizer_states():
    """ZeRO's other means work in a pipeline as elsewhere."""
    settings = config(zero_optimization={"stage": 1, "offload_optimizer": {"device": "cpu"}}, dtype="bf16")
    plain, offloaded = (pipeline(layers(), 2, one) for one in (config(dtype="bf16"), settings))
    for engine in (plain, offloaded):
        data = batches(0, MICRO_BATCHES)
        engine.losses = [engine.train_batch(data).item() for _ in range(3)]
    assert plain.losses == offloaded.losses


@distributed(2)
def test_partition_methods():
    specs = layers(tied=False)
    for method, edges in (("uniform", [0, 3, 6]), ("type:block", [0, 4, 6]), ("TYPE:Block|Embedding", [0, 3, 6])):
        module = PipelineModule(specs, num_stages=2, partition_method=method, loss_fn=loss_fn)
        assert module.parts == edges
        assert [name.split(".")[0] for name, _ in module.named_children()][:1] != []
    assert module.stage_owner(0) == 0 and module.stage_owner(5) == 1
    with pytest.raises(ConfigError, match="no layer 6"):
        module.stage_owner(6)


DYING = """
import os, sys
{boot}
from test_pipe import MICRO_BATCHES, batches, pipeline, layers
engine = pipeline(layers(tied=False), 3)
data = batches(0, MICRO_BATCHES)
engine.train_batch(data)
if engine.stage_id == 1:
    passes = []
    def die(*_):
        passes.append(None)
        if len(passes) == 2:
            {death}
    next(engine.module.parameters()).register_hook(die)
engine.train_batch(data)
"""


@pytest.mark.slow
@pytest.mark.parametrize("death, said", [
    ("os.kill(os.getpid(), 9)", "rank 1 failed first: killed by SIGKILL"),
    ("raise ArithmeticError('in the middle')", r"stage 1 .*rank 1.* ArithmeticError: in the middle"),
])  # fmt: skip
def test_a_stage_that_dies_in_the_middle_of_a_batch_ends_the_others(death, said, tmp_path):
    """The stages before and after it are in the middle of passes of their own; who it was is said."""
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(boot=BOOT, death=death))
    launcher = [sys.executable, "-m", "deepspeedlite.launcher", "--num_gpus", "3", str(script)]
    done = subprocess.run(launcher, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode != 0
    assert re.search(said, done.stderr + done.stdout), done.stderr
