"""A start on several machines: their agents, the check before, the run, and again on those that are left.

There is no rendezvous: the launcher knows every node, gives every rank its place, and after a failure starts all
of them anew, so that a lost machine, the first one too, is replaced by a spare one.
"""

from __future__ import annotations

import os
import shlex
import socket
import time
from collections.abc import Sequence
from dataclasses import replace

from deepspeedlite.env_report.preflight import Found, check, facts, table
from deepspeedlite.env_report.rows import BAD
from deepspeedlite.launcher import protocol
from deepspeedlite.launcher.agent import Outcome
from deepspeedlite.launcher.backends import Backend, Launch, Reach, find_backend
from deepspeedlite.launcher.cluster import NotReadyError
from deepspeedlite.launcher.job import DEFAULT_PORT, Assignment
from deepspeedlite.launcher.node import KEY, AgentSession, connect
from deepspeedlite.launcher.options import EVERY_RANK, Hosts, LaunchOptions, is_here, say
from deepspeedlite.launcher.output import Screen
from deepspeedlite.launcher.remote import RemoteCluster
from deepspeedlite.launcher.signals import SignalQueue
from deepspeedlite.runtime.errors import LaunchError
from deepspeedlite.runtime.log import logger
from deepspeedlite.runtime.text import columns


def run(options: LaunchOptions, hosts: Hosts, attempt: int, screen: Screen, signals: SignalQueue) -> Outcome | None:
    """Start a training on these machines: how it went; None if it was only to be checked, and is well.

    Raises:
        NotReadyError: it did not start.
    """
    listener, key, connect_to, backend = _way_in(options)
    path = os.pathsep.join(os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)
    launches = _launches(options, hosts, backend, connect_to, key, path)
    cluster, status = RemoteCluster(hosts, "".join(key.values()), listener, screen, signals), 1
    try:
        cluster.gather(launches, options.start_timeout_s)
        try:
            outcome = _check_and_run(cluster, options, attempt)
        except KeyboardInterrupt:  # while machines were still being asked
            outcome = Outcome(cluster.started_s, time.monotonic(), interrupted_by=cluster.interrupted_by)
        status = outcome.exit_status if outcome else 0
        return outcome
    except LaunchError as error:
        gone = [node.host for node in cluster.nodes if node.lost or not node.facts]
        raise NotReadyError(str(error), gone) from error
    finally:
        cluster.close(status)


def _check_and_run(cluster: RemoteCluster, options: LaunchOptions, attempt: int) -> Outcome | None:
    if cluster.interrupted_by is not None:
        raise KeyboardInterrupt
    address = ""
    if all(node.facts for node in cluster.nodes):
        address, port, note = cluster.meet(options.master_port, options.master_addr, not options.no_check)
    found = [node.found for node in cluster.nodes]
    _judge(found, address, options, cluster.screen)
    if options.check:
        return None
    say([note] * bool(note))
    visible = {node.host: node.facts["visible"] for node in found if node.facts["visible"]}
    say([f"{host}: {variable} is respected: slots index into it" for host, variable in visible.items()])
    assignments = assign_ranks(found, address, port, attempt)
    num_ranks = assignments[0].world_size
    say([f"{num_ranks} ranks on {len(assignments)} machines, which meet at {address}:{port}"])
    cluster.assign(replace(options.workload, cwd=os.getcwd()), assignments)
    return cluster.run(num_ranks)


def _judge(found: Sequence[Found], address: str, options: LaunchOptions, screen: Screen) -> None:
    rows = check(found, address)
    bad = [row for row in rows if row.status == BAD and (not options.no_check or row.name == "reached")]
    if bad or options.check:
        screen.say(table(rows, screen.is_terminal(2) and screen.has_colour) + "\n")
    if bad:
        hosts = ", ".join(dict.fromkeys(row.section for row in bad))
        skip = "" if any(row.name == "reached" for row in bad) else "; --no_check starts all the same"
        raise LaunchError(f"{hosts}: not ready, nothing was started (see the table above{skip})")
    if options.check:
        logger.info("all %d machines are ready", len(found), extra=EVERY_RANK)


def _way_in(options: LaunchOptions) -> tuple[socket.socket | None, dict[str, str], str, Backend | None]:
    """How agents come to us: the listener, the variable with their key, our address, the backend that starts them."""
    if options.no_ssh:
        try:
            listener = socket.create_server(("", _control_port(options)), backlog=1024)
        except OSError as error:
            raise LaunchError(
                f"port {_control_port(options)}, where nodes join, cannot be used: {error.strerror}"
            ) from error
        return listener, {KEY: os.environ.get(KEY, "")}, "", None
    backend = find_backend(options.launcher)
    if backend.by_pipes:
        return None, {}, "", backend
    listener = socket.create_server(("", 0), backlog=1024)
    addresses = [*facts()["addresses"], "127.0.0.1"]
    return listener, {KEY: protocol.new_secret()}, f"{','.join(addresses)}:{listener.getsockname()[1]}", backend


def _launches(
    options: LaunchOptions, hosts: Hosts, backend: Backend | None, connect_to: str, key: dict[str, str], path: str = ""
) -> list[Launch]:
    """What starts the agents; without a backend it is node 0's alone, and the others join."""
    here = frozenset(host for host in hosts if is_here(host))
    reach = Reach(list(hosts), here, connect_to, key, options.ssh_port, options.launcher_args, path)
    return [Launch(reach.agent("--index", "0"), node=0)] if backend is None else backend.launches(reach)


def _control_port(options: LaunchOptions) -> int:
    return (options.master_port or DEFAULT_PORT) + 1


def join(options: LaunchOptions, num_nodes: int) -> int:
    """Without ssh: meet node 0's launcher and be its agent here, on this machine's own screen."""
    index = options.node_rank
    if index is None or not 0 <= index < num_nodes or not options.master_addr:
        raise LaunchError(
            f"--no_ssh needs on every node: --node_rank (0 to {num_nodes - 1}; here {index}), --master_addr (that of "
            "node 0), and --num_nodes or a hostfile"
        )
    port = _control_port(options)
    say([f"node {index}: joining node 0 at {options.master_addr}:{port}"])
    found = connect([options.master_addr], port, max(options.start_timeout_s, 600.0))
    return AgentSession(protocol.Link(found.detach()), os.environ.get(KEY, ""), index, options.workload).run()


def assign_ranks(found: Sequence[Found], address: str, port: int, restarts: int) -> list[Assignment]:
    """Each node's ranks: they are numbered through the nodes in their order."""
    sizes = [len(node.slots or ()) for node in found]
    firsts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [
        Assignment(tuple(node.slots or ()), sum(sizes), address, port, node.host, first, index, len(found), restarts)
        for index, (node, first) in enumerate(zip(found, firsts))
    ]


def dry_run(options: LaunchOptions, hosts: Hosts) -> str:
    """What would run where: a table, and the commands; nothing is asked of any machine."""
    backend = None if options.no_ssh else find_backend(options.launcher)
    names = list(hosts)
    found = [Found(host, slots if slots is not None else [0]) for host, slots in hosts.items()]
    assignments = assign_ranks(found, options.master_addr or names[0], options.master_port or DEFAULT_PORT, 0)
    rows = [("node", "ranks", "slots")]
    for one in assignments:
        known = ",".join(map(str, one.slots)) if hosts[one.host] else "as many as it has devices"
        rows.append((one.host, f"{one.first_rank}-{one.first_rank + len(one.slots) - 1}", known))
    lines = columns(rows)
    launches = _launches(options, hosts, backend, "ADDRESS:PORT", {KEY: "KEY"})
    lines += [shlex.join(launch.argv) for launch in launches]
    script = ["python", *["-m"] * options.workload.module, options.workload.script, *options.workload.script_args]
    names_only = " ".join(sorted(options.workload.env)) or "none"
    return "\n".join(
        [*lines, f"each rank: {shlex.join(script)}", f"variables handed on (values not shown): {names_only}"]
    )
