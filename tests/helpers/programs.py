"""Programs that tests need, each asked for here by its name: where it is missing, the test skips and says so.

    pytestmark = needs("pdsh")               # or over a test, or a parameter's `marks`
    compiler = program("c++")                # in a fixture or a test: where it is

The mark is looked at when a test is to run, and never when it is collected: that asks for nothing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest

# What brings a program on Debian, where the package is not called like it.
PACKAGES = {
    "c++": "g++", "g++": "g++", "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "clang++-19": "clang-19",
    "ninja": "ninja-build", "qemu-aarch64-static": "qemu-user-static", "nvcc": "nvidia-cuda-toolkit",
    "ip": "iproute2", "bridge": "iproute2", "ss": "iproute2", "ps": "procps", "mount": "mount",
    "mkfs.ext4": "e2fsprogs",
    "ssh": "openssh-client", "ssh-keygen": "openssh-client", "sshd": "openssh-server",
    "mpirun.openmpi": "openmpi-bin", "mpirun.mpich": "mpich", "mpiexec.hydra": "mpich",
    "srun": "slurm-client", "sinfo": "slurm-client", "slurmctld": "slurmctld", "slurmd": "slurmd", "munged": "munge",
    "docker": "docker.io", "pdsh": "pdsh", "hipcc": "hipcc", "fio": "fio", "mmdebstrap": "mmdebstrap",
    "docker-registry": "docker-registry", "sudo": "sudo", "setpriv": "util-linux",
}  # fmt: skip
ALIASES = {"c++": ("c++", "g++", "clang++"), "ninja": ("ninja", "ninja-build")}  # the first that is there will do


def search_path() -> str:
    """PATH, and where the system's own daemons are, which is not on everybody's."""
    return f"{os.environ.get('PATH', '/usr/bin')}:/usr/sbin:/sbin"


def find(name: str) -> str | None:
    """Where the program is."""
    path = search_path()
    return next(filter(None, (shutil.which(alias, path=path) for alias in ALIASES.get(name, (name,)))), None)


def missing(*names: str) -> str | None:
    """The reason to skip what needs these; None where all are there."""
    for name in names:
        if find(name) is None:
            return f"needs {name} (Debian's package {PACKAGES.get(name, name)})"
    return None


def program(name: str) -> str:
    """Where it is; the calling test skips without it."""
    found = find(name)
    if found is None:
        pytest.skip(missing(name) or name)
    return found


def needs(*names: str, unless: Callable[[], str | None] = lambda: None) -> pytest.MarkDecorator:
    """Skip the test by the name of the first of these programs that is missing, or for the reason that `unless` has."""
    unknown = [name for name in names if name not in PACKAGES]
    assert not unknown, f"name the package of {unknown} in helpers/programs.py"
    return pytest.mark.needs(*names, unless=unless)


def reason_to_skip(item: pytest.Item) -> str | None:
    """What an item's marks ask for in vain."""
    marks = list(item.iter_markers("needs"))
    if reason := missing(*(name for mark in marks for name in mark.args)):
        return reason
    return next(filter(None, (mark.kwargs["unless"]() for mark in marks)), None)
