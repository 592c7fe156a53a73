"""From options to ranks: the run on this machine, or multinode.py's; after a failure, again; and the last words."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from deepspeedlite.host.cores import usable_cores
from deepspeedlite.host.gpus import find_devices
from deepspeedlite.host.network import is_here
from deepspeedlite.host.text import counted
from deepspeedlite.launcher.agent import Agent
from deepspeedlite.launcher.cluster import Cluster, NotReadyError
from deepspeedlite.launcher.job import Assignment, Job, Port, build_job, choose_port, shell_line
from deepspeedlite.launcher.loop import Loop
from deepspeedlite.launcher.options import LaunchOptions
from deepspeedlite.launcher.output import Screen
from deepspeedlite.launcher.plan import EVERY_RANK, Hosts, choose_hosts, exported, ranks_environ
from deepspeedlite.launcher.report import Outcome, duration
from deepspeedlite.runtime.errors import LaunchError
from deepspeedlite.runtime.log import logger

# One start of a training, the so-manieth: how it went, or None if it was only to be checked, and is well.
Attempt = Callable[[LaunchOptions, Hosts, int, Loop, Screen], "Outcome | None"]


def start(options: LaunchOptions) -> int:
    """Run the training and return its exit status.

    Raises:
        LaunchError: it could not be started.
    """
    options = replace(options, env=exported(options, os.environ))
    hosts, spares, is_listed = choose_hosts(options, os.environ)
    alone = next(iter(hosts)) if len(hosts) == 1 else None
    is_wide = options.force_multi or options.no_ssh or options.check
    if alone is not None and not is_wide and (not is_listed or is_here(alone)):
        if options.dry_run:
            with contextlib.closing(choose_port(options.master_port)) as port:
                job = plan_here(options, hosts[alone], 0, os.environ, port)
            print("\n".join(map(shell_line, job.ranks)))
            return 0
        return _run_attempts(options, hosts, {}, _run_here)
    from deepspeedlite.launcher import multinode

    if options.no_ssh and options.node_rank != 0:
        return multinode.join(options, len(hosts))
    if options.dry_run:
        print(multinode.dry_run(options, hosts))
        return 0
    return _run_attempts(options, hosts, spares, multinode.run)


def save_pid(environ: Mapping[str, str]) -> Path:
    """Write this process's number into a file of that name: in the user's runtime directory, else where DeepSpeed does.

    Raises:
        LaunchError: it cannot be written; nothing of another user's is, wherever a link may point.
    """
    path = Path(environ.get("XDG_RUNTIME_DIR") or "/tmp", f"{os.getpid()}.ds")
    try:
        path.unlink(missing_ok=True)  # of an earlier process of this number, or a link: that itself
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644), "w") as file:
            file.write(str(os.getpid()))
    except OSError as error:
        raise LaunchError(f"--save_pid: {path} cannot be written: {error.strerror}") from error
    return path


def _run_attempts(options: LaunchOptions, hosts: Hosts, spares: Hosts, run: Attempt) -> int:
    """Start, and after a failure again, on those machines that are left; the exit status."""
    wanted, least, attempt = len(hosts), options.min_nodes or len(hosts), 0
    pool = {**hosts, **spares}
    if options.save_pid:
        atexit.register(save_pid(os.environ).unlink, missing_ok=True)
    with Loop() as loop, contextlib.redirect_stderr(Screen(loop)) as screen:
        while True:
            try:
                outcome = run(options, dict(list(pool.items())[:wanted]), attempt, loop, screen)
                if outcome is None:
                    return 0
                _conclude(outcome, screen)
                is_failed = outcome.failures and outcome.interrupted_by is None
                if not is_failed or attempt >= options.max_restarts:
                    screen.finish(1e9)
                    return outcome.exit_status
                gone, attempt = tuple(outcome.gone), attempt + 1
                logger.warning("restart %d of at most %d", attempt, options.max_restarts, extra=EVERY_RANK)
            except NotReadyError as error:
                if not attempt or not error.gone:
                    raise
                gone = error.gone  # a machine to spare does not answer either: try those that are left
            pool = {host: slots for host, slots in pool.items() if host not in gone}
            if gone and len(pool) < least:
                raise LaunchError(f"{counted(len(pool), 'machine')} left, and {least} needed (--min_nodes)")


def plan_here(
    options: LaunchOptions, slots: Sequence[int] | None, restarts: int, environ: Mapping[str, str], port: Port
) -> Job:
    """The job of a start on this machine alone."""
    environ = ranks_environ(options, environ)
    devices = find_devices(environ)
    slots = slots or range(len(devices.ids) or 1)
    secret = "" if options.dry_run else os.urandom(16).hex()  # a dry run shows every variable
    where = (options.master_addr or "127.0.0.1", port.number)
    assignment = Assignment(slots, len(slots), *where, restarts=restarts, secret=secret)
    job = build_job(options, assignment, environ, devices)
    cores = usable_cores()
    shared = f" on {counted(cores, 'core')}" if not devices.ids and cores < len(slots) else ""
    for text in filter(None, (devices.used(slots) + shared, port.note)):
        logger.info(text, extra=EVERY_RANK)
    return job


def _run_here(options: LaunchOptions, hosts: Hosts, attempt: int, loop: Loop, screen: Screen) -> Outcome:
    """On this machine alone: a cluster of one."""
    with contextlib.closing(choose_port(options.master_port)) as port:
        job = plan_here(options, next(iter(hosts.values())), attempt, os.environ, port)
        outcome = Outcome(len(job.ranks))
        cluster = Cluster([Agent(job, screen, loop, outcome.hear)], loop, screen, outcome)
        try:
            return cluster.run()
        finally:
            cluster.close(0)


def _conclude(outcome: Outcome, screen: Screen) -> None:
    """Say how it went: the last lines."""
    if outcome.exit_status:
        screen.restore()
    if outcome.left_behind:
        logger.warning("%d processes that ranks left behind were ended", outcome.left_behind)
    if outcome.unkillable:
        logger.error("these processes did not end even by SIGKILL: %s", " ".join(outcome.unkillable))
    after = duration(outcome.ended_s - outcome.started_s)
    if outcome.failures and outcome.interrupted_by is None:
        screen.write(f"deepspeedlite: FAILED after {after}, exit status {outcome.exit_status}\n{outcome.report()}\n")
        return
    ranks = f"{counted(outcome.num_ranks, 'rank')} ended"
    if outcome.interrupted_by is None:
        text = f"{ranks} well after {after}"
    elif outcome.interrupted_by == signal.SIGPIPE:
        text = f"{ranks} after {after}: the output can no longer be written"
    else:
        text = f"{ranks} after {after} by {signal.Signals(outcome.interrupted_by).name}"
    logger.info(text, extra=EVERY_RANK)
