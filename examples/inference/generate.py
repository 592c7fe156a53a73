"""Text in, text out, token by token, with any causal model of transformers in a folder.

    python examples/inference/generate.py MODEL_DIR --prompt "Once upon a time"
    deepspeedlite --num_gpus 2 examples/inference/generate.py MODEL_DIR --prompt "Once upon a time"

The model is built without memory, and each rank reads its part of the weights from the folder, with a bar while it
does. Started on several ranks, the model is split over them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TextStreamer

import deepspeedlite


class CountingStreamer(TextStreamer):
    """Prints text as it comes, and counts its tokens."""

    def __init__(self, tokenizer) -> None:
        super().__init__(tokenizer)
        self.tokens = -1  # the first call brings the prompt
        self.began_s = self.last_s = time.perf_counter()

    def put(self, value) -> None:
        """Take the next token."""
        self.tokens += 1
        self.last_s = time.perf_counter()
        if self.tokens == 1:
            self.began_s = self.last_s  # the first token's time is the prompt's
        super().put(value)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Generate text with a model of transformers.")
    parser.add_argument("model", metavar="MODEL_DIR", help="a folder with config.json, weights and a tokenizer")
    parser.add_argument("--prompt", default="", help="what the text starts with; lines of standard input if not given")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "fp16", "bf16", "int8"])
    parser.add_argument("--sample", action="store_true", help="draw tokens instead of taking the likeliest")
    parser.add_argument("--unfused", action="store_true", help="leave the model's blocks as they are")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    return parser.parse_args()


def main() -> int:
    """Load, then answer."""
    args = parse_arguments()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model))
    engine = deepspeedlite.init_inference(
        model.eval(),
        dtype=args.dtype,
        tensor_parallel={"tp_size": ranks},
        checkpoint=args.model,
        replace_with_kernel_inject=not args.unfused,
    )
    is_first = os.environ.get("RANK", "0") == "0"
    for prompt in [args.prompt] if args.prompt else map(str.strip, sys.stdin):
        streamer = CountingStreamer(tokenizer) if is_first else None
        given = tokenizer(prompt, return_tensors="pt").to(next(engine.buffers()).device)
        engine.generate(
            input_ids=given["input_ids"],
            attention_mask=given["attention_mask"],
            max_new_tokens=args.new_tokens,
            do_sample=args.sample,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id,
        )
        if streamer is not None:
            took_s = streamer.last_s - streamer.began_s
            print(f"[{streamer.tokens} tokens, {(streamer.tokens - 1) / max(took_s, 1e-9):,.1f} tokens/s]", flush=True)
    engine.destroy()
    return 0


if __name__ == "__main__":
    sys.exit(main())
