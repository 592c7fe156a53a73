"""What follows from the options here: which machines, and which variables ranks get."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from deepspeedlite.launcher.hostfile import DEFAULT_HOSTFILE, read_hostfile, select
from deepspeedlite.launcher.options import LaunchOptions
from deepspeedlite.runtime.errors import LaunchError
from deepspeedlite.runtime.gpus import find_devices
from deepspeedlite.runtime.log import logger

# Variables that begin so are passed to every machine. A list, because scripts that start the launcher append to it.
EXPORT_ENVS = ["NCCL", "PYTHON", "MV2", "UCX", "MLFLOW"]
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
EVERY_RANK = {"ranks": (-1,)}  # the launcher's lines are shown even if RANK is set around it

Hosts = dict[str, "list[int] | None"]


def choose_hosts(options: LaunchOptions, environ: Mapping[str, str]) -> tuple[Hosts, Hosts, bool]:
    """The machines and their slots (None: whatever one has), those to spare, and whether a list names them.

    Raises:
        LaunchError: options contradict each other, or ask for what is not there.
    """
    picks = options.include or options.exclude
    if picks and (options.num_nodes or options.num_gpus):
        raise LaunchError(
            "--include and --exclude name slots; --num_nodes and --num_gpus count them: use one or the other"
        )
    path = options.hostfile or (DEFAULT_HOSTFILE if os.path.exists(DEFAULT_HOSTFILE) else None)
    nodelist = environ.get("SLURM_JOB_NODELIST") if options.launcher == "slurm" else None
    hosts: Hosts
    if path is not None:
        hosts = {host: list(range(slots)) for host, slots in read_hostfile(path).items()}
    elif nodelist:
        from deepspeedlite.runtime.env import expand_nodelist

        hosts = dict.fromkeys(expand_nodelist(nodelist))
    elif options.no_ssh:
        hosts = {f"node-{index}": None for index in range(options.num_nodes or 1)}
    else:
        count = len(find_devices(environ).ids)
        hosts = {"localhost": list(range(count)) if count else None}
    if picks:
        hosts = dict(select(hosts, options.include, options.exclude))
    if options.num_nodes and options.num_nodes > len(hosts):
        known = f"{path} names {len(hosts)}" if path else "there is this machine alone; --hostfile FILE names others"
        raise LaunchError(f"--num_nodes {options.num_nodes}: {known}")
    if options.num_gpus and (path or nodelist or options.no_ssh):
        for host, slots in hosts.items():
            if slots is not None and options.num_gpus > len(slots):
                raise LaunchError(f"--num_gpus {options.num_gpus}: {host} has {len(slots)} slots in {path}")
            hosts[host] = list(slots or range(options.num_gpus))[: options.num_gpus]
    names = list(hosts)
    used = names[: options.num_nodes or len(names)]
    return {n: hosts[n] for n in used}, {n: hosts[n] for n in names[len(used) :]}, bool(path or nodelist)


def exported(options: LaunchOptions, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that ranks on every machine get, values untouched: by prefix, from `.deepspeed_env`, by --export_env.

    Raises:
        LaunchError: a line of the file is no variable, or the file that DS_ENV_FILE names is not there.
    """
    found = {name: value for name, value in environ.items() if name.startswith(tuple(EXPORT_ENVS))}
    name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    files = [path for path in dict.fromkeys((Path.home() / name, Path.cwd() / name)) if path.is_file()]
    if not files and "DS_ENV_FILE" in environ:
        raise LaunchError(f"DS_ENV_FILE={name}: there is no such file here or in {Path.home()}")
    lines = [
        (f"{path}, line {n}", line)
        for path in files
        for n, line in enumerate(os.fsdecode(path.read_bytes()).split("\n"), 1)
    ]
    for where, line in [*lines, *(("--export_env", line) for line in options.export_env)]:
        name, equals, value = line.removeprefix("export ").lstrip().partition("=")
        if not name or name.startswith("#"):
            continue
        name = name.strip()
        if not _NAME.fullmatch(name):
            raise LaunchError(
                f"{where}: {name!r} is no variable's name; write NAME=VALUE, or NAME for one that is set here"
            )
        if equals:
            found[name] = value
        elif name in environ:
            found[name] = environ[name]
        else:
            logger.warning("%s: %s is not set here, and is not handed on", where, name, extra=EVERY_RANK)
    return found


def is_here(host: str) -> bool:
    """Whether a host's name is this machine's. Name servers are not asked: one that is slow would be asked a lot."""
    own = socket.gethostname()
    if host in ("localhost", own, own.split(".")[0]):
        return True
    with contextlib.suppress(OSError), socket.socket() as probe:
        probe.bind((socket.inet_ntoa(socket.inet_aton(host)), 0))  # only an own address can be bound
        return True
    return False
