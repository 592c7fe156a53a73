"""Ranks that take different paths get an error that says where each of them is, not a hang and not wrong values."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest
import torch
from harness import distributed

import deepspeedlite
from deepspeedlite import comm
from deepspeedlite.errors import DistributedError

TIMEOUT_S = 4


class Branching(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, skipped):
        for index, block in enumerate(self.blocks):
            if index != skipped:
                x = torch.tanh(block(x))
        return x.sum()


@pytest.mark.slow
@distributed(world_size=2, init_process_group=False, env={"DS_ACCELERATOR": "cpu"})
def test_a_rank_that_skips_a_sharded_module(free_port):
    start(free_port)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_reuse_distance": 0,
        },
    }
    engine, *_ = deepspeedlite.initialize(model=Branching(), config=config)
    engine(torch.ones(1, 8), None)
    started_s = time.monotonic()
    with pytest.raises(DistributedError, match="do not meet") as caught:
        engine(torch.ones(1, 8), 2 if comm.get_rank() == 1 else None)
    assert time.monotonic() - started_s < TIMEOUT_S + 12
    said = str(caught.value)
    assert "rank 0 waits in all_gather_into_tensor of the values of blocks.2." in said, said
    assert "rank 1 waits in all_gather_into_tensor of the values of blocks.3." in said, said
    assert "set_z3_leaf_modules" in said


@pytest.mark.slow
@distributed(world_size=2, init_process_group=False, env={"DS_ACCELERATOR": "cpu"})
def test_a_rank_that_is_elsewhere(free_port):
    start(free_port)
    group = comm.Group()
    if group.rank == 1:
        time.sleep(TIMEOUT_S + 8)
        return
    with pytest.raises(DistributedError, match="rank 1 has not said where it is") as caught:
        group.all_reduce(torch.ones(3))
    assert "rank 0 waits in all_reduce of 3 elements" in str(caught.value)


def start(port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    deepspeedlite.init_distributed(verbose=False, timeout=timedelta(seconds=TIMEOUT_S))
