"""MVAPICH2's mpirun (hydra). Its commands are checked as text only: no package of it is at hand."""

from deepspeedlite.launcher.backends import Launch, Reach, hydra

PROGRAMS = ("mpirun",)


def launches(reach: Reach) -> list[Launch]:
    """One agent per node, in the hosts' order, not pinned to a part of it."""
    return hydra(reach, PROGRAMS, MV2_ENABLE_AFFINITY="0")
