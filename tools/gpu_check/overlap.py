"""Whether the device gathers while it computes and reduces during backward, counted in a profiler's trace."""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile, record_function

from tools.gpu_check import gpt
from tools.gpu_check.setting import NotHereError, Rows, Setting
from tools.gpu_check.training import OURS, ours

STEPS = 2
LEAST_SHARE = 0.25  # of the pieces of work that must run beside compute: the first and last of a step cannot
MOST_SYNCS = 12  # of the host with the device, in a step


class Span(NamedTuple):
    """A piece of work on the device, in the trace's microseconds."""

    begin: float
    end: float
    stream: Any


class Counts(NamedTuple):
    """Pieces of work of a kind, how many run while a kernel of another stream computes, and how many a step waits."""

    gathers: int
    gathers_beside: int
    reductions: int
    reductions_beside: int
    copies: int
    copies_beside: int
    kernels: int
    syncs: int


def rows(setting: Setting) -> Rows:
    """Of sharded parameters, and of those that come from the host."""
    setting.start_group()
    yield setting.tried("stage 3, gathers and reductions", lambda: traced(setting, "ours, stage 3", judge_collectives))
    from_host = "ours, stage 3, all on the host"
    yield setting.tried("stage 3, parameters from the host", lambda: traced(setting, from_host, judge_copies))


def traced(setting: Setting, kind: str, judge: Callable[[Counts, Setting], None]) -> dict[str, Any]:
    """Train, trace and count."""
    config, sequences = gpt.sizes(setting)
    # Units small enough that there is something ahead to fetch.
    zero = {**OURS[kind], "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    batch = gpt.batch(config, sequences, setting)
    step, end = ours(zero)(gpt.fresh(config), batch, setting)
    activities = [ProfilerActivity.CPU]
    if setting.device.is_accelerator:
        activities += [
            kind for kind in ProfilerActivity.__members__.values() if kind.name == setting.device.type.upper()
        ]
    try:
        for _ in range(3):  # the first records the order of use
            step()
        setting.device.synchronize()
        with profile(activities=activities) as profiler, record_function("gpu-check steps"):
            for _ in range(STEPS):
                step()
            setting.device.synchronize()
    finally:
        end()
    file = setting.folder / f"trace{setting.rank}.json"
    profiler.export_chrome_trace(str(file))
    counts = count(json.loads(file.read_text())["traceEvents"])
    if not counts.kernels:
        raise NotHereError(f"the trace has nothing of {setting.device.name}'s own work")
    judge(counts, setting)
    return {**counts._asdict(), "steps": STEPS, "ranks": setting.ranks}


def judge_collectives(counts: Counts, setting: Setting) -> None:
    """Raises AssertionError where too few overlap; one rank gathers nothing."""
    assert counts.syncs <= MOST_SYNCS * STEPS, f"the host waits for the device too often: {counts}"
    if setting.ranks == 1:
        raise NotHereError(f"one rank has nothing to gather; counted {counts}")
    assert counts.gathers_beside >= LEAST_SHARE * counts.gathers > 0, f"gathers wait for compute: {counts}"
    assert counts.reductions_beside >= LEAST_SHARE * counts.reductions > 0, f"reductions wait for compute: {counts}"


def judge_copies(counts: Counts, setting: Setting) -> None:
    """Raises AssertionError where parameters are not copied while the device computes."""
    assert counts.copies_beside >= LEAST_SHARE * counts.copies > 0, f"copies wait for compute: {counts}"


def count(events: list[dict[str, Any]]) -> Counts:
    """Sort a trace's events by what they are, and count those that run while a kernel on another stream does."""
    kinds: dict[str, list[Span]] = {"gather": [], "reduce": [], "copy": [], "compute": []}
    syncs = 0
    for event in events:
        if event.get("ph") != "X":
            continue
        category, name, given = event.get("cat", ""), event.get("name", ""), event.get("args", {})
        if category in ("cuda_runtime", "hip_runtime") and "Synchronize" in name:
            syncs += 1
        kind = _kind(category, f"{name} {given.get('Collective name', '')}".lower())
        if kind:
            stream = given.get("stream", event.get("tid"))
            kinds[kind].append(Span(event["ts"], event["ts"] + event.get("dur", 0), stream))
    compute = sorted(kinds["compute"], key=lambda span: span.begin)
    beside = {kind: sum(_is_beside(span, compute) for span in spans) for kind, spans in kinds.items()}
    gather, reduce, copy = kinds["gather"], kinds["reduce"], kinds["copy"]
    found = (len(gather), beside["gather"], len(reduce), beside["reduce"], len(copy), beside["copy"])
    return Counts(*found, len(compute), syncs)


def _kind(category: str, name: str) -> str:
    """Of a piece of the device's work, by the names that NCCL, RCCL and the profilers give; "" for what is none."""
    if category == "gpu_memcpy":
        return "copy" if "htod" in name or "hosttodevice" in name.replace(" ", "") else ""
    if category != "kernel":
        return ""
    if "nccl" not in name:
        return "compute"
    flat = name.replace("_", "")
    return "gather" if "allgather" in flat else "reduce" if "reducescatter" in flat or "allreduce" in flat else ""


def _is_beside(span: Span, compute: list[Span]) -> bool:
    return any(
        one.begin < span.end and span.begin < one.end and one.stream != span.stream for one in _near(span, compute)
    )


def _near(span: Span, compute: list[Span]) -> list[Span]:
    """Those that begin before it ends; kernels are short, so those that could reach into it are the last of them."""
    last = bisect.bisect_left(compute, span.end, key=lambda one: one.begin)
    first = bisect.bisect_left(compute, span.begin, key=lambda one: one.begin)
    return compute[max(0, first - 64) : last]
