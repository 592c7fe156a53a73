"""ssh, one connection per node at once. Its pipes are the link: only sshd's port need be open, and all is encrypted."""

from deepspeedlite.launcher.backends import Launch, Reach

PROGRAMS = ("ssh",)


def launches(reach: Reach) -> list[Launch]:
    """A connection per node; a node that is this machine needs none."""
    options = ["-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", *reach.extra]
    if reach.ssh_port is not None:
        options += ["-p", str(reach.ssh_port)]
    return [
        Launch(reach.agent("--index", str(index)), reach.variables, node=index)
        if host in reach.here
        else Launch(["ssh", *options, host, reach.shell("--index", str(index))], node=index)
        for index, host in enumerate(reach.hosts)
    ]
