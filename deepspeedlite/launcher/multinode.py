"""A run on several machines: starts an agent on each, looks at them, hears them over links, takes silence for a loss.

There is no rendezvous: the launcher knows every node, gives every rank its place, and after a failure starts all
of them anew, so that a lost machine, the first one too, is replaced by a spare one.

    gather    start the agents, hear what every node is
    meet      find a port on the first node and an address at which all reach it
    assign    hand out the jobs; `Cluster.run` does the rest
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shlex
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from deepspeedlite.env_report.preflight import Found, check, last_line, reason_for, table
from deepspeedlite.env_report.rows import BAD, WARN
from deepspeedlite.host.network import addresses, is_here, listen
from deepspeedlite.host.text import columns, counted
from deepspeedlite.launcher import protocol
from deepspeedlite.launcher.backends import BACKENDS, Backend, Launch, Reach, find_backend
from deepspeedlite.launcher.cluster import Cluster, NotReadyError
from deepspeedlite.launcher.hostfile import bare
from deepspeedlite.launcher.job import DEFAULT_PORT, Assignment, rank_argv
from deepspeedlite.launcher.loop import Loop
from deepspeedlite.launcher.node import AgentSession, connect
from deepspeedlite.launcher.options import LaunchOptions
from deepspeedlite.launcher.output import Screen
from deepspeedlite.launcher.plan import EVERY_RANK, Hosts
from deepspeedlite.launcher.protocol import KEY
from deepspeedlite.launcher.report import CLOSED, Outcome, RankEnd
from deepspeedlite.launcher.ssh import HostProcess
from deepspeedlite.runtime.errors import LaunchError
from deepspeedlite.runtime.log import logger

_NOTICE_S = 8.0  # after so long somebody is told who is being waited for
_KILL_S = 3.0  # beyond a grace: how long an agent may take to end its ranks by SIGKILL and say so


class RemoteNode:
    """A machine whose agent is at the other end of a link. `slots`: None for as many as it has devices."""

    def __init__(
        self, host: str, slots: Sequence[int] | None, options: LaunchOptions, screen: Screen, outcome: Outcome
    ) -> None:
        self.host, self.found = host, Found(host, slots)  # all that is known of it
        self._options = options  # of all ranks
        self.link: protocol.Link | None = None  # None until its agent has shown that it is ours
        self.told: dict[str, Any] | None = None  # the answer to the last question
        self.lost = ""  # why nothing more will come
        self._screen, self._outcome = screen, outcome
        self._is_closed = False
        self._give_up_s = math.inf  # when it is no longer waited for: an order to end says so
        self._beat_s = 0.0  # when it was last sent a beat
        # How long a beat took to come back, and by that the node's monotonic clock, less ours: the quickest counts.
        self._clock = (math.inf, 0.0)

    @property
    def is_done(self) -> bool:
        """Whether nothing more will come from it."""
        return self._is_closed or bool(self.lost) or time.monotonic() > self._give_up_s

    def join(self, link: protocol.Link) -> None:
        """Its agent is at the other end of this link: what is that machine, for these options?"""
        self.link = link
        self.send(protocol.ASK, {"options": asdict(self._options)})

    def _take(self, facts: dict[str, Any]) -> None:
        self.found = replace(self.found, facts=facts, skew_s=facts["time"] - time.time())
        if self.found.slots is None:
            self.found = replace(self.found, slots=range(len(self.found.devices.ids) or 1))

    def send(self, kind: bytes, value: Any = None) -> None:
        """Tell its agent something, if there is one."""
        if self.link is not None and not self.link.closed:
            self.link.send(kind, value)

    def ask(self, question: dict[str, Any]) -> None:
        """Ask for an answer to this: `told`."""
        self.told = None
        self.send(protocol.ASK, question)

    def has_answered(self, begin_s: float) -> bool:
        """Whether something came since; asks for it."""
        if self._beat_s < begin_s:
            self._send_beat()
        return self.link is None or self.link.heard_s > begin_s

    def _send_beat(self) -> None:
        self._beat_s = time.monotonic()
        self.send(protocol.BEAT, self._beat_s)

    def hear(self, link: protocol.Link) -> None:
        """Take in what has come over its link."""
        for kind, value in link.receive():
            if kind == protocol.OUTPUT:
                shown = functools.partial(link.send, protocol.ACK, len(value) - 2)
                self._screen.show(value[0], value[2:], bool(value[1]), shown)
            elif kind == protocol.BEAT:
                theirs_s, sent_s = value
                now_s = time.monotonic()
                self._clock = min(self._clock, (now_s - sent_s, theirs_s - (now_s + sent_s) / 2))
            elif kind == protocol.TELL and not self.found.facts:
                self._take(value)
            elif kind == protocol.TELL:
                self.told = value
            elif kind == protocol.ERROR:
                self._fail(str(value))
            elif kind == protocol.SIGNAL:
                if self._outcome.interrupted_by is None and self._give_up_s == math.inf:
                    self._outcome.interrupted_by = value
            else:
                self._outcome.hear(kind, value, self.host, self._clock[1])
                self._is_closed |= kind == CLOSED

    def _fail(self, why: str) -> None:
        """The node itself: it was lost, or could not start its ranks."""
        assert self.link is not None
        self.lost = why
        self._outcome.lost.append(RankEnd(-1, 1, self.link.heard_s, host=self.host, lost=why))

    def turn(self) -> float | None:
        """Send a beat where one is due, and notice a loss."""
        silent_s = time.monotonic() - (self.link.heard_s if self.link is not None else 0.0)
        if time.monotonic() - self._beat_s >= protocol.BEAT_S:
            self._send_beat()
        is_silent = silent_s > protocol.SILENCE_S and bool(
            self.found.facts
        )  # it looks at itself: --start_timeout ends that
        if self.link is not None and not self.is_done and (self.link.closed or is_silent):
            why = "its connection closed" if self.link.closed else f"no word from it for {silent_s:.1f} s"
            self.link.closed = True
            self._fail(f"it was lost ({why})")
            self._outcome.gone.append(self.host)
        return protocol.BEAT_S

    def signal(self, number: int) -> None:
        """Hand it to the ranks there; their terminal's size stays what it was."""
        if number == signal.SIGCONT and self.link is not None:
            self.link.heard_s = time.monotonic()  # while we were stopped nobody listened
        if number != signal.SIGWINCH:
            self.send(protocol.SIGNAL, int(number))

    def end(self, number: int, grace_s: float) -> None:
        """End the ranks there."""
        self._give_up_s = min(self._give_up_s, time.monotonic() + grace_s + _KILL_S)
        self.send(protocol.END, [int(number), grace_s])

    def close(self, status: int) -> None:
        """Tell the agent how all has ended."""
        self.send(protocol.CLOSE, status)


class RemoteCluster(Cluster):
    """A cluster whose nodes are reached over links.

    Args:
        options: what all ranks get.
        hosts: each node's name and slots.
        key: what agents that connect must know; "" with ssh, whose pipes are theirs alone.
        listener: where they connect; None with ssh.
    """

    def __init__(
        self,
        options: LaunchOptions,
        hosts: Hosts,
        key: str,
        listener: socket.socket | None,
        loop: Loop,
        screen: Screen,
    ) -> None:
        outcome = Outcome(0)
        self.nodes = [RemoteNode(host, slots, options, screen, outcome) for host, slots in hosts.items()]
        super().__init__(self.nodes, loop, screen, outcome)
        self._key, self._listener = key, listener
        self._starters: list[tuple[int | None, HostProcess]] = []  # with the one node whose link it is
        self._links: dict[protocol.Link, str] = {}  # connected -> the nonce it was given

    # Meeting

    def gather(self, launches: Sequence[Launch], limit_s: float) -> None:
        """Start the agents and return when each has said what it is, or why not (`found.error`) is known."""
        for launch in launches:
            self._start(launch)
        if self._listener is not None:
            self._loop.watch(self._listener.fileno(), self._accept)
        connects = self._listener is not None

        def silent() -> list[RemoteNode]:
            return [node for node in self.nodes if not node.found.facts and not self._has_failed(node)]

        self._await(lambda: not silent(), min(limit_s, _NOTICE_S))
        if limit_s > _NOTICE_S and silent():
            hint = (
                "; each must be able to connect to this machine (firewall), as must mpirun's daemons"
                if connects
                else ""
            )
            names = ", ".join(node.host for node in silent())
            logger.warning(
                "no word yet from %s, %.0f s are left for it%s", names, limit_s - _NOTICE_S, hint, extra=EVERY_RANK
            )
            self._await(lambda: not silent(), limit_s - _NOTICE_S)
        for node in self.nodes:
            if not node.found.facts and not node.found.error:
                why = (
                    ("no connection from it" if connects else "no answer")
                    if node.link is None
                    else "it answers, but its --venv_script has not ended"
                )
                node.found = replace(node.found, error=f"{why} in {limit_s:.0f} s")

    def _start(self, launch: Launch) -> None:
        """Start a process that starts agents, and show what it, or an agent, says."""
        tag = f"[{self.nodes[launch.node].host}] ".encode() if launch.node is not None else b""

        def write(_: int, lines: bytes) -> None:
            self._screen.show(2, b"".join(tag + line for line in lines.splitlines(True)))

        try:
            starter = HostProcess(launch.argv, self._loop, write, launch.env, is_link=launch.node is not None)
        except OSError as error:
            raise LaunchError(f"cannot start {launch.argv[0]}: {error.strerror}") from error
        self._starters.append((launch.node, starter))
        if launch.node is not None:  # over the process's own pipes
            theirs, ours = starter.process.stdin, starter.process.stdout
            assert theirs is not None and ours is not None
            self._challenge(os.dup(ours.fileno()), os.dup(theirs.fileno()))

    def _has_failed(self, node: RemoteNode) -> bool:
        """Whether the process that should have started this node's agent has gone, or says that it could not."""
        index = self.nodes.index(node)
        own = next((starter for number, starter in self._starters if number in (None, index)), None)
        if own is None:
            return False
        said = own.last_words.decode(errors="replace")
        reason = reason_for(node.host, said)
        if not reason and (own.process.poll() is None or own.is_open):
            return False
        others = [other.host for other in self.nodes if reason_for(other.host, said)]
        reason = reason or (f"given up because of {', '.join(others)}" if others else last_line(said))
        node.found = replace(node.found, error=reason or f"its starter ended with {own.process.returncode}")
        return True

    def _accept(self) -> None:
        assert self._listener is not None
        self._challenge(self._listener.accept()[0].detach())

    def _challenge(self, *fds: int) -> None:
        link = protocol.Link(self._loop, self._hear, *fds)
        self._links[link] = protocol.new_secret()
        link.send(protocol.CHALLENGE, self._links[link])

    def _hear(self, link: protocol.Link) -> None:
        node = next((node for node in self.nodes if node.link is link), None)
        if node is not None:
            node.hear(link)
            return
        hello = next((value for kind, value in link.receive() if kind == protocol.HELLO), None)
        node = self._recognise(hello, self._links[link])
        if hello is not None and node is not None:
            link.send(protocol.WELCOME, protocol.proof(self._key, hello["nonce"], "launcher"))
            node.join(link)
        elif hello is not None or link.closed:
            del self._links[link]
            link.close()

    def _recognise(self, hello: Any, nonce: str) -> RemoteNode | None:
        """Who knows the key is the node that its starter named; under MPI and Slurm, the one with its host's name."""
        if not isinstance(hello, dict) or hello.get("proof") != protocol.proof(self._key, nonce, "node"):
            return None
        index = hello["index"]
        by_name = [node for node in self.nodes if bare(node.host) in hello["names"] and not hello["is_told"]]
        by_index = [self.nodes[index]] if index is not None and index < len(self.nodes) else []
        return next((node for node in (*by_name, *by_index) if node.link is None), None)

    def meet(self, port: int | None, address: str, is_checked: bool) -> tuple[str, int, str]:
        """Where ranks will meet: (address, port, a line to say if it is not what was expected).

        Raises:
            LaunchError: the port is taken, or a node does not answer.
        """
        first = self.nodes[0]
        told = self._ask([first], {"port": port})[0]
        if "fault" in told:
            raise LaunchError(f"{first.host}: {told['fault']}")
        candidates = [address] if address else list(dict.fromkeys([bare(first.host), *first.found.facts["addresses"]]))
        if not is_checked:
            return candidates[-1], told["port"], told["note"]
        answers = self._ask(self.nodes, {"reach": told["port"], "addresses": candidates})
        best = max(candidates, key=lambda name: sum(name in answer["reached"] for answer in answers))
        for node, answer in zip(self.nodes, answers):
            why = answer["failed"].get(best, "")
            node.found = replace(node.found, reached=best in answer["reached"], unreached=why)
        # The address that the others have found under a name: on the first node it may be a loopback one.
        seen = {answer["reached"].get(best) for answer in answers[1:]} & set(first.found.facts["addresses"])
        return seen.pop() if len(seen) == 1 else best, told["port"], told["note"]

    def _ask(self, nodes: Sequence[RemoteNode], question: dict[str, Any]) -> list[dict[str, Any]]:
        for node in nodes:
            node.ask(question)
        self._await(lambda: all(node.told is not None or node.lost for node in nodes), 2 * protocol.SILENCE_S)
        for node in nodes:
            if node.told is None:
                raise LaunchError(f"{node.host} was lost before the start: {node.lost or 'it does not answer'}")
        return [node.told or {} for node in nodes]

    def _await(self, done: Callable[[], bool], limit_s: float) -> None:
        self.until(done, limit_s)
        if self.outcome.interrupted_by is not None:
            raise KeyboardInterrupt

    # Working

    def assign(self, assignments: Sequence[Assignment]) -> None:
        """Hand out the jobs."""
        self.outcome.begin(assignments[0].world_size)
        terminals = {stream: size.hex() for stream, size in self._screen.terminals.items()}
        job = {"terminals": terminals, "colour": self._screen.has_colour, "salt": protocol.new_secret()}
        for node, assignment in zip(self.nodes, assignments):
            told = {name: value for name, value in asdict(assignment).items() if name != "secret"}
            node.send(protocol.JOB, {**job, "assignment": told})

    def close(self, status: int) -> None:
        """Let the agents go, and kill what started them if it stays."""
        super().close(status)

        def are_told() -> bool:
            is_sent = all(link.waits_for is None for link in self._links)
            return is_sent and all(starter.process.poll() is not None for _, starter in self._starters)

        self.until(are_told, _KILL_S if self.outcome.num_ranks else 1.0)
        for _, starter in self._starters:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(starter.process.pid, signal.SIGKILL)
            starter.process.wait()
            starter.close()
        for link in self._links:
            link.close()
        if self._listener is not None:
            self._loop.forget(self._listener.fileno())
            self._listener.close()


def run(options: LaunchOptions, hosts: Hosts, attempt: int, loop: Loop, screen: Screen) -> Outcome | None:
    """Start a training on these machines: how it went; None if it was only to be checked, and is well.

    Raises:
        NotReadyError: it did not start.
    """
    launches, key, listener = _way_in(options, hosts)
    cluster, status = RemoteCluster(replace(options, cwd=os.getcwd()), hosts, key, listener, loop, screen), 1
    try:
        cluster.gather(launches, options.start_timeout)
        is_to_run = _is_ready(cluster, options, attempt, screen)
        outcome = cluster.run() if is_to_run else None
        status = outcome.exit_status if outcome else 0
        return outcome
    except KeyboardInterrupt:  # while machines were still being asked
        status = cluster.outcome.exit_status
        return cluster.outcome
    except LaunchError as error:
        gone = [node.host for node in cluster.nodes if node.lost or not node.found.facts]
        raise NotReadyError(str(error), gone) from error
    finally:
        cluster.close(status)


def _is_ready(cluster: RemoteCluster, options: LaunchOptions, attempt: int, screen: Screen) -> bool:
    """Judge what the machines have said, and hand out the jobs; False if it was only to be checked."""
    address, port, note = "", 0, ""
    if all(node.found.facts for node in cluster.nodes):
        address, port, note = cluster.meet(options.master_port, options.master_addr, not options.no_check)
    found = [node.found for node in cluster.nodes]
    rows = check(found, address, by_hand=options.no_ssh)
    bad = [row for row in rows if row.status == BAD and (not options.no_check or row.name == "reached")]
    if bad or options.check:
        screen.write(table(rows, 2 in screen.terminals and screen.has_colour) + "\n")
    if bad:
        names = ", ".join(dict.fromkeys(row.section for row in bad))
        skip = "" if any(row.name == "reached" for row in bad) else "; --no_check starts all the same"
        raise LaunchError(f"{names}: not ready, nothing was started (see the table above{skip})")
    if options.check:
        logger.info(
            "%s ready", f"all {len(found)} machines are" if len(found) > 1 else "the machine is", extra=EVERY_RANK
        )
        return False
    assignments = assign_ranks(found, address, port, attempt)
    if note:
        logger.info(note, extra=EVERY_RANK)
    for row in rows:
        if row.status == WARN:
            logger.warning("%s: %s: %s; %s", row.section, row.name, row.value, row.remedy, extra=EVERY_RANK)
    for node in found:
        if node.devices.ids and node.devices.value is not None:
            logger.info("%s: %s", node.host, node.devices.used(node.slots or ()), extra=EVERY_RANK)
    ranks, machines = counted(assignments[0].world_size, "rank"), counted(len(found), "machine")
    logger.info("%s on %s, meeting at %s:%d", ranks, machines, address, port, extra=EVERY_RANK)
    cluster.assign(assignments)
    return True


def _backend(options: LaunchOptions, hosts: Hosts) -> Backend:
    """What was asked for; for this machine alone, which may have no ssh and no sshd, the one that needs none there."""
    is_near = options.launcher is None and all(map(is_here, hosts))
    return BACKENDS["ssh"] if is_near else find_backend(options.launcher, hosts)


def _way_in(options: LaunchOptions, hosts: Hosts) -> tuple[list[Launch], str, socket.socket | None]:
    """What starts the agents, the key by which they are known, and where they come to us; None with ssh.

    Without ssh it is only node 0's that is started here; the others join.
    """
    if options.no_ssh:
        try:
            listener = listen(_control_port(options), backlog=1024)
        except OSError as error:
            raise LaunchError(
                f"port {_control_port(options)}, where nodes join, cannot be used: {error.strerror}"
            ) from error
        return _launches(options, hosts, "", ""), os.environ.get(KEY, ""), listener
    if _backend(options, hosts).by_pipes:
        return _launches(options, hosts, "", ""), "", None
    key, listener = protocol.new_secret(), listen(0, backlog=1024)
    own = ",".join([*addresses(), "127.0.0.1"])
    return _launches(options, hosts, f"{own}:{listener.getsockname()[1]}", key), key, listener


def _launches(options: LaunchOptions, hosts: Hosts, connect_to: str, key: str) -> list[Launch]:
    path = os.pathsep.join(os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)
    here = frozenset(host for host in hosts if is_here(host))
    keys = {KEY: key} if key else {}
    reach = Reach(list(hosts), here, connect_to, keys, options.ssh_port, shlex.split(options.launcher_args), path)
    if options.no_ssh:
        return [Launch(reach.agent("--index", "0"), node=0)]
    return _backend(options, hosts).launches(reach)


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
    logger.info("node %d: joining node 0 at %s:%d", index, options.master_addr, port, extra=EVERY_RANK)
    found = connect([options.master_addr], port, max(options.start_timeout, 600.0))
    with Loop() as loop:
        return AgentSession(loop, [found.detach()], index, options).run()


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
    names = list(hosts)
    found = [Found(host, slots if slots is not None else [0]) for host, slots in hosts.items()]
    assignments = assign_ranks(found, options.master_addr or bare(names[0]), options.master_port or DEFAULT_PORT, 0)
    rows = [("node", "ranks", "slots")]
    for one in assignments:
        known = ",".join(map(str, one.slots)) if hosts[one.host] else "as many as it has devices"
        rows.append((one.host, f"{one.first_rank}-{one.first_rank + len(one.slots) - 1}", known))
    lines = columns(rows)
    is_piped = options.no_ssh or _backend(options, hosts).by_pipes
    launches = _launches(options, hosts, "ADDRESS:PORT", "" if is_piped else "KEY")
    lines += [shlex.join(launch.argv) for launch in launches]
    script = rank_argv(options, "N", "python")
    names_only = " ".join(sorted(options.env)) or "none"
    return "\n".join(
        [*lines, f"each rank: {shlex.join(script)}", f"variables handed on (values not shown): {names_only}"]
    )
