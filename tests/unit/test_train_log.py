"""What an engine prints and writes while it trains, read back from the log and from the files."""

from __future__ import annotations

import contextlib
import csv
import io
import re

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from models import tied_model, tokens

import deepspeedlite

BASE = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
}


def log_of_training(config: dict, steps: int) -> tuple[str, list[float]]:
    """Train on every rank; this rank's log and the losses of its micro-steps."""
    written, losses = io.StringIO(), []
    with contextlib.redirect_stderr(written):
        engine, *_ = deepspeedlite.initialize(model=tied_model(), config=BASE | config)
        for step in range(steps):
            for micro in range(2):
                loss = engine(*tokens(step, micro, dist.get_rank()))
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
        engine.destroy()
    return written.getvalue(), losses


@distributed(world_size=2)
def test_progress_lines_come_from_rank_0_every_few_steps():
    log, losses = log_of_training(
        {"steps_per_print": 2, "wall_clock_breakdown": True, "memory_breakdown": True}, steps=6
    )
    if dist.get_rank() == 1:
        assert log == ""
        return
    assert re.findall(r"step=(\d+), skipped=0, lr=\[0.01\]", log) == ["2", "4", "6"]
    said = [float(loss) for loss in re.findall(r"step=.*, loss=([\d.]+)", log)]  # the mean over a step's micro-batches
    assert said == pytest.approx([(losses[2 * step] + losses[2 * step + 1]) / 2 for step in (1, 3, 5)], rel=1e-3)
    assert len(re.findall(r"SamplesPerSec=\d", log)) >= 2
    times = re.findall(r"time \(ms\) \| forward: ([\d.]+) \| backward: ([\d.]+) \| step: ([\d.]+)", log)
    assert len(times) == 3 and all(float(value) > 0 for line in times for value in line)
    assert len(re.findall(r"memory \(GiB\).*host RSS", log)) == 3


@distributed(world_size=2)
def test_a_silent_configuration_prints_only_the_summary():
    log, _ = log_of_training({}, steps=3)
    if dist.get_rank() == 0:
        lines = log.strip().splitlines()
        assert len(lines) == 1 and re.search(
            r"training 0\.0\d M parameters in float32 on 2 x cpu, ZeRO stage 0, (DeepSpeedCPUAdam|AdamW)", log
        )


@distributed(world_size=2)
def test_csv_monitor_follows_the_training(tmp_path):
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "run"}
    _, losses = log_of_training({"csv_monitor": section, "gradient_clipping": 0}, steps=3)
    dist.barrier()
    found = {path.stem: list(csv.reader(path.open()))[1:] for path in (tmp_path / "run").glob("*.csv")}
    assert len(found) == 3, sorted(found)
    for name, rows in found.items():
        assert [int(step) for step, _ in rows] == [16, 32, 48], name
        values = [float(value) for _, value in rows]
        if "loss" in name and dist.get_rank() == 0:
            expected = [(a + b) / 2 for a, b in zip(losses[::2], losses[1::2])]
            assert all(abs(a - b) < 1e-5 for a, b in zip(values, expected))
        if name.endswith("lr"):
            assert values == [0.01] * 3
        if "norm" in name:
            assert all(value > 0 for value in values)


@distributed(world_size=1)
def test_flops_of_one_step_are_counted_and_written(tmp_path):
    report = tmp_path / "profile.txt"
    section = {"enabled": True, "profile_step": 1, "output_file": str(report)}
    log_of_training({"flops_profiler": section}, steps=4)
    text = report.read_text()
    numel = sum(p.numel() for p in tied_model().parameters())
    matrices = 2 * 32 * 97 * 2 + 61 * 32  # two up and down projections, and the tied head
    flops = 2 * matrices * 4 * 8
    assert "TiedTokenModel" in text
    assert re.search(rf"{numel / 1e3:.2f} ?K", text) or str(numel) in text, text[:2000]
    assert re.search(rf"{flops / 1e6:.2f} ?M", text) or re.search(rf"{flops / 1e3:.2f} ?K", text), (flops, text[:2000])


@distributed(world_size=2)
def test_comms_logger_sees_every_bucket():
    sizes = {"comms_logger": {"enabled": True}, "zero_optimization": {"reduce_bucket_size": 3000}}
    deepspeedlite.comm.comms_logger.reset()
    try:
        log_of_training(sizes, steps=3)
        counts = {key: stats.count for key, stats in deepspeedlite.comm.comms_logger.stats.items()}
    finally:
        deepspeedlite.comm.comms_logger.reset()
        deepspeedlite.comm.comms_logger.enabled = False
    reduced = {size: count for (op, size), count in counts.items() if op == "all_reduce"}
    assert len(reduced) > 1 and all(count % 3 == 0 for count in reduced.values()), counts
    numel = sum(p.numel() for p in tied_model().parameters())
    moved = sum(size * count for size, count in reduced.items())
    assert 3 * 4 * numel <= moved <= 3 * 4 * (numel + 64 * 11), "one reduction of each bucket per window, no more"


@distributed(world_size=1)
def test_a_caught_failure_in_forward_does_not_disturb_the_profile(tmp_path):
    report = tmp_path / "profile.txt"
    config = BASE | {"flops_profiler": {"enabled": True, "profile_step": 0, "output_file": str(report)}}
    engine, *_ = deepspeedlite.initialize(model=tied_model(), config=config)
    inputs, targets = tokens(0, 0, 0)
    with pytest.raises(IndexError):
        engine(inputs + 1000, targets)
    for micro in range(2):
        engine.backward(engine(*tokens(0, micro, 0)))
        engine.step()
    assert report.exists() and torch.isfinite(engine(inputs, targets))
