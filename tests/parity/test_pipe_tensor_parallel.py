"""Pipeline stages whose tensors are split too: 2 stages x 2 tensor-parallel ranks, against the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import distributed
from tensor_parallel import _Enter, _Leave
from torch import Tensor, nn

import deepspeedlite
from deepspeedlite.parallel.pipe.topology import PipeModelDataParallelTopology
from deepspeedlite.pipe import LayerSpec, PipelineModule

pytestmark = pytest.mark.slow

WIDTH, HIDDEN, MICRO_BATCHES = 6, 12, 3
HYPER = {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.1}


class Block(nn.Module):
    """A norm, which all hold alike, and a feed-forward layer, of which each has a part; whole where `group` is None."""

    def __init__(self, seed: int, group: Any = None) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN)
        self.down, self.group = nn.Linear(HIDDEN, WIDTH, bias=False), group
        if group is not None:
            rank, parts = dist.get_rank(group), dist.get_world_size(group)
            for module, name, dim in ((self.up, "weight", 0), (self.up, "bias", 0), (self.down, "weight", 1)):
                piece = nn.Parameter(getattr(module, name).detach().chunk(parts, dim)[rank].clone())
                piece.model_parallel = True
                setattr(module, name, piece)

    def forward(self, x: Tensor) -> Tensor:
        entered = self.norm(x)
        entered = entered if self.group is None else _Enter.apply(entered, self.group)
        left = self.down(F.gelu(self.up(entered)))
        return x + (left if self.group is None else _Leave.apply(left, self.group))


def loss_fn(out: Tensor, y: Tensor) -> Tensor:
    return (out - y).square().mean()


def batches(step: int) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(step)
    return [tuple(torch.randn(2, 4, WIDTH, generator=draw).unbind(0)) for _ in range(MICRO_BATCHES)]


def pipeline(seed: int = 0, replicas: int = 1) -> Any:
    topology = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=replicas)
    groups = [(ranks, dist.new_group(ranks)) for ranks in topology.get_axis_comm_lists("model")]
    own = next(group for ranks, group in groups if dist.get_rank() in ranks)
    module = PipelineModule([LayerSpec(Block, seed + i, own) for i in range(4)], topology=topology, loss_fn=loss_fn)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": 0.1,
        "optimizer": {"type": "AdamW", "params": HYPER},
        "zero_optimization": {"stage": 1},
    }
    return deepspeedlite.initialize(model=module, config=config)[0]


@distributed(4)
def test_training_and_resuming(tmp_path):
    engine = pipeline()
    whole = nn.Sequential(*(Block(i) for i in range(4)))
    optimizer = torch.optim.AdamW(whole.parameters(), **HYPER)
    for step in range(4):
        loss = engine.train_batch(iter(batches(step)))
        expected = sum(loss_fn(whole(x), y) for x, y in batches(step)) / MICRO_BATCHES
        optimizer.zero_grad()
        expected.backward()
        norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.1)
        optimizer.step()
        assert norm > 0.1, "clipping is to bite"
        assert loss.item() == pytest.approx(expected.item(), rel=2e-5)
        assert engine.get_global_grad_norm() == pytest.approx(norm.item(), rel=2e-5)
        if step == 1:
            engine.save_checkpoint(str(tmp_path))
    again = pipeline(seed=50)
    again.load_checkpoint(str(tmp_path))
    for step in (2, 3):
        again.train_batch(iter(batches(step)))
    for mine, other in zip(engine.module.parameters(), again.module.parameters(), strict=True):
        assert torch.equal(mine, other)
