"""What one rank of many holds, sends and spends in Python at ZeRO stages 1 to 3: up to 1024 ranks, on one machine.

    python benchmarks/zero_scale.py [--models 1.3B 7B 70B] [--ranks 8 64 512 1024] [--stages 1 2 3] [--steps 2]

Rank 0 runs alone. torch's fake process group answers for the others: a collective is over as soon as it is started. All
tensors are on the meta device, where they have sizes and storages but no memory, so a step runs the same Python as a
real one, and every storage that comes, goes or is resized can be counted. What a simulation cannot see: values, time on
a device or a wire, a real allocator's fragments, and the inner buffers of kernels. Sequences are one token long, which
leaves model states and communication buffers, the two things that sharding is about.

The models are GPTs in bf16 with AdamW (its two moments are kept, its update does nothing: torch's fused kernel has no
meta form). Nothing clips, since a norm would have to be read. Stage 3 lets parameters go after each use
(`stage3_max_reuse_distance` 0); all else is the default. Columns of the table:

- states: live bytes after a step, and their ratio to `deepspeedlite.tools.memory_plan.states`' formula,
- peak: most live bytes in forward and backward,
- reduces, shares, gathers: collectives of one step. A share sends updated values that every rank keeps, a gather makes
  sharded values whole; "late" are the gathers that a module had to wait for as soon as they were started,
- sent: bytes that leave this rank in a step over a ring, (N - 1)/N of each collective's buffer,
- CPU ms: processor time of a step in this process, the least of some; "plain" is that of the model's forward and
  backward without an engine, which the meta device makes slower than a GPU does.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from machine import machine, print_json, print_table
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import GPT, GPTConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import deepspeedlite
from deepspeedlite.runtime.device import Device
from deepspeedlite.tools.memory_plan.states import model_states_bytes

GIB = 1 << 30
META = torch.device("meta")
SIZES: dict[str, Any] = {"vocabulary": 50304, "context": 2048, "tied_head": False}
MODELS = {
    "1.3B": GPTConfig(width=2048, layers=24, heads=16, **SIZES),
    "7B": GPTConfig(width=4096, layers=32, heads=32, **SIZES),
    "70B": GPTConfig(width=8192, layers=86, heads=64, **SIZES),
}
SMALL = GPTConfig(vocabulary=512, context=8, width=256, layers=6, heads=4, tied_head=False)  # 5 M, to try it out


# --- a machine that is not there ------------------------------------------------------------------------------------


def _address(tensor: torch.Tensor) -> int:
    """What `data_ptr` says of real tensors: equal where memory is shared. It is 0 for all on the meta device."""
    return tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size()


@contextmanager
def simulated(ranks: int) -> Iterator[None]:
    """This process is rank 0 of `ranks`, and its device is `meta`."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        with (
            mock.patch.dict(os.environ),
            mock.patch("deepspeedlite.factory.pick_device", lambda local_rank: Device(META)),
            mock.patch.object(torch.Tensor, "data_ptr", _address, create=True),
        ):
            yield
    finally:
        dist.destroy_process_group()


class LiveBytes(TorchDispatchMode):
    """Counts the storages behind all tensors that operators return while it is active, until they are released."""

    def __init__(self) -> None:
        super().__init__()
        self.now_bytes = self.peak_bytes = 0
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._resize = torch.UntypedStorage.resize_
        self._patch = mock.patch.object(torch.UntypedStorage, "resize_", self._on_resize())

    def _on_resize(self) -> Callable[..., Any]:
        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = self._resize(storage, size)
            self._note(storage)
            return result

        return resize_

    def __enter__(self) -> LiveBytes:
        self._patch.start()
        # A parameter's storage of its own lies in its flat buffer's: counted once, as on the meta device.
        self._views = mock.patch("deepspeedlite.zero.flat_params._in_storage_of_its_own", lambda view: view)
        self._views.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._views.stop()
        self._patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, torch.Tensor):
                self._note(item.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._watched:
            self._watched[key] = weakref.ref(storage, partial(self._forget, key))
        self.now_bytes += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)

    def _forget(self, key: int, reference: Any) -> None:
        del self._watched[key]
        self.now_bytes -= self._sizes.pop(key)


class Traffic:
    """The collectives that an engine starts in a `with` block, and whether a module ran before each gather's wait."""

    def __init__(self, engine: Any) -> None:
        self.reduces = self.shares = self.gathers = self.late_gathers = self.sent_bytes = 0
        self._engine, self._group = engine, engine._parts.group
        self._sharded = {id(unit.flat.values) for unit in engine._reducer.units if unit.flat.sharded}
        self._modules_run = 0
        self._handles: list[Any] = []

    def __enter__(self) -> Traffic:
        self._gather, self._reduce = self._group.all_gather_into, self._group.reduce_scatter_into
        self._group.all_gather_into, self._group.reduce_scatter_into = self._on_gather, self._on_reduce
        self._handles = [module.register_forward_hook(self._on_module) for module in self._engine.module.modules()]
        return self

    def __exit__(self, *error: Any) -> None:
        del self._group.all_gather_into, self._group.reduce_scatter_into  # the class's own appear again
        for handle in self._handles:
            handle.remove()

    def _on_module(self, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self._modules_run += 1
        output.register_hook(self._on_grad)

    def _on_grad(self, grad: torch.Tensor) -> None:
        self._modules_run += 1

    def _count_bytes(self, buffer: torch.Tensor) -> None:
        self.sent_bytes += buffer.numel() * buffer.element_size() * (self._group.size - 1) // self._group.size

    def _on_gather(self, out: torch.Tensor, shard: torch.Tensor, **options: Any) -> Any:
        self._count_bytes(out)
        work = self._gather(out, shard, **options)
        if id(out) not in self._sharded:
            self.shares += 1
            return work
        self.gathers += 1
        return _Awaited(work, partial(self._on_wait, self._modules_run))

    def _on_wait(self, modules_run_at_start: int) -> None:
        self.late_gathers += self._modules_run == modules_run_at_start

    def _on_reduce(self, out: torch.Tensor, full: torch.Tensor, *op: str, **options: Any) -> Any:
        self._count_bytes(full)
        self.reduces += 1
        return self._reduce(out, full, *op, **options)


class _Awaited:
    """A collective whose `wait` is noticed."""

    def __init__(self, work: Any, note: Callable[[], None]) -> None:
        self._work, self._note = work, note

    def wait(self) -> None:
        self._note()
        self._work.wait()


class AdamWStates(torch.optim.AdamW):
    """AdamW's memory, without its arithmetic."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Make the moments of what has a gradient, if they are not there."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and not self.state[param]:
                    self.state[param] = {key: torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq")}


# --- one training ---------------------------------------------------------------------------------------------------


def build(sizes: GPTConfig, stage: int, device: torch.device = META, **zero: Any) -> Any:
    """An engine of a model on `device`."""
    with device:
        model = GPT(sizes)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0,
        "steps_per_print": None,
        "bf16": {"enabled": True, "check_grad_overflow": False},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **({"stage3_max_reuse_distance": 0} if stage == 3 else {}), **zero},
    }
    return deepspeedlite.initialize(model=model, optimizer=AdamWStates(model.parameters()), config=settings)[0]


def token(device: torch.device) -> torch.Tensor:
    """A batch of one sequence of one token."""
    return torch.zeros(1, 1, dtype=torch.long, device=device)


def one_step(engine: Any) -> None:
    """A step, of which nothing is kept."""
    batch = token(engine.device)
    engine.backward(engine(batch, batch))
    engine.step()


class Counted(NamedTuple):
    """What one rank holds and sends; see the file's first lines."""

    params: int
    units: int
    states_bytes: int
    peak_bytes: int
    largest_unit_bytes: int
    reduces: int
    shares: int
    gathers: int
    late_gathers: int
    sent_bytes: int


def count(make_engine: Callable[[], Any]) -> tuple[Any, Counted]:
    """Make an engine on any device, and count its second step: the first one makes states and learns the order."""
    with LiveBytes() as live:
        engine = make_engine()
        one_step(engine)
        live.peak_bytes = live.now_bytes
        with Traffic(engine) as traffic:
            batch = token(engine.device)
            loss = engine(batch, batch)
            engine.backward(loss)
            peak_bytes = live.peak_bytes
            engine.step()
        del batch, loss
        states_bytes = live.now_bytes
    units = engine._reducer.units
    return engine, Counted(
        params=sum(slot.numel for unit in units for slot in unit.layout.slots),
        units=len(units),
        states_bytes=states_bytes,
        peak_bytes=peak_bytes,
        largest_unit_bytes=max(unit.layout.numel * unit.flat.dtype.itemsize for unit in units),
        reduces=traffic.reduces,
        shares=traffic.shares,
        gathers=traffic.gathers,
        late_gathers=traffic.late_gathers,
        sent_bytes=traffic.sent_bytes,
    )


def formula_bytes(counted: Counted, ranks: int, stage: int) -> int:
    """The model states that ZeRO's formula gives each rank."""
    return model_states_bytes(counted.params, counted.params, gpus=ranks, dtype="bf16", stage=stage).gpu_bytes


def plain_cpu_ms(sizes: GPTConfig, steps: int) -> float:
    """Processor time of forward and backward without an engine."""
    with META:
        model = GPT(sizes).bfloat16()

    def step() -> None:
        model(token(META), token(META)).backward()
        model.zero_grad()

    step()
    return min(cpu_ms(step) for _ in range(steps))


def cpu_ms(call: Callable[[], None]) -> float:
    """Milliseconds of this process's processor time that a call takes; other processes do not disturb it."""
    start_s = time.process_time()
    call()
    return (time.process_time() - start_s) * 1e3


def main() -> None:
    """Simulate every combination; print as they come, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=[*MODELS, "small"], default=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64, 512, 1024])
    parser.add_argument("--stages", nargs="+", type=int, choices=(1, 2, 3), default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=2, help="timed steps")
    args = parser.parse_args()
    os.environ.setdefault("DSL_LOG_LEVEL", "error")
    rows = []
    for name in args.models:
        sizes = MODELS.get(name, SMALL)
        plain = plain_cpu_ms(sizes, args.steps)
        for stage in args.stages:
            for ranks in args.ranks:
                with simulated(ranks):
                    engine, counted = count(partial(build, sizes, stage))
                    step_ms = min(cpu_ms(partial(one_step, engine)) for _ in range(args.steps))
                formula = formula_bytes(counted, ranks, stage)
                about = {"model": name, "stage": stage, "ranks": ranks, **counted._asdict(), "formula_bytes": formula}
                times = {"step_cpu_ms": round(step_ms, 1), "plain_cpu_ms": round(plain, 1)}
                print_json(benchmark="zero_scale", **about, **times, torch=torch.__version__, **machine())
                rows.append((name, stage, ranks, *cells(counted, formula), f"{step_ms:.0f}", f"{plain:.0f}"))
    head = ("model", "stage", "ranks", "states GiB", "to formula", "peak GiB", "reduces", "shares", "gathers", "late")
    title = f"Rank 0 of N, simulated; GPTs in bf16 with AdamW, torch {torch.__version__}"
    print_table(title, (*head, "sent GB", "CPU ms", "plain"), rows)


def cells(counted: Counted, formula: int) -> tuple[object, ...]:
    """A row's counts as text."""
    return (
        f"{counted.states_bytes / GIB:.2f}",
        f"{counted.states_bytes / formula:.4f}",
        f"{counted.peak_bytes / GIB:.2f}",
        counted.reduces,
        counted.shares,
        counted.gathers,
        counted.late_gathers,
        f"{counted.sent_bytes / 1e9:.2f}",
    )


if __name__ == "__main__":
    main()
