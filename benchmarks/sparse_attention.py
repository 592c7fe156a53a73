"""Block-sparse attention beside dense attention times the share of blocks kept, and beside compiled FlexAttention.

    python benchmarks/sparse_attention.py [--tokens 2048 8192] [--blocks 64 16] [--dtypes float32 bfloat16] [--rounds 7]
    python benchmarks/sparse_attention.py --memory 8192 32768 --train 65536

8 heads of 64; a layout of a local window of 512 tokens (256 to either side) and a global block at the beginning, which
sees all and is seen by all. A round is one of dense attention and FlexAttention and two of ours, before and behind
them; what counts is the median of the rounds' ratios: others on the machine load all of a round alike. Peers are
torch's scaled_dot_product_attention, forward and backward, and torch's FlexAttention, compiled, with the same blocks,
forward alone (torch refuses its backward on a CPU). Memory is the peak of a process of its own, less what it had before
the first call, divided by the bytes of q, k, v, out and their gradients. `--train` takes steps of one layer
(projections, attention, projection) with Adam on tokens of one sequence.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import print_json, print_table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from deepspeedlite.ops.sparse_attention import BlockLists, sparse_attention

HEADS, DIM, WINDOW, MIB = 8, 64, 512, 1 << 20


def lists_of(tokens: int, block: int) -> BlockLists:
    place = torch.arange(tokens // block)
    kept = (place[:, None] - place).abs() <= WINDOW // 2 // block
    kept[0] = kept[:, 0] = True
    return BlockLists.of(kept, block)


def flex_of(tokens: int, block: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def seen(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        row, column = q_idx // block, kv_idx // block
        return ((row - column).abs() <= WINDOW // 2 // block) | (row == 0) | (column == 0)

    torch._dynamo.reset()  # it stops compiling a function at eight shapes
    mask = create_block_mask(seen, None, None, tokens, tokens, device="cpu", BLOCK_SIZE=block)
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def both(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: tuple[Tensor, ...], grad: Tensor
) -> tuple[float, float]:
    """Seconds of forward, and of both."""
    started_s = time.perf_counter()
    out = attention(*tensors)
    middle_s = time.perf_counter()
    torch.autograd.grad(out, tensors, grad)
    return middle_s - started_s, time.perf_counter() - started_s


def forward(attention: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: tuple[Tensor, ...]) -> float:
    with torch.no_grad():
        started_s = time.perf_counter()
        attention(*tensors)
        return time.perf_counter() - started_s


def compare(tokens: int, block: int, dtype: torch.dtype, rounds: int) -> dict[str, object]:
    tensors = tuple(torch.randn(1, HEADS, tokens, DIM).to(dtype).requires_grad_() for _ in range(3))
    grad = torch.randn(1, HEADS, tokens, DIM).to(dtype)
    lists, flex = lists_of(tokens, block), flex_of(tokens, block)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q, k, v, lists, block)

    detached = tuple(one.detach() for one in tensors)
    with torch.no_grad():
        torch.testing.assert_close(ours(*detached).float(), flex(*detached).float(), rtol=2e-2, atol=2e-2)
    both(ours, tensors, grad)
    found: dict[str, list[float]] = {name: [] for name in ("ours_ms", "dense_ms", "flex_ms", "to_dense", "to_flex")}
    for _ in range(rounds):
        before, alone = both(ours, tensors, grad)[1], forward(ours, detached)
        flex_s = forward(flex, detached)
        alone = (alone + forward(ours, detached)) / 2
        dense_s = both(F.scaled_dot_product_attention, tensors, grad)[1]
        ours_s = (before + both(ours, tensors, grad)[1]) / 2
        each = (ours_s * 1e3, dense_s * 1e3, flex_s * 1e3, ours_s / dense_s / lists.density, alone / flex_s)
        for values, value in zip(found.values(), each):
            values.append(value)
    middle = {name: round(statistics.median(values), 2) for name, values in found.items()}
    return {"tokens": tokens, "block": block, "dtype": str(dtype)[6:], "density": round(lists.density, 4), **middle}


def peak_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def memory(tokens: int, dtype: torch.dtype) -> dict[str, object]:
    """Of this process, which must be fresh."""
    few = torch.randn(1, HEADS, 64, DIM).to(dtype).requires_grad_()
    sparse_attention(few, few, few, torch.ones(1, 1), 64).sum().backward()
    lists, before = lists_of(tokens, 64), peak_bytes()
    q, k, v = (torch.randn(1, HEADS, tokens, DIM, dtype=dtype).requires_grad_() for _ in range(3))
    sparse_attention(q, k, v, lists, 64).backward(torch.ones_like(q))
    taken = peak_bytes() - before
    return {
        "tokens": tokens,
        "dtype": str(dtype)[6:],
        "mib": round(taken / MIB, 1),
        "bytes_a_token": round(taken / tokens),
        "of_tensors": round(taken / (8 * q.nbytes), 2),  # q, k, v, out and their gradients
        "scores_mib": HEADS * tokens * tokens * dtype.itemsize // MIB,
    }


class Layer(nn.Module):
    def __init__(self, lists: BlockLists) -> None:
        super().__init__()
        self.lists = lists
        self.project, self.out = nn.Linear(HEADS * DIM, 3 * HEADS * DIM), nn.Linear(HEADS * DIM, HEADS * DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, DIM)).unbind(2)
        heads = sparse_attention(*(one.transpose(1, 2) for one in (q, k, v)), self.lists, self.lists.block, causal=True)
        return x + self.out(heads.transpose(1, 2).flatten(2))


def train(tokens: int, dtype: torch.dtype, steps: int = 4) -> dict[str, object]:
    torch.manual_seed(0)
    layer = Layer(lists_of(tokens, 64)).to(dtype)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    x = torch.randn(1, tokens, HEADS * DIM, dtype=dtype)
    target, losses, started_s = x.roll(1, 1), [], time.perf_counter()
    for _ in range(steps):
        loss = F.mse_loss(layer(x).float(), target.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 5))
    each_s = (time.perf_counter() - started_s) / steps
    return {
        "tokens": tokens,
        "dtype": str(dtype)[6:],
        "step_s": round(each_s, 2),
        "peak_mib": round(peak_bytes() / MIB),
        "losses": losses,
    }


def in_a_process(*arguments: str) -> dict[str, object]:
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="*", type=int, default=[2048, 8192])
    parser.add_argument("--blocks", nargs="+", type=int, default=[64, 16])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", nargs="*", type=int, default=[])
    parser.add_argument("--train", nargs="*", type=int, default=[])
    parser.add_argument("--alone", choices=["memory", "train"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    dtypes = [getattr(torch, name) for name in given.dtypes]
    if given.alone:
        print_json(**(memory if given.alone == "memory" else train)(given.tokens[0], dtypes[0]))
        return
    if given.memory or given.train:
        for kind, lengths in (("memory", given.memory), ("train", given.train)):
            rows = []
            for tokens in lengths:
                for name in given.dtypes:
                    found = in_a_process("--alone", kind, "--tokens", str(tokens), "--dtypes", name)
                    print_json(**found)
                    rows.append(found)
            if rows:
                print_table(f"Block-sparse attention, {kind}", list(rows[0]), [list(row.values()) for row in rows])
        return
    rows = []
    for dtype in dtypes:
        for tokens in given.tokens:
            for block in given.blocks:
                rows.append(compare(tokens, block, dtype, given.rounds))
                print_json(**rows[-1])
    head = ["tokens", "block", "dtype", "density", "ours ms", "dense ms", "Flex forward ms", "ours / (dense x density)"]
    head.append("forward / Flex's")
    print_table("Block-sparse attention, forward and backward", head, [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()
