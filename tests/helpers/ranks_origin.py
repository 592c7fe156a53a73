"""What the ranks of harness.py are forked from, by multiprocessing's fork server: it imports this, once.

It takes 4 s of a processor: torch, its compiler (which torch imports as soon as an optimizer is made), and ours.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent is gone, however it went."""
    parent_pid = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


if "multiprocessing.forkserver" in sys.modules and "pytest" not in sys.modules:
    die_with_parent()  # pytest's end is the fork server's, which would wait for all ranks; its end is the ranks'
    import torch._dynamo
    import torch.distributed  # noqa: F401

    import deepspeedlite.compat
    import deepspeedlite.factory  # noqa: F401
