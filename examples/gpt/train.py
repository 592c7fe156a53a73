"""Train a small byte-level GPT on the Python standard library's own sources, then let it write.

    deepspeedlite --num_gpus 2 examples/gpt/train.py --deepspeed_config examples/gpt/ds_config.json --generate 300

Losses are in nats per byte: 5.55 (ln 256) knows nothing. Five hundred steps, about a minute on two CPU cores, reach
about 2.2, enough for indentation and the look of Python; more `--steps` and a larger model on a GPU go further.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from model import GPT, GPTConfig
from text import Windows, library_text
from torch import nn

import deepspeedlite
from deepspeedlite import comm

DEFAULT_CONFIG = Path(__file__).with_name("ds_config.json")
VALIDATION_WINDOWS = 512


def parse_arguments() -> argparse.Namespace:
    """This example's arguments and deepspeedlite's own."""
    parser = argparse.ArgumentParser(description="Train a small GPT on Python's own sources with deepspeedlite.")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps (default 500)")
    parser.add_argument("--text_bytes", type=int, default=8_000_000, help="how much text to use (default 8 MB)")
    parser.add_argument("--generate", type=int, default=0, metavar="N", help="write N bytes at the end")
    parser.add_argument("--prompt", default="def ", help="what the generated text starts with")
    parser.add_argument("--save", metavar="FOLDER", help="save a checkpoint at the end, for generate.py")
    parser.add_argument("--max_val_loss", type=float, help="exit with an error when the last one is above this")
    parser.add_argument("--context", type=int, default=GPTConfig.context)
    parser.add_argument("--width", type=int, default=GPTConfig.width)
    parser.add_argument("--layers", type=int, default=GPTConfig.layers)
    parser.add_argument("--heads", type=int, default=GPTConfig.heads)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    return deepspeedlite.add_config_arguments(parser).parse_args()


def main() -> int:
    """Train, validate and generate; returns the process's exit code."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    sizes = GPTConfig(context=args.context, width=args.width, layers=args.layers, heads=args.heads)
    train_text, validation_text = library_text(args.text_bytes)
    train_windows, validation_windows = Windows(train_text, args.context), Windows(validation_text, args.context)

    config = json.loads(Path(args.deepspeed_config or DEFAULT_CONFIG).read_text())
    schedule = config.get("scheduler", {}).get("params", {})
    if "total_num_steps" in schedule:
        schedule["total_num_steps"] = args.steps
        schedule["warmup_num_steps"] = min(schedule.get("warmup_num_steps", 0), max(args.steps - 1, 1))
    net = GPT(sizes)
    engine, _, loader, _ = deepspeedlite.initialize(
        model=net, model_parameters=net.parameters(), training_data=train_windows, config=config
    )
    world = comm.Group()
    say(
        f"a GPT of {net.numel() / 1e6:.2f} M parameters on {len(train_text) / 1e6:.1f} MB of Python's own sources; "
        f"{world.size} rank(s) on {engine.device}, {engine.train_batch_size()} windows of {args.context} bytes a step"
    )
    say(
        f"validation loss before training: {validate(engine.module, validation_windows, engine.device, world):.3f} nats"
    )
    train(engine, loader, args.steps, args.context)
    loss = validate(engine.module, validation_windows, engine.device, world)
    say(f"validation loss: {loss:.3f} nats per byte ({loss / 0.693147:.3f} bits)")
    if args.generate:
        generate(engine.module, args.prompt, args.generate, engine.device, args.seed)
    if args.save:
        engine.save_checkpoint(args.save)
        if world.rank == 0:
            (Path(args.save) / "sizes.json").write_text(json.dumps(asdict(sizes)))
    engine.destroy()
    if args.max_val_loss is not None and not loss <= args.max_val_loss:
        say(f"the validation loss {loss:.3f} is above the {args.max_val_loss} that --max_val_loss allows")
        return 1
    return 0


def train(engine, loader, steps: int, context: int) -> None:
    """`steps` optimizer steps, over as many epochs as that takes, and a line for each tenth of them."""
    tokens_per_step = engine.train_batch_size() * context
    accumulation = engine.gradient_accumulation_steps()
    interval = max(steps // 10, 1)
    engine.train()
    since_s = time.perf_counter()
    for number, (tokens, targets) in enumerate(islice(forever(loader), steps * accumulation), start=1):
        loss = engine(tokens.to(engine.device), targets.to(engine.device))
        engine.backward(loss)
        engine.step()
        if number % (interval * accumulation) == 0:
            now_s = time.perf_counter()
            rate = interval * tokens_per_step / (now_s - since_s)
            since_s = now_s
            say(f"step {number // accumulation}/{steps}  loss {loss.item():.3f}  {rate:,.0f} tokens/s")


def forever(loader):
    """Epoch after epoch of the loader's batches, each in an order of its own."""
    while True:
        yield from loader


@torch.no_grad()
def validate(net: nn.Module, windows: Windows, device: torch.device, world: comm.Group) -> float:
    """The mean loss in nats over evenly spaced windows, shared out over the ranks."""
    was_training = net.training
    net.eval()
    spaced = range(0, len(windows), max(len(windows) // VALIDATION_WINDOWS, 1))[:VALIDATION_WINDOWS]
    mine = [windows[index] for index in spaced[world.rank :: world.size]]
    sum_and_count = torch.zeros(2, dtype=torch.float64, device=device)
    for start in range(0, len(mine), 32):
        tokens, targets = (torch.stack(part).to(device) for part in zip(*mine[start : start + 32]))
        sum_and_count[0] += net(tokens, targets).double() * len(tokens)
        sum_and_count[1] += len(tokens)
    world.all_reduce(sum_and_count, op="sum")
    net.train(was_training)
    return float(sum_and_count[0] / sum_and_count[1])


def generate(net: nn.Module, prompt: str, new_bytes: int, device: torch.device, seed: int) -> None:
    """Print the prompt and what the model writes after it. Every rank takes part, as a sharded model needs."""
    net.eval()
    torch.manual_seed(seed)
    prompt_1t = torch.tensor([list(prompt.encode() or b"\n")], device=device)
    written = net.generate(prompt_1t, new_bytes)[0].tolist()
    say("-" * 80 + "\n" + bytes(written).decode("utf-8", errors="replace") + "\n" + "-" * 80)


def say(text: str) -> None:
    """Print on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
