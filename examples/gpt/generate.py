"""Let the GPT that train.py has trained write on, byte by byte.

    deepspeedlite --num_gpus 2 examples/gpt/train.py --save /tmp/gpt
    python examples/gpt/generate.py /tmp/gpt --prompt "def main("

The checkpoint is read as the training's ranks have written it, into a model that is built without memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from model import GPT, GPTConfig

import deepspeedlite


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Generate text with the GPT that train.py --save has saved.")
    parser.add_argument("folder", help="where train.py saved it")
    parser.add_argument("--prompt", default="def ", help="what the text starts with")
    parser.add_argument("--new_bytes", type=int, default=300)
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16", "int8"])
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest byte")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@torch.no_grad()
def main() -> int:
    """Load the model, and print what it writes as it comes."""
    args = parse_arguments()
    sizes = GPTConfig(**json.loads((Path(args.folder) / "sizes.json").read_text()))
    with torch.device("meta"):
        net = GPT(sizes)
    engine = deepspeedlite.init_inference(net, dtype=args.dtype, checkpoint=args.folder)
    torch.manual_seed(args.seed)
    tokens_bt = torch.tensor([list(args.prompt.encode() or b"\n")])
    write(bytes(tokens_bt[0].tolist()))
    began_s = time.perf_counter()
    for _ in range(args.new_bytes):
        logits_bv = engine(tokens_bt[:, -sizes.context :])[:, -1].float()
        if args.temperature > 0:
            next_b1 = torch.multinomial(torch.softmax(logits_bv / args.temperature, dim=-1), num_samples=1)
        else:
            next_b1 = logits_bv.argmax(dim=-1, keepdim=True)
        tokens_bt = torch.cat([tokens_bt, next_b1], dim=1)
        write(bytes([int(next_b1)]))
    took_s = time.perf_counter() - began_s
    print(f"\n[{args.new_bytes} bytes, {args.new_bytes / took_s:,.0f} bytes/s]", flush=True)
    return 0


def write(text: bytes) -> None:
    """Show bytes at once; what is no UTF-8 yet as a question mark."""
    sys.stdout.write(text.decode("utf-8", errors="replace"))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
