"""A node's part of a training: from the options and an `Assignment` of ranks, each rank's command and environment.

`build_job` is called on the machine that will run the ranks: their Python, their GPUs, their cores are found there.
Everything that can be wrong there is found before a process starts.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from deepspeedlite.host.cores import usable_cores
from deepspeedlite.host.gpus import Devices, find_devices
from deepspeedlite.host.network import claim_port, interface_towards, pick_port, port_fault
from deepspeedlite.launcher.hostfile import numbers_in
from deepspeedlite.launcher.options import LaunchOptions
from deepspeedlite.launcher.plan import EVERY_RANK
from deepspeedlite.runtime.env import JOB_SECRET
from deepspeedlite.runtime.errors import LaunchError
from deepspeedlite.runtime.log import logger
from deepspeedlite.runtime.text import nearest

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Assignment:
    """Where one node's ranks stand in the world. `slots` index into the devices that the node shows."""

    slots: Sequence[int]
    world_size: int
    master_addr: str
    master_port: int
    host: str = ""  # in front of output lines; "" where there is one machine
    first_rank: int = 0
    node_rank: int = 0
    num_nodes: int = 1
    restarts: int = 0
    secret: str = ""  # the ranks'; see `JOB_SECRET`


@dataclass(frozen=True)
class RankCommand:
    """One process to start: its command, and the variables it gets beyond the node's."""

    rank: int
    argv: tuple[str, ...]
    env: Mapping[str, str]
    prefix: str = ""
    cores: tuple[int, ...] = ()  # to run on; all if empty
    log_path: str | None = None


@dataclass(frozen=True)
class Job:
    """Everything an agent needs to run one node's ranks."""

    ranks: tuple[RankCommand, ...]
    environ: Mapping[str, str]
    keyboard: bool = True  # rank 0 reads the launcher's stdin


def build_job(
    options: LaunchOptions,
    assignment: Assignment,
    environ: Mapping[str, str],
    devices: Devices | None = None,
    keyboard: bool = True,
) -> Job:
    """The processes of one node. `environ`: what they inherit (`ranks_environ`).

    Raises:
        LaunchError: naming what is wrong on this node and how to mend it.
    """
    devices = find_devices(environ) if devices is None else devices
    size = len(assignment.slots)
    python = sys.executable if options.venv_script is None else shutil.which("python", path=environ.get("PATH"))
    if python is None:
        raise LaunchError(f"--venv_script {options.venv_script}: there is no `python` on PATH after it")
    check_script(options, environ)
    log_dir = None if options.dry_run else options.enable_each_rank_log
    if log_dir is not None:
        _make_log_dir(log_dir)
    cores = _cores(options, size)
    filled = {"PYTHONUNBUFFERED": "1"}  # a rank that dies must not take its last lines with it
    if not devices.ids or cores[0]:
        share = len(cores[0]) or max(1, usable_cores() // size)
        filled["OMP_NUM_THREADS"] = str(share)  # else each rank takes every core
    # Else gloo asks for the machine's own name, which may be a loopback address, one that all can reach, or none.
    is_alone = assignment.num_nodes == 1
    filled["GLOO_SOCKET_IFNAME"] = "lo" if is_alone else interface_towards(assignment.master_addr)
    filled = {name: value for name, value in filled.items() if value and name not in environ}
    for name, value in filled.items():
        logger.debug("%s=%s for each rank; set it yourself to change it", name, value, extra=EVERY_RANK)
    asked = f"--num_gpus {options.num_gpus}" if options.num_gpus else options.include and f"--include {options.include}"
    shared = {**devices.pick(assignment.slots, asked or options.hostfile or "the hostfile"), **filled}
    tag = f"{assignment.host}:" if assignment.host else ""
    clock = time.strftime("%Y%m%d%H%M%S")

    def command(local_rank: int) -> RankCommand:
        rank = assignment.first_rank + local_rank
        return RankCommand(
            rank=rank,
            argv=rank_argv(options, local_rank, python),
            env={**rank_environment(assignment, local_rank), **shared},
            prefix="" if assignment.world_size == 1 else f"[{tag}{rank}] ",
            cores=cores[local_rank],
            log_path=None if log_dir is None else os.path.join(log_dir, f"{clock}_rank{rank}.log"),
        )

    return Job(tuple(map(command, range(size))), environ, keyboard)


def rank_argv(options: LaunchOptions, local_rank: int | str, python: str) -> tuple[str, ...]:
    """The command line of one rank; the script's own arguments follow untouched."""
    start = [options.script] if options.no_python else [python, *["-m"] * options.module, options.script]
    if not options.no_local_rank:
        start.append(f"--local_rank={local_rank}")
    return (*start, *options.script_args)


def rank_environment(assignment: Assignment, local_rank: int) -> dict[str, str]:
    """The variables that torch.distributed and scripts written for DeepSpeed read to find their place."""
    values = {
        "RANK": assignment.first_rank + local_rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": assignment.world_size,
        "LOCAL_WORLD_SIZE": len(assignment.slots),
        "LOCAL_SIZE": len(assignment.slots),
        "CROSS_RANK": assignment.node_rank,
        "CROSS_SIZE": assignment.num_nodes,
        "MASTER_ADDR": assignment.master_addr,
        "MASTER_PORT": assignment.master_port,
        **({"TORCHELASTIC_RESTART_COUNT": assignment.restarts} if assignment.restarts else {}),
        **({JOB_SECRET: assignment.secret} if assignment.secret else {}),
    }
    return {name: str(value) for name, value in values.items()}


def shell_line(command: RankCommand) -> str:
    """The command as one could paste it into a shell, its variables in front."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in command.env.items()]
    return " ".join([*variables, shlex.join(command.argv)])


def check_script(options: LaunchOptions, environ: Mapping[str, str]) -> None:
    """Raises LaunchError where it could not be run, saying why."""
    script = options.script
    if options.module:
        return  # Python finds it, or says what it did not find
    if options.no_python:
        if shutil.which(script, path=environ.get("PATH")) is None:
            is_path, is_here = os.sep in script, os.path.isfile(script)
            fault = "does not exist" if is_path else "is not on PATH"
            remedy = (
                f"chmod +x {script} makes it executable"
                if is_path
                else f"write ./{script} for the one in this directory"
            )
            fault = "is not executable" if is_path and is_here else fault
            raise LaunchError(f"program {script} {fault}" + f"; {remedy}" * is_here)
    elif os.path.isdir(script) and not os.path.isfile(os.path.join(script, "__main__.py")):
        raise LaunchError(f"{script} is a directory without a __main__.py; name the script inside it")
    elif not os.path.exists(script):  # anything that opens is for Python to judge: zip files, pipes
        folder, name = os.path.split(script)
        near = nearest(name, os.listdir(folder or ".") if os.path.isdir(folder or ".") else [])
        hint = f"; did you mean {os.path.join(folder, near)}?" if near else ""
        raise LaunchError(f"script {script} does not exist (looked in {os.getcwd()}){hint}")
    elif not os.access(script, os.R_OK):
        raise LaunchError(f"script {script} cannot be read by this user; see its permissions with ls -l")


def _make_log_dir(directory: str) -> None:
    try:
        os.makedirs(directory, exist_ok=True)
        if os.access(directory, os.W_OK | os.X_OK):
            return
        reason = "it cannot be written by this user"
    except OSError as error:
        reason = str(error.strerror)
    raise LaunchError(f"--enable_each_rank_log {directory}: cannot make files there: {reason}")


def _cores(options: LaunchOptions, size: int) -> list[tuple[int, ...]]:
    """Each rank's cores: equal runs of --bind_core_list, or of all that this process may use; none are empty."""
    listed = options.bind_core_list
    if not options.bind_cores_to_rank and listed is None:
        return [()] * size
    usable = sorted(os.sched_getaffinity(0))
    cores = usable if listed is None else numbers_in(listed, f"--bind_core_list {listed}", "core")
    if missing := [core for core in cores if core not in usable]:
        raise LaunchError(f"--bind_core_list {listed}: cores {missing} are not this process's; it has {usable}")
    share = len(cores) // size
    if not share:
        raise LaunchError(f"--bind_cores_to_rank: {size} ranks cannot have a core each of {len(cores)}")
    return [tuple(cores[rank * share : (rank + 1) * share]) for rank in range(size)]


class Port(NamedTuple):
    """The port of the ranks' meeting place on this machine."""

    number: int
    note: str  # to be said where it is not the expected one
    claim: socket.socket | None  # keeps other launches from choosing it, until it is closed; None: another's does

    def close(self) -> None:
        """The ranks have ended."""
        if self.claim is not None:
            self.claim.close()


def choose_port(asked: int | None) -> Port:
    """A port of this machine that a server can listen at, and that no other launch has chosen.

    Seconds go by until rank 0 listens there. Another program could take the port meanwhile; port 0 makes that unlikely,
    since a port is picked that the system itself gives to nobody.

    Raises:
        LaunchError: the port that was asked for cannot be used.
    """
    wanted = DEFAULT_PORT if asked is None else asked
    fault = ""
    if wanted:
        port = Port(wanted, "", claim_port(wanted))
        fault = port_fault(wanted)
        if port.claim is None and asked is None:  # who asks for a port may know that the other's ranks do not use it
            fault = fault or "has been chosen by another launch"
        if not fault:
            return port
        port.close()
    if asked:
        raise LaunchError(f"--master_port {asked} {fault}; name another port, or 0 to have a free one picked")
    number, claim = pick_port()
    if asked == 0:
        return Port(number, f"--master_port 0: port {number} is free and used", claim)
    return Port(number, f"the usual port {DEFAULT_PORT} {fault}: port {number} is used instead", claim)
