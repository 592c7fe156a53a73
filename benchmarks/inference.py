"""Tokens by a 100 M-parameter Llama: `init_inference` beside transformers' generate, compiled or not, and DeepSpeed.

    python benchmarks/inference.py [--peer-python ENV/bin/python] [--dtypes fp32 bf16] [--batches 1 8] [--rounds 5]

Every contender is a process of its own (tensor parallelism: one per rank, each with its share of the threads) that
makes the same random model and generates greedily; they take turns, and only one computes at a time. A prompt of 64
tokens is continued by 64: the time to the first new token is called prompt, (the time of all 64 - that) / 63 is called
decode, both the median over the rounds. `read` is what reading the weights once takes, by the rate at which this
machine sums as many bytes; `products` are the prompt's dense products alone, by torch, one after the other; both are
timed after each turn, for that turn.
The peer's Python needs DeepSpeed and transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 12}
SIZES |= {"num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 1024}
PROMPT, NEW = 64, 64
EAGER, COMPILED, DEEPSPEED = "transformers, eager", "transformers, static cache, compiled", "DeepSpeed init_inference"
OURS, UNFUSED, INT8, INT4, TWO = "ours", "ours, not fused", "ours, int8", "ours, int4", "ours, 2 ranks of 1 thread"


class Contender(NamedTuple):
    """Who generates: in which Python, on how many ranks, and the words of its inference config."""

    name: str
    dtype: str
    python: str = sys.executable
    ranks: int = 1
    config: dict[str, Any] | None = None  # None: no inference engine, transformers alone
    compiled: bool = False
    peer: bool = False


# ------------------------------------------------------------------------------------------------ in a process


def fresh_model(dtype: str) -> Any:
    """The same weights everywhere: a Llama of `SIZES`, head and embedding apart."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, tie_word_embeddings=False)
    config.eos_token_id = config.pad_token_id = None
    return LlamaForCausalLM(config).eval().to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])


def work(contender: Contender, threads: int) -> None:
    """Make the contender's model, then answer each line `BATCH` with the times and tokens, as JSON."""
    import torch
    import transformers

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes where errors go
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    net = fresh_model(contender.dtype)
    start = time.perf_counter()
    generates = net.generate
    if contender.config is not None:
        if contender.peer:
            import deepspeed as package
        else:
            import deepspeedlite as package
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[contender.dtype]
        generates = package.init_inference(net, config={"dtype": dtype, **contender.config}).generate
    init_s = time.perf_counter() - start
    if contender.compiled:  # as its documentation says; on a CPU its generate does not by itself
        net.forward = torch.compile(net.forward)
    more: dict[str, Any] = {"cache_implementation": "static"} if contender.compiled else {}
    numel = sum(one.numel() for one in net.parameters())
    print(json.dumps({"init_s": init_s, "numel": numel}), file=answers, flush=True)
    for line in sys.stdin:
        batch = int(line)
        prompt = torch.randint(5, SIZES["vocab_size"], (batch, PROMPT), generator=torch.Generator().manual_seed(1))
        more["attention_mask"] = torch.ones_like(prompt)
        found = {}
        with torch.inference_mode():
            for new in (1, NEW):
                begun = time.perf_counter()
                found[new] = generates(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, **more)
                found[-new] = (time.perf_counter() - begun) * 1e3
        times = {"prompt_ms": found[-1], "decode_ms": (found[-NEW] - found[-1]) / (NEW - 1)}
        print(json.dumps({**times, "tokens": found[NEW][0, PROMPT:].tolist()}), file=answers, flush=True)


# ----------------------------------------------------------------------------------------------- the conductor


class Process:
    """A contender's ranks, waiting for a line each."""

    def __init__(self, contender: Contender, threads: int, folder: str) -> None:
        self.contender = contender
        self.ranks = []
        for rank in range(contender.ranks):
            environ = {**os.environ, "PYTHONPATH": f"{ROOT}", "DS_ACCELERATOR": "cpu", "DSL_LOG_LEVEL": "warning"}
            environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(contender.ranks)}
            environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port(folder, contender))}
            environ |= {"OMP_NUM_THREADS": str(threads // contender.ranks), "HF_HUB_OFFLINE": "1"}
            words = ["--work", json.dumps(contender._asdict()), "--threads", str(threads // contender.ranks)]
            command = [contender.python, __file__, *words]
            self.log, pipe = Path(folder, f"{len(os.listdir(folder))}.log"), subprocess.PIPE
            with self.log.open("w") as log:
                self.ranks.append(
                    subprocess.Popen(command, env=environ, stdin=pipe, stdout=pipe, stderr=log, text=True, bufsize=1)
                )
        self.about = self.answer()

    def answer(self) -> dict[str, Any]:
        """What rank 0 says; all are waited for."""
        lines = [process.stdout.readline() for process in self.ranks]
        if not all(lines):
            raise RuntimeError(f"{self.contender.name} ({self.contender.dtype}): {self.log.read_text()[-2000:]}")
        return json.loads(lines[0])

    def ask(self, batch: int) -> dict[str, Any]:
        """One prompt of `batch` sequences and its continuation."""
        for process in self.ranks:
            process.stdin.write(f"{batch}\n")
        return self.answer()

    def close(self) -> None:
        for process in self.ranks:
            process.stdin.close()
        for process in self.ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def free_port(folder: str, contender: Contender) -> int:
    """The same for all ranks of a contender."""
    import socket

    kept = Path(folder, f"port-{abs(hash(contender.name + contender.dtype))}")
    if not kept.exists():
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            kept.write_text(str(one.getsockname()[1]))
    return int(kept.read_text())


class Limits:
    """What nobody does without, measured beside each turn: others on the machine change the rate of its memory."""

    def __init__(self, dtype: str, batch: int, threads: int, numel: int) -> None:
        import torch

        torch.set_num_threads(threads)
        hidden, inter, layers = (SIZES[f"{name}"] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
        of = {"dtype": {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]}
        wide = hidden + 2 * hidden * SIZES["num_key_value_heads"] // SIZES["num_attention_heads"]
        shapes = [(wide, hidden), (hidden, hidden), (2 * inter, hidden), (hidden, inter)]
        self._weights = [torch.randn(shape, **of) for _ in range(layers) for shape in shapes]
        self._head = torch.randn(SIZES["vocab_size"], hidden, **of)
        self._rows = {width: torch.randn(batch * PROMPT, width, **of) for width in (hidden, inter)}
        self._last = self._rows[hidden][:batch]
        # As many bytes as the weights have; of the embedding a token's row is read alone.
        self._read = torch.ones((numel - hidden * SIZES["vocab_size"]) * self._head.element_size() // 4)

    def measured(self) -> dict[str, float]:
        """Milliseconds of reading the weights once, by a sum, and of a prompt's products, by torch."""
        return {
            "read_ms": min(timed_ms(self._read.sum) for _ in range(3)),
            "products_ms": min(timed_ms(self._products) for _ in range(2)),
        }

    def _products(self) -> None:
        import torch

        for weight in self._weights:
            torch.nn.functional.linear(self._rows[weight.shape[1]], weight)
        torch.nn.functional.linear(self._last, self._head)


def timed_ms(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return (time.perf_counter() - begun) * 1e3


@contextlib.contextmanager
def all_started(contenders: list[Contender], threads: int) -> Iterator[list[Process]]:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        processes = []
        for contender in contenders:
            try:
                processes.append(Process(contender, threads, folder))
            except RuntimeError as error:
                print(f"left out: {error}", file=sys.stderr)
                continue
            stack.callback(processes[-1].close)
        yield processes


def contenders_of(dtype: str, peer_python: str | None, only: list[str] | None) -> list[Contender]:
    """All that can generate in `dtype`."""
    fused = {"replace_with_kernel_inject": True, "max_out_tokens": SIZES["max_position_embeddings"]}
    found = [
        Contender(EAGER, dtype),
        Contender(COMPILED, dtype, compiled=True),
        Contender(OURS, dtype, config=fused),
        Contender(UNFUSED, dtype, config={}),
        Contender(TWO, dtype, ranks=2, config={**fused, "tensor_parallel": {"tp_size": 2}}),
    ]
    if dtype == "fp32":
        found += [
            Contender(name, dtype, config={**fused, "quant": {"enabled": True, "weight": {"num_bits": bits}}})
            for name, bits in ((INT8, 8), (INT4, 4))
        ]
    if peer_python:
        found.append(Contender(DEEPSPEED, dtype, python=peer_python, config={}, peer=True))
    return [one for one in found if only is None or one.name in only]


def main() -> None:
    """Measure, then print JSON lines and a table per dtype."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", help="the Python of an environment that has DeepSpeed and transformers")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (a first one is not counted)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="for each contender")
    parser.add_argument("--only", nargs="+", help="contenders' names, as the table prints them")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(Contender(**json.loads(args.work)), args.threads)
    for dtype in args.dtypes:
        measure(dtype, args)
    return None


def measure(dtype: str, args: argparse.Namespace) -> None:
    """One dtype's table."""
    from machine import machine, print_json, print_table

    with all_started(contenders_of(dtype, args.peer_python, args.only), args.threads) as processes:
        for batch in args.batches:
            found: dict[str, list[dict[str, Any]]] = {one.contender.name: [] for one in processes}
            limits = Limits(dtype, batch, args.threads, processes[0].about["numel"])
            for number in range(args.rounds + 1):
                turn = number % len(processes)
                for process in processes[turn:] + processes[:turn]:
                    answer = process.ask(batch)
                    if number:
                        found[process.contender.name].append({**answer, **limits.measured()})
            reference = found.get(EAGER) or next(iter(found.values()))
            rows = []
            for process in processes:
                name = process.contender.name
                decode, prompt = ([answer[which] for answer in found[name]] for which in ("decode_ms", "prompt_ms"))
                ratio = [
                    statistics.median(a[which] / b[which] for a, b in zip(found[name], reference))
                    for which in ("decode_ms", "prompt_ms")
                ]
                to_limit = [
                    statistics.median(answer[which] / answer[limit] for answer in found[name])
                    for which, limit in (("decode_ms", "read_ms"), ("prompt_ms", "products_ms"))
                ]
                alike = sum(a == b for a, b in zip(found[name][0]["tokens"], reference[0]["tokens"]))
                figures = {
                    "decode_ms": round(statistics.median(decode), 2),
                    "to_eager": round(ratio[0], 3),
                    "to_read": round(to_limit[0], 2),
                    "prompt_ms": round(statistics.median(prompt), 1),
                    "prompt_to_eager": round(ratio[1], 3),
                    "prompt_to_products": round(to_limit[1], 2),
                    "init_s": round(process.about["init_s"], 2),
                    "tokens_alike": alike,
                }
                print_json(benchmark="inference", what=name, dtype=dtype, batch=batch, **figures, **machine())
                rows.append((name, *figures.values()))
            title = f"Llama, {processes[0].about['numel'] / 1e6:.0f} M parameters, {dtype}, batch {batch}"
            read, products = (
                statistics.median(answer[limit] for answers in found.values() for answer in answers)
                for limit in ("read_ms", "products_ms")
            )
            print_table(
                f"{title}; weights read in {read:.1f} ms, prompt's products {products:.0f} ms",
                (
                    "what",
                    "decode ms/token",
                    "to eager",
                    "to read",
                    "prompt ms",
                    "to eager",
                    "to products",
                    "start s",
                    f"tokens as eager's, of {NEW}",
                ),
                rows,
            )


if __name__ == "__main__":
    main()
