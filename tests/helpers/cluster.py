"""A cluster of real hosts on this one machine, for tests of what runs on many.

    with Cluster(["worker-1", "worker-2"]) as cluster:
        cluster.run("head", ["ssh", "worker-1", "hostname"])

A host has network, UTS, PID, IPC and mount namespaces of its own: an address, a name, processes that end together,
/etc (with a hosts file that knows all names), /run, /dev/shm, a boot id, and a real sshd that lets root in from every
other host without a password or a question. The hosts share a home, which is not this machine's, and the rest of the
file system, which is: the checkout and pytest's folders are there. `mount --bind` by `run` changes one host's view
alone. The host "head" is always there.

The hosts hang on a bridge in a namespace of its own too. Nothing is added to this machine's network or to its /etc.
Every host's first process waits for the end of a pipe that this process holds: all ends with it, however it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from children import hear_signals
from programs import find, missing, needs, search_path

_CLONE_FS, _CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC, _CLONE_NEWPID, _CLONE_NEWNET = (
    (0x200, 0x20000, 0x4000000, 0x8000000, 0x20000000, 0x40000000)
)  # fmt: skip
_ALL = _CLONE_NEWNS | _CLONE_NEWUTS | _CLONE_NEWIPC | _CLONE_NEWPID | _CLONE_NEWNET
_PATH = search_path()
PROGRAMS = ("ip", "bridge", "mount", "sshd", "ssh", "ssh-keygen")
SLURM = ("srun", "sinfo", "slurmctld", "slurmd", "munged")

# The first process of a host. It ends as `cat`, whose end is the host's; the kernel reaps what is orphaned there.
_HOST = r"""
set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mkdir -m 755 /run/lock /run/sshd /run/munge /run/slurm /run/slurm/state /run/slurm/spool
mount --bind "$ETC" /etc
cat /proc/sys/kernel/random/uuid >/run/boot_id
mount --bind /run/boot_id /proc/sys/kernel/random/boot_id
echo "$NAME" >/proc/sys/kernel/hostname
ip link set lo up
read -r go # on: eth0 is there
ip address add "$ADDRESS/24" dev eth0
ip link set eth0 up
"$SSHD" -E /run/sshd.log
tries=0
until [ -s /run/sshd.pid ]; do # it listens by then, which it does not yet when the command above has returned
    tries=$((tries + 1))
    [ $tries -lt 1000 ] || { cat /run/sshd.log; exit 1; }
    sleep 0.01
done
trap '' CHLD
echo ready
exec cat
"""
_TRIAL = """
mount --make-rprivate / && mount -t tmpfs run /run && ip link add bridge0 type bridge && ip link add end0 type veth
"""
_SSHD_CONFIG = """
HostKey /etc/ssh/cluster_key
AuthorizedKeysFile /etc/ssh/cluster_key.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PrintMotd no
PidFile /run/sshd.pid
Subsystem sftp internal-sftp
"""
_SSH_CONFIG = """
Host *
    IdentityFile /etc/ssh/cluster_key
    UserKnownHostsFile /dev/null
    GlobalKnownHostsFile /etc/ssh/cluster_known_hosts
    KexAlgorithms curve25519-sha256
"""
# Times are short so that tests of lost nodes are; everything that a daemon writes is in its own host's /run.
_SLURM_CONF = """
ClusterName=bed
SlurmctldHost=head
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=/run/slurm/state
SlurmdSpoolDir=/run/slurm/spool
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
SlurmctldLogFile=/run/slurm/slurmctld.log
SlurmdLogFile=/run/slurm/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0
ReturnToService=2
SlurmdTimeout=10
KillWait=3
MailProg=/bin/true
"""


class Host:
    """One host: its name, its address, and its first process (its pid as seen from here), once it has been started."""

    def __init__(self, name: str, number: int) -> None:
        self.name, self.address, self.port = name, f"10.77.{number // 250}.{number % 250 + 1}", f"port-{number}"
        self.mac = f"02:64:73:6c:{number // 256:02x}:{number % 256:02x}"  # kept when its power is back, as real ones do
        self.keeper: subprocess.Popen[str] | None = None
        self.pid_namespace = ""
        self.started: list[subprocess.Popen[Any]] = []  # by `Cluster.popen`

    def end(self) -> None:
        """End all of its processes at once: the kernel does it when the first one ends."""
        if self.keeper is None:
            return
        self.keeper.kill()
        for process in self.started:
            process.wait()  # the PID namespace lasts until those who were put into it from outside have been waited for
        self.started.clear()
        self.keeper.stdin.close()
        self.keeper.wait()
        self.keeper.stdout.close()

    @property
    def pid(self) -> int:
        if self.keeper is None or self.keeper.poll() is not None:
            raise RuntimeError(f"the host {self.name} is off")
        return self.keeper.pid


class Cluster:
    """Hosts of these names, and "head", for the length of a `with` block."""

    def __init__(self, names: Sequence[str]) -> None:
        self.hosts = {name: Host(name, number) for number, name in enumerate(["head", *names])}
        self.workers = list(names)
        self.directory = Path()  # on the file system that all share; gone at the end

    @property
    def home(self) -> Path:
        """Root's home on all hosts, empty but for a link to this machine's ~/.cache, where compiled ops are."""
        return self.directory / "home"

    def __enter__(self) -> Cluster:
        if reason := missing(*PROGRAMS) or missing_rights():
            raise RuntimeError(reason)
        self.directory = Path(tempfile.mkdtemp(prefix="dsl-cluster."))
        # Ends last, and removes the directory where this process cannot any more.
        script = 'ip link add bridge0 type bridge && ip link set bridge0 up && echo ready && cat; rm -rf "$1"'
        self._switch = _spawn(
            lambda: _check(_libc().unshare(_CLONE_NEWNET), "unshare"),
            ["sh", "-c", script, "sh", str(self.directory)],
            **_keeper_pipes(),
        )
        try:
            _read_ready(self._switch, "the bridge")
            self._make_etc()
            self._boot(self.hosts.values())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(Host.end, self.hosts.values()))
        self._switch.stdin.close()
        self._switch.wait()
        self._switch.stdout.close()

    # --- what tests do with it ---

    def popen(self, host: str, argv: Sequence[str | os.PathLike[str]], **options: Any) -> subprocess.Popen[Any]:
        """Start a command on a host; the options are `subprocess.Popen`'s. Signals to it reach it, not a go-between.

        Without `env` it gets this process's environment, with the hosts' HOME.
        """
        options["cwd"] = options.get("cwd") or os.getcwd()
        options.setdefault("preexec_fn", hear_signals)
        if options.get("env") is None:
            options["env"] = {**os.environ, "HOME": str(self.home)}
        process = _spawn(functools.partial(_enter, self.hosts[host].pid, _ALL), argv, **options)
        self.hosts[host].started.append(process)
        return process

    def run(
        self,
        host: str,
        argv: Sequence[str | os.PathLike[str]],
        timeout: float = 60,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host, with no input, and give its output; a failure raises with that output."""
        pipe = subprocess.PIPE
        streams = {"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": pipe, "text": True}
        process = self.popen(host, argv, env=env, cwd=cwd, start_new_session=True, **streams)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with its children, which hold the pipes too
            out, err = process.communicate()
            raise AssertionError(f"{argv} on {host} took longer than {timeout} s\n{out}\n{err}") from None
        assert not check or process.returncode == 0, f"{argv} on {host}: status {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(argv, process.returncode, out, err)

    def hostfile(self, slots: int = 2, names: Sequence[str] | None = None) -> Path:
        """A hostfile of the workers, or of these names, that has the same path here and on every host."""
        descriptor, path = tempfile.mkstemp(prefix="hostfile.", dir=self.directory)
        with os.fdopen(descriptor, "w") as file:
            file.writelines(f"{name} slots={slots}\n" for name in (self.workers if names is None else names))
        return Path(path)

    def cut(self, host: str) -> None:
        """Pull the network cable: nothing of the host ends, and no packet goes in or out."""
        self._switching([f"link set {self.hosts[host].port} down"])

    def heal(self, host: str) -> None:
        """Put the cable back, and wait until packets go through it."""
        self._switching([f"link set {self.hosts[host].port} up"])
        self._wait_for_ports([self.hosts[host]])

    def power_off(self, host: str, silent: bool = False) -> None:
        """End everything on a host at once. With `silent` its peers are not told by closing connections either."""
        if silent:
            self.cut(host)
        self.hosts[host].end()
        with contextlib.suppress(RuntimeError):  # the kernel may have removed it with the host's network, or will
            self._switching([f"link delete {self.hosts[host].port}"])

    def power_on(self, host: str) -> None:
        """Start a host that is off, with nothing left of what was in its memory and its mounts."""
        with contextlib.suppress(RuntimeError):
            raise AssertionError(f"{host} is on: its first process is {self.hosts[host].pid}")
        self._boot([self.hosts[host]])

    def processes(self, host: str, containing: str = "") -> dict[int, str]:
        """Pid (as seen from here) -> command line, of all that runs on a host, its own daemons included.

        `containing` keeps those whose command line has this text. Zombies do not count.
        """
        found = {}
        for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
            if _pid_namespace(pid) == self.hosts[host].pid_namespace:
                with contextlib.suppress(OSError):  # it has ended since
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ")
                    found[pid] = words.decode(errors="replace")
        return {pid: line for pid, line in found.items() if line and containing in line}

    def start_slurm(self, cpus: int = 4) -> None:
        """Munge on all hosts, slurmctld on head and slurmd on the workers, and wait until the nodes are idle."""
        etc = self.directory / "etc"
        (etc / "munge").mkdir(exist_ok=True)
        (etc / "slurm").mkdir(exist_ok=True)
        for path in (etc / "munge", key := etc / "munge" / "munge.key"):
            if path == key:
                key.unlink(missing_ok=True)
                key.write_bytes(os.urandom(128))
            os.chown(path, 0, 0)
            path.chmod(0o700)
        nodes = [
            f"NodeName={name} NodeAddr={self.hosts[name].address} CPUs={cpus} State=UNKNOWN" for name in self.workers
        ]
        nodes.append("PartitionName=bed Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
        (etc / "slurm" / "slurm.conf").write_text("\n".join([_SLURM_CONF, *nodes, ""]))
        # It looks for cgroups, which it has no use for here, unless it is told which kind there would be.
        (etc / "slurm" / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        munged = [
            _program("munged"),
            "--force",
            *(f"--{what}-file=/run/munge/{what}" for what in ("log", "seed", "pid")),
        ]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda host: self.run(host, munged), self.hosts))
            daemons = {"head": [_program("slurmctld")]} | {
                name: [_program("slurmd"), "-N", name] for name in self.workers
            }
            list(pool.map(lambda item: self.run(*item), daemons.items()))
        until = time.monotonic() + 30
        while "idle\n" * len(self.workers) != (
            states := self.run("head", ["sinfo", "-h", "-N", "-o", "%T"], check=False).stdout
        ):
            assert time.monotonic() < until, f"slurm's nodes are not idle after 30 s:\n{states}"
            time.sleep(0.05)

    # --- how it is made ---

    def _make_etc(self) -> None:
        etc = self.directory / "etc"
        subprocess.run(["cp", "-a", "/etc", etc], check=True)
        key = etc / "ssh" / "cluster_key"
        key.parent.mkdir(exist_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", key], check=True)
        (etc / "ssh" / "cluster_known_hosts").write_text("* " + (key.parent / "cluster_key.pub").read_text())
        (etc / "ssh" / "sshd_config").write_text(_SSHD_CONFIG)
        (etc / "ssh" / "ssh_config").write_text(_SSH_CONFIG)
        names = [f"{host.address} {host.name}" for host in self.hosts.values()]
        (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", "::1 localhost ip6-localhost", *names, ""]))
        for file in ("hostname", "nologin"):
            (etc / file).unlink(missing_ok=True)
        # Without PAM, sshd refuses an account whose password is locked, as root's is in many images.
        _set_root(etc / "shadow", 1, "*")
        _set_root(etc / "passwd", 5, str(self.home))
        self.home.mkdir()
        if (cache := Path.home() / ".cache").is_dir():
            (self.home / ".cache").symlink_to(cache)

    def _boot(self, hosts: Iterable[Host]) -> None:
        hosts = list(hosts)
        for host in hosts:
            environment = {
                "PATH": _PATH,
                "NAME": host.name,
                "ADDRESS": host.address,
                "ETC": str(self.directory / "etc"),
                "SSHD": _program("sshd"),
            }
            host.keeper = _spawn(
                lambda: _check(_libc().unshare(_ALL), "unshare"),
                ["sh", "-c", _HOST],
                **{**_keeper_pipes(), "env": environment},
            )
            host.pid_namespace = _pid_namespace(host.pid)
        lines = []
        for host in hosts:
            lines.append(f"link add {host.port} type veth peer name eth0 address {host.mac} netns {host.pid}")
            lines.append(f"link set {host.port} master bridge0 up")
        self._switching(lines)
        for host in hosts:
            assert host.keeper is not None
            host.keeper.stdin.write("on\n")
            host.keeper.stdin.flush()
        for host in hosts:
            _read_ready(host.keeper, host.name)
        self._wait_for_ports(hosts)

    def _switching(self, lines: Sequence[str]) -> None:
        """`ip` commands in the namespace of the bridge."""
        self._in_switch(["ip", "-batch", "-"], "".join(f"{line}\n" for line in lines))

    def _wait_for_ports(self, hosts: Sequence[Host]) -> None:
        """The kernel takes up to a second to see that a cable is in; the bridge drops packets till then."""
        waiting = {host.port for host in hosts}
        until = time.monotonic() + 10
        while waiting:
            links = [
                line.split() for line in self._in_switch(["bridge", "link"]).splitlines() if "state forwarding" in line
            ]
            waiting -= {words[1].split("@")[0] for words in links}
            assert time.monotonic() < until, f"the bridge does not forward to {waiting}"
            time.sleep(0.005 if waiting else 0)

    def _in_switch(self, argv: Sequence[str], text: str = "") -> str:
        pipe = subprocess.PIPE
        enter = functools.partial(_enter, self._switch.pid, _CLONE_NEWNET)
        process = _spawn(enter, argv, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env={"PATH": _PATH})
        out, err = process.communicate(text)
        if process.returncode != 0:
            raise RuntimeError(f"{argv[0]} failed: {err}")
        return out


def _program(name: str) -> str:
    return find(name) or name


@functools.cache
def missing_rights() -> str | None:
    """Why no hosts can be made here, whatever programs there are; None where they can."""
    if os.geteuid() != 0:
        return "needs root, to make hosts of network namespaces"
    try:
        pipe = subprocess.PIPE
        trial = _spawn(lambda: _check(_libc().unshare(_ALL), "unshare"), ["sh", "-c", _TRIAL], stderr=pipe, text=True)
    except OSError as error:
        return f"needs namespaces, which are forbidden here ({error.strerror}): it takes CAP_SYS_ADMIN"
    words = trial.communicate()[1].strip()
    return f"needs mounts, bridges and veth pairs in namespaces: {words}" if trial.returncode else None


def needs_cluster(*programs: str) -> pytest.MarkDecorator:
    """A mark that skips a test where there can be no cluster, or one of these programs is missing."""
    return needs(*PROGRAMS, *programs, unless=missing_rights)


def _spawn(prepare: Callable[[], None], argv: Sequence[Any], **options: Any) -> subprocess.Popen[Any]:
    """Popen in a thread that has entered other namespaces: the child is in them, and this process is its parent."""

    def enter_and_start() -> subprocess.Popen[Any]:
        _check(_libc().unshare(_CLONE_FS), "unshare")  # this thread's root and folder are its own from here
        prepare()
        return subprocess.Popen(argv, **options)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(enter_and_start).result()


def _enter(pid: int, namespaces: int) -> None:
    descriptor = os.pidfd_open(pid)
    try:
        _check(_libc().setns(descriptor, namespaces), "setns")
    finally:
        os.close(descriptor)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, call: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


def _keeper_pipes() -> dict[str, Any]:
    """How first processes are started: not ended by Ctrl-C, and with a pipe whose end is their end."""
    pipe = subprocess.PIPE
    return {
        "stdin": pipe,
        "stdout": pipe,
        "stderr": subprocess.STDOUT,
        "text": True,
        "start_new_session": True,
        "env": {"PATH": _PATH},
        "cwd": "/",
    }


def _read_ready(keeper: subprocess.Popen[str] | None, what: str) -> None:
    assert keeper is not None and keeper.stdout is not None
    line = keeper.stdout.readline()
    if line != "ready\n":
        keeper.kill()
        raise RuntimeError(f"{what} did not start: {line}{keeper.stdout.read()}")


def _pid_namespace(pid: int) -> str:
    """The name of the PID namespace that a process is in; empty where there is no such process any more."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""


def _set_root(file: Path, field: int, value: str) -> None:
    lines = [line.split(":") for line in file.read_text().splitlines()]
    for words in lines:
        if words[0] == "root":
            words[field] = value
    file.write_text("".join(":".join(words) + "\n" for words in lines))
