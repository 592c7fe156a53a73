"""From options to ranks: the run on this machine, or multinode.py's; after a failure, again; and the last words."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from deepspeedlite.launcher.agent import Outcome
from deepspeedlite.launcher.cluster import Cluster, LocalNode, NotReadyError
from deepspeedlite.launcher.job import Assignment, Job, build_job, choose_port, shell_line
from deepspeedlite.launcher.options import EVERY_RANK, Hosts, LaunchOptions, choose_hosts, exported, is_here, say
from deepspeedlite.launcher.output import Screen, ScreenText
from deepspeedlite.launcher.report import duration, failure_report
from deepspeedlite.launcher.signals import SignalQueue
from deepspeedlite.runtime.errors import LaunchError
from deepspeedlite.runtime.gpus import choose_ranks, find_devices
from deepspeedlite.runtime.log import logger

# One start of a training, the so-manieth: how it went, or None if it was only to be checked, and is well.
Attempt = Callable[[LaunchOptions, Hosts, int, Screen, SignalQueue], "Outcome | None"]


def start(options: LaunchOptions) -> int:
    """Run the training and return its exit status.

    Raises:
        LaunchError: it could not be started.
    """
    hosts, spares, is_listed = choose_hosts(options, os.environ)
    options = replace(options, workload=replace(options.workload, env=exported(options, os.environ)))
    alone = next(iter(hosts)) if len(hosts) == 1 else None
    is_wide = options.force_multi or options.no_ssh or options.check
    if alone is not None and not is_wide and (not is_listed or is_here(alone)):
        if options.dry_run:
            print(_dry_run(options, hosts[alone]))
            return 0
        return _run_attempts(options, hosts, {}, _run_here)
    from deepspeedlite.launcher import multinode

    if options.no_ssh and options.node_rank != 0:
        return multinode.join(options, len(hosts))
    if options.dry_run:
        print(multinode.dry_run(options, hosts))
        return 0
    return _run_attempts(options, hosts, spares, multinode.run)


def _run_attempts(options: LaunchOptions, hosts: Hosts, spares: Hosts, run: Attempt) -> int:
    """Start, and after a failure again, on those machines that are left; the exit status."""
    wanted, least, attempt = len(hosts), options.min_nodes or len(hosts), 0
    pool, signals = {**hosts, **spares}, SignalQueue()
    screen = Screen(signals=signals)
    with _pid_file(options.save_pid), contextlib.redirect_stderr(ScreenText(screen)), signals:
        while True:
            try:
                outcome = run(options, dict(list(pool.items())[:wanted]), attempt, screen, signals)
                if outcome is None:
                    return 0
                _conclude(outcome, screen)
                if not _goes_on(outcome, attempt, options):
                    return outcome.exit_status
                gone, attempt = outcome.gone, attempt + 1
            except NotReadyError as error:
                if not attempt or not error.gone:
                    raise
                gone = error.gone  # a machine to spare does not answer either: try those that are left
            pool = {host: slots for host, slots in pool.items() if host not in gone}
            if gone and len(pool) < least:
                raise LaunchError(f"{len(pool)} machines are left, and {least} are needed (--min_nodes)")


@contextlib.contextmanager
def _pid_file(is_wanted: bool):  # type: ignore[no-untyped-def]
    """DeepSpeed's place for it, /tmp/PID.ds, while the launcher runs."""
    path = Path(f"/tmp/{os.getpid()}.ds")
    if is_wanted:
        path.write_text(str(os.getpid()))
    try:
        yield
    finally:
        if is_wanted:
            path.unlink(missing_ok=True)


def plan_here(options: LaunchOptions, slots: Sequence[int] | None, restarts: int, environ: Mapping[str, str]) -> Job:
    """The job of a start on this machine alone."""
    environ = {**environ, **options.workload.env}
    devices = find_devices(environ)
    count, note = choose_ranks(devices, options.num_gpus if not (slots and options.num_gpus is None) else len(slots))
    port, port_note = choose_port(options.master_port)
    used = list(slots)[:count] if slots else list(range(count))
    assignment = Assignment(used, count, options.master_addr or "127.0.0.1", port, restarts=restarts)
    workload = replace(options.workload, log_dir=None) if options.dry_run else options.workload
    job = build_job(workload, assignment, environ, devices)
    return replace(job, notes=tuple(filter(None, (note, port_note))))


def _dry_run(options: LaunchOptions, slots: Sequence[int] | None) -> str:
    """What would run: notes, and a command for each rank."""
    job = plan_here(options, slots, 0, os.environ)
    return "\n".join([*(f"# {note}" for note in job.notes), *map(shell_line, job.ranks)])


def _run_here(options: LaunchOptions, hosts: Hosts, attempt: int, screen: Screen, signals: SignalQueue) -> Outcome:
    """On this machine alone: a cluster of one."""
    job = plan_here(options, next(iter(hosts.values())), attempt, os.environ)
    say(job.notes, job.details)
    cluster = Cluster(screen, signals)
    cluster.nodes = [LocalNode(job, screen, cluster.loop)]
    try:
        return cluster.run(len(job.ranks))
    finally:
        cluster.close(0)


def _goes_on(outcome: Outcome, attempt: int, options: LaunchOptions) -> bool:
    """Whether to start again after a failure."""
    if outcome.first is None or outcome.interrupted_by is not None or attempt >= options.max_restarts:
        return False
    logger.warning("restart %d of at most %d", attempt + 1, options.max_restarts, extra=EVERY_RANK)
    return True


def _conclude(outcome: Outcome, screen: Screen) -> None:
    """Say how it went: the last lines."""
    if outcome.exit_status:
        screen.restore()
    if outcome.left_behind:
        logger.warning("%d processes that ranks left behind were ended", outcome.left_behind)
    if outcome.unkillable:
        logger.error("these processes did not end even by SIGKILL: %s", " ".join(map(str, outcome.unkillable)))
    after = duration(outcome.ended_s - outcome.started_s)
    first, num_ranks = outcome.first, outcome.num_ranks
    if first is not None and outcome.interrupted_by is None:
        also = [failure.rank for failure in outcome.failures if failure is not first and not failure.lost]
        heading = f"deepspeedlite: FAILED after {after}, exit status {outcome.exit_status}"
        screen.say(f"{heading}\n{failure_report(first, outcome.started_s, num_ranks, also)}\n")
        return
    ranks = f"{num_ranks} rank{'s' * (num_ranks > 1)} ended"
    if outcome.interrupted_by is None:
        text = f"{ranks} well after {after}"
    elif outcome.interrupted_by == signal.SIGPIPE:
        text = f"{ranks} after {after}: the output can no longer be written"
    else:
        text = f"{ranks} after {after} by {signal.Signals(outcome.interrupted_by).name}"
    logger.info(text, extra=EVERY_RANK)
