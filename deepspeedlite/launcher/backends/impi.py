"""Intel MPI's mpirun. Its commands are checked as text only: it is not free to install here."""

from deepspeedlite.launcher.backends import Launch, Reach, hydra

PROGRAMS = ("mpirun",)


def launches(reach: Reach) -> list[Launch]:
    """One agent per node, in the hosts' order, not pinned to a part of it."""
    return hydra(reach, PROGRAMS, I_MPI_PIN="0")
