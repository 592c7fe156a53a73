"""How a node's agent gets started on other machines: one small file each, a pure function from `Reach` to commands.

Every backend starts the same agent, one per node, and does nothing else: places, variables, output, signals and
failures go over the agents' links. A new backend is a file with `PROGRAMS` and `launches`, and its name in `BACKENDS`.
"""

from __future__ import annotations

import importlib
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deepspeedlite.runtime.errors import LaunchError

BACKENDS = ("pdsh", "ssh", "openmpi", "mpich", "slurm", "impi", "mvapich")


@dataclass(frozen=True)
class Reach:
    """What a backend needs to know."""

    hosts: Sequence[str]
    here: frozenset[str] = frozenset()  # hosts that are this machine
    connect: str = ""  # where agents find the launcher: ADDRESS,...:PORT
    key: Mapping[str, str] = field(default_factory=dict)  # the variable by which an agent shows that it is ours
    ssh_port: int | None = None
    extra: Sequence[str] = ()  # --launcher_args
    python_path: str = ""
    python: str = sys.executable

    @property
    def variables(self) -> dict[str, str]:
        """What an agent that connects must find in its environment."""
        return {**self.key, **({"PYTHONPATH": self.python_path} if self.python_path else {})}

    def agent(self, *arguments: str) -> list[str]:
        """The agent's command line."""
        return [self.python, "-m", "deepspeedlite.launcher.node", *arguments]

    def shell(self, *arguments: str) -> str:
        """The agent's command line, with its variables, for any login shell."""
        env = [f"{name}={value}" for name, value in self.variables.items()]
        return "exec " + shlex.join([*(["env", *env] if env else []), *self.agent(*arguments)])


@dataclass(frozen=True)
class Launch:
    """A process to start here. `node`: the one agent whose link is this process's stdin and stdout."""

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    node: int | None = None


def find_backend(name: str | None, path: str | None = None) -> Any:
    """The backend of this name; pdsh where it is installed, else ssh.

    Raises:
        LaunchError: there is no such backend, or its program is not installed.
    """
    if name is None:
        name = "pdsh" if shutil.which("pdsh", path=path) else "ssh"
    if name not in BACKENDS:
        raise LaunchError(f"--launcher {name}: the launchers are {', '.join(BACKENDS)}")
    backend = importlib.import_module(f"{__name__}.{name}")
    if not any(shutil.which(program, path=path) for program in backend.PROGRAMS):
        raise LaunchError(
            f"--launcher {name}: {backend.PROGRAMS[-1]} is not installed here; --launcher ssh needs only ssh"
        )
    return backend


def program(names: Sequence[str]) -> str:
    """The first of these programs that is installed; the last name where none is."""
    return next((name for name in names if shutil.which(name)), names[-1])


def mpirun(reach: Reach, programs: Sequence[str], options: Sequence[str], **variables: str) -> list[Launch]:
    """One agent per node by an mpirun; the key travels in the environment, which no `ps` shows."""
    path = ["env", f"PYTHONPATH={reach.python_path}"] if reach.python_path else []
    argv = [program(programs), *options, *reach.extra, *path, *reach.agent("--connect", reach.connect)]
    return [Launch(argv, {**reach.key, **variables})]


def hydra(reach: Reach, programs: Sequence[str], **variables: str) -> list[Launch]:
    """The same by MPICH's process manager and its relatives.

    They are told to hand on the key alone: values with line ends would stop them. MPICH 4.0 overlooks the last
    variable of its environment, so another one comes after the key.
    """
    options = ["-n", str(len(reach.hosts)), "-ppn", "1", "-hosts", ",".join(reach.hosts), "-genvlist", *reach.key]
    return mpirun(reach, programs, options, **variables, DSL_LAUNCHER_LAST="")
