"""The same small GPT as a pipeline: its layers cut into stages, the embedding's weight the head of the last one too.

    deepspeedlite --num_gpus 2 examples/gpt/train_pipeline.py --stages 2 --deepspeed_config examples/gpt/ds_config.json

With more ranks than stages the others are replicas. The configuration's batch is cut into `--micro_batches`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from model import Block, GPTConfig
from text import Windows, library_text
from torch import Tensor, nn

import deepspeedlite
from deepspeedlite.pipe import LayerSpec, PipelineModule, TiedLayerSpec

DEFAULT_CONFIG = Path(__file__).with_name("ds_config.json")


class Embed(nn.Module):
    """Tokens (B, T) and their positions to hidden states (B, T, D)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens_bt: Tensor) -> Tensor:
        return self.tokens(tokens_bt) + self.positions(torch.arange(tokens_bt.shape[1], device=tokens_bt.device))


def logits(embed: Embed, x_btd: Tensor) -> Tensor:
    """The head: hidden states (B, T, D) to logits (B, T, V)."""
    return F.linear(x_btd, embed.tokens.weight)


def cross_entropy(logits_btv: Tensor, targets_bt: Tensor) -> Tensor:
    """The mean loss in nats per byte."""
    return F.cross_entropy(logits_btv.flatten(0, 1).float(), targets_bt.flatten())


def main() -> int:
    """Train and validate; returns the process's exit code."""
    parser = argparse.ArgumentParser(description="Train a small GPT as a pipeline with deepspeedlite.")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--micro_batches", type=int, default=8, help="of a batch (default 8)")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps (default 500)")
    parser.add_argument("--max_val_loss", type=float, help="exit with an error when the last one is above this")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    args = deepspeedlite.add_config_arguments(parser).parse_args()

    deepspeedlite.init_distributed()
    torch.manual_seed(0)
    sizes = GPTConfig()
    net = PipelineModule(
        [
            TiedLayerSpec("embed", Embed, sizes, tied_weight_attr="tokens.weight"),
            *[LayerSpec(Block, sizes) for _ in range(sizes.layers)],
            LayerSpec(nn.LayerNorm, sizes.width),
            TiedLayerSpec("embed", Embed, sizes, tied_weight_attr="tokens.weight", forward_fn=logits),
        ],
        num_stages=args.stages,
        loss_fn=cross_entropy,
        partition_method="type:Block",
        seed_layers=True,
    )
    config = json.loads(Path(args.deepspeed_config or DEFAULT_CONFIG).read_text())
    config["gradient_accumulation_steps"] = args.micro_batches
    if "scheduler" in config:
        config["scheduler"]["params"]["total_num_steps"] = args.steps
    train_text, validation_text = library_text(8_000_000)
    engine, *_ = deepspeedlite.initialize(model=net, config=config, training_data=Windows(train_text, sizes.context))

    since_s, interval = time.perf_counter(), max(args.steps // 10, 1)
    for step in range(1, args.steps + 1):
        loss = engine.train_batch()
        if step % interval == 0:
            now_s = time.perf_counter()
            rate = interval * engine.train_batch_size() * sizes.context / (now_s - since_s)
            since_s = now_s
            say(f"step {step}/{args.steps}  loss {loss.item():.3f}  {rate:,.0f} tokens/s")

    validation = engine.deepspeed_io(Windows(validation_text, sizes.context), route="eval")
    loss = engine.eval_batch(iter(validation), num_micro_batches=32).item()
    say(f"validation loss: {loss:.3f} nats per byte")
    engine.destroy()
    if args.max_val_loss is not None and not loss <= args.max_val_loss:
        say(f"the validation loss {loss:.3f} is above the {args.max_val_loss} that --max_val_loss allows")
        return 1
    return 0


def say(text: str) -> None:
    """Print on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
