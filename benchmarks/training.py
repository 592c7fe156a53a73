"""What the training benchmarks share: one model, one stream of batches, and the loops that are compared on them.

The model is examples/gpt's of 33.6 M parameters (width 512, 8 layers, vocabulary 8192, context 64), AdamW, micro-batch
2 per rank. Nothing here imports deepspeedlite or DeepSpeed, so that a Python which has only one of them can use it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "gpt"))
from model import GPT, GPTConfig  # noqa: E402  (found through the line above)

LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY = 1e-4, (0.9, 0.95), 1e-8, 0.1
ADAMW: dict[str, Any] = {"lr": LEARNING_RATE, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
MICRO_BATCH = 2

Batch = tuple[torch.Tensor, torch.Tensor]  # tokens and targets, (MICRO_BATCH, context) each
Step = Callable[[list[Batch]], list[float]]  # the micro-batches of one optimizer step -> this rank's losses on them


def fresh_model(sizes: GPTConfig) -> GPT:
    """The same weights for every contender."""
    torch.manual_seed(0)
    return GPT(sizes)


def batch(sizes: GPTConfig, rank: int, number: int) -> Batch:
    """This rank's batch of that number: random tokens in a pattern that can be learned, so the loss moves."""
    generator = torch.Generator().manual_seed(1000 * number + rank)
    tokens = torch.randint(0, sizes.vocabulary // 16, (MICRO_BATCH, sizes.context + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def engine_config(zero_optimization: dict[str, Any] | None = None, bf16: bool = False, accumulation: int = 1) -> dict:
    """The configuration that deepspeedlite and DeepSpeed both read. Nothing here clips, so they must not either."""
    return {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0,
        "bf16": {"enabled": bf16},
        "zero_optimization": zero_optimization or {"stage": 0},
    }


def engine_step(engine: Any) -> Step:
    """The loop around an engine, deepspeedlite's or DeepSpeed's."""

    def step(micro_batches: list[Batch]) -> list[float]:
        losses = []
        for tokens, targets in micro_batches:
            loss = engine(tokens, targets)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses

    return step


def our_engine(model: GPT, config: dict[str, Any]) -> Any:
    """An engine of deepspeedlite with the AdamW of its configuration."""
    sys.path.insert(0, str(ROOT))
    import deepspeedlite

    config = {**config, "optimizer": {"type": "AdamW", "params": {**ADAMW, "betas": list(BETAS)}}}
    return deepspeedlite.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def ddp_step(model: DistributedDataParallel) -> Step:
    """The loop that a careful person writes by hand; a bf16 model gets fp32 master weights."""
    params = list(model.parameters())
    full_precision = all(param.dtype == torch.float32 for param in params)
    update = _update(params) if full_precision else _master_update(params)

    def step(micro_batches: list[Batch]) -> list[float]:
        losses = []
        for number, (tokens, targets) in enumerate(micro_batches, start=1):
            with nullcontext() if number == len(micro_batches) else model.no_sync():
                loss = model(tokens, targets)
                (loss / len(micro_batches) if len(micro_batches) > 1 else loss).backward()
            losses.append(loss.detach())
        update()
        return [loss.item() for loss in losses]

    return step


def fused_adamw(params: Iterable[torch.Tensor]) -> torch.optim.AdamW:
    """AdamW in one pass over memory."""
    return torch.optim.AdamW(params, fused=True, **ADAMW)


def _update(params: list[torch.nn.Parameter]) -> Callable[[], None]:
    optimizer = fused_adamw(params)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def _master_update(params: list[torch.nn.Parameter]) -> Callable[[], None]:
    masters = [param.detach().float() for param in params]
    for master in masters:
        master.grad = torch.empty_like(master)
    optimizer, grads = fused_adamw(masters), [master.grad for master in masters]

    @torch.no_grad()
    def update() -> None:
        torch._foreach_copy_(grads, [param.grad for param in params])
        optimizer.step()
        torch._foreach_copy_(params, masters)
        for param in params:
            param.grad = None

    return update
