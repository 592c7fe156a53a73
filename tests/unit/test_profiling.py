"""Timers, throughput, memory lines, and the FLOPs profiler against closed formulas."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from deepspeedlite.metrics.flops_report import si
from deepspeedlite.metrics.timers import MAX_UNREAD_INTERVALS, Stopwatch
from deepspeedlite.profiling import (
    FlopsProfiler,
    ThroughputTimer,
    Timers,
    get_model_profile,
    memory_breakdown,
    see_memory_usage,
)
from deepspeedlite.runtime.device import Device
from deepspeedlite.runtime.errors import ConfigError, EngineStateError
from deepspeedlite.runtime.log import logger

CPU = Device(torch.device("cpu"))


@dataclass
class FakeGpu:
    """A device whose events finish `behind` events late, and which counts every wait of the host."""

    behind: int = 0
    clock_ms: float = 0.0
    waits: int = 0
    made: int = 0
    queued: deque[FakeEvent] = field(default_factory=deque)

    def event(self) -> FakeEvent:
        self.made += 1
        return FakeEvent(self)

    def work(self, time_ms: float) -> None:
        self.clock_ms += time_ms

    def memory_stats(self) -> dict[str, int]:
        gib = 1 << 30
        return {
            "allocated_bytes": gib,
            "peak_allocated_bytes": 2 * gib,
            "reserved_bytes": 3 * gib,
            "peak_reserved_bytes": 4 * gib,
        }


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.at_ms, self.done = gpu, 0.0, False

    def record(self) -> None:
        self.at_ms, self.done = self.gpu.clock_ms, False
        self.gpu.queued.append(self)
        while len(self.gpu.queued) > self.gpu.behind:
            self.gpu.queued.popleft().done = True

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.gpu.waits += not self.done
        while not self.done:
            self.gpu.queued.popleft().done = True

    def elapsed_time(self, other: FakeEvent) -> float:
        assert self.done and other.done, "an event was read before it finished"
        return other.at_ms - self.at_ms


@pytest.fixture
def gpu() -> FakeGpu:
    return FakeGpu(behind=1000)


# --- timers


def test_cpu_timers_measure_and_nest() -> None:
    timers = Timers(CPU, enabled=True)
    timers.start("step")
    timers.start("inner")
    time.sleep(0.02)
    timers.stop("inner")
    time.sleep(0.01)
    timers.stop("step")
    assert timers.elapsed_ms("inner", reset=False) >= 20
    assert timers.elapsed_ms("step", reset=False) >= timers.elapsed_ms("inner") + 10
    assert timers.elapsed_ms("inner") == 0.0, "the read before reset it"
    assert timers.elapsed_ms("step") > 0.0
    assert timers.elapsed_ms("never") == 0.0


def test_gpu_timers_wait_only_when_read(gpu: FakeGpu) -> None:
    timers = Timers(gpu, enabled=True)  # type: ignore[arg-type]
    for _ in range(3):
        timers.start("forward")
        gpu.work(5)
        timers.stop("forward")
        gpu.work(100)
        timers.start("backward")
        gpu.work(10)
        timers.stop("backward")
    assert gpu.waits == 0, "start and stop must not wait for the device"
    assert timers.report(["forward", "backward", "step"], steps=3) == "time (ms) | forward: 5.00 | backward: 10.00"
    assert gpu.waits > 0
    assert timers.report() == "time (ms) | forward: 0.00 | backward: 0.00"


def test_gpu_events_are_reused_when_nobody_reads() -> None:
    gpu = FakeGpu(behind=4)
    watch = Stopwatch(gpu)  # type: ignore[arg-type]
    for _ in range(1000):
        watch.start()
        gpu.work(2)
        watch.stop()
    assert gpu.waits == 0
    assert gpu.made <= 2 * MAX_UNREAD_INTERVALS + 8, "events piled up"
    assert watch.elapsed_ms() == 2000


def test_stop_without_start_is_named() -> None:
    timers = Timers(CPU, enabled=True)
    timers.start("forward")
    with pytest.raises(EngineStateError, match=r"'backward'.*running: forward"):
        timers.stop("backward")
    timers.stop("forward")
    with pytest.raises(EngineStateError, match="'forward'"):
        timers.stop("forward")
    with pytest.raises(EngineStateError, match="0 steps"):
        timers.report(steps=0)


def test_an_interval_left_open_is_dropped(gpu: FakeGpu) -> None:
    timers = Timers(gpu, enabled=True)  # type: ignore[arg-type]
    timers.start("forward")  # raised, and the script went on
    gpu.work(1000)
    timers.start("forward")
    gpu.work(1)
    timers.stop("forward")
    assert timers.elapsed_ms("forward") == 1


def test_disabled_timers_do_nothing(gpu: FakeGpu) -> None:
    timers = Timers(gpu, enabled=False)  # type: ignore[arg-type]
    timers.start("forward")
    timers.stop("forward")
    timers.stop("never started")
    assert (gpu.made, timers.names, timers.elapsed_ms("forward"), timers.report()) == (0, [], 0.0, "time (ms)")


# --- throughput


def steps(timer: ThroughputTimer, gpu: FakeGpu, times_ms: list[float], accumulation: int = 1) -> None:
    for time_ms in times_ms:
        for micro in range(accumulation):
            timer.start()
            timer.start()  # the data loader's and the engine's
            gpu.work(time_ms / accumulation)
            timer.stop(global_step=micro == accumulation - 1)
        gpu.work(7)  # between steps: not counted


@pytest.mark.parametrize("accumulation", [1, 4])
def test_throughput_leaves_out_warm_up_and_waits_only_to_print(gpu: FakeGpu, accumulation: int) -> None:
    lines: list[str] = []
    timer = ThroughputTimer(8, start_step=2, steps_per_output=4, device=gpu, logging_fn=lines.append)  # type: ignore[arg-type]
    steps(timer, gpu, [9000, 9000, 10], accumulation)
    assert (lines, gpu.waits) == ([], 0)
    steps(timer, gpu, [10], accumulation)
    assert len(lines) == 1
    assert "step 4 | RunningAvgSamplesPerSec=800.00, CurrSamplesPerSec=800.00, MemAllocated=1.00GiB" in lines[0]
    waits = gpu.waits
    steps(timer, gpu, [20, 20, 20], accumulation)
    assert gpu.waits == waits
    steps(timer, gpu, [20], accumulation)
    assert "RunningAvgSamplesPerSec=480.00, CurrSamplesPerSec=400.00" in lines[1]


def test_throughput_follows_a_changed_batch_size(gpu: FakeGpu) -> None:
    timer = ThroughputTimer(8, start_step=0, device=gpu)  # type: ignore[arg-type]
    assert timer.avg_samples_per_sec() == 0.0
    steps(timer, gpu, [10])
    timer.batch_size = 16
    steps(timer, gpu, [10])
    assert timer.avg_samples_per_sec() == pytest.approx(1200)


def test_throughput_prints_nothing_in_warm_up(gpu: FakeGpu) -> None:
    lines: list[str] = []
    timer = ThroughputTimer(8, start_step=2, steps_per_output=1, device=gpu, logging_fn=lines.append)  # type: ignore[arg-type]
    steps(timer, gpu, [10, 10])
    assert lines == []
    steps(timer, gpu, [10])
    assert len(lines) == 1


def test_throughput_on_the_cpu_clock() -> None:
    lines: list[str] = []
    timer = ThroughputTimer(10, start_step=0, steps_per_output=1, logging_fn=lines.append)
    timer.start()
    time.sleep(0.02)
    timer.stop()
    assert 0 < timer.avg_samples_per_sec() <= 500
    assert "HostRSS=" in lines[0]


def test_throughput_refuses_impossible_arguments() -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        ThroughputTimer(0)
    with pytest.raises(ConfigError, match="steps_per_print"):
        ThroughputTimer(1, steps_per_output=0)


# --- memory


def test_memory_breakdown_on_cpu_and_gpu(gpu: FakeGpu) -> None:
    host = memory_breakdown(CPU)
    assert host.startswith("memory (GiB) | host RSS ")
    shown = float(host.split("RSS ")[1].split(",")[0])
    assert shown == pytest.approx(psutil.Process().memory_info().rss / 2**30, abs=0.05)
    both = memory_breakdown(gpu)  # type: ignore[arg-type]
    assert "device allocated 1.00 (peak 2.00), reserved 3.00 (peak 4.00) | host RSS " in both


def test_see_memory_usage_speaks_when_forced_or_at_debug(capsys: pytest.CaptureFixture[str]) -> None:
    level = logger.level
    try:
        logger.setLevel(logging.INFO)
        see_memory_usage("after init")
        assert capsys.readouterr().err == ""
        see_memory_usage("after init", force=True)
        assert "after init | memory (GiB) | " in capsys.readouterr().err
        logger.setLevel(logging.DEBUG)
        see_memory_usage("quiet one")
        assert "quiet one | memory" in capsys.readouterr().err
    finally:
        logger.setLevel(level)


# --- FLOPs


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, width: int, fused: bool) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, 2, fused)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class SmallGpt(nn.Module):
    def __init__(self, layers: int = 2, width: int = 16, vocabulary: int = 32, fused: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, fused) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def count(model: nn.Module, *inputs: Any, **named: Any) -> int:
    flops, macs, _ = get_model_profile(model, args=inputs, kwargs=named, print_profile=False, as_string=False)
    assert isinstance(flops, int) and macs == flops // 2
    return flops


B, T, D, V, L = 2, 8, 16, 32, 2
GPT_FLOPS = L * (2 * B * T * D * 12 * D + 4 * B * T * T * D) + 2 * B * T * D * V


class Functional(nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("model", "inputs", "expected"),
    [
        (nn.Linear(6, 5), [(3, 6)], 2 * 3 * 6 * 5),
        (nn.Linear(6, 5, bias=False), [(4, 3, 6)], 2 * 12 * 6 * 5),
        (nn.Linear(6, 5), [(6,)], 2 * 6 * 5),
        (nn.Conv1d(3, 4, 5, bias=False), [(2, 3, 12)], 2 * 2 * 4 * 8 * 3 * 5),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), [(2, 4, 8, 8)], 2 * 2 * 6 * 4 * 4 * 4 * 9),
        (nn.Conv2d(4, 8, 3, groups=4), [(1, 4, 6, 6)], 2 * 8 * 16 * 1 * 9),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), [(1, 4, 5, 5)], 2 * 4 * 25 * 6 * 4),
        (Functional(torch.bmm), [(4, 3, 5), (4, 5, 7)], 2 * 4 * 3 * 5 * 7),
        (Functional(torch.mv), [(3, 5), (5,)], 2 * 3 * 5),
        (Functional(torch.dot), [(5,), (5,)], 2 * 5),
        (Functional(torch.addmv), [(3,), (3, 5), (5,)], 2 * 3 * 5),
        (Functional(lambda a, b: torch.einsum("bik,bjk->bij", a, b)), [(2, 3, 4), (2, 5, 4)], 2 * 2 * 3 * 5 * 4),
        (Functional(F.scaled_dot_product_attention), [(2, 3, 5, 4)] * 3, 4 * 2 * 3 * 5 * 5 * 4),
        (Functional(F.scaled_dot_product_attention), [(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)], 4 * 6 * 5 * 7 * 4),
        (nn.MultiheadAttention(D, 2, batch_first=True), [(B, T, D)] * 3, 8 * B * T * D * D + 4 * B * T * T * D),
        (
            nn.TransformerEncoderLayer(D, 2, 4 * D, batch_first=True),
            [(B, T, D)],
            24 * B * T * D * D + 4 * B * T * T * D,
        ),
        (nn.LSTM(4, 5, num_layers=2), [(3, 2, 4)], 2 * 3 * 2 * 4 * 5 * ((4 + 5) + (5 + 5))),
        (nn.LSTM(4, 5, bidirectional=True), [(3, 2, 4)], 2 * 3 * 2 * 2 * 4 * 5 * (4 + 5)),
        (nn.GRU(4, 5), [(3, 2, 4)], 2 * 3 * 2 * 3 * 5 * (4 + 5)),
        (nn.ReLU(), [(3, 4)], 0),
    ],
)
def test_flops_of_layers_match_closed_formulas(
    model: nn.Module, inputs: list[tuple[int, ...]], expected: int, grad: bool
) -> None:
    with torch.set_grad_enabled(grad):
        assert count(model, *(torch.randn(shape) for shape in inputs)) == expected


@pytest.mark.parametrize("fused", [True, False])
def test_transformer_totals_and_every_module(fused: bool) -> None:
    model = SmallGpt(fused=fused)
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    model(torch.zeros(B, T, dtype=torch.long))
    profiler.stop_profile()
    flops = {profile.name: profile.flops for profile in profiler.profiles}
    assert flops[""] == GPT_FLOPS == profiler.get_total_flops()
    assert flops["head"] == 2 * B * T * D * V
    assert flops["blocks.0.attention"] == 8 * B * T * D * D + 4 * B * T * T * D
    assert flops["blocks.1.mlp.0"] == 2 * B * T * D * 4 * D
    assert flops["blocks"] == flops["blocks.0"] + flops["blocks.1"], "a ModuleList is the sum of its children"
    assert flops["embedding"] == flops["blocks.0.norm"] == 0
    assert {name for name, _ in model.named_modules()} == set(flops)
    assert profiler.get_total_params() == sum(parameter.numel() for parameter in model.parameters())
    assert profiler.get_total_macs() == GPT_FLOPS // 2
    calls = {profile.name: profile.calls for profile in profiler.profiles}
    assert calls["head"] == 1 and calls["blocks"] == 0
    latency = {profile.name: profile.latency_ms for profile in profiler.profiles}
    assert latency[""] >= latency["blocks"] >= latency["blocks.0"] >= latency["blocks.0.mlp"] > 0
    assert profiler.get_total_duration() == pytest.approx(latency[""] / 1e3)
    profiler.end_profile()


def hooks_of(model: nn.Module) -> Iterator[tuple[str, int]]:
    import torch.nn.modules.module as global_hooks

    for name, module in model.named_modules():
        for kind, hooks in vars(module).items():
            if kind.endswith("_hooks"):
                yield f"{name}.{kind}", len(hooks)
    for kind, hooks in vars(global_hooks).items():
        if kind.startswith("_global_") and hasattr(hooks, "__len__"):
            yield kind, len(hooks)


def test_no_hook_or_mode_or_attribute_is_left_behind() -> None:
    model = SmallGpt()
    model.head.register_forward_hook(lambda *_: None)
    before, attributes = dict(hooks_of(model)), [sorted(vars(module)) for module in model.modules()]
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    assert dict(hooks_of(model)) != before
    loss = model(torch.zeros(B, T, dtype=torch.long)).sum()
    profiler.stop_profile()
    assert dict(hooks_of(model)) == before
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    total = profiler.get_total_flops()
    loss.backward()
    model(torch.zeros(B, T, dtype=torch.long))
    assert profiler.get_total_flops() == total, "counting went on after stop_profile"
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    profiler.end_profile()
    with pytest.raises(EngineStateError, match="start_profile"):
        profiler.get_total_flops()


def test_profiling_changes_no_result() -> None:
    torch.manual_seed(0)
    model, ids = SmallGpt(), torch.randint(0, V, (B, T))
    plain = model(ids)
    plain.sum().backward()
    gradient = model.head.weight.grad.clone()
    model.zero_grad()
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    profiled = model(ids)
    profiler.end_profile()
    profiled.sum().backward()
    assert torch.equal(plain, profiled)
    assert torch.equal(gradient, model.head.weight.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_backward_and_recomputation_are_not_counted(reentrant: bool) -> None:
    class Checkpointed(SmallGpt):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embedding(ids)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return self.head(x)

    model = Checkpointed()
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    model(torch.zeros(B, T, dtype=torch.long)).sum().backward()
    profiler.stop_profile()
    flops = {profile.name: profile.flops for profile in profiler.profiles}
    assert flops[""] == GPT_FLOPS
    assert flops["blocks.0"] == (GPT_FLOPS - flops["head"]) // L
    assert model.blocks[0].mlp[0].weight.grad is not None
    profiler.end_profile()


def test_a_shared_module_counts_every_call() -> None:
    shared = nn.Linear(4, 4)
    assert count(nn.Sequential(shared, nn.ReLU(), shared), torch.randn(3, 4)) == 2 * (2 * 3 * 4 * 4)


def test_a_module_that_raises_and_is_caught_loses_no_count() -> None:
    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.inner(x)
            raise ValueError("on purpose")

    class Catching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fragile, self.head = Fragile(), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                self.fragile(x)
            except ValueError:
                return self.head(x)
            raise AssertionError("the inner module did not raise")

    assert count(Catching(), torch.randn(3, 4)) == 2 * 3 * 4 * 4 + 2 * 3 * 4 * 2


def test_ignored_classes_are_not_listed_but_counted() -> None:
    model = SmallGpt()
    profiler = FlopsProfiler(model)
    profiler.start_profile(ignore_list=[Attention])
    model(torch.zeros(B, T, dtype=torch.long))
    profiler.stop_profile()
    assert profiler.get_total_flops() == GPT_FLOPS
    assert all(profile.class_name != "Attention" for profile in profiler.profiles)
    profiler.end_profile()


def test_report_totals_top_and_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = SmallGpt()
    profiler = FlopsProfiler(model, recompute_fwd_factor=1.0)
    profiler.start_profile()
    model(torch.zeros(B, T, dtype=torch.long))
    profiler.stop_profile()
    times = {"forward": 1.0, "backward": 2.0, "step": 1.0}
    profiler.print_model_profile(7, -1, 2, True, None, times)
    text = capsys.readouterr().out
    assert "FLOPs profile of SmallGpt (step 7)" in text
    assert f"forward     {si(GPT_FLOPS)}FLOPs in 1.00 ms, {si(GPT_FLOPS * 1e3)}FLOPS" in text
    assert f"backward    {si(3 * GPT_FLOPS)}FLOPs in 2.00 ms" in text and "(3 x forward)" in text
    assert f"together    {si(4 * GPT_FLOPS)}FLOPs in 4.00 ms, {si(GPT_FLOPS * 1e3)}FLOPS" in text
    attention_share = 100 * L * 4 * B * T * T * D / GPT_FLOPS
    assert f"Attention {si(L * 4 * B * T * T * D).rstrip()} ({attention_share:.1f}%)" in text, "own work by class"
    tree = text[text.index("module ") :].splitlines()
    assert len(tree) == 1 + len(list(model.modules()))
    assert [line.split(":")[0] for line in tree[1:4]] == ["model", "  embedding", "  blocks"]
    assert len({len(line) for line in tree}) == 1, "columns line up"

    target = tmp_path / "new" / "profile.txt"
    profiler.print_model_profile(7, module_depth=1, top_modules=1, detailed=True, output_file=str(target))
    assert capsys.readouterr().out == ""
    text = target.read_text()
    assert "top 1 of the modules at depth 1" in text
    assert f"FLOPs     ModuleList {si(GPT_FLOPS - 2 * B * T * D * V).rstrip()}" in text
    assert "embedding: Embedding" in text and "Attention" not in text
    profiler.print_model_profile(7, 99, 1, detailed=False, output_file=str(target))
    assert "depth 4" in target.read_text() and "calls" not in target.read_text()
    profiler.end_profile()


def test_report_names_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    engine = SimpleNamespace(world_size=4, train_micro_batch_size_per_gpu=lambda: 3)
    profiler = FlopsProfiler(nn.Linear(2, 2), engine)
    profiler.start_profile()
    profiler.model(torch.zeros(1, 2))
    profiler.stop_profile()
    profiler.print_model_profile(5)
    assert "step 5, one of 4 ranks, micro-batch 3" in capsys.readouterr().out
    profiler.end_profile()


def test_get_model_profile_interface(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(1000, 1000), nn.Dropout())
    model[1].eval()
    assert get_model_profile(model, (8, 1000)) == ("16.00 MFLOPs", "8.00 MMACs", "1.00 M")
    assert "FLOPs profile of Sequential" in capsys.readouterr().out
    assert [module.training for module in model.modules()] == [True, True, False], "modes are restored"
    assert dict(hooks_of(model)) == dict(hooks_of(nn.Sequential(nn.Linear(1, 1), nn.Dropout())))
    model.generate = lambda x, times: [model(x) for _ in range(times)]  # type: ignore[assignment]
    named = {"x": torch.randn(1, 1000), "times": 3}
    flops, *_ = get_model_profile(model, kwargs=named, mode="generate", print_profile=False, as_string=False)
    assert flops == 3 * 2 * 1000 * 1000
    with pytest.raises(ConfigError, match="input_shape, args or kwargs"):
        get_model_profile(model)
    with pytest.raises(ConfigError, match="'backward'"):
        get_model_profile(model, (1, 1000), mode="backward")


def test_get_model_profile_cleans_up_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Functional(lambda x: x.missing))
    with pytest.raises(AttributeError, match="missing"):
        get_model_profile(model, (2, 4), warm_up=0)
    assert all(module.training for module in model.modules())
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert model[0](torch.zeros(1, 4)).shape == (1, 4)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 "), (999, "999 "), (1000, "1.00 K"), (999_999, "1.00 M"), (4.35e9, "4.35 G"), (2e18, "2000.00 P")],
)
def test_si(number: float, text: str) -> None:
    assert si(number) == text


# --- the same on a real GPU


@pytest.mark.gpu
def test_timers_and_profile_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm GPU")
    device = Device(torch.device("cuda", torch.cuda.current_device()))
    timers = Timers(device, enabled=True)
    matrix = torch.randn(4096, 4096, device="cuda")
    matrix @ matrix
    torch.cuda.synchronize()
    began = time.perf_counter()
    timers.start("work")
    for _ in range(20):
        matrix @ matrix
    timers.stop("work")
    launched_ms = (time.perf_counter() - began) * 1e3
    torch.cuda.synchronize()
    wall_ms = (time.perf_counter() - began) * 1e3
    measured_ms = timers.elapsed_ms("work")
    assert launched_ms < measured_ms <= wall_ms, "the kernels are timed, not their launch"
    assert "device allocated" in memory_breakdown(device)
    assert count(SmallGpt().cuda(), torch.zeros(B, T, dtype=torch.long, device="cuda")) == GPT_FLOPS
    lstm_input = torch.randn(3, 2, 4, device="cuda")
    assert count(nn.LSTM(4, 5).cuda(), lstm_input) == 2 * 3 * 2 * 4 * 5 * (4 + 5)
