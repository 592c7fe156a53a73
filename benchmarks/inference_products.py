"""Products of 1 and 8 rows with the weights of a Llama of 100 M parameters: ours beside torch's, and the memory's rate.

    python benchmarks/inference_products.py [--shape 768x768 ...] [--rows 1 8] [--turns 9] [--cpu-time]

A shape is inputs x outputs. Weights are of many layers, 200 MB together, so that each product reads its own from
memory. Contenders take turns; a turn is one pass over all layers, and the quickest counts: others on the machine make
turns longer, and nothing makes one shorter. The peer of a product is torch's F.linear with a whole weight of the
inputs' dtype; where torch has packed products of its own (int8 by output, int4 by groups, bfloat16 inputs) they are
another. The read rate is that of the quickest of three plain passes over 400 MB in the same run. `--cpu-time` is for a
machine that is busy: one thread, and the time that it had the processor.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import print_json, print_table
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from deepspeedlite.ops.multi_tensor import has_overflow, multi_tensor_l2norm
from deepspeedlite.ops.packed_linear import PackedLinear

SHAPES = ("768x768", "768x2048", "2048x768", "768x32000")
KINDS = ((torch.float32, None), (torch.bfloat16, None), (torch.float32, 8), (torch.float32, 4), (torch.bfloat16, 8),
         (torch.bfloat16, 4))  # fmt: skip
LAYERS_BYTES, READ_NUMEL, GROUP = 200 << 20, 100 << 20, 64
Pass = Callable[[], object]
Clock = Callable[[], float]


def layers_of(weight_bytes: int) -> int:
    return max(LAYERS_BYTES // weight_bytes, 2)


def ours(weight: Tensor, x: Tensor, bits: int | None) -> tuple[Pass, int]:
    """A pass over the layers, and the bytes that it reads."""
    first = PackedLinear.pack(weight, dtype=x.dtype, bits=bits, group_size=GROUP)
    layers = [
        PackedLinear(
            first.weight.clone(),
            None if first.scales is None else first.scales.clone(),
            None,
            shape=(first.out_features, first.in_features),
            dtype=x.dtype,
            bits=bits,
            group_size=GROUP,
        )
        for _ in range(layers_of(first.weight_bytes))
    ]
    return lambda: [layer(x) for layer in layers], first.weight_bytes


def torchs(weight: Tensor, x: Tensor) -> Pass:
    whole = weight.to(x.dtype)
    layers = [whole.clone() for _ in range(layers_of(whole.nbytes))]
    return lambda: [F.linear(x, layer) for layer in layers]


def torchs_packed(weight: Tensor, x: Tensor, bits: int) -> Pass:
    """Torch's weight-only products. Their scales are of no account here, so they are ones."""
    out, width = weight.shape
    integers = torch.randint(0, 16, (out, width))
    if bits == 8:
        packed, scales = integers.to(torch.int8), torch.ones(out, dtype=x.dtype)
        layers = [packed.clone() for _ in range(layers_of(packed.nbytes))]
        return lambda: [torch._weight_int8pack_mm(x, layer, scales) for layer in layers]
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers.to(torch.int32), 1)
    scales = torch.ones(width // GROUP, out, 2, dtype=x.dtype)
    layers = [packed.clone() for _ in range(layers_of(packed.nbytes))]
    return lambda: [torch.ops.aten._weight_int4pack_mm_for_cpu(x, layer, GROUP, scales) for layer in layers]


def seconds(work: Pass, clock: Clock) -> float:
    started_s = clock()
    work()
    return clock() - started_s


def quickest(passes: dict[str, Pass], turns: int, clock: Clock) -> dict[str, float]:
    """Seconds of the quickest pass of each, who take turns; the first turn does not count."""
    taken: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(turns + 1):
        for name, work in passes.items():
            taken[name].append(seconds(work, clock))
    return {name: min(each[1:]) for name, each in taken.items()}


def read_rate(turns: int, clock: Clock) -> float:
    """Bytes per second of the quickest plain pass."""
    numbers = torch.ones(READ_NUMEL)
    passes = {
        "sum": numbers.sum,
        "norm": lambda: multi_tensor_l2norm([numbers]),
        "check": lambda: has_overflow([numbers]),
    }
    return numbers.nbytes / min(quickest(passes, turns, clock).values())


def measure(shape: str, rows: int, kind: tuple[torch.dtype, int | None], turns: int, clock: Clock) -> dict[str, object]:
    dtype, bits = kind
    width, out = map(int, shape.split("x"))
    weight, x = torch.randn(out, width), torch.randn(rows, width).to(dtype)
    mine, weight_bytes = ours(weight, x, bits)
    passes = {"ours": mine, "torch": torchs(weight, x)}
    if bits and dtype == torch.bfloat16:
        passes["torch packed"] = torchs_packed(weight, x, bits)
    with torch.inference_mode():
        found = quickest(passes, turns, clock)
    whole_bytes = width * out * dtype.itemsize
    per_layer = {
        "ours": found["ours"] / layers_of(weight_bytes),
        "torch": found["torch"] / layers_of(whole_bytes),
    }
    if "torch packed" in found:
        per_layer["torch packed"] = found["torch packed"] / layers_of(width * out * bits // 8)
    return {
        "weight": f"{str(dtype)[6:]}" + (f", int{bits}" if bits else ""),
        "shape": shape,
        "rows": rows,
        "ours_us": round(per_layer["ours"] * 1e6, 1),
        "torch_us": round(per_layer["torch"] * 1e6, 1),
        "ratio": round(per_layer["ours"] / per_layer["torch"], 2),
        "ratio_packed": round(per_layer["ours"] / per_layer["torch packed"], 2)
        if "torch packed" in per_layer
        else None,
        "read_gb_s": round(weight_bytes / per_layer["ours"] / 1e9, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=SHAPES)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--cpu-time", action="store_true")
    arguments = parser.parse_args()
    clock: Clock = time.perf_counter
    if arguments.cpu_time:
        clock = time.thread_time
        torch.set_num_threads(1)
    with torch.inference_mode():
        read = read_rate(arguments.turns, clock)
    table = []
    for kind in KINDS:
        for shape in arguments.shape:
            for rows in arguments.rows:
                found = measure(shape, rows, kind, arguments.turns, clock)
                found["share_of_read"] = round(found["read_gb_s"] * 1e9 / read, 2)
                print_json(**found)
                table.append([found[name] for name in found])
    title = f"Products; memory is read at {read / 1e9:.1f} GB/s by {torch.get_num_threads()} threads"
    heads = [
        "weight",
        "shape",
        "rows",
        "ours us",
        "torch us",
        "ours / torch",
        "/ torch packed",
        "GB/s",
        "share of read",
    ]
    print_table(title, heads, table)


if __name__ == "__main__":
    main()
