"""The loop without an engine that training is held to: `reference`, and what tells it from an engine's.

It holds fp32 masters and a copy of the model in the trained dtype, runs every rank's micro-batches one after another
in a single process, averages the gradients in fp32 and steps a plain, unfused torch optimizer.
"""

from __future__ import annotations

import functools

import torch
from models import tied_model, tokens

STEPS = 20
CLIP = 0.4  # well under the norms met here, so that clipping acts at every step
LOSS_SCALE = 128.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# fp32 differs from the reference by the order of sums only. In 16 bits each rank's gradient is rounded before the
# average, which moves single weights by up to a learning rate and losses by about the dtype's precision.
LOSS_ATOL = {"fp32": 2e-6, "bf16": 2e-2, "fp16": 4e-3}
WEIGHT_ATOL = {"fp32": 5e-6, "bf16": 2e-2, "fp16": 1e-2}
OPTIMIZER = {"lr": 2e-3, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.05}


def engine_config(dtype: str, accumulation: int, clip: bool, **more) -> dict:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": dict(OPTIMIZER)},
        "zero_optimization": {"stage": 0, "reduce_bucket_size": 4000},
        **more,
    }
    config["gradient_clipping"] = CLIP if clip else 0.0
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if dtype == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": LOSS_SCALE}
    return config


@functools.cache
def reference(
    dtype: str, accumulation: int, clip: bool, world_size: int, device: str = "cpu"
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Mean loss of rank 0's micro-batches per step, and the final fp32 weights by name."""
    model = tied_model().to(device, DTYPES[dtype])
    names = [name for name, _ in model.named_parameters()]
    masters = [p.detach().float().clone().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=2e-3, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.05, foreach=False)
    scale = LOSS_SCALE if dtype == "fp16" else 1.0
    losses = []
    for step in range(STEPS):
        totals = [torch.zeros_like(master) for master in masters]
        mine = []
        for rank in range(world_size):
            for micro in range(accumulation):
                model.zero_grad()
                loss = model(*(one.to(device) for one in tokens(step, micro, rank)))
                (loss * scale / accumulation).backward()
                for total, param in zip(totals, model.parameters()):
                    total += param.grad.float() / (scale * world_size)
                if rank == 0:
                    mine.append(loss.item())
        for master, total in zip(masters, totals):
            master.grad = total
        if clip:
            torch.nn.utils.clip_grad_norm_(masters, CLIP)
        optimizer.step()
        with torch.no_grad():
            for param, master in zip(model.parameters(), masters):
                param.copy_(master)
        losses.append(sum(mine) / len(mine))
    return losses, {name: master.detach() for name, master in zip(names, masters)}
