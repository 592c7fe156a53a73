"""A transformer layer's forward and backward pass, ours beside torch's and transformers', and what each keeps between.

    python benchmarks/transformer_layer.py [--dtype fp32 bf16] [--batch 8] [--tokens 128] [--rounds 15] [--threads 2]
                                           [--cpu-time]

A layer as BERT-base has it: hidden 768, 12 heads, intermediate 3072, norms after, dropout 0.1 of attention's
probabilities and of both results. Peers: torch.nn.TransformerEncoderLayer (as it comes, it drops numbers of the MLP's
activation too; "without the activation's" does not, as the others), transformers' BertLayer with torch's sdpa.
Contenders take turns; the ratio is the median over rounds of ours to the peer's in the same round, since others on the
machine change how long all take. `--cpu-time` is for a machine that is busy: one thread, and the time that it had the
processor. Bytes are of the tensors that autograd keeps, each memory once, without weights.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from machine import print_json, print_table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from deepspeedlite.ops.transformer import DeepSpeedTransformerConfig, DeepSpeedTransformerLayer

HIDDEN, HEADS, INTER, RATIO = 768, 12, 3072, 0.1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OPTIONS = ("normalize_invertible", "gelu_checkpoint", "attn_dropout_checkpoint")
Clock = Callable[[], float]


def ours(**options: bool) -> nn.Module:
    return DeepSpeedTransformerLayer(
        DeepSpeedTransformerConfig(
            hidden_size=HIDDEN,
            intermediate_size=INTER,
            heads=HEADS,
            attn_dropout_ratio=RATIO,
            hidden_dropout_ratio=RATIO,
            num_hidden_layers=12,
            initializer_range=0.02,
            pre_layer_norm=False,
            gelu="erf",
            **options,
        )
    )


def torchs(*, activation_too: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, INTER, RATIO, activation="gelu", batch_first=True)
    if not activation_too:
        layer.dropout.p = 0.0
    return layer


def berts() -> nn.Module:
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertLayer

    config = BertConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        intermediate_size=INTER,
        hidden_dropout_prob=RATIO,
        attention_probs_dropout_prob=RATIO,
    )
    config._attn_implementation = "sdpa"
    return BertLayer(config)


def contenders() -> dict[str, nn.Module]:
    return {
        "ours": ours(),
        "ours, keeping less": ours(**dict.fromkeys(OPTIONS, True)),
        "ours, stochastic": ours(stochastic_mode=True),
        "torch": torchs(activation_too=True),
        "torch, without the activation's": torchs(activation_too=False),
        "transformers": berts(),
    }


def run(layer: nn.Module, x: Tensor, grad: Tensor, clock: Clock) -> float:
    """Seconds of a forward and a backward pass."""
    for parameter in layer.parameters():
        parameter.grad = None
    x.grad = None
    started_s = clock()
    result = layer(x)
    (result[0] if isinstance(result, tuple) else result).backward(grad)
    return clock() - started_s


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """Of what autograd keeps of a forward pass beside weights and the input."""
    known = {one.untyped_storage().data_ptr() for one in (*layer.parameters(), x)}
    found: dict[int, tuple[Tensor, int]] = {}  # with the tensor: memory that is freed may come again as another's

    def keep(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in known:
            found[memory.data_ptr()] = (tensor, memory.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    return sum(size for _, size in found.values())


def measure(
    name: str, batch: int, tokens: int, rounds: int, clock: Clock
) -> tuple[dict[str, list[float]], dict[str, int]]:
    dtype = DTYPES[name]
    torch.manual_seed(0)
    x = torch.randn(batch, tokens, HIDDEN).to(dtype).requires_grad_()
    grad = torch.randn(batch, tokens, HIDDEN).to(dtype)
    layers = {who: layer.to(dtype).train() for who, layer in contenders().items()}
    kept = {who: kept_bytes(layer, x) for who, layer in layers.items()}
    taken: dict[str, list[float]] = {who: [] for who in layers}
    for round_ in range(rounds + 2):
        order: Iterable[str] = layers if round_ % 2 == 0 else reversed(layers)
        for who in order:
            seconds = run(layers[who], x, grad, clock)
            if round_ >= 2:
                taken[who].append(seconds)
    return taken, kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true")
    arguments = parser.parse_args()
    clock: Clock = time.perf_counter
    if arguments.cpu_time:
        clock, arguments.threads = time.process_time, 1
    torch.set_num_threads(arguments.threads)
    rows = []
    for name in arguments.dtype:
        taken, kept = measure(name, arguments.batch, arguments.tokens, arguments.rounds, clock)
        for who in taken:
            ratio = statistics.median(mine / its for mine, its in zip(taken["ours"], taken[who]))
            result = {
                "dtype": name,
                "layer": who,
                "median_ms": round(statistics.median(taken[who]) * 1e3, 1),
                "quickest_ms": round(min(taken[who]) * 1e3, 1),
                "ours_to_it": round(ratio, 3),
                "kept_mb": round(kept[who] / 1e6, 1),
            }
            print_json(benchmark="transformer_layer", batch=arguments.batch, tokens=arguments.tokens, **result)
            rows.append(tuple(result.values()))
    sizes = f"{arguments.batch} x {arguments.tokens}"
    title = f"A layer's forward and backward pass, {sizes}, {arguments.threads} thread(s)"
    print_table(title, ("dtype", "layer", "median ms", "quickest ms", "ours / it", "kept MB"), rows)


if __name__ == "__main__":
    main()
