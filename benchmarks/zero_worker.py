"""One rank of one contender of zero_step.py: builds it, then trains as many steps as it is told to, and times them.

    python benchmarks/zero_worker.py JSON      (JSON: a `Job`)

It reads one JSON line per turn from stdin, {"steps": k, "first": number of the first step}, and answers each with one
on stdout; the end of stdin ends it. Between turns it blocks in that read. What others print goes to stderr.
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from training import (
    ADAMW,
    BETAS,
    GPT,
    Batch,
    GPTConfig,
    Step,
    batch,
    ddp_step,
    engine_config,
    engine_step,
    fresh_model,
    fused_adamw,
    our_engine,
)

MIB = 2**20


@dataclass(frozen=True)
class Job:
    """Which contender this is, and where its ranks meet."""

    kind: str  # a key of MAKERS
    options: dict[str, Any]  # of `zero_optimization`, or of FSDP2
    rank: int
    ranks: int
    store_path: str
    layers: int
    bf16: bool
    accumulation: int


@dataclass(frozen=True)
class Training:
    """A contender ready to train; `module` is what the loop calls."""

    module: torch.nn.Module
    step: Step
    version: str


def main() -> None:
    """Build, report, obey."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    job = Job(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    store = dist.FileStore(job.store_path, job.ranks)
    dist.init_process_group("gloo", store=store, rank=job.rank, world_size=job.ranks)
    model = fresh_model(replace(GPTConfig.benchmark(), layers=job.layers))
    sizes, numel = model.config, model.numel()
    training = MAKERS[job.kind](model, job)
    del model
    gc.collect()
    init_mib = memory_mib()
    answer(replies, version=training.version, torch=torch.__version__, numel=numel, **init_mib)
    restart_peak()

    whole = watch_whole_parameters(training.module)
    idle_since = clocks()
    for line in sys.stdin:
        idle = [now - then for now, then in zip(clocks(), idle_since)]
        command = json.loads(line)
        numbers = range(command["first"], command["first"] + command["steps"])
        data = [[batch(sizes, job.rank, n * job.accumulation + i) for i in range(job.accumulation)] for n in numbers]
        found = timed_turn(training.step, data)
        memory = memory_mib()
        answer(replies, **found, **memory, idle_cpu_s=idle[0], idle_s=idle[1], whole_numel=whole())
        idle_since = clocks()
    dist.destroy_process_group()


def timed_turn(step: Step, data: list[list[Batch]]) -> dict[str, Any]:
    """Train on the data; milliseconds of each step and of this process's CPU per step, and all losses.

    A step lasts from one barrier to the next, so that what it leaves for a background thread is counted too.
    """
    losses: list[float] = []
    dist.barrier()
    cpu_start_s, marks_s = time.process_time(), [time.perf_counter()]
    for micro_batches in data:
        losses += step(micro_batches)
        dist.barrier()
        marks_s.append(time.perf_counter())
    cpu_ms = (time.process_time() - cpu_start_s) * 1e3 / len(data)
    times_ms = [(end - start) * 1e3 for start, end in pairwise(marks_s)]
    return {"times_ms": times_ms, "cpu_ms": cpu_ms, "losses": losses}


def make_ddp(model: GPT, job: Job) -> Training:
    """DistributedDataParallel; with bf16 the model is bf16, its master weights fp32, its gradients reduced in bf16."""
    if job.bf16:
        model.bfloat16()
    module = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return Training(module, ddp_step(module), torch.__version__)


def make_alone(model: GPT, job: Job) -> Training:
    """Forward and backward passes alone, no rank knowing of another, and no step: what everyone has to do."""
    if job.bf16:
        model.bfloat16()

    def step(micro_batches: list[Batch]) -> list[float]:
        losses = []
        for tokens, targets in micro_batches:
            loss = model(tokens, targets)
            loss.backward()
            losses.append(loss.detach())
        model.zero_grad(set_to_none=True)
        return [loss.item() for loss in losses]

    return Training(model, step, torch.__version__)


def make_fsdp2(model: GPT, job: Job) -> Training:
    """fully_shard on each block and the root; `reshard_root` False leaves the root's parameters whole after forward.

    bf16: fp32 parameters, cast when gathered, gradients reduced in bf16 as the others do.
    Accumulation: gradients stay whole on each rank until the last micro-batch, which takes the fewest messages.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    shared = {"mesh": init_device_mesh("cpu", (job.ranks,)), "mp_policy": bf16 if job.bf16 else MixedPrecisionPolicy()}
    for block in model.blocks:
        fully_shard(block, reshard_after_forward=True, **shared)
    module: Any = fully_shard(model, reshard_after_forward=job.options["reshard_root"], **shared)
    optimizer = fused_adamw(module.parameters())

    def step(micro_batches: list[Batch]) -> list[float]:
        losses = []
        for number, (tokens, targets) in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            module.set_requires_gradient_sync(last)
            module.set_is_last_backward(last)
            loss = module(tokens, targets)
            (loss / len(micro_batches) if len(micro_batches) > 1 else loss).backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return [loss.item() for loss in losses]

    return Training(module, step, torch.__version__)


def make_lite(model: GPT, job: Job) -> Training:
    """deepspeedlite, its AdamW named in the configuration."""
    options = {key: value for key, value in job.options.items() if key != "check_grad_overflow"}
    config = engine_config(options, job.bf16, job.accumulation)
    config["check_grad_overflow"] = job.options.get("check_grad_overflow", True)
    engine = our_engine(model, config)
    from deepspeedlite import __version__

    return Training(engine, engine_step(engine), __version__)


def make_deepspeed(model: GPT, job: Job) -> Training:
    """The real DeepSpeed with torch's fused AdamW as the client's optimizer: its own cpu_adam is no faster."""
    import deepspeed

    config = engine_config(job.options, job.bf16, job.accumulation)
    optimizer = None
    if "offload_optimizer" in job.options:  # which its own Adam alone steps
        config["optimizer"] = {"type": "AdamW", "params": {**ADAMW, "betas": list(BETAS)}}
    else:
        optimizer = fused_adamw(model.parameters())
    engine = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), optimizer=optimizer, config=config, dist_init_required=False
    )[0]
    return Training(engine, engine_step(engine), deepspeed.__version__)


MAKERS: dict[str, Callable[[GPT, Job], Training]] = {
    "alone": make_alone,
    "ddp": make_ddp,
    "fsdp2": make_fsdp2,
    "lite": make_lite,
    "deepspeed": make_deepspeed,
}


def watch_whole_parameters(module: torch.nn.Module) -> Callable[[], int]:
    """A function that says how many elements of parameters this rank held whole as the first turn's last forward ended.

    It shows whether a contender really lets its parameters go after forward. Later turns are not watched.
    """
    found: list[int] = []
    handle = module.register_forward_hook(lambda *_: found.append(whole_numel(module.parameters())))

    def last() -> int:
        handle.remove()
        return found[-1]

    return last


def whole_numel(params: Iterable[torch.Tensor]) -> int:
    """Elements of the parameters that are plain tensors with memory under them: neither shards nor released."""
    return sum(
        param.numel()
        for param in params
        if not isinstance(param, DTensor) and param.untyped_storage().nbytes() >= param.numel() * param.element_size()
    )


def memory_mib() -> dict[str, float]:
    """Resident memory of this process now, and its highest since the start or since `restart_peak`, in MiB."""
    status = Path("/proc/self/status").read_text()
    now, peak = (int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) * 1024 / MIB for key in ("VmRSS", "VmHWM"))
    return {"rss_mib": now, "peak_mib": peak}


def restart_peak() -> None:
    """Let VmHWM start again from what is resident now (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def clocks() -> tuple[float, float]:
    """Seconds of CPU that all threads of this process have used, and seconds on the wall."""
    return time.process_time(), time.perf_counter()


def answer(replies: TextIO, **fields: Any) -> None:
    """One line of JSON to the parent."""
    replies.write(json.dumps(fields) + "\n")


if __name__ == "__main__":
    main()
