"""From options to ranks: machines and variables; then the run here, or multinode.py's; after a failure, again."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from deepspeedlite.launcher.agent import Outcome
from deepspeedlite.launcher.cluster import Cluster, LocalNode
from deepspeedlite.launcher.hostfile import DEFAULT_HOSTFILE, read_hostfile, select
from deepspeedlite.launcher.job import Assignment, Job, Workload, build_job, choose_port, shell_line
from deepspeedlite.launcher.output import Screen, ScreenText
from deepspeedlite.launcher.report import duration, failure_report
from deepspeedlite.launcher.signals import SignalQueue
from deepspeedlite.runtime.errors import LaunchError
from deepspeedlite.runtime.gpus import choose_ranks, find_devices
from deepspeedlite.runtime.log import logger

_EXPORTED = ("NCCL", "PYTHON", "MV2", "UCX", "MLFLOW")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
EVERY_RANK = {"ranks": (-1,)}  # the launcher's lines are shown even if RANK is set around it


@dataclass(frozen=True)
class LaunchOptions:
    """What the user asked for, checked for form but not yet against the machines."""

    workload: Workload
    hostfile: str | None = None
    include: str | None = None
    exclude: str | None = None
    num_nodes: int | None = None
    num_gpus: int | None = None  # per machine; None: every slot, every GPU there is, or one CPU rank
    master_addr: str = ""
    master_port: int | None = None  # None: 29500 unless it is busy; 0: any free port
    launcher: str | None = None
    launcher_args: Sequence[str] = ()
    ssh_port: int | None = None
    force_multi: bool = False
    no_ssh: bool = False
    node_rank: int | None = None
    check: bool = False
    no_check: bool = False
    dry_run: bool = False
    max_restarts: int = 0
    min_nodes: int | None = None
    start_timeout_s: float = 60.0
    save_pid: bool = False
    export: Sequence[str] = field(default_factory=tuple)  # NAME, or NAME=VALUE


Hosts = dict[str, "list[int] | None"]


class Attempt(Protocol):
    """One start of a training: planned when it is made."""

    num_ranks: int
    gone: set[str]  # machines that were lost, or did not answer

    def run(self) -> Outcome | None:
        """How it went; None if it was only to be checked, and is well. Raises LaunchError: it did not start."""


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
            print(dry_run_here(options, hosts[alone]))
            return 0
        return run_attempts(options, hosts, {}, _AttemptHere)
    from deepspeedlite.launcher import multinode

    if options.no_ssh and options.node_rank != 0:
        return multinode.join(options, len(hosts))
    if options.dry_run:
        print(multinode.dry_run(options, hosts))
        return 0
    return run_attempts(options, hosts, spares, multinode.RemoteAttempt)


def run_attempts(
    options: LaunchOptions,
    hosts: Hosts,
    spares: Hosts,
    attempt_of: Callable[[LaunchOptions, Hosts, int, Screen, SignalQueue], Attempt],
) -> int:
    """Start, and after a failure again, on those machines that are left; the exit status."""
    wanted, least, attempt, status = len(hosts), options.min_nodes or len(hosts), 0, 0
    pool, signals = {**hosts, **spares}, SignalQueue()
    screen = Screen(signals=signals)
    with _pid_file(options.save_pid):
        while True:
            planned = attempt_of(options, dict(list(pool.items())[:wanted]), attempt, screen, signals)
            try:
                with contextlib.redirect_stderr(ScreenText(screen)), signals:
                    outcome = planned.run()
                    if outcome is None:
                        return 0
                    conclude(outcome, planned.num_ranks, screen)
            except LaunchError:
                if not attempt or not planned.gone:
                    raise  # else a machine to spare does not answer either: try those that are left
            else:
                status = outcome.exit_status
                if not goes_on(outcome, attempt, options):
                    return status
                attempt += 1
            pool = {host: slots for host, slots in pool.items() if host not in planned.gone}
            if planned.gone and len(pool) < least:
                raise LaunchError(f"{len(pool)} machines are left, and {least} are needed (--min_nodes)")


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
    found = {name: value for name, value in environ.items() if name.startswith(_EXPORTED)}
    name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    files = [path for path in dict.fromkeys((Path.home() / name, Path.cwd() / name)) if path.is_file()]
    if not files and "DS_ENV_FILE" in environ:
        raise LaunchError(f"DS_ENV_FILE={name}: there is no such file here or in {Path.home()}")
    lines = [
        (f"{path}, line {n}", line)
        for path in files
        for n, line in enumerate(os.fsdecode(path.read_bytes()).split("\n"), 1)
    ]
    for where, line in [*lines, *(("--export_env", line) for line in options.export)]:
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


# --- one machine ------------------------------------------------------------------------------------------------------


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


def dry_run_here(options: LaunchOptions, slots: Sequence[int] | None) -> str:
    """What would run: notes, and a command for each rank."""
    job = plan_here(options, slots, 0, os.environ)
    return "\n".join([*(f"# {note}" for note in job.notes), *map(shell_line, job.ranks)])


class _AttemptHere:
    """On this machine alone: a cluster of one."""

    def __init__(
        self, options: LaunchOptions, hosts: Hosts, attempt: int, screen: Screen, signals: SignalQueue
    ) -> None:
        self.gone: set[str] = set()
        self._screen, self._signals = screen, signals
        (slots,) = hosts.values()
        self._job = plan_here(options, slots, attempt, os.environ)
        self.num_ranks = len(self._job.ranks)
        say(self._job.notes, self._job.details)

    def run(self) -> Outcome:
        """How it went."""
        cluster = Cluster(self._screen, self._signals)
        cluster.nodes = [LocalNode(self._job, self._screen, cluster.loop)]
        try:
            return cluster.run()
        finally:
            cluster.close(0)


def goes_on(outcome: Outcome, attempt: int, options: LaunchOptions) -> bool:
    """Whether to start again after a failure."""
    if outcome.first is None or outcome.interrupted_by is not None or attempt >= options.max_restarts:
        return False
    logger.warning("restart %d of at most %d", attempt + 1, options.max_restarts, extra=EVERY_RANK)
    return True


def say(notes: Sequence[str], details: Sequence[str] = ()) -> None:
    """The launcher's own lines before a start."""
    for note in notes:
        logger.info(note, extra=EVERY_RANK)
    for detail in details:
        logger.debug(detail, extra=EVERY_RANK)


def conclude(outcome: Outcome, num_ranks: int, screen: Screen) -> None:
    """Say how it went: the last lines."""
    if outcome.exit_status:
        screen.restore()
    if outcome.left_behind:
        logger.warning("%d processes that ranks left behind were ended", outcome.left_behind)
    if outcome.unkillable:
        logger.error("these processes did not end even by SIGKILL: %s", " ".join(map(str, outcome.unkillable)))
    after = duration(outcome.ended_s - outcome.started_s)
    first = outcome.first
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
