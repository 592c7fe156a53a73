"""How a node's agent gets started on other machines: a table of pure functions from `Reach` to commands.

Every backend starts the same agent, one per node, and does nothing else: places, variables, output, signals and
failures go over the agents' links. A new backend is a function and a row of `BACKENDS`.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from deepspeedlite.launcher.hostfile import bare, ssh_words
from deepspeedlite.launcher.protocol import KEY
from deepspeedlite.launcher.ssh import ASK_NOTHING
from deepspeedlite.runtime.errors import LaunchError


@dataclass(frozen=True)
class Reach:
    """What a backend needs to know."""

    hosts: Sequence[str]
    here: frozenset[str] = frozenset()  # hosts that are this machine
    connect: str = ""  # where agents find the launcher: ADDRESS,...:PORT
    key: Mapping[str, str] = field(default_factory=dict)  # the variable `KEY`, where agents connect
    ssh_port: int | None = None
    extra: Sequence[str] = ()  # --launcher_args
    python_path: str = ""
    python: str = sys.executable

    @property
    def variables(self) -> dict[str, str]:
        """What an agent that connects must find in its environment."""
        return {**self.key, **({"PYTHONPATH": self.python_path} if self.python_path else {})}

    @property
    def ssh_arguments(self) -> str:
        """What another program tells the ssh that it starts."""
        return " ".join([*ASK_NOTHING, *(["-p", str(self.ssh_port)] if self.ssh_port is not None else [])])

    def agent(self, *arguments: str) -> list[str]:
        """The agent's command line."""
        return [self.python, "-m", "deepspeedlite.launcher.node", *arguments]

    def shell(self, *arguments: str) -> str:
        """The agent's command line, for any login shell; not the key, which others could see."""
        env = [f"PYTHONPATH={self.python_path}"] if self.python_path else []
        return "exec " + shlex.join([*(["env", *env] if env else []), *self.agent(*arguments)])


@dataclass(frozen=True)
class Launch:
    """A process to start here. `node`: the one agent whose link is this process's stdin and stdout."""

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    node: int | None = None


@dataclass(frozen=True)
class Backend:
    """The programs of which one must be installed (the usual name last), and the commands, given that one."""

    programs: Sequence[str]
    build: Callable[[Reach, str], list[Launch]]
    by_pipes: bool = False  # whether the links are the processes' own pipes; else agents connect
    login: str = ""  # of `user@` and `:port` in a host's name what its program can be told for each host

    def launches(self, reach: Reach) -> list[Launch]:
        """What to start here so that every node of `reach` gets an agent."""
        program = next((name for name in self.programs if shutil.which(name)), self.programs[-1])
        return self.build(reach, program)


def _ssh(reach: Reach, program: str) -> list[Launch]:
    """A connection per node, none for this machine. Only sshd's port need be open, and all is encrypted."""
    options = ["-T", *ASK_NOTHING, *reach.extra]
    return [
        Launch(reach.agent("--index", str(index)), reach.variables, node=index)
        if host in reach.here
        else Launch(
            [program, *options, *ssh_words(host, reach.ssh_port), reach.shell("--index", str(index))], node=index
        )
        for index, host in enumerate(reach.hosts)
    ]


# Run by pdsh for each host, with ssh's arguments; its words for the host, its index and user are %h, %n and %u.
_KEYED_SSH = f'[ "%u" = "$(id -un)" ] || set -- -l "%u" "$@"; echo "${KEY}" | exec ssh "$@"'


def _pdsh(reach: Reach, program: str) -> list[Launch]:
    """One for all nodes. Agents get the key on stdin, which it hands on to nobody: it runs ssh behind an `echo`."""
    options = [*shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", "")), *shlex.split(reach.ssh_arguments), "-T"]
    theirs = shlex.split(os.environ.get("PDSH_SSH_ARGS", "-a -x %h"))
    agent = reach.shell("--connect", reach.connect, "--keyed").replace("%", "%%") + " --index %n"
    argv = [program, "-S", "-R", "exec", "-f", "1024", "-w", ",".join(reach.hosts), *reach.extra]
    return [Launch([*argv, "sh", "-c", _KEYED_SSH, "sh", *options, *theirs, agent], reach.key)]


def _slurm(reach: Reach, program: str) -> list[Launch]:
    """Inside an allocation on its nodes, else on whole nodes that it asks for; nodes are known by their names."""
    count = str(len(reach.hosts))
    argv = [program, "-N", count, "-n", count, "--ntasks-per-node=1", f"--nodelist={','.join(reach.hosts)}"]
    argv += ["--cpu-bind=none", "--input=none", "--export=ALL", "--kill-on-bad-exit=0"]
    argv += [] if "SLURM_JOB_ID" in os.environ else ["--exclusive"]
    argv += ["--overlap"] if "SLURM_STEP_ID" in os.environ else []  # `srun --pty bash` holds what it would wait for
    return [Launch([*argv, *reach.extra, *reach.agent("--connect", reach.connect)], reach.variables)]


def _mpirun(reach: Reach, program: str, options: Sequence[str], env: Mapping[str, str]) -> list[Launch]:
    """One agent per node; the key travels in the environment, which no `ps` shows."""
    path = ["env", f"PYTHONPATH={reach.python_path}"] if reach.python_path else []
    argv = [program, "-n", str(len(reach.hosts)), *options, *reach.extra, *path]
    return [Launch([*argv, *reach.agent("--connect", reach.connect)], {**reach.key, **env})]


def _openmpi(reach: Reach, program: str) -> list[Launch]:
    """Binding is left to the ranks: it would put an agent, and all that it starts, on one core."""
    options = ["--host", ",".join(f"{host}:1" for host in reach.hosts), "--map-by", "node", "--bind-to", "none"]
    options += [word for name in reach.key for word in ("-x", name)]
    options += ["--mca", "plm_rsh_args", reach.ssh_arguments]
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}  # containers run as root
    return _mpirun(reach, program, options, as_root)


def _hydra(**more: str) -> Callable[[Reach, str], list[Launch]]:
    """MPICH's process manager and its relatives, with what else they must be told.

    They hand on the key alone: values with line ends would stop them. MPICH 4.0 overlooks the last variable of its
    environment, so another one comes after the key.
    """

    def build(reach: Reach, program: str) -> list[Launch]:
        options = ["-ppn", "1", "-hosts", ",".join(reach.hosts), "-genvlist", *reach.key]
        variables = {"HYDRA_LAUNCHER_EXTRA_ARGS": reach.ssh_arguments, **more, "DSL_LAUNCHER_LAST": ""}
        return _mpirun(reach, program, options, variables)

    return build


BACKENDS = {
    "pdsh": Backend(("pdsh",), _pdsh, login="@"),
    "ssh": Backend(("ssh",), _ssh, by_pipes=True, login="@:"),
    "openmpi": Backend(("mpirun.openmpi", "mpirun"), _openmpi),
    "mpich": Backend(("mpirun.mpich", "mpiexec.hydra", "mpirun"), _hydra()),
    "slurm": Backend(("srun",), _slurm),
    # The commands of these two are checked as text only: neither is free to install here. Unpinned, else all that an
    # agent starts would be on its part of the node.
    "impi": Backend(("mpirun",), _hydra(I_MPI_PIN="0")),
    "mvapich": Backend(("mpirun",), _hydra(MV2_ENABLE_AFFINITY="0")),
}


def _runs_commands(pdsh: str | None) -> bool:
    """Whether it has the module that runs a command here for each host, which Fedora packs apart."""
    with contextlib.suppress(OSError):
        return pdsh is not None and b"rcmd/exec" in subprocess.run([pdsh, "-L"], capture_output=True).stdout
    return False


def find_backend(name: str | None, hosts: Iterable[str] = (), path: str | None = None) -> Backend:
    """The backend of this name; pdsh where it is installed and can reach these hosts, else ssh.

    Raises:
        LaunchError: there is no such backend, its program is not installed, or it cannot log in as a host's name says.
    """
    logins = {mark: host for host in hosts for mark in "@:" if mark in host}
    has_pdsh = name in (None, "pdsh") and _runs_commands(shutil.which("pdsh", path=path))
    if name is None:
        name = "pdsh" if ":" not in logins and has_pdsh else "ssh"
    if name not in BACKENDS:
        raise LaunchError(f"--launcher {name}: the launchers are {', '.join(BACKENDS)}")
    programs = BACKENDS[name].programs
    if not any(shutil.which(program, path=path) for program in programs):
        raise LaunchError(f"--launcher {name}: {programs[-1]} is not installed here; --launcher ssh needs only ssh")
    if name == "pdsh" and not has_pdsh:
        raise LaunchError(
            "--launcher pdsh: its module exec is not there (Fedora: pdsh-rcmd-exec); --launcher ssh needs none"
        )
    if odd := [host for mark, host in logins.items() if mark not in BACKENDS[name].login]:
        raise LaunchError(
            f"--launcher {name}: it cannot be told the user or port of {odd[0]}; use --launcher ssh, or "
            f"write User and Port below `Host {bare(odd[0])}` in ~/.ssh/config and the bare name in the hostfile"
        )
    return BACKENDS[name]
