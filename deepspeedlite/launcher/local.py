"""The local backend: turns launch options into a Job for this machine.

Everything that can be wrong is found here, before any process starts: a missing script, more GPUs than there
are, a busy port, a log directory that cannot be written.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from deepspeedlite.errors import LaunchError
from deepspeedlite.launcher.command import (
    Job,
    LaunchOptions,
    NodePlace,
    RankCommand,
    defaults_environment,
    rank_argv,
    rank_environment,
)
from deepspeedlite.launcher.devices import choose_ranks, find_devices

DEFAULT_PORT = 29500
_DEFAULT_HOSTFILE = Path("/job/hostfile")


def plan_local(options: LaunchOptions, environ: Mapping[str, str]) -> Job:
    """The ranks to start on this machine.

    Raises:
        LaunchError: naming what is wrong and how to mend it.
    """
    check_script(options)
    devices = find_devices(environ)
    count, note = choose_ranks(devices, options.num_gpus)
    notes, details = [note], []
    if _DEFAULT_HOSTFILE.exists():
        notes.append(f"{_DEFAULT_HOSTFILE} is left aside: this release starts ranks on this machine only")
    port, port_note = choose_port(options.master_port)
    if port_note:
        notes.append(port_note)
    if options.log_dir is not None and not options.dry_run:
        _make_log_dir(options.log_dir)

    place = NodePlace(local_size=count)
    shared = devices.first(count)
    filled = defaults_environment(environ, count, on_cpu=not devices.ids, cores=len(os.sched_getaffinity(0)))
    if "OMP_NUM_THREADS" in filled:
        details.append(f"OMP_NUM_THREADS={filled['OMP_NUM_THREADS']} for each CPU rank; set it yourself to change it")
    ranks = tuple(
        RankCommand(
            rank=local_rank,
            local_rank=local_rank,
            argv=rank_argv(options, local_rank, sys.executable),
            env={**rank_environment(place, local_rank, options.master_addr, port), **shared, **filled},
        )
        for local_rank in range(count)
    )
    return Job(ranks, options.log_dir, tuple(notes), tuple(details))


def check_script(options: LaunchOptions) -> None:
    """Raise LaunchError unless what the ranks are to run exists."""
    script = options.script
    if options.no_python:
        if shutil.which(script) is None:
            _refuse_program(script)
    elif options.module:
        _check_module(script)
    elif os.path.isdir(script):
        if not os.path.isfile(os.path.join(script, "__main__.py")):
            raise LaunchError(f"{script} is a directory without a __main__.py; name the script inside it")
    elif not os.path.exists(script):  # anything that opens is for Python to judge: zip files, pipes
        raise LaunchError(f"script {script} does not exist (looked in {os.getcwd()}){_similar_file(script)}")
    elif not os.access(script, os.R_OK):
        raise LaunchError(f"script {script} cannot be read by this user; see its permissions with ls -l")


def _refuse_program(script: str) -> None:
    if os.path.isdir(script):
        raise LaunchError(f"{script} is a directory; --no_python needs a program")
    if os.path.dirname(script) and os.path.exists(script):
        raise LaunchError(f"{script} is not executable; chmod +x it, or leave --no_python out to run it with Python")
    if os.path.exists(script):
        raise LaunchError(f"program {script} is not on PATH; write ./{script} for the one in this directory")
    where = "" if os.path.dirname(script) else " on PATH"
    raise LaunchError(f"program {script} does not exist{where}{_similar_file(script)}")


def _similar_file(script: str) -> str:
    from difflib import get_close_matches

    directory, name = os.path.split(script)
    if directory and not os.path.isdir(directory):
        return f"; there is no directory {directory}"
    near = get_close_matches(name, os.listdir(directory or "."), n=1)
    return f"; did you mean {os.path.join(directory, near[0])}?" if near else ""


def _check_module(name: str) -> None:
    """Find a module part by part without importing its packages, which could pull in torch."""
    path: Sequence[str] | None = None
    for depth, part in enumerate(name.split("."), start=1):
        dotted = ".".join(name.split(".")[:depth])
        spec = _find_spec(dotted, path) if part else None
        if spec is None:
            hint = "; --module takes a dotted name, not a file" if name.endswith(".py") or "/" in name else ""
            raise LaunchError(f"module {name}: no module named {dotted} is in {os.getcwd()} or installed{hint}")
        path = spec.submodule_search_locations


def _find_spec(dotted: str, path: Sequence[str] | None) -> ModuleSpec | None:
    if "." not in dotted:
        # `python -m` looks in the current directory first, which this process need not have on its path.
        here = PathFinder.find_spec(dotted, [os.getcwd(), *sys.path])
        if here is not None:
            return here
    elif path is None:
        return None  # the parent is a plain module
    found = (finder.find_spec(dotted, path) for finder in sys.meta_path)
    return next((spec for spec in found if spec is not None), None)


def choose_port(asked: int | None) -> tuple[int, str]:
    """A port for the ranks' meeting place, and a line to say when it is not the expected one.

    Between this check and rank 0's start another program could take the port; port 0 makes that unlikely.

    Raises:
        LaunchError: the port that was asked for cannot be used.
    """
    if asked == 0:
        port = _any_free_port()
        return port, f"--master_port 0: port {port} is free and used"
    port = DEFAULT_PORT if asked is None else asked
    fault = _port_fault(port)
    if not fault:
        return port, ""
    if asked is not None:
        raise LaunchError(f"--master_port {port} {fault}; name another port, or 0 to have a free one picked")
    free = _any_free_port()
    return free, f"the usual port {port} {fault}: port {free} is used instead"


def _port_fault(port: int) -> str:
    """Why a server could not listen on this port, or "" when it could."""
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            probe = socket.socket(family, socket.SOCK_STREAM)
        except OSError:  # a kernel without this family
            continue
        with probe:
            # As torch's store does: a port whose old connections are still winding down may be used again.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind((address, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return "is in use by another program"
                if error.errno == errno.EACCES:
                    return "needs root (ports below 1024)"
    return ""


def _any_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _make_log_dir(directory: str) -> None:
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise LaunchError(
            f"--enable_each_rank_log {directory}: cannot make this directory: {error.strerror}"
        ) from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise LaunchError(f"--enable_each_rank_log {directory}: this directory cannot be written by this user")
