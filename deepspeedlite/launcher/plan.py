"""What follows from the options here: which machines, and which variables ranks get."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from deepspeedlite.host.gpus import find_devices
from deepspeedlite.launcher.hostfile import DEFAULT_HOSTFILE, lines_of, read_hostfile, select
from deepspeedlite.launcher.options import LaunchOptions
from deepspeedlite.launcher.stand_in import with_stand_in
from deepspeedlite.runtime.errors import DistributedError, LaunchError
from deepspeedlite.runtime.log import logger

# Variables that begin so are passed to every machine. A list, because scripts that start the launcher append to it.
EXPORT_ENVS = ["NCCL", "GLOO", "PYTHON", "MV2", "UCX", "MLFLOW"]
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_REFERENCE = re.compile(r"\\([\\$])|\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")  # \$, \\, $NAME, ${NAME}
_VENV_TIMEOUT_S = 60.0
# What starts a process on every node -> its command, the launcher's name for it, and which node a process is on.
_STARTERS = {
    "Slurm": ("srun", "slurm", "$SLURM_NODEID"),
    "Open MPI": ("mpirun", "openmpi", "$OMPI_COMM_WORLD_RANK"),
    "MVAPICH": ("mpirun", "mvapich", "$MV2_COMM_WORLD_RANK"),
    "MPICH or Intel MPI": ("mpirun", "mpich", "$PMI_RANK"),
}
_TASKS = ("SLURM_STEP_ID", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE")  # set for what those start
EVERY_RANK = {"ranks": (-1,)}  # the launcher's lines are shown even if RANK is set around it

Hosts = dict[str, "list[int] | None"]


def choose_hosts(options: LaunchOptions, environ: Mapping[str, str]) -> tuple[Hosts, Hosts, bool]:
    """The machines and their slots (None: whatever one has), those to spare, and whether a list names them.

    Raises:
        LaunchError: options contradict each other, or ask for what is not there.
    """
    refuse_second_start(options, environ)
    picks = options.include or options.exclude
    if picks and (options.num_nodes or options.num_gpus):
        raise LaunchError(
            "--include and --exclude name slots; --num_nodes and --num_gpus count them: use one or the other"
        )
    path = options.hostfile or (DEFAULT_HOSTFILE if os.path.exists(DEFAULT_HOSTFILE) else None)
    nodelist = environ.get("SLURM_JOB_NODELIST") if options.launcher else None
    if options.launcher and not (path or nodelist or options.no_ssh or options.force_multi):
        raise LaunchError(
            f"--launcher {options.launcher}: neither --hostfile FILE nor a Slurm allocation (salloc, sbatch) names "
            "machines; leave --launcher out to train on this one alone"
        )
    hosts: Hosts
    if path is not None:
        hosts = {host: list(range(slots)) for host, slots in read_hostfile(path).items()}
    elif nodelist:
        from deepspeedlite.schedulers import expand_nodelist

        hosts = dict.fromkeys(expand_nodelist(nodelist))
    elif options.no_ssh:
        hosts = {f"node-{index}": None for index in range(options.num_nodes or 1)}
    else:  # as many slots as its ranks will see devices
        ids = find_devices(ranks_environ(options, environ)).ids if options.exclude else ()
        hosts = {"localhost": list(range(len(ids))) or None}
    if picks:
        hosts = dict(select(hosts, options.include, options.exclude))
    if options.num_nodes and options.num_nodes > len(hosts):
        known = f"{path} names {len(hosts)}" if path else "there is this machine alone; --hostfile FILE names others"
        raise LaunchError(f"--num_nodes {options.num_nodes}: {known}")
    if options.num_gpus:
        for host, slots in hosts.items():
            if slots is not None and options.num_gpus > len(slots):
                raise LaunchError(f"--num_gpus {options.num_gpus}: {host} has {len(slots)} slots in {path}")
            hosts[host] = list(slots or range(options.num_gpus))[: options.num_gpus]
    names = list(hosts)
    used = names[: options.num_nodes or len(names)]
    return {n: hosts[n] for n in used}, {n: hosts[n] for n in names[len(used) :]}, bool(path or nodelist)


def refuse_second_start(options: LaunchOptions, environ: Mapping[str, str]) -> None:
    """A launcher that a scheduler starts on every node would start the whole training on each.

    Raises:
        LaunchError: with the two right ways.
    """
    count = environ.get("WORLD_SIZE", "1")
    if environ.get("TORCHELASTIC_RUN_ID") and count != "1":
        raise LaunchError(
            f"torchrun has started this launcher {count} times, and each would start the whole training. Start the "
            "script by it: torchrun ... SCRIPT. Or start it by this launcher alone, once: deepspeedlite --num_gpus N "
            "SCRIPT (several machines: -H FILE)"
        )
    if options.no_ssh or not any(name in environ for name in _TASKS):
        return
    from deepspeedlite.runtime.env import discover_world

    outer = {name: value for name, value in environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    with contextlib.suppress(DistributedError):  # half of what a scheduler sets
        world = discover_world(outer)
        if world.world_size > 1:
            starter, name, node = _STARTERS.get(world.source, _STARTERS["Open MPI"])
            raise LaunchError(
                f"{starter} ({world.source}) has started this launcher {world.world_size} times, and each would start "
                f"the whole training. Start it once, not by {starter}: deepspeedlite --launcher {name} -H FILE SCRIPT. "
                f"Or on every node, with its place: {starter} ... sh -c 'deepspeedlite --no_ssh --num_nodes N "
                f"--node_rank {node} --master_addr HOST SCRIPT'"
            )


def exported(options: LaunchOptions, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that ranks on every machine get: by prefix, from `.deepspeed_env`, by --export_env.

    Only those of the file are looked into: `$NAME` stands for what the node has under it. In all of them dollars and
    backslashes that stand for themselves are escaped, until `ranks_environ`.

    Raises:
        LaunchError: a line of the file is no variable, or the file that DS_ENV_FILE names is not there.
    """
    found = {name: _literal(value) for name, value in environ.items() if name.startswith(tuple(EXPORT_ENVS))}
    name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    home = os.path.expanduser("~")  # as it stands where nobody has one
    files = [path for path in dict.fromkeys((Path(home, name), Path(os.path.abspath(name)))) if os.path.isfile(path)]
    if not files and "DS_ENV_FILE" in environ:
        raise LaunchError(f"DS_ENV_FILE={name}: there is no such file here or in {home}")
    lines = [(f"{path}, line {n}", line.strip(" \t\r")) for path in files for n, line in enumerate(lines_of(path), 1)]
    for where, line in [*lines, *(("--export_env", line) for line in options.export_env)]:
        name, equals, value = line.removeprefix("export ").lstrip().partition("=")
        if not name or name.startswith("#"):
            continue
        name = name.strip()
        value = _literal(value) if where == "--export_env" else _unquoted(value.strip(" \t"))
        if not _NAME.fullmatch(name):
            raise LaunchError(
                f"{where}: {name!r} is no variable's name; write NAME=VALUE, or NAME for one that is set here"
            )
        if equals:
            found[name] = value
        elif name in environ:
            found[name] = _literal(environ[name])
        else:
            logger.warning("%s: %s is not set here, and is not handed on", where, name, extra=EVERY_RANK)
    return found


def _literal(value: str) -> str:
    return value.replace("\\", "\\\\").replace("$", "\\$")


def _unquoted(value: str) -> str:
    """As a shell would take it: within single quotes nothing stands for another thing."""
    quote = value[:1] if len(value) > 1 and value[:1] == value[-1:] and value[:1] in ("'", '"') else ""
    inner = value[1:-1] if quote else value
    return _literal(inner) if quote == "'" else inner


def ranks_environ(options: LaunchOptions, environ: Mapping[str, str]) -> Mapping[str, str]:
    """What ranks on this machine inherit: its own environment, what is handed on, and what --venv_script makes of it.

    Raises:
        LaunchError: the script cannot be sourced.
    """
    known = dict(environ)
    for name, template in options.env.items():  # one after the other: each may name those before it

        def value_of(found: re.Match[str], name: str = name) -> str:
            asked = found[2] or found[3]
            if asked and asked not in known:
                text = "%s: $%s is not set on %s, and nothing stands for it; \\$ is a dollar"
                logger.warning(text, name, asked, socket.gethostname(), extra=EVERY_RANK)
            return known.get(asked, "") if asked else found[1]

        known[name] = _REFERENCE.sub(value_of, template)
    given = {name: known[name] for name in options.env}
    environ = {**_sourced(options.venv_script, known), **given}
    return with_stand_in(environ) if options.as_deepspeed else environ


def _sourced(script: str | None, environ: Mapping[str, str]) -> Mapping[str, str]:
    """The environment after a shell has sourced `script`."""
    if script is None:
        return environ
    command = ["bash", "-c", '. "$1" >/dev/null && env -0', "bash", os.path.abspath(script)]
    try:
        done = subprocess.run(
            command, env=dict(environ), stdin=subprocess.DEVNULL, capture_output=True, timeout=_VENV_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"--venv_script {script} cannot be sourced: {error}") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip() or f"status {done.returncode}"
        raise LaunchError(f"--venv_script {script} cannot be sourced: {said}")
    pairs = [pair.partition(b"=") for pair in done.stdout.split(b"\0") if pair]
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}
