"""Faults planted for real on hosts (helpers/cluster.py): the launcher names each with its remedy, in under 10 s."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import SLURM, Cluster, needs_cluster
from paths import ROOT
from programs import missing

pytestmark = [pytest.mark.slow, needs_cluster()]
PROGRAMS = {"pdsh": ("pdsh",), "openmpi": ("mpirun.openmpi",), "mpich": ("mpirun.mpich",), "slurm": SLURM}
STARTS = {
    "slurm": ["srun", "-N", "2", "-n", "2", "--ntasks-per-node=1"],
    "openmpi": [
        "mpirun.openmpi",
        "--allow-run-as-root",
        "--host",
        "worker-1:1,worker-2:1",
        "-n",
        "2",
        "-x",
        "PYTHONPATH",
    ],
    "mpich": ["mpirun.mpich", "-hosts", "worker-1,worker-2", "-ppn", "1", "-n", "2"],
}
LIMIT_S = 10.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(["worker-1", "worker-2"]) as made:
        if missing(*SLURM) is None:
            made.start_slurm()
        yield made


def launch(
    cluster: Cluster, *arguments: object, host: str = "head", before: tuple[str, ...] = (), **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the launcher to its end, which must not take longer than is promised."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env = {**kept, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "HOME": str(cluster.home), **env}
    words = [*before, sys.executable, "-m", "deepspeedlite.launcher", *map(str, arguments)]
    began_s = time.monotonic()
    done = cluster.run(host, words, env=env, check=False)
    assert time.monotonic() - began_s < LIMIT_S, done.stderr
    return done


def hostfile(folder: Path, text: str) -> Path:
    (folder / "hosts").write_text(text)
    return folder / "hosts"


def write(folder: Path, body: str = "import os\nprint('ran', os.environ['RANK'])\n") -> Path:
    (folder / "train.py").write_text(body)
    return folder / "train.py"


@pytest.mark.parametrize(
    "starter", [pytest.param(name, marks=needs_cluster(*PROGRAMS[name])) for name in ("slurm", "openmpi", "mpich")]
)
def test_a_launcher_that_is_started_on_every_node_is_refused(cluster: Cluster, tmp_path: Path, starter: str) -> None:
    script = write(tmp_path, "import os\nopen(os.path.join(os.path.dirname(__file__), os.environ['RANK']), 'w')\n")
    done = launch(cluster, "--num_gpus", 2, script, before=tuple(STARTS[starter]))
    assert done.returncode == 2 and not (tmp_path / "0").exists()
    assert f"deepspeedlite --launcher {starter} -H" in done.stderr and "--no_ssh --num_nodes N" in done.stderr
    if starter == "mpich":
        return  # the words below are those of the message, by the two that number nodes differently
    node = re.search(r"--node_rank (\$\w+)", done.stderr)
    assert node
    places = (
        f"--no_ssh --num_nodes 2 --num_gpus 1 --node_rank {node[1]} --master_addr {cluster.hosts['worker-1'].address}"
    )
    ours = f"DS_ACCELERATOR=cpu {sys.executable} -m deepspeedlite.launcher {places} {script}"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    cluster.run("head", [*STARTS[starter], "sh", "-c", ours], env=env, timeout=30)
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()


@needs_cluster(*SLURM)
def test_a_launcher_within_a_step_of_slurm_shares_its_nodes(cluster: Cluster, tmp_path: Path) -> None:
    """As in the shell of `srun --pty bash`."""
    around = ("salloc", "-N2", "-n2", "srun", "-N1", "-n1")
    done = launch(cluster, "--launcher", "slurm", write(tmp_path), before=around)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["[worker-1:0] ran 0", "[worker-2:1] ran 1"]


def test_a_machine_under_two_names_is_found_and_its_own_name_not_needed(cluster: Cluster, tmp_path: Path) -> None:
    first, address = cluster.hosts["worker-1"].name, cluster.hosts["worker-1"].address
    twice = hostfile(tmp_path, f"{first} slots=1\nroot@{address} slots=1 max_slots=2\n")
    done = launch(cluster, "-H", twice, write(tmp_path))
    assert done.returncode == 2 and "machine: is worker-1 under another name" in done.stderr, done.stderr
    names = {name: tmp_path / name for name in ("worker-1", "worker-2")}
    names["worker-1"].write_text("127.0.0.1 localhost\n127.0.1.1 worker-1\n")  # as Debian's installer leaves it
    names["worker-2"].write_text("127.0.0.1 localhost\n")
    for host, path in names.items():
        cluster.run(host, ["mount", "--bind", path, "/etc/hosts"])
    try:
        both = ("-H", cluster.hostfile(1), "--launcher", "ssh")
        looked = launch(cluster, *both, "--check")
        assert looked.returncode == 0, looked.stderr
        assert "own name: worker-1 is 127.0.1.1, which only this machine reaches" in looked.stderr
        assert "own name: worker-2 has no address\n    give it the network's address" in looked.stderr
        body = "import torch, torch.distributed as d\nd.init_process_group('gloo')\nx = torch.ones(1)\n"
        body += "d.all_reduce(x)\nprint('sum', x.item())\nd.destroy_process_group()\n"
        env = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
        words = [sys.executable, "-m", "deepspeedlite.launcher", *map(str, both), str(write(tmp_path, body))]
        done = cluster.run("head", words, env=env)
        assert done.stdout.count("sum 2.0") == 2, done.stdout + done.stderr
    finally:
        for host in names:
            cluster.run(host, ["umount", "/etc/hosts"])


def test_what_is_odd_on_a_node_is_named_with_its_remedy(cluster: Cluster, tmp_path: Path) -> None:
    """Limits, cores, shared memory, disk, clock, versions and files of one node, all in one look."""
    script, other = write(tmp_path), tmp_path / "other"
    other.mkdir()
    (other / "sitecustomize.py").write_text("import time\nnow = time.time\ntime.time = lambda: now() + 60\n")
    version = ROOT / "deepspeedlite" / "_version.py"
    (other / "_version.py").write_text('__version__ = "0.0.9"\n')
    torch = Path(subprocess.run(
        [sys.executable, "-c", "import importlib.util as u; print(u.find_spec('torch').origin)"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()).parent  # fmt: skip
    (other / "version.py").write_text((torch / "version.py").read_text().replace("__version__ = '", "__version__ = '9"))
    plants = [
        ["mount", "-o", "remount,size=64m", "/dev/shm"],
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(cluster.home)],
        ["mount", "--bind", str(other / "_version.py"), str(version)],
        ["mount", "--bind", str(other / "version.py"), str(torch / "version.py")],
        ["mount", "--bind", str(other), str(tmp_path)],
        ["sh", "-c", "ulimit -n 64; exec taskset -c 0 /usr/sbin/sshd -p 2222 -o PidFile=/run/odd.pid"],
    ]
    hosts = tmp_path / "other" / "hosts"
    hosts.write_text("worker-1 slots=1\nworker-2:2222 slots=8\n")
    (tmp_path / "hosts").write_text(hosts.read_text())
    for plant in plants:
        cluster.run("worker-2", plant)
    try:
        done = launch(cluster, "-H", tmp_path / "hosts", "--check", script, PYTHONPATH=f"{ROOT}:{tmp_path}")
    finally:
        cluster.power_off("worker-2")
        cluster.power_on("worker-2")
    assert done.returncode == 2, done.stderr
    for said, remedy in (
        ("deepspeedlite: 0.0.9", "install the same wheel on every node"),
        ("torch: 9", "install the same torch on every node"),
        (r"clock: \+60\.\d s", "run an NTP client"),
        ("/dev/shm: 64 MiB free", "docker run --shm-size=8g"),
        (r"ops' folder: \S+ KiB free|ops' folder: 1 MiB free", "TORCH_EXTENSIONS_DIR"),
        ("open files: 64, and 8 of 9 ranks may take", "ulimit -n 65536"),
        ("cores: 1 for 8 ranks", "start fewer ranks there"),
        (rf"start: script {script} does not exist", "every node needs the same files at the same paths"),
    ):
        found = re.search(rf"^worker-2:2222: (?:{said}).*\n    (.*)", done.stderr, re.MULTILINE)
        assert found and remedy in found[1], f"{said}\n{done.stderr}"


def test_another_python_on_a_node_is_named(cluster: Cluster, tmp_path: Path) -> None:
    """What is at our Python's path there is the system's, of another patch release at least."""
    system = Path("/usr/bin/python3")
    ours = platform.python_version()
    said = (
        subprocess.run([system, "--version"], capture_output=True, text=True, check=False) if system.exists() else None
    )
    if said is None or said.stdout.split()[1] == ours:
        pytest.skip("needs a Python of another version at /usr/bin/python3")
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {system} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    real = Path(sys.executable).resolve()
    cluster.run("worker-2", ["mount", "--bind", tmp_path / "python", real])
    try:
        path = os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")])
        done = launch(cluster, "-H", cluster.hostfile(1), "--check", PYTHONPATH=path)
    finally:
        cluster.run("worker-2", ["umount", real])
    assert done.returncode == 2, done.stderr
    assert f"worker-2: python: {said.stdout.split()[1]} (most nodes: {ours})" in done.stderr, done.stderr
    assert "every node runs the same Python; `install.sh` installs one wheel on all" in done.stderr


def test_threads_follow_the_quota_of_a_control_group(tmp_path: Path) -> None:
    """The launcher's ranks, the builder of ops and the report: the quota pays for one and a half processors."""
    group = Path(f"/sys/fs/cgroup/cpu/dsl-test-{os.getpid()}")
    try:
        group.mkdir()
        (group / "cpu.cfs_period_us").write_text("100000")
        (group / "cpu.cfs_quota_us").write_text("150000")
    except OSError as error:
        pytest.skip(f"needs a cpu controller of cgroup v1 that may be written: {error}")
    script = write(tmp_path, "import os\nprint('threads', os.environ['OMP_NUM_THREADS'])\n")
    report = "from deepspeedlite.ops.op_builder.toolchain import max_jobs\n"
    report += "from deepspeedlite.env_report.machine import cpu_and_memory\nprint(max_jobs(), cpu_and_memory())\n"
    env = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MAX_JOBS", "RANK")}
    env |= {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    said = []
    try:
        for words in (["-m", "deepspeedlite.launcher", str(script)], ["-c", report]):
            argv = ["sh", "-c", f'echo $$ >{group}/cgroup.procs; exec "$@"', "sh", sys.executable, *words]
            said.append(subprocess.run(argv, env=env, capture_output=True, text=True, check=True, timeout=60).stdout)
    finally:
        group.rmdir()
    assert said[0] == "threads 1\n"
    assert said[1].startswith("1 ") and f"1 usable of {os.cpu_count()}, 1.5 by the control group's quota" in said[1]


def test_devices_are_those_of_the_ranks_own_environment(cluster: Cluster, tmp_path: Path) -> None:
    """Each host has the files of four GPUs; the variable is set where the ranks start, not around the launcher."""
    script = write(tmp_path, "import os\nprint('ran', os.environ['RANK'], os.environ.get('CUDA_VISIBLE_DEVICES'))\n")
    (tmp_path / "activate").write_text(f"export CUDA_VISIBLE_DEVICES=3,1,2 PATH={Path(sys.executable).parent}:$PATH\n")
    plant = "mkdir -p /run/g/up /run/g/work && "
    plant += "mount -t overlay -o lowerdir=/dev,upperdir=/run/g/up,workdir=/run/g/work dev /dev"
    for host in ("head", "worker-1"):
        cluster.run(host, ["sh", "-c", f"{plant} && touch /dev/nvidia0 /dev/nvidia1 /dev/nvidia2 /dev/nvidia3"])
    try:
        there = ("-H", hostfile(tmp_path, "worker-1 slots=2\n"), "--launcher", "ssh")
        visible, asked = "CUDA_VISIBLE_DEVICES=3,1,2", "--include localhost:3 asks for slot 3"
        for where, status, said in (
            (("--include", "localhost:1,2"), 0, f"{visible} is respected: ranks use 1,2, slots 1,2 of it"),
            (("--include", "localhost:3"), 2, f"{asked}, but {visible} leaves 3 (slots 0 to 2 of it)"),
            (there, 0, f"worker-1: {visible} is respected: ranks use 3,1"),
            (
                (*there, "--export_env", "CUDA_VISIBLE_DEVICES=all"),
                2,
                "worker-1: start: CUDA_VISIBLE_DEVICES=all: 'all'",
            ),
        ):
            done = launch(cluster, *where, "--venv_script", tmp_path / "activate", script, DS_ACCELERATOR="")
            assert done.returncode == status and said in done.stderr, done.stderr
            given = re.findall(r"ran \d (.*)", done.stdout)
            assert given == ([] if status else [re.findall("ranks use ([0-9,]+[0-9])", said)[0]] * 2), done.stdout
    finally:
        for host in ("head", "worker-1"):
            cluster.run(host, ["umount", "-l", "/dev"])


@pytest.mark.parametrize("is_rejected", [False, True])
def test_a_firewall_between_nodes_is_named(cluster: Cluster, tmp_path: Path, is_rejected: bool) -> None:
    """The launcher reaches both; what one node sends to the other is dropped, or answered with an error."""
    one, two = cluster.hosts["worker-1"].address, cluster.hosts["worker-2"].address
    host, route = ("worker-2", ["unreachable", one]) if is_rejected else ("worker-1", ["blackhole", two])
    cluster.run(host, ["ip", "route", "add", *route])
    try:
        both = ("-H", cluster.hostfile(1), "--launcher", "ssh")
        done = launch(cluster, *both, write(tmp_path), *([] if is_rejected else ["--check"]))
        assert done.returncode == 2 and "ran" not in done.stdout
        reason = "No route to host" if is_rejected else "timed out"
        assert f"worker-2: master: cannot reach worker-1: {reason}" in done.stderr, done.stderr
        assert "open the port between the nodes (firewall)" in done.stderr
    finally:
        cluster.run(host, ["ip", "route", "del", *route])


@needs_cluster("pdsh")
def test_a_firewall_before_the_launcher_is_named(cluster: Cluster) -> None:
    """Nothing but ssh goes through to one node: its agent cannot connect, and says so."""
    address = cluster.hosts["worker-2"].address
    ssh_alone = f"ip route add {address} dev eth0 table 100 && ip rule add ipproto tcp dport 22 lookup 100"
    cluster.run("head", ["sh", "-c", f"{ssh_alone} && ip route add blackhole {address}"])
    try:
        done = launch(cluster, "-H", cluster.hostfile(1), "--launcher", "pdsh", "--check")
        assert done.returncode == 2, done.stderr
        reason = rf"the launcher cannot be reached at port \d+ of {cluster.hosts['head'].address} \(timed out\)"
        assert re.search(rf"worker-2: reached: .*{reason}", done.stderr), done.stderr
        assert "open this machine's ports to it (firewall); --launcher ssh needs sshd's port alone" in done.stderr
    finally:
        undo = f"ip route del blackhole {address}; ip rule del ipproto tcp dport 22; ip route flush table 100"
        cluster.run("head", ["sh", "-c", undo])


@pytest.mark.parametrize(
    "backend",
    ["ssh", *(pytest.param(name, marks=needs_cluster(*needed)) for name, needed in PROGRAMS.items())],
)
def test_a_host_that_is_not_reached_is_named_by_every_launcher(cluster: Cluster, tmp_path: Path, backend: str) -> None:
    rejected = ["unreachable", cluster.hosts["worker-2"].address]
    if backend == "ssh":
        cluster.cut("worker-2")
    elif backend == "slurm":
        cluster.run("head", ["scontrol", "update", "nodename=worker-2", "state=down", "reason=test"])
    else:
        cluster.run("head", ["ip", "route", "add", *rejected])
    try:
        done = launch(cluster, "-H", cluster.hostfile(1), "--launcher", backend, write(tmp_path))
        assert done.returncode == 2 and "ran" not in done.stdout
        if backend == "slurm":
            assert "worker-2: reached: srun: Required node not available (down, drained or reserved)" in done.stderr
            assert "`sinfo -N -l` says which" in done.stderr
        else:
            reason = r"worker-2: reached: ssh: connect to host worker-2 port 22: (No route|Connection timed out)"
            assert re.search(reason, done.stderr), done.stderr
            assert "see that worker-2 is on, that sshd runs there" in done.stderr
    finally:
        if backend == "ssh":
            cluster.heal("worker-2")
        elif backend == "slurm":
            cluster.run("head", ["scontrol", "update", "nodename=worker-2", "state=resume"])
        else:
            cluster.run("head", ["ip", "route", "del", *rejected])
