"""Slurm's srun: inside an allocation (salloc, sbatch) on its nodes, elsewhere on whole nodes that it asks for."""

import os

from deepspeedlite.launcher.backends import Launch, Reach

PROGRAMS = ("srun",)


def launches(reach: Reach) -> list[Launch]:
    """One agent per node; which task is which node is found by the node's name."""
    count = str(len(reach.hosts))
    argv = ["srun", "-N", count, "-n", count, "--ntasks-per-node=1", f"--nodelist={','.join(reach.hosts)}"]
    argv += ["--cpu-bind=none", "--input=none", "--export=ALL", "--kill-on-bad-exit=0"]
    if "SLURM_JOB_ID" not in os.environ:
        argv.append("--exclusive")
    return [Launch([*argv, *reach.extra, *reach.agent("--connect", reach.connect)], reach.variables)]
