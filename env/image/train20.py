"""The training of the self-test: 20 steps of a small network at ZeRO stage 2, by whatever ranks the launcher starts.

It fails unless the loss falls to less than half and all ranks hold the same weights at the end. Rank 0 prints both
losses.
"""

from __future__ import annotations

import torch
from torch import nn

import deepspeedlite
from deepspeedlite import comm

STEPS = 20
CONFIG = {
    "train_micro_batch_size_per_gpu": 32,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.02}},
    "zero_optimization": {"stage": 2},
    "steps_per_print": 1 << 30,
}


def main() -> None:
    """Train, compare and say so."""
    torch.manual_seed(0)
    deepspeedlite.init_distributed()
    world = comm.Group()
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))
    engine, *_ = deepspeedlite.initialize(model=net, config=CONFIG)
    torch.manual_seed(1 + world.rank)
    inputs = torch.randn(32, 16, device=engine.device)
    wanted = inputs.sum(dim=1, keepdim=True)
    losses = []
    for _ in range(STEPS):
        loss = nn.functional.mse_loss(engine(inputs), wanted)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    held = world.all_gather_objects([parameter.detach().cpu() for parameter in engine.module.parameters()])
    for other in held[1:]:
        for ours, theirs in zip(held[0], other):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    if not losses[-1] < losses[0] / 2:
        raise SystemExit(f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f} in {STEPS} steps: it should halve")
    if world.rank == 0:
        how = f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"
        print(f"{STEPS} steps on {world.size} ranks ({engine.device}): {how}", flush=True)
    engine.destroy()


if __name__ == "__main__":
    main()
