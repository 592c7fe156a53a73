"""dslite_bench: its command line, what it measures between real ranks and hosts, and what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pytest
from cluster import Cluster, needs_cluster
from harness import distributed
from paths import ROOT

from deepspeedlite.host.text import size_text, time_text
from deepspeedlite.tools.bench.plot import draw
from deepspeedlite.tools.bench.points import Point, parse_sizes

TOOL = [sys.executable, "-m", "deepspeedlite.bench"]
SVG = "{http://www.w3.org/2000/svg}"


def bench(*arguments: str | Path, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, *launcher, "-m", "deepspeedlite.bench"] if launcher else TOOL
    return subprocess.run([*start, *arguments], capture_output=True, text=True, cwd=ROOT)


def test_sizes_are_ranges_or_lists() -> None:
    assert parse_sizes("1K:64K") == (1024, 4096, 16384, 65536)
    assert parse_sizes("1K:5K:2") == (1024, 2048, 4096)
    assert parse_sizes("3, 4KiB,1M") == (3, 4096, 1 << 20)
    for text in ("", "0", "x", "4K:1K", "1K:4K:1", "1K:4K:x", "1:2:3:4", "-1"):
        with pytest.raises(ValueError, match="write"):
            parse_sizes(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--collectives", "all_reduce,all_to_all"],
            "--collectives all_to_all: there is none of that name; they are all_",
        ),
        (["--dtypes", "int4"], "--dtypes int4: there is none of that name; they are float32"),
        (["--sizes", "tiny"], "'tiny' is no size; write bytes, such as 512, 4K, 64M or 1G"),
        (["--seconds", "0"], "--seconds 0: write a time above 0"),
        (["--num_gps", "2"], "unknown option --num_gps; did you mean --num_gpus?"),
    ],
)
def test_wrong_command_lines_start_nothing(arguments: list[str], message: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 2 and message in done.stderr and done.stdout == ""


def check(found: dict, ranks: int, hosts: int, sizes: list[int]) -> None:
    """The points fit each other: sizes as asked for, and bandwidths by nccl-tests' formulas."""
    assert (found["ranks"], found["hosts"], found["backend"], found["device"]) == (ranks, hosts, "gloo", "cpu")
    factors = {"all_reduce": 2 * (ranks - 1) / ranks, "broadcast": 1.0}
    for name in ("reduce_scatter", "all_gather"):
        factors[name] = (ranks - 1) / ranks
    dtypes = dict.fromkeys(point["dtype"] for point in found["points"])
    keys = [(point["dtype"], point["collective"], point["size_bytes"]) for point in found["points"]]
    order = ("all_reduce", "reduce_scatter", "all_gather", "broadcast")
    assert keys == [(dtype, name, size) for dtype in dtypes for name in order for size in sizes]
    for point in found["points"]:
        assert 0 < point["fastest_us"] <= point["time_us"] <= point["slowest_us"] and point["calls"] >= 5
        assert point["algbw_gb_s"] == pytest.approx(point["size_bytes"] / point["time_us"] / 1e3)
        assert point["busbw_gb_s"] == pytest.approx(point["algbw_gb_s"] * factors[point["collective"]])


@pytest.mark.slow
def test_it_starts_its_own_ranks_and_writes_what_it_shows(tmp_path: Path) -> None:
    files = ("--json", tmp_path / "a.json", "--plot", tmp_path / "a.svg")
    done = bench("--num_gpus", "2", "--sizes", "1000:256K:16", "--seconds", "0.02", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "a.json").read_text())
    check(found, 2, 1, [1000, 16000, 256000])
    rows = [line for line in done.stdout.splitlines() if "float32" in line]
    assert len(rows) == len(found["points"])
    for row, point in zip(rows, found["points"]):
        size, time = size_text(point["size_bytes"]), time_text(point["time_us"])
        assert all(f" {word} " in row for word in (point["collective"], size, time, f"{point['busbw_gb_s']:.3g}"))
    picture = ElementTree.parse(tmp_path / "a.svg")
    assert len(picture.findall(f"{SVG}polyline")) == 8 and len(picture.findall(f"{SVG}circle")) == 24


@pytest.mark.slow
def test_ranks_started_otherwise_measure_too(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "3", "--standalone")
    arguments = ("--dtypes", "bfloat16,float64", "--sizes", "10,3K", "--seconds", "0.02", "--json", tmp_path / "a.json")
    done = bench(*arguments, launcher=torchrun)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "a.json").read_text())
    assert {point["size_bytes"] for point in found["points"] if point["dtype"] == "bfloat16"} == {6, 3072}
    found["points"] = [point for point in found["points"] if point["dtype"] == "float64"]
    check(found, 3, 1, [24, 3072])  # of 10 bytes there is nothing to share out


@pytest.mark.slow
def test_what_keeps_it_from_measuring_is_said(tmp_path: Path) -> None:
    done = bench("--num_gpus", "1")
    assert done.returncode == 1
    assert "dslite_bench: one rank has nobody to talk to; start at least two: dslite_bench --num_gpus 2" in done.stderr
    done = bench("--num_gpus", "2", "--json", tmp_path / "none" / "a.json")
    assert done.returncode == 1
    assert f"{tmp_path}/none/a.json cannot be written by rank 0 on" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@needs_cluster()
def test_ranks_of_two_hosts(tmp_path: Path) -> None:
    with Cluster(["worker-1", "worker-2"]) as cluster:
        arguments = ["--hostfile", cluster.hostfile(slots=1), "--sizes", "4K,1M", "--seconds", "0.02"]
        cluster.run("head", [*TOOL, *arguments, "--json", tmp_path / "a.json"], cwd=ROOT, timeout=120)
    check(json.loads((tmp_path / "a.json").read_text()), 2, 2, [4096, 1 << 20])


@pytest.mark.slow
@distributed(world_size=2)
def test_wrong_results_are_found():
    import torch

    from deepspeedlite.comm import Group
    from deepspeedlite.runtime.errors import DistributedError
    from deepspeedlite.tools.bench.measure import _check

    class Broken(Group):
        def all_reduce(self, tensor, *arguments, **options):
            super().all_reduce(tensor, *arguments, **options)
            tensor[-1] += 1

        def all_gather_into(self, out, shard, **options):
            super().all_gather_into(out, shard, **options)
            out.copy_(out.flip(0))

        def reduce_scatter_into(self, out_shard, full, **options):
            super().reduce_scatter_into(out_shard, full, **options)
            out_shard[0] = 0

        def broadcast(self, tensor, src=0):
            super().broadcast(tensor, src=1)

    for name in ("all_reduce", "reduce_scatter", "all_gather", "broadcast"):
        for dtype in (torch.float32, torch.bfloat16):
            whole, shard = torch.zeros(64, dtype=dtype), torch.zeros(32, dtype=dtype)
            _check(Group(), name, whole, shard)
            assert not whole.any() and not shard.any()
            with pytest.raises(DistributedError, match=f"{name} of .* gave a wrong result on rank"):
                _check(Broken(), name, whole, shard)


def test_the_plot_is_logarithmic_and_holds_every_point() -> None:
    def point(size: int, time_us: float) -> Point:
        return Point("all_reduce", "float32", size, 5, time_us, time_us, time_us, 1.0, size / 1000)

    picture = ElementTree.fromstring(draw("a <title> & more", [point(4**power, 10.0**power) for power in range(1, 5)]))
    assert "a <title> & more" in [text.text for text in picture.iter(f"{SVG}text")]
    lines = [
        [tuple(map(float, spot.split(","))) for spot in line.get("points").split()]
        for line in picture.iter(f"{SVG}polyline")
    ]
    assert len(lines) == 2
    times = lines[0]
    for axis in (0, 1):
        steps = [after[axis] - before[axis] for before, after in pairwise(times)]
        assert steps == pytest.approx([steps[0]] * 3, abs=0.3) and (steps[0] > 0) is (axis == 0)
    # One value alone, and one on a tick, have room too.
    ElementTree.fromstring(draw("", [point(1024, 10.0)]))
