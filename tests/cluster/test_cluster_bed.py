"""The test bed itself: its hosts have addresses, reach each other by every launcher, fail, and leave nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cluster import SLURM, Cluster, missing_rights, needs_cluster
from paths import BOOT, HELPERS
from programs import program

WORKERS = ["worker-1", "worker-2", "worker-3"]
pytestmark = needs_cluster()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(WORKERS) as cluster:
        yield cluster


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return sorted(done.stdout.splitlines())


def test_hosts_are_separate_machines(cluster: Cluster) -> None:
    seen = {}
    for name in ("head", *WORKERS):
        script = "hostname; hostname -i; cat /proc/sys/kernel/random/boot_id; ls /sys/class/net; ls /dev/shm"
        script += "; echo /proc/[0-9]*; touch /dev/shm/x"
        host, address, boot_id, *rest = cluster.run(name, ["bash", "-c", script]).stdout.split()
        assert (host, address) == (name, cluster.hosts[name].address)
        # Two interfaces, an empty /dev/shm, and few processes: its first, its sshd and those that tell.
        assert rest[:3] == ["eth0", "lo", "/proc/1"] and len(rest) < 8, rest
        seen[boot_id] = address
        found = cluster.run(name, ["getent", "hosts", "worker-2"]).stdout.split()
        assert found == [cluster.hosts["worker-2"].address, "worker-2"]
    assert len(seen) == len(set(seen.values())) == 4


def test_root_may_go_everywhere_by_ssh_unasked(cluster: Cluster) -> None:
    pairs = [(one, other) for one in cluster.hosts for other in cluster.hosts]
    with ThreadPoolExecutor(4) as pool:
        names = list(pool.map(lambda pair: cluster.run(pair[0], ["ssh", pair[1], "hostname"]), pairs))
    assert [done.stdout.strip() for done in names] == [other for _, other in pairs]
    assert [done.stderr for done in names if done.stderr] == [], "no warning either"


def test_files_are_copied_by_scp(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("text")
    cluster.run("head", ["scp", "-q", tmp_path / "a", "worker-3:/dev/shm/b"])
    assert cluster.run("worker-3", ["cat", "/dev/shm/b"]).stdout == "text"
    assert "b" not in cluster.run("worker-2", ["ls", "/dev/shm"]).stdout


@pytest.mark.parametrize(
    "command",
    [
        ["pdsh", "-R", "ssh", "-N", "-w", "worker-[1-3]", "hostname"],
        ["mpirun.openmpi", "--allow-run-as-root", "--hostfile", "{mpi}", "-N", "1", "hostname"],
        ["mpirun.mpich", "-hosts", ",".join(WORKERS), "-n", "3", "-ppn", "1", "hostname"],
        ["mpiexec.hydra", "-launcher", "ssh", "-f", "{plain}", "-n", "3", "-ppn", "1", "hostname"],
    ],
)
def test_launchers_start_a_process_per_host(cluster: Cluster, tmp_path: Path, command: list[str]) -> None:
    program(command[0])
    (tmp_path / "plain").write_text("\n".join([*WORKERS, ""]))
    files = {"mpi": cluster.hostfile(slots=2), "plain": tmp_path / "plain"}
    assert lines(cluster.run("head", [word.format(**files) for word in command])) == WORKERS


@pytest.mark.slow
@needs_cluster(*SLURM)
def test_slurm_starts_tasks_on_the_workers() -> None:
    with Cluster(WORKERS) as cluster:
        cluster.start_slurm()
        assert lines(cluster.run("head", ["srun", "-N2", "-n2", "hostname"])) == WORKERS[:2]
        assert lines(cluster.run("head", ["srun", "-N3", "-n6", "--ntasks-per-node=2", "hostname"])) == sorted(
            WORKERS * 2
        )
        done = cluster.run("head", ["srun", "-N2", "-n2", "sh", "-c", "exit $((SLURM_PROCID + 3))"], check=False)
        assert done.returncode == 4


@pytest.mark.slow
def test_a_cut_cable_is_silent_and_can_be_mended() -> None:
    with Cluster(WORKERS[:2]) as cluster:
        probe = ["ssh", "-o", "ConnectTimeout=1", "worker-1", "echo reached"]
        sleeper = cluster.popen("worker-1", ["sleep", "60"])
        cluster.cut("worker-1")
        done = cluster.run("head", probe, check=False)
        assert done.returncode == 255 and "timed out" in done.stderr
        assert cluster.run("head", ["ssh", "worker-2", "hostname"]).stdout == "worker-2\n", "the others are as before"
        assert sleeper.poll() is None and cluster.processes("worker-1", "sleep 60")
        cluster.heal("worker-1")
        assert cluster.run("head", probe).stdout == "reached\n"


@pytest.mark.slow
@pytest.mark.parametrize("silent", [False, True])
def test_a_host_without_power(silent: bool) -> None:
    with Cluster(WORKERS[:1]) as cluster:
        # Keeps a connection open, and a process that has left its session.
        remote = "setsid sh -c 'echo there; sleep 61' & sleep 62"
        ssh = cluster.popen(
            "head", ["ssh", "worker-1", remote], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert ssh.stdout.readline() == "there\n"
        assert cluster.processes("worker-1", "echo there; sleep 61")
        local = cluster.popen("worker-1", ["sleep", "60"])
        cluster.power_off("worker-1", silent=silent)
        assert local.poll() == -signal.SIGKILL and not cluster.processes("worker-1")
        with pytest.raises(RuntimeError, match="the host worker-1 is off"):
            cluster.run("worker-1", ["true"])
        if silent:
            with pytest.raises(subprocess.TimeoutExpired):
                ssh.wait(0.5)  # nobody told it
        else:
            assert ssh.wait(10) == 255
        cluster.power_on("worker-1")
        assert cluster.run("head", ["ssh", "worker-1", "hostname"]).stdout == "worker-1\n"


def test_commands_get_their_environment_folder_and_signals(cluster: Cluster, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "A": 'x "y"\n$z'}
    assert cluster.run("worker-1", ["sh", "-c", 'printf "%s" "$A"; pwd'], env=environment, cwd=tmp_path).stdout == (
        f'x "y"\n$z{tmp_path}\n'
    )
    script = "import signal, sys; signal.signal(15, lambda *_: sys.exit(7)); print('ready', flush=True); signal.pause()"
    process = cluster.popen("worker-1", [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n" and process.pid in cluster.processes("worker-1", "signal.pause")
    process.terminate()
    assert process.wait(10) == 7 and process.pid not in cluster.processes("worker-1")


def test_the_home_is_the_clusters(cluster: Cluster) -> None:
    (cluster.home / "note").write_text("text")
    for command in (["ssh", "worker-1", "cat ~/note; pwd"], ["sh", "-c", "cat ~/note; echo $HOME"]):
        assert cluster.run("head", command).stdout == f"text{cluster.home}\n"


def test_hostfiles_name_the_workers(cluster: Cluster) -> None:
    path = cluster.hostfile(slots=3)
    text = "worker-1 slots=3\nworker-2 slots=3\nworker-3 slots=3\n"
    assert path.read_text() == text == cluster.run("worker-2", ["cat", path]).stdout
    assert cluster.hostfile(names=["worker-2"]).read_text() == "worker-2 slots=2\n"


OWNER = """
{boot}
from cluster import Cluster
with Cluster(["worker-1"]) as cluster:
    cluster.popen("worker-1", ["sleep", "63"])
    namespaces = [host.pid_namespace for host in cluster.hosts.values()]
    print(cluster.directory, cluster._switch.pid, *namespaces, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("ending", ["exit", pytest.param("kill", marks=pytest.mark.slow)])
def test_nothing_is_left(ending: str) -> None:
    before = seen_from_here()
    code = OWNER.format(boot=BOOT)
    pipe = subprocess.PIPE
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True)
    directory, switch, *namespaces = owner.stdout.readline().split()
    assert Path(directory, "etc/ssh/cluster_key").exists() and set(namespaces) <= pid_namespaces()
    assert seen_from_here() == before, "it is all in namespaces"
    if ending == "kill":
        owner.kill()
    owner.communicate(timeout=20)
    until = time.monotonic() + 30  # where it was killed, init must wait for what it had put into the hosts
    while left := [*(set(namespaces) & pid_namespaces()), *filter(os.path.exists, (directory, f"/proc/{switch}"))]:
        assert time.monotonic() < until, left
        time.sleep(0.05)
    assert seen_from_here() == before


# What hosts have of their own, as cluster.py makes it, and so what may neither come nor change here. Nothing else is
# compared: tests beside this one run containers, whose links and mounts come and go.
_PLACES = ("/proc", "/sys", "/dev/shm", "/run", "/etc", "/proc/sys/kernel/random/boot_id")  # mounted over
_FILES = ("/etc/hosts", "/etc/passwd", "/etc/ssh/sshd_config", "/proc/sys/kernel/hostname")
_MADE = ("/etc/ssh/cluster_key", *(f"/run/{name}" for name in ("boot_id", "sshd.log", "sshd.pid", "munge", "slurm")))
_LINKS = re.compile("bridge0|end0|port-[0-9]+")


def seen_from_here() -> dict[str, list[str]]:
    """This machine's own links, mounts and files where those of a host would show."""
    mounts = [line.split()[:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return {
        "links": sorted(filter(_LINKS.fullmatch, os.listdir("/sys/class/net"))),
        "mounts": [" ".join(words) for words in mounts if words[1] in _PLACES],
        "files": [Path(path).read_text() for path in _FILES if os.path.exists(path)],
        "made": [path for path in _MADE if os.path.exists(path)],
        "boot": [Path("/proc/sys/kernel/random/boot_id").read_text()],
    }


def pid_namespaces() -> set[str]:
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            found.add(os.readlink(f"/proc/{pid}/ns/pid"))
        except OSError:
            continue  # it has ended since
    return found


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert missing_rights.__wrapped__() == "needs root, to make hosts of network namespaces"
    monkeypatch.setattr("cluster.missing", lambda *names: f"needs {names[0]}")
    with pytest.raises(RuntimeError, match="needs ip"), Cluster(WORKERS):
        pass


def test_a_machine_that_forbids_namespaces_is_named() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import cluster; print(cluster.missing_rights())"
    drop = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    done = subprocess.run([*drop, sys.executable, "-c", code, HELPERS], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("needs namespaces, which are forbidden here (unshare: Operation not permitted)")
