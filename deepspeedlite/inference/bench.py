"""What `python -m deepspeedlite.inference bench` measures: a model generating, as it is and by an engine."""

from __future__ import annotations

import gc
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deepspeedlite.comm.init import init_process_group
from deepspeedlite.comm.ranks import get_local_rank
from deepspeedlite.host.text import print_table, size_text
from deepspeedlite.inference.config import read_inference_config
from deepspeedlite.inference.engine import InferenceEngine
from deepspeedlite.inference.prepare import TORCH_DTYPES
from deepspeedlite.runtime.device import Device, pick_device
from deepspeedlite.runtime.env import discover_world
from deepspeedlite.runtime.errors import ConfigError
from deepspeedlite.runtime.log import current_rank, logger

_READ_NBYTES = 512 << 20  # of the buffer that the read bandwidth is measured with


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be measured; see the command's help."""

    folder: str
    dtype: str = "bf16"
    bits: int | None = None
    fused: bool = True
    prompt: int = 64
    new: int = 64
    batch: int = 1
    rounds: int = 3
    beside: bool = True


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was found of one way to generate; rates are of all prompts together."""

    name: str
    load_s: float
    prompt_tokens_per_s: float
    decode_tokens_per_s: float
    step_ms: float
    weights_bytes: int
    memory_bytes: int
    bandwidth_share: float  # of the rate at which one rank's weights are read once for each token


def bench(asked: Asked, as_json: bool = False) -> list[Figures]:
    """Measure, and print a table on rank 0.

    Raises:
        ConfigError: there are not at least two tokens to generate.
        ImportError: transformers is not installed.
    """
    if asked.new < 2 or asked.prompt < 1 or asked.batch < 1 or asked.rounds < 1:
        raise ConfigError("bench: --new must be 2 at least, and --prompt, --batch and --rounds 1 at least")
    import transformers

    transformers.logging.set_verbosity_error()
    ranks = discover_world(os.environ).world_size
    if ranks > 1:
        init_process_group(verbose=False)
    device = pick_device(get_local_rank())
    logger.setLevel(logging.WARNING)
    rate = read_rate(device)
    with torch.device("meta"):  # so that imports are nobody's load time
        transformers.AutoModelForCausalLM.from_config(_config_of(transformers, asked))
    ways: list[tuple[str, Callable[[], Any]]] = []
    if asked.beside and ranks == 1:
        ways.append(("transformers", lambda: _as_it_is(transformers, asked, device)))
    ways.append((_named(asked, ranks), lambda: _by_engine(transformers, asked, ranks)))
    found = [_measured(name, make, asked, device, rate) for name, make in ways]
    if current_rank() == 0:
        _tell(found, asked, ranks, device, rate, as_json)
    return found


def _named(asked: Asked, ranks: int) -> str:
    words = ["init_inference", "fused" if asked.fused else "unfused"]
    words += [f"int{asked.bits}"] if asked.bits else []
    return " ".join([*words, f"tp {ranks}"] if ranks > 1 else words)


def read_rate(device: Device) -> float:
    """Bytes per second at which memory is read, the best of some passes over a buffer larger than caches."""
    buffer = torch.ones(_READ_NBYTES // 4, device=device.torch_device)
    best = 0.0
    for _ in range(5):
        device.synchronize()
        begun = time.perf_counter()
        float(buffer.sum())
        best = max(best, buffer.nbytes / (time.perf_counter() - begun))
    return best


def _config_of(transformers: Any, asked: Asked) -> Any:
    return transformers.AutoConfig.from_pretrained(asked.folder, local_files_only=True)


def _has_weights(asked: Asked) -> bool:
    return any(next(Path(asked.folder).glob(ending), None) for ending in ("*.safetensors", "*.bin"))


def _as_it_is(transformers: Any, asked: Asked, device: Device) -> Any:
    dtype = TORCH_DTYPES[asked.dtype]
    if _has_weights(asked):
        model = transformers.AutoModelForCausalLM.from_pretrained(asked.folder, dtype=dtype, local_files_only=True)
    else:
        model = transformers.AutoModelForCausalLM.from_config(_config_of(transformers, asked), dtype=dtype)
    return model.eval().to(device.torch_device)


def _by_engine(transformers: Any, asked: Asked, ranks: int) -> InferenceEngine:
    config = _config_of(transformers, asked)
    given: dict[str, Any] = {
        "dtype": asked.dtype,
        "tensor_parallel": {"tp_size": ranks},
        "replace_with_kernel_inject": asked.fused,
        "max_out_tokens": asked.prompt + asked.new,
    }
    if asked.bits:
        given["quant"] = {"weight": {"num_bits": asked.bits}}
    if _has_weights(asked):
        given["checkpoint"] = asked.folder
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=TORCH_DTYPES[asked.dtype])
    else:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=TORCH_DTYPES[asked.dtype])
    return InferenceEngine(model.eval(), read_inference_config(given, {}))


def _measured(name: str, make: Callable[[], Any], asked: Asked, device: Device, rate: float) -> Figures:
    gc.collect()
    before = _memory(device)
    begun = time.perf_counter()
    model = make()
    device.synchronize()
    load_s = time.perf_counter() - begun
    size = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(0, size, (asked.batch, asked.prompt), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device.torch_device)

    def takes_s(new: int) -> float:
        best = float("inf")
        for _ in range(asked.rounds):
            device.synchronize()
            started = time.perf_counter()
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
            device.synchronize()
            best = min(best, time.perf_counter() - started)
        return best

    takes_s(2)  # what is made at the first call
    prompt_s = takes_s(1)
    step_s = max((takes_s(asked.new) - prompt_s) / (asked.new - 1), 1e-9)
    module = model.module if isinstance(model, InferenceEngine) else model
    kept = {one.data_ptr(): one.nbytes for one in (*module.parameters(), *module.buffers())}
    weights = sum(kept.values())
    tokens, head = (getattr(module, f"get_{which}_embeddings")() for which in ("input", "output"))
    is_tied = head is not None and head.weight.data_ptr() == tokens.weight.data_ptr()
    read = weights if is_tied else weights - tokens.weight.nbytes  # of which a step reads one row
    figures = Figures(
        name=name,
        load_s=load_s,
        prompt_tokens_per_s=asked.batch * asked.prompt / prompt_s,
        decode_tokens_per_s=asked.batch / step_s,
        step_ms=step_s * 1e3,
        weights_bytes=weights,
        memory_bytes=max(0, _memory(device) - before),
        bandwidth_share=read / rate / step_s,
    )
    if isinstance(model, InferenceEngine):
        model.destroy()
    return figures


def _memory(device: Device) -> int:
    """What this process has of the device's memory, or of the host's."""
    if device.is_accelerator:
        return device.memory_stats()["allocated_bytes"]
    import psutil

    return int(psutil.Process().memory_info().rss)


def _tell(found: list[Figures], asked: Asked, ranks: int, device: Device, rate: float, as_json: bool) -> None:
    if as_json:
        about = {"asked": asdict(asked), "ranks": ranks, "device": device.name, "read_bytes_per_s": rate}
        print(json.dumps({**about, "found": [asdict(one) for one in found]}))
        return
    weights = "its weights" if _has_weights(asked) else "random weights"
    print(
        f"{asked.folder} with {weights} in {asked.dtype}: {asked.batch} x {asked.prompt} tokens, {asked.new} new ones; "
        f"{ranks} x {device.name}, {torch.get_num_threads()} threads, reads {size_text(rate)}/s"
    )
    head = ["", "load", "prompt tokens/s", "new tokens/s", "ms a step", "weights", "memory", "of read bandwidth"]
    rows = [
        [
            one.name,
            f"{one.load_s:.2f} s",
            f"{one.prompt_tokens_per_s:,.0f}",
            f"{one.decode_tokens_per_s:,.1f}",
            f"{one.step_ms:.2f}",
            size_text(one.weights_bytes),
            size_text(one.memory_bytes),
            f"{one.bandwidth_share:.0%}",
        ]
        for one in found
    ]
    print_table(head, rows, right=set(head[1:]))
