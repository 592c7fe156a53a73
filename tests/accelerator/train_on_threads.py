"""Trains on the accelerator of threads: each case under several seeds, which must give what running at once gives.

    python train_on_threads.py CASE ...        (or `all`)

Prints one JSON line per case: the losses and gradient norms of each rank by seed, 0 first, and how often it waited.
Seed 0 runs work as it is put down; the others run it late, in orders of their own.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import tempfile
import traceback
from typing import Any

import threads_device
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import deepspeedlite

WORLD = 2
STEPS = 3
SEEDS = (0, 1, 2)
LONGEST_S = 100
FLOW = {"stage3_param_persistence_threshold": 20, "stage3_prefetch_bucket_size": 600, "stage3_max_reuse_distance": 0}
CPU, PINNED = {"device": "cpu"}, {"device": "cpu", "pin_memory": True}
# By name: the zero section, the dtype, the rest of the configuration.
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "stage 0": ({"stage": 0}, "", {}),
    "stage 1, bf16, clipped": ({"stage": 1}, "bf16", {"gradient_clipping": 0.5}),
    "stage 2, fp16, accumulated": ({"stage": 2}, "fp16", {"gradient_accumulation_steps": 2, "gradient_clipping": 1.0}),
    "stage 3, ahead of use": ({"stage": 3, **FLOW}, "", {"gradient_accumulation_steps": 2}),
    "stage 3, bf16, kept for reuse": ({"stage": 3, **FLOW, "stage3_max_reuse_distance": 10**9}, "bf16", {}),
    "stage 2, bf16, optimizer on the CPU": ({"stage": 2, "offload_optimizer": PINNED}, "bf16", {}),
    "stage 3, all on the CPU": ({"stage": 3, **FLOW, "offload_optimizer": CPU, "offload_param": PINNED}, "", {}),
    "stage 1, inputs on the host": ({"stage": 1}, "", {"activation_checkpointing": {"cpu_checkpointing": True}}),
    "stage 3, saved and loaded": ({"stage": 3, **FLOW}, "bf16", {}),
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


def train(case: str, rank: int, folder: str) -> tuple[list[float], float]:
    zero, dtype, more = CASES[case]
    micro_batches = more.get("gradient_accumulation_steps", 1)
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"reduce_bucket_size": 600, **zero},
        **more,
    }
    if dtype:
        config[dtype] = {"enabled": True, **({"initial_scale_power": 8} if dtype == "fp16" else {})}

    def build() -> Any:
        engine, *_ = deepspeedlite.initialize(model=Model("activation_checkpointing" in more), config=config)
        if "activation_checkpointing" in more:
            deepspeedlite.checkpointing.configure(None, deepspeed_config=config)
        return engine

    engine = build()
    losses = []
    inputs = torch.Generator().manual_seed(rank)
    torch.threads.manual_seed(7)
    for step in range(STEPS * micro_batches):
        x, y = (torch.randn(2, width, generator=inputs).to(engine.device) for width in (16, 4))
        loss = (engine(x.to(next(engine.parameters()).dtype)).float() - y).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
        if "saved" in case and step == 1:
            engine.save_checkpoint(folder)
            engine = build()
            engine.load_checkpoint(folder)
    return [loss.item() for loss in losses], float(engine.get_global_grad_norm())


def work(case: str, rank: int, folder: str, results: Any) -> None:
    faulthandler.dump_traceback_later(LONGEST_S - 20, exit=True)
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
        native = torch.threads.native
        native.seed(0)
        deepspeedlite.init_distributed(init_method=f"file://{folder}/store")
        found = []
        for seed in SEEDS:
            native.seed(seed * 10 + rank if seed else 0)
            before = native.syncs()
            losses, norm = train(case, rank, os.path.join(folder, str(seed)))
            found.append({"seed": seed, "losses": losses, "norm": norm, "waits": native.syncs() - before})
            dist.barrier()
        results.put((rank, found))
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc()))


def main(names: list[str]) -> None:
    threads_device.use()
    os.environ["DSL_LOG_LEVEL"] = "warning"
    for case in CASES if names == ["all"] else names:
        with tempfile.TemporaryDirectory() as folder:
            context = mp.get_context("fork")
            results = context.Queue()
            ranks = [context.Process(target=work, args=(case, rank, folder, results)) for rank in range(WORLD)]
            for process in ranks:
                process.start()
            try:
                found = dict(results.get(timeout=LONGEST_S) for _ in ranks)
            finally:
                for process in ranks:
                    process.join(10)
                    process.kill()
        print(json.dumps({"case": case, "ranks": [found[rank] for rank in range(WORLD)]}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # the device's own thread may want Python's lock, which ends with the interpreter
