"""Start-up (`init_distributed`), `Group` and the comms logger, on real processes.

torchrun and Open MPI start real ranks here. Slurm is met by its variables only; a real slurmd is the business of
the launcher's tests.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from harness import distributed
from paths import ROOT
from programs import find, missing

from deepspeedlite import comm
from deepspeedlite.comm import Group, comms_logger, init_distributed
from deepspeedlite.comm.registry import registry
from deepspeedlite.metrics.comms_logger import CommsLogger, OpStats
from deepspeedlite.runtime.errors import DistributedError

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


# ----------------------------------------------------------------------------------------------------- Group


@distributed([1, 2, 3])
def test_all_reduce(world_size: int) -> None:
    """Sum, average, maximum and minimum, at once and asynchronously."""
    group = Group()
    assert (group.rank, group.size, group.ranks) == (dist.get_rank(), world_size, list(range(world_size)))
    expected = {
        "sum": world_size * (world_size + 1) / 2,
        "avg": (world_size + 1) / 2,
        "max": world_size,
        "min": 1,
    }
    for op, value in expected.items():
        for async_op in (False, True):
            x = torch.full((5,), group.rank + 1.0)
            work = group.all_reduce(x, op, async_op)
            assert (work is None) == (not async_op or world_size == 1)
            if work is not None:
                work.wait()
            torch.testing.assert_close(x, torch.full((5,), float(value)))


@distributed([1, 2, 3])
def test_shards(world_size: int) -> None:
    """Reduce-scatter then all-gather is all-reduce, in separate buffers and in a rank's range of the whole."""
    group = Group()
    for aliased in (False, True):
        for op in ("sum", "avg"):
            full = torch.arange(4.0 * world_size) * (group.rank + 1)
            whole = full.clone()
            group.all_reduce(whole, op)
            shard = full[group.rank * 4 : group.rank * 4 + 4] if aliased else torch.empty(4)
            work = group.reduce_scatter_into(shard, full, op, async_op=aliased)
            if work is not None:
                work.wait()
            torch.testing.assert_close(shard, whole[group.rank * 4 : group.rank * 4 + 4], rtol=0, atol=0)
            out = full if aliased else torch.empty_like(full)
            work = group.all_gather_into(out, shard, async_op=aliased)
            if work is not None:
                work.wait()
            torch.testing.assert_close(out, whole, rtol=0, atol=0)


@distributed([1, 3])
def test_broadcast_and_objects(world_size: int) -> None:
    """Sources are ranks of the group; objects arrive in rank order."""
    group = Group()
    for src in range(world_size):
        x = torch.full((2,), float(group.rank))
        group.broadcast(x, src)
        assert x.tolist() == [src, src]
        assert group.broadcast_object({"from": group.rank}, src) == {"from": src}
    assert group.all_gather_objects(("rank", group.rank)) == [("rank", rank) for rank in range(world_size)]
    group.barrier()


@distributed(3)
def test_subgroup() -> None:
    """Ranks in arguments count within the group, and outsiders are refused."""
    pair = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        with pytest.raises(DistributedError, match="rank 0 is not a member"):
            Group(pair)
        return
    group = Group(pair)
    assert (group.rank, group.size, group.ranks, group.backend) == (dist.get_rank() - 1, 2, [1, 2], "gloo")
    x = torch.tensor([float(dist.get_rank())])
    group.broadcast(x, src=1)
    assert x.item() == 2
    comm.broadcast(x.fill_(dist.get_rank()), src=1, group=pair)  # the module's function counts as torch does
    assert x.item() == 1
    assert group.all_gather_objects(dist.get_rank()) == [1, 2]


def test_group_of_one_needs_no_torch_distributed() -> None:
    """Before any start-up a Group is this process, and its collectives are the identity."""
    assert not dist.is_initialized()
    group = Group()
    assert (group.rank, group.size, group.ranks, group.backend, group.averages) == (0, 1, [0], "none", False)
    x = torch.arange(3.0)
    assert group.all_reduce(x, "avg", async_op=True) is None
    out = torch.empty(3)
    group.all_gather_into(out, x)
    group.reduce_scatter_into(out, x * 2, "sum")
    group.broadcast(x)
    group.barrier()
    assert out.tolist() == [0, 2, 4]
    assert group.all_gather_objects(7) == [7]
    assert (comm.get_rank(), comm.get_world_size(), comm.is_initialized()) == (0, 1, False)


@pytest.mark.parametrize(("op", "dtype", "match"), [("median", torch.float32, "median"), ("avg", torch.int64, "int64")])
def test_reductions_that_make_no_sense(op: str, dtype: torch.dtype, match: str) -> None:
    """Refused for every world size alike, so that the fault shows before the cluster does."""
    with pytest.raises(DistributedError, match=match):
        Group().all_reduce(torch.ones(2, dtype=dtype), op)


# ------------------------------------------------------------------------------------- start-up within the harness


@distributed(2)
def test_an_existing_process_group_is_reused() -> None:
    """Nothing is started anew, and contradictory arguments are refused."""
    before = dist.group.WORLD
    init_distributed()
    init_distributed(dist_init_required=False)
    assert dist.group.WORLD is before
    with pytest.raises(DistributedError, match="already initialised as rank"):
        init_distributed(rank=0, world_size=3)
    assert comm.get_local_rank() == dist.get_rank()


@distributed(2, init_process_group=False)
def test_start_meet_end_and_start_again(free_port: int) -> None:
    """The default way, from variables; a second start after the end of the first works too."""
    os.environ["MASTER_PORT"] = str(free_port)
    for _ in range(2):
        init_distributed(verbose=False, timeout=timedelta(seconds=20))
        assert (comm.get_world_size(), dist.get_backend()) == (2, "gloo")
        comm.barrier()
        comm.destroy_process_group()


@pytest.mark.parametrize("scheme", ["tcp", "file"])
@distributed(2, init_process_group=False)
def test_explicit_arguments(scheme: str, free_port: int, tmp_path: Path) -> None:
    """`rank`, `world_size` and `init_method` need no variables, and set them for those who read them."""
    rank = int(os.environ["RANK"])
    for name in LAUNCHERS:
        os.environ.pop(name, None)
    url = f"tcp://127.0.0.1:{free_port}" if scheme == "tcp" else f"file://{tmp_path}/store"
    init_distributed("gloo", init_method=url, rank=rank, world_size=2, timeout=timedelta(seconds=20))
    assert dist.get_rank() == rank
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == (str(rank), "2", str(rank))
    comm.barrier()


@pytest.mark.slow
@distributed(3, init_process_group=False)
def test_ranks_that_do_not_come_are_named(free_port: int) -> None:
    """Every rank that came raises the same within the time allowed."""
    os.environ["MASTER_PORT"] = str(free_port)
    if os.environ["RANK"] == "2":
        return
    started = time.monotonic()
    with pytest.raises(DistributedError, match="rank 2 of 3 did not arrive within 2 s"):
        init_distributed(timeout=timedelta(seconds=2))
    assert time.monotonic() - started < 5
    assert not dist.is_initialized()


@distributed(2, init_process_group=False)
def test_rank_0_unreachable(free_port: int) -> None:
    """The others name the address they tried and what to look at."""
    os.environ["MASTER_PORT"] = str(free_port)
    if os.environ["RANK"] == "1":
        with pytest.raises(DistributedError, match=f"127.0.0.1:{free_port} within 0.5 s.*rank 0 did not start"):
            init_distributed(timeout=timedelta(seconds=0.5))
        os.environ["MASTER_ADDR"] = "no-such-host.invalid"
        del os.environ["LOCAL_WORLD_SIZE"]  # ranks that are known to be on one host need no name of it
        with pytest.raises(DistributedError, match="cannot be resolved"):
            init_distributed(timeout=timedelta(seconds=0.5))


@distributed(3, init_process_group=False)
def test_two_processes_that_claim_one_rank(free_port: int) -> None:
    """All ranks raise, naming both processes."""
    os.environ["MASTER_PORT"] = str(free_port)
    if os.environ["RANK"] == "2":
        os.environ["RANK"] = "1"
    with pytest.raises(DistributedError, match=r"two processes claim rank 1: process \d+ on .* and process \d+ on "):
        init_distributed(timeout=timedelta(seconds=10))


@distributed(2, init_process_group=False)
def test_ranks_that_disagree_on_the_world_size(free_port: int) -> None:
    """Both views are told on every rank."""
    os.environ["MASTER_PORT"] = str(free_port)
    if os.environ["RANK"] == "1":
        os.environ["WORLD_SIZE"] = "4"
        os.environ["LOCAL_WORLD_SIZE"] = "4"
    with pytest.raises(DistributedError, match=r"disagree on the world size: .*2.*4"):
        init_distributed(timeout=timedelta(seconds=10))


@distributed(1, init_process_group=False)
def test_a_port_that_is_taken() -> None:
    """Rank 0 says which port, and what to do."""
    with socket.socket() as holder:
        holder.bind(("0.0.0.0", 0))
        holder.listen()
        port = holder.getsockname()[1]
        os.environ.update(MASTER_PORT=str(port), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        with pytest.raises(DistributedError, match=f"cannot listen on port {port}.*free port"):
            init_distributed(timeout=timedelta(seconds=5))


@distributed(1, init_process_group=False)
def test_arguments_that_cannot_be_right() -> None:
    """Each is refused with its reason, and leaves nothing started."""
    cases: list[tuple[dict[str, object], str]] = [
        ({"dist_init_required": False}, "dist_init_required=False"),
        ({"dist_backend": "smoke"}, "'smoke' is not known.*gloo"),
        ({"dist_backend": "mpi"}, "without the backend mpi"),
        ({"rank": 0}, "pass both"),
        ({"rank": 2, "world_size": 2}, "rank < world_size"),
        ({"init_method": "tcp://nowhere"}, "tcp://host:port"),
    ]
    if not torch.cuda.is_available():
        cases.append(({"dist_backend": "nccl"}, "nccl needs a GPU"))
    for arguments, match in cases:
        with pytest.raises(DistributedError, match=match):
            init_distributed(**arguments)  # type: ignore[arg-type]
    del os.environ["MASTER_ADDR"]
    os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    with pytest.raises(DistributedError, match="MASTER_ADDR is not set"):
        init_distributed()
    assert not dist.is_initialized()


@distributed(2, init_process_group=False, env={"DS_ACCELERATOR": "cpu"})
def test_slurm_tasks_by_their_variables(free_port: int) -> None:
    """What srun sets is enough; RANK and the others are set for those who read them."""
    rank = os.environ["RANK"]
    for name in LAUNCHERS:
        os.environ.pop(name, None)
    os.environ.update(
        SLURM_JOB_ID=str(free_port),
        SLURM_STEP_ID="0",
        SLURM_STEP_NODELIST="some-host",
        SLURM_STEP_NUM_TASKS="2",
        SLURM_PROCID=rank,
        SLURM_LOCALID=rank,
    )
    init_distributed(timeout=timedelta(seconds=20))
    assert (comm.get_rank(), comm.get_world_size(), comm.get_local_rank()) == (int(rank), 2, int(rank))
    assert os.environ["RANK"] == rank
    comm.barrier()


def test_deepspeed_timeout_is_in_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable replaces the ten minutes; nonsense is refused by name."""
    assert comm.default_timeout() == timedelta(minutes=10)
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "0.5")
    assert comm.default_timeout() == timedelta(seconds=30)
    for text in ("soon", "-1", "0", "nan", "inf"):
        monkeypatch.setenv("DEEPSPEED_TIMEOUT", text)
        with pytest.raises(DistributedError, match="DEEPSPEED_TIMEOUT"):
            comm.default_timeout()


# ---------------------------------------------------------------------------------------- start-up by real launchers

SCRIPT = """
import os, torch
from deepspeedlite import comm
comm.init_distributed()
group = comm.Group()
x = torch.tensor([group.rank + 1.0])
group.all_reduce(x, "avg")
line = f"rank {group.rank} of {group.size}, local {comm.get_local_rank()}, average {x.item()}"
os.write(1, f"{line}, RANK {os.environ.get('RANK')}\\n".encode())
comm.destroy_process_group()
"""


# Rank 1's script is over while its collective is under way. The result arrives while `sum`, the last thing before the
# interpreter is finalised, holds the lock that gloo's thread needs to drop the tensor.
LEAVES_EARLY = """
import atexit
atexit.register(sum, range(60_000_000))  # the first to be registered is the last to run
import time, torch, torch.distributed as dist
from deepspeedlite import comm
comm.init_distributed()
if comm.get_rank() == 1:
    dist.all_reduce(torch.ones(4), async_op=True)
else:
    time.sleep(0.5)
    x = torch.ones(4)
    dist.all_reduce(x)
    print("rank 0 has", x.sum().item())
"""


@pytest.fixture
def run_script(tmp_path: Path) -> Callable[..., tuple[list[str], str]]:
    """Start the script with a launcher's command line; its sorted lines, and its log."""

    def run(*launcher: str, script: str = SCRIPT) -> tuple[list[str], str]:
        (tmp_path / "script.py").write_text(script)
        environ = {k: v for k, v in os.environ.items() if k not in LAUNCHERS}
        environ.update(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), DS_ACCELERATOR="cpu")
        command = [*(launcher or (sys.executable,)), str(tmp_path / "script.py")]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return sorted(line for line in done.stdout.splitlines() if line.startswith("rank")), done.stderr

    return run


TWO_RANKS = ["rank 0 of 2, local 0, average 1.5, RANK 0", "rank 1 of 2, local 1, average 1.5, RANK 1"]


@pytest.mark.slow
def test_a_plain_python_process(run_script: Callable[..., tuple[list[str], str]]) -> None:
    """No variables, no ports: a world of one, which leaves the environment alone."""
    lines, log = run_script()
    assert lines == ["rank 0 of 1, local 0, average 1.0, RANK None"]
    assert "1 rank(s), gloo on cpu, found by single process" in log


@pytest.mark.slow
def test_torchrun(run_script: Callable[..., tuple[list[str], str]]) -> None:
    """The agent of torchrun hosts the store; rank 0 is a client of it like the others."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    lines, log = run_script(*launcher)
    assert lines == TWO_RANKS
    assert log.count("2 rank(s), gloo on cpu, found by torchrun") == 1


@pytest.mark.slow
def test_the_interpreter_ends_after_the_process_group(run_script: Callable[..., tuple[list[str], str]]) -> None:
    """A rank that ends with a collective under way does not abort, and does not fail the others."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    lines, _ = run_script(*launcher, script=LEAVES_EARLY)
    assert lines == ["rank 0 has 8.0"]


def open_mpi() -> str | None:
    """Its mpirun: other MPIs have a program of that name too."""
    for name in ("mpirun.openmpi", "mpirun"):
        if find(name) and "Open MPI" in subprocess.run([name, "--version"], capture_output=True, text=True).stdout:
            return name
    return None


def test_other_mpis_are_not_taken_for_open_mpi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where MPICH's mpirun is the only one, the test of Open MPI skips by its name."""
    for says, found in (("HYDRA build details:", None), ("mpirun (Open MPI) 4.1.4", "mpirun")):
        (tmp_path / "mpirun").write_text(f"#!/bin/sh\necho '{says}'\n")
        (tmp_path / "mpirun").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert open_mpi() == found


@pytest.mark.slow
def test_open_mpi(run_script: Callable[..., tuple[list[str], str]]) -> None:
    """A run on one host needs neither mpi4py nor MASTER_ADDR."""
    program = open_mpi()
    if program is None:
        pytest.skip(missing("mpirun.openmpi") or "needs Open MPI's mpirun")
    options = ("--allow-run-as-root", "--oversubscribe", "-n", "2")
    lines, log = run_script(program, *options, sys.executable)
    assert lines == TWO_RANKS
    assert log.count("2 rank(s), gloo on cpu, found by Open MPI, rank 0 at 127.0.0.1:") == 1


# ------------------------------------------------------------------------------------------------- comms logger


def test_bandwidths_follow_nccl_tests() -> None:
    """1 GB in 100 ms over 4 ranks is 10 GB/s; the bus carries 2(n-1)/n or (n-1)/n of it."""
    one = OpStats()
    for elapsed_ms in (50.0, 150.0):
        one.add(elapsed_ms, ranks=4)
    assert (one.count, one.total_ms, one.mean_ms) == (2, 200, 100)
    assert one.algbw_gb_s(10**9) == pytest.approx(10)
    for op, busbw in [
        ("all_reduce", 15),
        ("all_gather_into_tensor", 7.5),
        ("reduce_scatter_tensor < step", 7.5),
        ("broadcast", 10),
    ]:
        assert one.busbw_gb_s(op, 10**9) == pytest.approx(busbw)


@distributed(2, init_process_group=False, env={"DS_ACCELERATOR": "cpu"})
def test_what_the_process_keeps_is_closed_with_the_world(free_port) -> None:
    """And made anew in the next one, at the same address."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port))
    for _ in range(2):
        init_distributed(verbose=False)
        values = torch.ones(1 << 16)
        group = Group()
        group.all_reduce(values)
        assert values[0] == 2 and registry.last is not None and registry.watch is not None
        link = group.transport.link
        group.barrier()
        comm.destroy_process_group()
        assert registry.last is None and registry.watch is None and not registry.waits
        assert link is None or not link._end.alive


@distributed(2)
def test_every_collective_is_counted_by_its_size() -> None:
    """Counts and bytes are exact; sizes are those of the whole buffers."""
    log = CommsLogger(enabled=True)
    group = Group(observer=log)
    full, shard = torch.ones(8), torch.ones(4)
    for _ in range(3):
        group.all_reduce(full, "avg")
    group.all_reduce(torch.ones(2, dtype=torch.float64))
    group.reduce_scatter_into(shard, full)
    group.all_gather_into(full, shard)
    group.broadcast(shard)
    group.barrier()
    assert {key: one.count for key, one in log.stats.items()} == {
        ("all_reduce", 32): 3,
        ("all_reduce", 16): 1,
        ("reduce_scatter_tensor", 32): 1,
        ("all_gather_into_tensor", 32): 1,
        ("broadcast", 16): 1,
        ("barrier", 0): 1,
    }
    assert all(one.total_ms > 0 and one.ranks == 2 for one in log.stats.values())
    line = next(row for row in log.summary().splitlines() if row.startswith("all_reduce") and "32 B" in row)
    assert line.split()[3] == "3"


@distributed(2)
def test_async_is_measured_until_wait_returns() -> None:
    """Rank 0 waits for a late rank 1; the call is counted once, however often it is waited for."""
    log = CommsLogger(enabled=True)
    group = Group(observer=log)
    group.barrier()
    log.reset()
    if group.rank == 1:
        time.sleep(0.2)
    work = group.all_reduce(torch.ones(8), async_op=True)
    assert work is not None
    assert not log.stats
    work.wait()
    work.wait()
    one = log.stats["all_reduce", 32]
    assert one.count == 1
    if group.rank == 0:
        assert 150 < one.total_ms < 5000
    totals = group.all_gather_objects(one.total_ms)
    out = StringIO()
    log.log_summary(show_straggler=True, file=out)
    if group.rank == 0:
        waited_ms = [float(text) for text in out.getvalue().splitlines()[-1].split()[-2:]]
        assert waited_ms == pytest.approx([total - min(totals) for total in totals], abs=2e-3)
    else:
        assert out.getvalue() == ""


@distributed(2)
def test_settings_choose_what_is_measured() -> None:
    """Off measures nothing, `prof_ops` only what it names, `debug` tells who called; the module's logger serves all."""
    section = SimpleNamespace(enabled=False, verbose=False, prof_all=True, prof_ops=[], debug=False)
    init_distributed(config=SimpleNamespace(comms_logger=section))
    group = Group(observer=comms_logger)
    try:
        group.all_reduce(torch.ones(1))
        assert not comms_logger.stats
        section.enabled, section.prof_all, section.prof_ops, section.debug = True, False, ["broadcast"], True
        init_distributed(config=SimpleNamespace(comms_logger=section))
        group.all_reduce(torch.ones(1))
        group.broadcast(torch.ones(1))
        assert list(comms_logger.stats) == [("broadcast < test_settings_choose_what_is_measured", 4)]
    finally:
        comm.configure(enabled=False, prof_all=True, prof_ops=[], debug=False)
        comms_logger.reset()
