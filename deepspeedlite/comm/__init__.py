"""Communication between ranks: start-up, groups, and who waits for whom.

`init_process_group` starts torch.distributed wherever the process finds itself; `Group` is what the library's parts
communicate through. What scripts call by themselves, under DeepSpeed's names, is `compat.comm`'s; `deepspeedlite.comm`
serves it too, and `__init__.pyi` says so to type checkers.
"""

from __future__ import annotations

from deepspeedlite.comm.desync import whereabouts
from deepspeedlite.comm.group import Group, Observer
from deepspeedlite.comm.init import default_timeout, init_process_group
from deepspeedlite.comm.ranks import destroy_process_group, get_local_rank, get_rank, get_world_size, is_initialized
from deepspeedlite.comm.transport import Work

__all__ = [
    "Group",
    "Observer",
    "Work",
    "default_timeout",
    "destroy_process_group",
    "get_local_rank",
    "get_rank",
    "get_world_size",
    "init_process_group",
    "is_initialized",
    "whereabouts",
]
