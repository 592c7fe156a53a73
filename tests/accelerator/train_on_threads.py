"""Trains on the accelerator of threads: each case under several seeds, which must give what running at once gives.

    python train_on_threads.py [--seeds N] CASE ...        (or `all`)

Prints one JSON line per case: what each rank found by seed, 0 first (losses and what else the case computes, gradient
norm, how often the host waited in each step), or its traceback. Seed 0 runs work as it is put down; the others run it
late, in orders of their own. A case that does not end is killed, with every rank's stacks on stderr.
"""

from __future__ import annotations

import faulthandler
import json
import os
import queue
import sys
import tempfile
import traceback
from contextlib import nullcontext
from typing import Any, NamedTuple

import threads_device
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import deepspeedlite
from deepspeedlite.pipe import PipelineModule
from deepspeedlite.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state, safe_set_full_fp32_param

WORLD = 2
STEPS = 3
SEEDS = 2  # beside 0, unless the command line says more
LONGEST_S = 100
FLOW = {"stage3_param_persistence_threshold": 20, "stage3_prefetch_bucket_size": 600, "stage3_max_reuse_distance": 0}
CPU, PINNED = {"device": "cpu"}, {"device": "cpu", "pin_memory": True}
NVME = {"device": "nvme", "nvme_path": "FOLDER"}


class Case(NamedTuple):
    """The zero section, the dtype, the rest of the configuration; and what is done beside training, by name."""

    zero: dict[str, Any]
    dtype: str = ""
    more: dict[str, Any] = {}
    also: str = ""


KEPT, WHOLE = {**FLOW, "stage3_max_reuse_distance": 10**9}, {**FLOW, "stage3_param_persistence_threshold": 10**6}
ON_HOST = {"activation_checkpointing": {"cpu_checkpointing": True}}
ACCUMULATED, CLIPPED = {"gradient_accumulation_steps": 2}, {"gradient_clipping": 0.5}
CASES = {
    "stage 0": Case({"stage": 0}),
    "stage 0, fp16, clipped": Case({"stage": 0}, "fp16", CLIPPED),
    "stage 1, bf16, clipped": Case({"stage": 1}, "bf16", CLIPPED),
    "stage 2, fp16, accumulated": Case({"stage": 2}, "fp16", {**ACCUMULATED, "gradient_clipping": 1.0}),
    "stage 2, in the user's stream": Case({"stage": 2}, "bf16", ACCUMULATED, "in the user's stream"),
    "stage 2, states leave and come": Case({"stage": 2}, "bf16", {}, "states leave and come"),
    "stage 3, ahead of use": Case({"stage": 3, **FLOW}, "", ACCUMULATED),
    "stage 3, bf16, kept for reuse": Case({"stage": 3, **KEPT}, "bf16"),
    "stage 3, fp16, all persistent": Case({"stage": 3, **WHOLE}, "fp16", CLIPPED),
    "stage 3, in the user's stream": Case({"stage": 3, **FLOW}, "bf16", {}, "in the user's stream"),
    "stage 3, states leave and come": Case({"stage": 3, **FLOW}, "", {}, "states leave and come"),
    "stage 3, gathered between steps": Case({"stage": 3, **FLOW}, "bf16", {}, "gathered"),
    "stage 1, averaged aside": Case({"stage": 1}, "", {}, "averaged aside"),
    "stage 2, bf16, optimizer on the CPU": Case({"stage": 2, "offload_optimizer": PINNED}, "bf16"),
    "stage 2, gradients leave": Case({"stage": 2, "offload_optimizer": PINNED}),
    "stage 2, gradients leave, accumulated": Case({"stage": 2, "offload_optimizer": PINNED}, "", ACCUMULATED),
    "stage 3, all on the CPU": Case({"stage": 3, **FLOW, "offload_optimizer": CPU, "offload_param": PINNED}),
    "stage 3, values on the CPU, clipped": Case({"stage": 3, **FLOW, "offload_param": PINNED}, "bf16", CLIPPED),
    "stage 2, optimizer on the disk": Case({"stage": 2, "offload_optimizer": {**NVME, "pin_memory": True}}, "bf16"),
    "stage 3, all on the disk": Case({"stage": 3, **FLOW, "offload_optimizer": NVME, "offload_param": NVME}),
    "stage 1, inputs on the host": Case({"stage": 1}, "", ON_HOST),
    "stage 3, inputs on the host": Case({"stage": 3, **FLOW}, "bf16", {**ON_HOST, **ACCUMULATED}),
    "stage 3, saved and loaded": Case({"stage": 3, **FLOW}, "bf16", {}, "saved"),
    "stage 2, saved meanwhile": Case({"stage": 2}, "", {"checkpoint": {"async_save": True}}, "saved"),
    "pipeline, accumulated": Case({"stage": 0}, "", ACCUMULATED, "pipeline"),
    "pipeline, stage 1, bf16": Case({"stage": 1}, "bf16", ACCUMULATED, "pipeline"),
}  # fmt: skip


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.dropout(self.down(nn.functional.gelu(self.up(self.norm(x)))), 0.1, self.training)


class Model(nn.Module):
    def __init__(self, checkpoints: bool) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(3)), nn.Linear(16, 4)
        self.checkpoints = checkpoints

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = deepspeedlite.checkpointing.checkpoint(block, x) if self.checkpoints else block(x)
        return self.head(x)


def configuration(case: Case, folder: str) -> dict[str, Any]:
    zero = {
        key: value | {"nvme_path": folder} if isinstance(value, dict) and "nvme_path" in value else value
        for key, value in case.zero.items()
    }
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"reduce_bucket_size": 600, **zero},
        **case.more,
    }
    if case.dtype:
        config[case.dtype] = {"enabled": True, **({"initial_scale_power": 8} if case.dtype == "fp16" else {})}
    return config


def between_steps(case: Case, engine: Any, found: list[torch.Tensor]) -> None:
    """What users do there."""
    params = list(engine.module.parameters())
    if case.also == "states leave and come":
        engine.offload_states()
        engine.reload_states()
    elif case.also == "gathered":
        with deepspeedlite.zero.GatheredParameters(params[:3], modifier_rank=0):
            if dist.get_rank() == 0:
                params[0].data.mul_(1.01)
        full = safe_get_full_fp32_param(params[-1])
        found += [full.sum(), safe_get_full_optimizer_state(params[-1], "exp_avg").sum()]
        safe_set_full_fp32_param(params[-1], full * 0.99)


class Average:
    """Of the weights, in a stream of its own: training does not go on until they have been read."""

    def __init__(self, engine: Any) -> None:
        self.params = list(engine.module.parameters())
        self.values = [param.detach().clone() for param in self.params]
        self.stream = torch.threads.Stream()

    def update(self) -> None:
        self.stream.wait_stream(torch.threads.current_stream())
        with self.stream:
            for value, param in zip(self.values, self.params):
                value.lerp_(param.detach(), 0.5)
        torch.threads.current_stream().wait_stream(self.stream)


def users_stream(case: Case) -> Any:
    """What a user trains in, if that is the case."""
    if case.also != "in the user's stream":
        return nullcontext()
    stream = torch.threads.Stream()
    stream.wait_stream(torch.threads.current_stream())
    return stream


def train(case: Case, rank: int, folder: str) -> tuple[list[float], float, list[int]]:
    """Losses and what else was computed, the last gradient norm, and how often the host waited in each step."""
    config, native = configuration(case, folder), torch.threads.native
    checkpoints = "activation_checkpointing" in case.more
    torch.manual_seed(0)

    def build() -> Any:
        engine, *_ = deepspeedlite.initialize(model=Model(checkpoints), config=config)
        if checkpoints:
            deepspeedlite.checkpointing.configure(None, deepspeed_config=config)
        return engine

    engine = build()
    found: list[torch.Tensor] = []
    waits = []
    inputs = torch.Generator().manual_seed(rank)
    torch.threads.manual_seed(7)
    average = Average(engine) if case.also == "averaged aside" else None
    stream = users_stream(case)
    micro_batches = case.more.get("gradient_accumulation_steps", 1)
    for step in range(STEPS):
        data = [[torch.randn(2, width, generator=inputs) for width in (16, 4)] for _ in range(micro_batches)]
        before = native.syncs()
        with stream:
            for x, y in data:
                x, y = (half.pin_memory().to(engine.device, non_blocking=True) for half in (x, y))
                loss = (engine(x.to(next(engine.parameters()).dtype)).float() - y).square().mean()
                engine.backward(loss)
                engine.step()
                found.append(loss.detach())
        waits.append(native.syncs() - before)
        if average is not None:
            average.update()
        between_steps(case, engine, found)
        if case.also == "saved" and step == 1:
            engine.save_checkpoint(folder)
        if case.also == "saved" and step == STEPS - 1:
            engine = build()
            engine.load_checkpoint(folder)
            found.append((engine(x.to(next(engine.parameters()).dtype)).float() - y).square().mean().detach())
            engine.optimizer.zero_grad()
    torch.threads.synchronize()
    if average is not None:
        found += [value.sum() for value in average.values]
    norm = 0.0 if case.also == "saved" else float(engine.get_global_grad_norm())
    return [value.item() for value in found], norm, waits


def train_pipeline(case: Case, rank: int, folder: str) -> tuple[list[float], float, list[int]]:
    """The same for two stages."""
    config, native = configuration(case, folder), torch.threads.native
    torch.manual_seed(0)
    layers = [*(Block() for _ in range(4)), nn.Linear(16, 4)]
    module = PipelineModule(layers, num_stages=WORLD, loss_fn=lambda x, y: (x.float() - y).square().mean())
    engine, *_ = deepspeedlite.initialize(model=module, config=config)
    torch.threads.manual_seed(7)
    inputs = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    losses, waits = [], []
    for _ in range(STEPS):
        data = [
            (
                torch.randn(2, 16, generator=inputs).to(engine.device, dtype),
                torch.randn(2, 4, generator=inputs).to(engine.device),
            )
            for _ in range(case.more["gradient_accumulation_steps"])
        ]
        before = native.syncs()
        losses.append(engine.train_batch(iter(data)).detach())
        waits.append(native.syncs() - before)
    return [loss.item() for loss in losses], float(engine.get_global_grad_norm()), waits


def work(name: str, seeds: int, rank: int, folder: str, results: Any) -> None:
    faulthandler.dump_traceback_later(LONGEST_S - 20, exit=True)
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
        case, native = CASES[name], torch.threads.native
        native.seed(0)
        deepspeedlite.init_distributed(init_method=f"file://{folder}/store")
        found = []
        for seed in range(seeds + 1):
            native.seed(seed * 10 + rank if seed else 0)
            own = os.path.join(folder, str(seed))
            os.makedirs(own, exist_ok=True)
            losses, norm, waits = (train_pipeline if case.also == "pipeline" else train)(case, rank, own)
            found.append({"seed": seed, "losses": losses, "norm": norm, "waits": waits})
            dist.barrier()
        results.put((rank, found))
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc()))


def run(name: str, seeds: int) -> dict[int, Any]:
    """What each rank found, or why it found nothing."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("fork")
        results = context.Queue()
        ranks = [context.Process(target=work, args=(name, seeds, rank, folder, results)) for rank in range(WORLD)]
        for process in ranks:
            process.start()
        found: dict[int, Any] = dict.fromkeys(range(WORLD), f"did not end in {LONGEST_S} s")
        try:
            for _ in ranks:
                rank, what = results.get(timeout=LONGEST_S)
                found[rank] = what
                if isinstance(what, str):
                    break
        except queue.Empty:
            pass
        finally:
            for process in ranks:
                process.join(2)
                process.kill()
        return found


def main(arguments: list[str]) -> None:
    seeds = SEEDS
    if arguments[:1] == ["--seeds"]:
        seeds, arguments = int(arguments[1]), arguments[2:]
    threads_device.use()
    os.environ["DSL_LOG_LEVEL"] = "warning"
    for name in CASES if arguments == ["all"] else arguments:
        found = run(name, seeds)
        print(json.dumps({"case": name, "ranks": [found[rank] for rank in range(WORLD)]}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # the device's own thread may want Python's lock, which ends with the interpreter
