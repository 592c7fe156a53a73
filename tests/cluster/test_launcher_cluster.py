"""The launcher on several real hosts (helpers/cluster.py): every backend, failures of ranks and of machines, variables.

Every test that ends something also checks that no process of the training is left on any host.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from cluster import SLURM, Cluster, needs_cluster
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import ROOT

WORKERS = ["worker-1", "worker-2", "worker-3"]
pytestmark = [pytest.mark.slow, needs_cluster()]
PROGRAMS = {"pdsh": ("pdsh",), "openmpi": ("mpirun.openmpi",), "mpich": ("mpirun.mpich",), "slurm": SLURM}


def backends(*names: str) -> pytest.MarkDecorator:
    """The test with each of these, skipped where its programs are missing."""
    marked = [pytest.param(name, marks=needs_cluster(*PROGRAMS.get(name, ()))) for name in names]
    return pytest.mark.parametrize("backend", marked)


TRAIN = """
import json, sys
import torch
import deepspeedlite
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
config = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
          "zero_optimization": {"stage": 2}}
engine = deepspeedlite.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
losses = []
for step in range(5):
    torch.manual_seed(100 * step + torch.distributed.get_rank())
    x = torch.randn(4, 16)
    loss = engine(x).square().mean()
    engine.backward(loss)
    engine.step()
    torch.distributed.all_reduce(mean := loss.detach().clone())
    losses.append(mean.item() / torch.distributed.get_world_size())
if torch.distributed.get_rank() == 0:
    print("LOSSES", json.dumps(losses))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(WORKERS) as made:
        yield made


@pytest.fixture(scope="module")
def slurm_cluster() -> Iterator[Cluster]:
    with Cluster(WORKERS) as made:
        made.start_slurm()
        yield made


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "deepspeedlite.launcher", *map(str, arguments)]


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **changes}


def launch(cluster: Cluster, *arguments: object, host: str = "head", timeout: float = 120, **env: str):
    return cluster.run(host, command(*arguments), timeout=timeout, env=environment(**env))


def write(tmp_path: Path, body: str, name: str = "train.py") -> Path:
    path = tmp_path / name
    path.write_text(textwrap.dedent(body))
    return path


def assert_nothing_runs(cluster: Cluster, script: Path) -> None:
    """No rank, and no agent, is left on any host."""
    began_s = time.monotonic()
    for pattern, limit_s in ((str(script), 3), ("deepspeedlite.launcher.node", 10)):
        while left := {host: found for host in WORKERS if (found := cluster.processes(host, pattern))}:
            assert time.monotonic() < began_s + limit_s, left
            time.sleep(0.05)


# Backends


@pytest.fixture(scope="module")
def local_losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    script = write(tmp_path_factory.mktemp("local"), TRAIN)
    done = subprocess.run(
        command("--num_gpus", 4, script), capture_output=True, text=True, env=environment(), timeout=120
    )
    assert done.returncode == 0, done.stderr
    return losses_in(done.stdout)


def losses_in(text: str) -> list[float]:
    found = re.search(r"LOSSES (\[.*\])", text)
    assert found, text
    return json.loads(found[1])


@backends("ssh", "pdsh", "openmpi", "mpich", "slurm")
def test_a_training_is_the_same_as_on_one_machine(
    backend: str, request: pytest.FixtureRequest, tmp_path: Path, local_losses: list[float]
) -> None:
    cluster = request.getfixturevalue("slurm_cluster" if backend == "slurm" else "cluster")
    script = write(tmp_path, TRAIN)
    machines = ["--include", "worker-1:0@worker-2@worker-3:1"]
    if backend in ("mpich", "ssh"):
        machines = ["--num_nodes", "2"]  # the simpler choice of hosts, which is the same for all backends
    done = launch(cluster, "--launcher", backend, "--hostfile", cluster.hostfile(2), *machines, script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses_in(done.stdout) == local_losses
    many = 2 if "--num_nodes" in machines else 3
    assert f"4 ranks on {many} machines, meeting at 10.77.0." in done.stderr and "4 ranks ended well" in done.stderr
    assert_nothing_runs(cluster, script)


@backends("ssh", "pdsh", "openmpi", "mpich", "slurm")
def test_nothing_secret_stands_on_a_command_line(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """On no host, while it starts and while it runs. And ranks meet at an address, not at all that a host has."""
    cluster = request.getfixturevalue("slurm_cluster" if backend == "slurm" else "cluster")
    body = """
    import os
    import deepspeedlite, psutil, torch
    deepspeedlite.init_distributed()
    port = int(os.environ["MASTER_PORT"])
    print(*(f"LISTEN {c.laddr.ip}" for c in psutil.net_connections("tcp")
            if c.status == "LISTEN" and c.laddr.port == port))
    print("secret", os.environ["DSL_JOB_SECRET"], flush=True)
    torch.distributed.barrier()  # who leaves before all have met ends the others' start
    torch.distributed.destroy_process_group()
    """
    words = command("--hostfile", cluster.hostfile(1), "--launcher", backend, write(tmp_path, body))
    pipe = subprocess.PIPE
    process = cluster.popen("head", words, env=environment(), stdout=pipe, stderr=subprocess.STDOUT, text=True)
    seen: set[str] = set()
    while process.poll() is None:
        for host in cluster.hosts:
            seen.update(cluster.processes(host).values())
        time.sleep(0.05)
    out = process.communicate()[0]
    assert process.returncode == 0 and out.count("secret") == 3, out
    assert any("launcher.node" in line for line in seen)
    assert not [line for line in seen if re.search("[0-9a-f]{32}", line)]
    assert re.findall(r"LISTEN (\S+)", out) == [cluster.hosts["worker-1"].address], out


# Failures

WAIT = """
import os, signal, sys, time
from pathlib import Path
here = Path(sys.argv[-1])
(here / os.environ["RANK"]).write_text(str(os.getpid()))
rank = int(os.environ["RANK"])
while True:
    if (here / f"raise-{rank}").exists():
        raise ValueError(f"rank {rank} has seen enough")
    if (here / f"kill-{rank}").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    if (here / f"exit-{rank}").exists():
        sys.exit(41)
    time.sleep(0.02)
"""


class Training:
    """Launchers that run on, each with 2 ranks on 3 hosts that wait for a word."""

    def __init__(self, cluster: Cluster, tmp_path: Path, count: int, *options: object) -> None:
        self.cluster, self.script = cluster, write(tmp_path, WAIT)
        self.folders = [tmp_path / f"job-{index}" for index in range(count)]
        hosts = ("--hostfile", cluster.hostfile(2))
        self.processes: list[subprocess.Popen[str]] = []
        for folder in self.folders:
            folder.mkdir()
            with open(folder / "out", "w") as out:
                words = command(*hosts, "--master_port", 0, *options, self.script, folder)
                self.processes.append(
                    cluster.popen("head", words, env=environment(), stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                                  )
                )  # fmt: skip
        deadline_s = time.monotonic() + 60
        while not all((folder / str(rank)).exists() for folder in self.folders for rank in range(6)):
            assert time.monotonic() < deadline_s, self.reports()
            time.sleep(0.02)

    def tell(self, word: str) -> None:
        for folder in self.folders:
            (folder / word).touch()

    def end(self, within_s: float) -> list[int]:
        """All exit statuses; they, and all ranks on hosts that can be reached, must have ended in time."""
        deadline_s = time.monotonic() + within_s
        statuses = [process.wait(timeout=max(0.1, deadline_s - time.monotonic())) for process in self.processes]
        assert_nothing_runs(self.cluster, self.script)
        return statuses

    def reports(self) -> list[str]:
        return [(folder / "out").read_text() for folder in self.folders]


@pytest.mark.parametrize(
    ("backend", "word", "rank", "status", "said"),
    [
        ("ssh", "raise", 3, 1, "ValueError: rank 3 has seen enough"),
        ("ssh", "exit", 0, 41, "code 41"),
        pytest.param("pdsh", "kill", 5, 137, "killed by SIGKILL", marks=needs_cluster(*PROGRAMS["pdsh"])),
        pytest.param("openmpi", "kill", 5, 137, "killed by SIGKILL", marks=needs_cluster(*PROGRAMS["openmpi"])),
        pytest.param("openmpi", "exit", 0, 41, "code 41", marks=needs_cluster(*PROGRAMS["openmpi"])),
    ],
)
def test_a_rank_that_fails_ends_all_and_is_blamed(
    cluster: Cluster, tmp_path: Path, backend: str, word: str, rank: int, status: int, said: str
) -> None:
    training = Training(cluster, tmp_path, 7, "--launcher", backend)
    training.tell(f"{word}-{rank}")
    assert training.end(within_s=10) == [status] * 7
    for report in training.reports():
        host = WORKERS[rank // 2]
        assert f"rank {rank} on {host} failed first" in report and said in report, report
        assert report.count("failed first") == 1


WAITS = """
import os, signal, subprocess, sys, time
import torch
from deepspeedlite import comm
comm.init_distributed(verbose=False)
comm.all_reduce(torch.ones(1))
rank = comm.get_rank()
time.sleep(1.5)
if rank == 0:
    subprocess.Popen(["sh", "-c", f"sleep 5; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)
if rank == 2:
    subprocess.Popen(["sh", "-c", f"sleep 12; kill -CONT {os.getpid()}"])
    time.sleep(3)
    os.kill(os.getpid(), signal.SIGSTOP)
comm.all_reduce(torch.ones(1))
torch.distributed.destroy_process_group()
time.sleep(7 if rank < 2 else 0)
"""


def test_ranks_of_other_machines_are_waited_for_and_end_early(cluster: Cluster, tmp_path: Path) -> None:
    """Rank 0, on whose machine the store is, stops for a while, rank 2 on another longer; that ends early."""
    script = write(tmp_path, WAITS)
    two = ("--hostfile", cluster.hostfile(2), "--num_nodes", 2, "--export_env", "DEEPSPEEDLITE_STALL_NOTICE_S=1.5")
    done = launch(cluster, *two, script)
    text = done.stderr
    assert done.returncode == 0, text
    notices = text.split(" WARNING: ")[1:]
    assert all(re.match(r"rank \d has waited \d+ s in all_reduce of 1 elements, at ", notice) for notice in notices)
    assert re.search(r"rank 1 has waited.*\n.*rank 0 is stopped \(process \d+ on worker-1", text), text
    # Its first notice may come before the store has been silent for long, and the next once rank 2 is seen to stop.
    silent = r"rank 3 has waited.*\n.*ranks 0-[12] cannot be asked: the job's store, which rank 0 hosts"
    assert re.search(silent, text), text
    assert re.search(
        r"rank 0 has waited.*\n.*rank 2 is stopped \(process \d+ on worker-2.*\n.*ranks 1, 3 wait th", text
    ), text
    assert re.search(r"ranks 2, 3 have ended with exit code 0, .* after the start, and ranks 0, 1 still run", text), (
        text
    )
    assert_nothing_runs(cluster, script)


@pytest.mark.parametrize(
    ("backend", "loss"),
    [
        ("ssh", "cut"),
        ("ssh", "silent power"),
        pytest.param("pdsh", "power", marks=needs_cluster(*PROGRAMS["pdsh"])),
        pytest.param("pdsh", "silent power", marks=needs_cluster(*PROGRAMS["pdsh"])),
    ],
)
def test_a_machine_that_is_lost_ends_all_and_is_blamed(tmp_path: Path, backend: str, loss: str) -> None:
    with Cluster(WORKERS) as cluster:
        training = Training(cluster, tmp_path, 10, "--launcher", backend)
        began_s = time.monotonic()
        if loss == "cut":
            cluster.cut("worker-2")
        else:
            cluster.power_off("worker-2", silent=loss != "power")
        for process in training.processes:
            assert process.wait(timeout=max(0.1, began_s + 12 - time.monotonic())) == 1, training.reports()
        assert time.monotonic() - began_s < 10
        for report in training.reports():
            assert "worker-2 failed: it was lost" in report, report
        if loss == "cut":  # the ranks there have ended by themselves
            deadline_s = began_s + 12
            while cluster.processes("worker-2", str(training.script)):
                assert time.monotonic() < deadline_s, cluster.processes("worker-2")
                time.sleep(0.1)
            cluster.heal("worker-2")
        for host in ("worker-1", "worker-3"):
            assert not cluster.processes(host, str(training.script))


@pytest.mark.parametrize(
    ("backend", "number"),
    [
        ("ssh", signal.SIGINT),
        ("ssh", signal.SIGKILL),
        pytest.param("mpich", signal.SIGTERM, marks=needs_cluster(*PROGRAMS["mpich"])),
        pytest.param("mpich", signal.SIGHUP, marks=needs_cluster(*PROGRAMS["mpich"])),
    ],
)
def test_a_signal_to_the_launcher_ends_all(cluster: Cluster, tmp_path: Path, backend: str, number: int) -> None:
    training = Training(cluster, tmp_path, 10, "--launcher", backend)
    for process in training.processes:
        process.send_signal(number)
    status = -number if number == signal.SIGKILL else 128 + number
    assert training.end(within_s=10) == [status] * 10
    for report in training.reports():
        assert "failed" not in report.lower() or number == signal.SIGKILL, report


def test_a_hung_ssh_does_not_hang_the_launcher(cluster: Cluster, tmp_path: Path) -> None:
    hung = tmp_path / "bin" / "ssh"
    hung.parent.mkdir()
    hung.write_text('#!/bin/sh\nfor word; do [ "$word" = worker-2 ] && sleep 600; done\nexec /usr/bin/ssh "$@"\n')
    hung.chmod(0o755)
    script = write(tmp_path, WAIT)
    path = f"{hung.parent}:{os.environ['PATH']}"
    words = command("--hostfile", cluster.hostfile(1), "--launcher", "ssh", "--start_timeout", 3, script, tmp_path)
    began_s = time.monotonic()
    done = cluster.run("head", words, env=environment(PATH=path), timeout=30, check=False)
    assert done.returncode == 2 and "worker-2: reached: no answer in 3 s" in done.stderr, done.stderr
    assert time.monotonic() - began_s < 10
    assert "sleep 600" not in "".join(cluster.processes("head").values())
    assert_nothing_runs(cluster, script)


# What reaches the ranks

SHOW = """
import json, os, sys
from pathlib import Path
names = ("NCCL_", "PYTHON", "UCX_", "MV2_", "DSLT_")
kept = {name: value for name, value in os.environ.items() if name.startswith(names)}
Path(sys.argv[1], os.environ["RANK"]).write_text(json.dumps([kept, sys.argv[2:], os.getcwd()]))
"""
VALUES = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=60)
LINES = st.text(st.characters(blacklist_characters="\0\n", blacklist_categories=("Cs",)), max_size=60)


@backends("ssh", "pdsh", "mpich")
def test_variables_and_arguments_of_any_text_arrive_untouched(cluster: Cluster, tmp_path: Path, backend: str) -> None:
    script = write(tmp_path, SHOW)
    hostfile = cluster.hostfile(1, WORKERS[:2])

    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(VALUES, max_size=3), st.lists(LINES, max_size=3), st.lists(VALUES, max_size=3))
    def check(exported: list[str], filed: list[str], arguments: list[str]) -> None:
        env = {f"NCCL_T{index}": value for index, value in enumerate(exported)}
        lines = [f"DSLT_{index}='{value}'\n" for index, value in enumerate(filed)]
        (tmp_path / ".deepspeed_env").write_text("".join(lines))
        words = command("--hostfile", hostfile, "--launcher", backend, "--no_local_rank", script, tmp_path, *arguments)
        env |= {"PYTHONHASHSEED": "7", "DSLT_HIDDEN": "not named"}
        cluster.run("head", words, env=environment(**env), cwd=tmp_path)
        for rank in ("0", "1"):
            variables, received, folder = json.loads((tmp_path / rank).read_text())
            kept = {name: value for name, value in variables.items() if name in env}
            assert kept == {name: value for name, value in env.items() if name != "DSLT_HIDDEN"}
            assert [variables.get(f"DSLT_{index}") for index in range(len(filed))] == filed
            assert received == arguments and folder == str(tmp_path)

    check()


def test_named_variables_and_a_secret_that_is_never_shown(cluster: Cluster, tmp_path: Path) -> None:
    script = write(tmp_path, SHOW)
    (tmp_path / "vars").write_text("# mine\n\nexport DSLT_A=1 2\nDSLT_B\nDSLT_TOKEN=s3cr3t-value\n")
    words = ["--hostfile", cluster.hostfile(1), "--export_env", "DSLT_C", "--export_env", "DSLT_D==x "]
    words.append("--no_local_rank")
    env = environment(DSLT_B="line\nbreak", DSLT_C="see", DS_ENV_FILE=str(tmp_path / "vars"))
    shown = cluster.run("head", command(*words, "--dry_run", script, tmp_path), env=env)
    done = cluster.run("head", command(*words, "--log_level", "debug", script, tmp_path), env=env)
    variables = json.loads((tmp_path / "2").read_text())[0]
    wanted = {"DSLT_A": "1 2", "DSLT_B": "line\nbreak", "DSLT_C": "see", "DSLT_D": "=x ", "DSLT_TOKEN": "s3cr3t-value"}
    assert {name: value for name, value in variables.items() if name.startswith("DSLT_")} == wanted
    assert "s3cr3t" not in shown.stdout + shown.stderr + done.stdout + done.stderr
    assert "DSLT_TOKEN" in shown.stdout


def test_a_shell_that_talks_and_a_venv_script(cluster: Cluster, tmp_path: Path) -> None:
    """A login shell's own words do not disturb, and a sourced script's variables and Python reach the ranks."""
    path = f"export PATH={Path(sys.executable).parent}:$PATH"
    (tmp_path / "activate").write_text(f"echo noise\nexport DSLT_V='a b'\n{path}\n")
    script = write(tmp_path, SHOW)
    talking = tmp_path / "bin" / "ssh"
    talking.parent.mkdir()
    talking.write_text('#!/bin/sh\necho "welcome to this cluster"\nexec /usr/bin/ssh "$@"\n')
    talking.chmod(0o755)
    words = ("--launcher", "ssh", "--venv_script", tmp_path / "activate", "--no_local_rank", script, tmp_path)
    path = f"{talking.parent}:{os.environ['PATH']}"
    done = launch(cluster, "--hostfile", cluster.hostfile(1), *words, PATH=path)
    assert json.loads((tmp_path / "1").read_text())[0]["DSLT_V"] == "a b"
    assert "noise" not in done.stdout and "welcome" not in done.stdout


def test_mistakes_are_told_with_their_host(cluster: Cluster, tmp_path: Path) -> None:
    hosts = ("--hostfile", cluster.hostfile(2), "--launcher", "ssh")
    done = cluster.run("head", command(*hosts, tmp_path / "no.py"), env=environment(), check=False)
    assert done.returncode == 2 and f"script {tmp_path}/no.py does not exist" in done.stderr, done.stderr
    assert "worker-1, worker-2, worker-3: start: script" in done.stderr
    script = write(tmp_path, SHOW)
    mistakes = {
        "--num_gpus 3": "worker-1 has 2 slots",
        "--include worker-4": "did you mean worker-",
        "--include worker-1:2": "worker-1 has no slot 2",
        "--num_nodes 4": "names 3",
    }
    for words, said in mistakes.items():
        done = cluster.run("head", command(*hosts, *words.split(), script), env=environment(), check=False)
        assert done.returncode == 2 and said in done.stderr, done.stderr


# Output and pauses


def test_rank_0_of_another_machine_has_the_launchers_terminal(cluster: Cluster, tmp_path: Path) -> None:
    body = """
    import os, sys
    if os.environ["RANK"] == "0":
        print(sys.stdout.isatty(), os.get_terminal_size().columns)
        os.write(2, b"\\r 10%")
        os.write(2, b"\\r 20%\\n")
    """
    script = write(tmp_path, body)
    ours, theirs = pty.openpty()
    subprocess.run(["stty", "cols", "90"], stdin=theirs, check=True)
    hosts = ("--hostfile", cluster.hostfile(1), "--launcher", "ssh", "--quiet")
    env = environment(NO_COLOR="1")
    process = cluster.popen("head", command(*hosts, script), env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: everyone has closed the terminal
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert process.wait() == 0
    width = 90 - len("[worker-1:0] ")
    assert shown == b"[worker-1:0] True %d\r\n\r[worker-1:0]  10%%\r[worker-1:0]  20%%\r\n" % width, shown


@backends("ssh", "pdsh")
def test_a_reader_that_stops_loses_no_machine_and_no_line(cluster: Cluster, tmp_path: Path, backend: str) -> None:
    body = "import os\nfor n in range(40_000): print(os.environ['RANK'], n, 'x' * 100)\n"
    hosts = ("--hostfile", cluster.hostfile(1), "--launcher", backend, "--quiet")
    words = command(*hosts, write(tmp_path, body))
    process = cluster.popen("head", words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(8)  # longer than the silence after which a machine counts as lost
    assert process.poll() is None
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    lines = [line.split() for line in out.splitlines()]
    for rank, host in enumerate(WORKERS):
        own = [int(words[2]) for words in lines if words[0] == f"[{host}:{rank}]"]
        assert own == list(range(40_000))


def test_a_paused_launcher_pauses_the_ranks_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    training = Training(cluster, tmp_path, 1, "--launcher", "ssh")
    process = training.processes[0]
    process.send_signal(signal.SIGTSTP)
    time.sleep(7)
    assert process.poll() is None
    for rank in range(6):
        (pid,) = {pid for pid in cluster.processes(WORKERS[rank // 2], str(training.script)) if _is_rank(pid, rank)}
        assert Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"
    process.send_signal(signal.SIGCONT)
    training.tell("exit-4")
    assert training.end(within_s=10) == [41], training.reports()
    assert "rank 4 on worker-3 failed first" in training.reports()[0]


def _is_rank(pid: int, rank: int) -> bool:
    return f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes() + b"\0"


# Without ssh, and without the launcher


@pytest.mark.parametrize("sizes", [(2, 2), (1, 2, 1)])
def test_one_launcher_per_machine(
    cluster: Cluster, tmp_path: Path, local_losses: list[float], sizes: tuple[int, ...]
) -> None:
    script = write(tmp_path, TRAIN)
    address = cluster.hosts["worker-1"].address
    places = ("--no_ssh", "--num_nodes", len(sizes), "--master_addr", address, "--master_port", 29700 + 2 * len(sizes))
    pipe = {"env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"{host} slots={size}\n" for host, size in zip(WORKERS, sizes)))
    words = [command("--hostfile", hostfile, *places, "--node_rank", node, script) for node in range(len(sizes))]
    running = [cluster.popen(host, argv, **pipe) for host, argv in reversed(list(zip(WORKERS, words)))]
    *others, first = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(sizes), first
    assert losses_in(first) == local_losses
    assert not any("LOSSES" in out for out in others), "each machine shows its own ranks"


@pytest.mark.parametrize("rank", [0, 1])
def test_one_launcher_per_machine_ends_with_the_first_failure(cluster: Cluster, tmp_path: Path, rank: int) -> None:
    script = write(tmp_path, WAIT)
    address = cluster.hosts["worker-1"].address
    places = (
        "--no_ssh",
        "--num_nodes",
        2,
        "--num_gpus",
        1,
        "--master_addr",
        address,
        "--master_port",
        29710 + 2 * rank,
    )
    pipe = {"env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    words = [command(*places, "--node_rank", node, script, tmp_path) for node in (0, 1)]
    both = [cluster.popen(host, argv, **pipe) for host, argv in zip(WORKERS, words)]
    while not all((tmp_path / name).exists() for name in "01"):
        assert all(process.poll() is None for process in both)
        time.sleep(0.02)
    (tmp_path / f"exit-{rank}").touch()
    outs = [process.communicate(timeout=10)[0] for process in both]
    assert [process.returncode for process in both] == [41, 41], outs
    assert f"rank {rank} on node-{rank} failed first" in outs[0]
    assert_nothing_runs(cluster, script)


# Check, restart, many


def test_check_shows_what_differs_with_a_remedy(tmp_path: Path) -> None:
    with Cluster(WORKERS) as cluster:
        hosts = ("--hostfile", cluster.hostfile(2), "--launcher", "ssh")
        good = launch(cluster, *hosts, "--check")
        assert "all 3 machines are ready" in good.stderr and good.stderr.count(" yes ") == 3
        cluster.power_off("worker-3")
        began_s = time.monotonic()
        bad = cluster.run("head", command(*hosts, "--check"), env=environment(), check=False)
        assert bad.returncode == 2 and "worker-3: not ready" in bad.stderr and time.monotonic() - began_s < 15
        assert "see that worker-3 is on, that sshd runs there, and that no firewall is between" in bad.stderr
        cluster.run("worker-2", ["ip", "route", "add", "blackhole", f"{cluster.hosts['worker-1'].address}/32"])
        two = (*hosts, "--num_nodes", 2)
        unreached = cluster.run("head", command(*two, "--check"), env=environment(), check=False)
        assert "worker-2: master: cannot reach" in unreached.stderr and "firewall" in unreached.stderr, unreached.stderr
        started = cluster.run("head", command(*two, write(tmp_path, "print('ran')")), env=environment(), check=False)
        assert started.returncode == 2 and "nothing was started" in started.stderr and "ran" not in started.stdout


RESUME = """
import os, sys, time
from pathlib import Path
here = Path(sys.argv[-1])
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
done = here / "steps"
begin = int(done.read_text()) if done.exists() else 0
restart = os.environ.get("TORCHELASTIC_RESTART_COUNT")
print("begin", begin, "world", world, "restart", restart, os.uname().nodename, flush=True)
(here / f"begun-{restart}-{rank}").touch()
while len(list(here.glob(f"begun-{restart}-*"))) < world:  # nobody reads what rank 0 writes from here on
    time.sleep(0.01)
for step in range(begin, 20):
    time.sleep(0.05)
    if step == 5 and begin == 0:
        (here / f"at-5-{rank}").touch()
        time.sleep(600)
    if rank == 0:
        done.write_text(str(step + 1))
"""


@pytest.mark.parametrize(("options", "ranks"), [(("--num_nodes", 2), 4), (("--min_nodes", 2), 6)])
def test_a_lost_machine_is_replaced_or_done_without(tmp_path: Path, options: tuple[object, ...], ranks: int) -> None:
    with Cluster([*WORKERS, "worker-0"]) as cluster:
        cluster.power_off("worker-0")  # a spare machine that turns out not to answer
        script = write(tmp_path, RESUME)
        names = ["worker-1", "worker-2", "worker-0", "worker-3"] if ranks == 4 else WORKERS
        hosts = ("--hostfile", cluster.hostfile(2, names), "--launcher", "ssh")
        words = command(*hosts, *options, "--max_restarts", 1, script, tmp_path)
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = cluster.popen("head", words, env=environment(), **pipe)
        deadline_s = time.monotonic() + 30
        while len(list(tmp_path.glob("at-5-*"))) < ranks:
            assert time.monotonic() < deadline_s and process.poll() is None, process.communicate(timeout=5)[0]
            time.sleep(0.05)
        cluster.power_off("worker-1")  # the first one, where ranks meet
        out = process.communicate(timeout=40)[0]
        assert process.returncode == 0, out
        assert "worker-1 failed: it was lost" in out and "restart 1 of at most 1" in out
        again = re.findall(r"begin 5 world (\d+) restart 1 (worker-\d)", out)
        assert {(int(size), host) for size, host in again} == {(4, "worker-2"), (4, "worker-3")}, out


def started(words: str) -> ParameterSet:
    program = words.split()[0]
    return pytest.param(program, words, marks=needs_cluster(*(SLURM if program == "srun" else (program,))))


@pytest.mark.parametrize(
    ("program", "words"),
    [
        started("mpirun.openmpi --allow-run-as-root --oversubscribe --host worker-1:2,worker-2:2 -n 4"),
        started("mpirun.mpich -hosts worker-1,worker-2 -ppn 2 -n 4"),
        started("srun -N 2 -n 4 --overcommit --nodelist worker-1,worker-2"),
        ("torchrun", ""),
    ],
)
def test_the_script_starts_without_the_launcher(
    program: str, words: str, request: pytest.FixtureRequest, tmp_path: Path, local_losses: list[float]
) -> None:
    cluster = request.getfixturevalue("slurm_cluster" if program == "srun" else "cluster")
    script = write(tmp_path, TRAIN)
    address = cluster.hosts["worker-1"].address
    if program == "torchrun":
        run = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
        run.append(f"--master-addr={address}")
        pipe = {"env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        both = [cluster.popen(f"worker-{r + 1}", [*run, f"--node-rank={r}", str(script)], **pipe) for r in (0, 1)]
        outs = [process.communicate(timeout=90)[0] for process in both]
        assert losses_in(outs[0]) == local_losses
        return
    export = ["-x", "PYTHONPATH", "-x", "DS_ACCELERATOR", "-x", "MASTER_ADDR"] if program == "mpirun.openmpi" else []
    argv = [*words.split(), *export, sys.executable, str(script)]
    done = cluster.run("head", argv, timeout=90, env=environment(MASTER_ADDR=address))
    assert losses_in(done.stdout) == local_losses, done.stdout + done.stderr
