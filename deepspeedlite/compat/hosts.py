"""The launcher's functions that scripts import from `deepspeed.launcher.runner`: hostfiles, and choosing from them.

`EXPORT_ENVS` is the launcher's own list of prefixes: variables whose names begin with one are passed to all machines.
So a script that appends to it before it calls `main` has an effect.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from deepspeedlite.launcher.hostfile import read_hostfile, select
from deepspeedlite.launcher.plan import EXPORT_ENVS
from deepspeedlite.runtime.errors import LaunchError
from deepspeedlite.runtime.log import logger


class HostsError(LaunchError, ValueError):
    """A hostfile, or a choice from it, is wrong: what DeepSpeed raises a ValueError for."""


def fetch_hostfile(hostfile_path: str | os.PathLike[str]) -> OrderedDict[str, int] | None:
    """Host -> slots, in the file's order; None where there is no such file.

    Raises:
        HostsError: the file names nobody, or has lines that are wrong.
    """
    if not os.path.isfile(hostfile_path):
        logger.warning("there is no hostfile %s: this machine is used alone", hostfile_path)
        return None
    try:
        return OrderedDict(read_hostfile(hostfile_path))
    except LaunchError as error:
        raise HostsError(str(error)) from error


def parse_resource_filter(
    host_info: Mapping[str, Sequence[int]], include_str: str = "", exclude_str: str = ""
) -> Mapping[str, Sequence[int]]:
    """What `--include` leaves, or `--exclude`, of hosts and their slots: `worker-1@worker-2:0,2`. Ranges work too.

    Raises:
        HostsError: both are given, a host or slot is unknown or named twice, or nothing is left.
    """
    if not include_str and not exclude_str:
        return host_info
    try:
        return OrderedDict(select(host_info, include_str, exclude_str))
    except LaunchError as error:
        raise HostsError(str(error)) from error


def parse_inclusion_exclusion(
    resource_pool: Mapping[str, int], inclusion: str, exclusion: str
) -> Mapping[str, Sequence[int]]:
    """`parse_resource_filter` of hosts of which only the number of slots is given, as `fetch_hostfile` returns it."""
    slots = OrderedDict((host, list(range(count))) for host, count in resource_pool.items())
    return parse_resource_filter(slots, inclusion, exclusion)


__all__ = ["EXPORT_ENVS", "HostsError", "fetch_hostfile", "parse_inclusion_exclusion", "parse_resource_filter"]
