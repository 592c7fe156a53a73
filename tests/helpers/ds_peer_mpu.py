"""Trains the tensor-parallel model of two by two ranks with an mpu, by DeepSpeed or by deepspeedlite, the same way.

    PYTHON ds_peer_mpu.py LIBRARY CONFIGS.json STORE OUT.json

The library is imported once: ranks are forked. Rank 0 writes per configuration each step's loss, averaged over
data-parallel ranks, and its gradients' norm.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from ds_peer import on_forked_ranks
from tensor_parallel import Grid, OldMpu, batch, parallel_model

STEPS = 6


def train(library: Any, grid: Grid, settings: dict[str, Any]) -> list[tuple[float, float | None]]:
    engine, *_ = library.initialize(model=parallel_model(grid), config=settings, mpu=OldMpu(grid))
    dtype = next(engine.module.parameters()).dtype
    told = []
    for step in range(STEPS):
        x, y = batch(step, 0, dist.get_rank(grid.data))
        loss = engine(x.to(dtype), y)
        engine.backward(loss)
        engine.step()
        mean = loss.detach().float()
        dist.all_reduce(mean, group=grid.data)
        norm = engine.get_global_grad_norm()
        told.append((mean.item() / dist.get_world_size(grid.data), None if norm is None else float(norm)))
    return told


def main(name: str, configs: str, store: str, out: str) -> None:
    library = importlib.import_module(name)
    importlib.import_module("torch._dynamo")  # which making an optimizer imports
    if name == "deepspeedlite":
        assert library.initialize  # imports what it needs
    on_forked_ranks(4, lambda rank: work(library, configs, store, rank, out))


def work(library: Any, configs: str, store: str, rank: int, out: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, 4), rank=rank, world_size=4)
    grid = Grid()
    told = [train(library, grid, settings) for settings in json.loads(Path(configs).read_text())]
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(told))
    dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
