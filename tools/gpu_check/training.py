"""Step time, tokens per second and peak memory of a GPT in bf16 with Adam, ours at each stage, then installed peers."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from tools.gpu_check import gpt
from tools.gpu_check.setting import NotHereError, Rows, Setting

ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
ON_HOST = {"device": "cpu", "pin_memory": True}
OURS: dict[str, dict[str, Any]] = {
    "ours, stage 3": {"stage": 3},
    "ours, stage 2": {"stage": 2},
    "ours, stage 1": {"stage": 1},
    "ours, stage 0": {"stage": 0},
    "ours, stage 2, optimizer on the host": {"stage": 2, "offload_optimizer": ON_HOST},
    "ours, stage 3, all on the host": {"stage": 3, "offload_optimizer": ON_HOST, "offload_param": ON_HOST},
}
TORCHS_OWN = ("cpu", "cuda", "xpu")  # kinds of device for which torch itself brings all that it offers
Step = Callable[[], Any]  # one whole optimizer step on this rank's batch; its loss
Maker = Callable[[gpt.GPT, gpt.Batch, Setting], tuple[Step, Callable[[], None]]]  # the step, and what ends it


def rows(setting: Setting) -> Rows:
    """Ours and torch's own by turns; DeepSpeed, which may compile something first, last."""
    setting.start_group()
    makers: dict[str, Maker] = {name: ours(zero) for name, zero in OURS.items()}
    peers: dict[str, Maker] = {"torch alone": alone, "DDP": ddp, "FSDP2": fsdp2}
    turns = [*list(makers.items())[:1], *peers.items(), *list(makers.items())[1:]]
    turns += [(f"DeepSpeed, stage {stage}", _deepspeed(stage)) for stage in (3, 2, 1)]
    for name, make in turns:
        yield setting.tried(name, lambda make=make: measured(make, setting), judges=False)  # type: ignore[misc]


def measured(make: Maker, setting: Setting) -> dict[str, Any]:
    """Train some steps on the same batch; the loss must fall, for who trains nothing is quick."""
    if make in (alone, ddp, fsdp2) and setting.device.type not in TORCHS_OWN:
        raise NotHereError(f"torch has no autocast, and FSDP2 is not tried, on {setting.device.name}")
    config, sequences = gpt.sizes(setting)
    batch = gpt.batch(config, sequences, setting)
    model = gpt.fresh(config)
    numel = model.numel()
    step, end = make(model, batch, setting)
    del model
    try:
        first = float(step())
        setting.device.reset_peak_memory()
        warm, steps = (1, 2) if setting.tiny else (3, 8)
        ms = setting.step_ms(step, warm, steps)
        last = float(step())
    finally:
        end()
    assert last < first, f"the loss went from {first} to {last}"
    peak = setting.device.memory_stats().get("peak_allocated_bytes", 0)
    tokens = sequences * config.context * setting.ranks
    figures = {"step_ms": ms, "tokens_per_s": tokens / ms * 1e3, "peak_GiB": peak / 2**30}
    return {**figures, "Mparams": numel / 1e6, "loss_from": first, "loss_to": last, "ranks": setting.ranks}


def ours(zero: dict[str, Any]) -> Maker:
    """Our engine with that section `zero_optimization`."""

    def make(model: gpt.GPT, batch: gpt.Batch, setting: Setting) -> tuple[Step, Callable[[], None]]:
        engine = engine_of(model, zero, len(batch[0]))
        return _engine_step(engine, batch), engine.destroy

    return make


def engine_of(model: gpt.GPT, zero: dict[str, Any], sequences: int) -> Any:
    """Our engine, with the AdamW of its configuration."""
    import deepspeedlite

    optimizer = {"type": "AdamW", "params": {**ADAMW, "betas": list(ADAMW["betas"])}}
    config = {**gpt.engine_config(zero, sequences), "optimizer": optimizer}
    return deepspeedlite.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def _engine_step(engine: Any, batch: gpt.Batch) -> Step:
    def step() -> Any:
        loss = engine(*batch)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def alone(model: gpt.GPT, batch: gpt.Batch, setting: Setting) -> tuple[Step, Callable[[], None]]:
    """Plain torch on each rank by itself, in autocast with fp32 weights."""
    return _autocast_step(model.to(setting.device.torch_device), batch, setting), lambda: None


def ddp(model: gpt.GPT, batch: gpt.Batch, setting: Setting) -> tuple[Step, Callable[[], None]]:
    """DistributedDataParallel over the same."""
    module = DistributedDataParallel(model.to(setting.device.torch_device), gradient_as_bucket_view=True)
    return _autocast_step(module, batch, setting), lambda: None


def _autocast_step(module: Any, batch: gpt.Batch, setting: Setting) -> Step:
    optimizer = torch.optim.AdamW(module.parameters(), fused=setting.device.type in ("cuda", "cpu"), **ADAMW)

    def step() -> Any:
        with torch.autocast(setting.device.type, dtype=torch.bfloat16):
            loss = module(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def fsdp2(model: gpt.GPT, batch: gpt.Batch, setting: Setting) -> tuple[Step, Callable[[], None]]:
    """fully_shard on each block and the root: fp32 shards, gathered and reduced in bf16."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    shared: dict[str, Any] = {"mesh": init_device_mesh(setting.device.type, (setting.ranks,)), "mp_policy": policy}
    model.to(setting.device.torch_device)
    for block in model.blocks:
        fully_shard(block, **shared)
    module: Any = fully_shard(model, **shared)
    optimizer = torch.optim.AdamW(module.parameters(), fused=setting.device.type in ("cuda", "cpu"), **ADAMW)

    def step() -> Any:
        loss = module(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step, lambda: None


def _deepspeed(stage: int) -> Maker:
    def make(model: gpt.GPT, batch: gpt.Batch, setting: Setting) -> tuple[Step, Callable[[], None]]:
        try:
            importlib.metadata.version("deepspeed")
        except importlib.metadata.PackageNotFoundError:
            raise NotHereError("deepspeed is not installed") from None
        import deepspeed

        # torch's own optimizer: DeepSpeed's would be compiled first, for minutes.
        optimizer = torch.optim.AdamW(model.parameters(), fused=setting.device.type in ("cuda", "cpu"), **ADAMW)
        config = {**gpt.engine_config({"stage": stage}, len(batch[0])), "zero_allow_untested_optimizer": True}
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=model.parameters(),
            config=config,
            dist_init_required=False,
        )
        return _engine_step(engine, batch), engine.destroy

    return make
