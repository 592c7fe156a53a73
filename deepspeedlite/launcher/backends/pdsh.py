"""pdsh, one process for all nodes. It hands no stdin on, so the key stands in the nodes' `ps` until they connect."""

import os

from deepspeedlite.launcher.backends import Launch, Reach

PROGRAMS = ("pdsh",)


def launches(reach: Reach) -> list[Launch]:
    """`%n` is a node's index among those named."""
    port = f" -p {reach.ssh_port}" if reach.ssh_port is not None else ""
    theirs = os.environ.get("PDSH_SSH_ARGS_APPEND", "")
    env = {"PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": f"{theirs} -o BatchMode=yes -o ConnectTimeout=10{port}"}
    remote = reach.shell("--connect", reach.connect) + " --index %n"
    return [Launch(["pdsh", "-S", "-f", "1024", "-w", ",".join(reach.hosts), *reach.extra, remote], env)]
