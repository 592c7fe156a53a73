"""The ranks that hold one model together: from the configuration's process group, its mpu, or its number of ranks."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist

from deepspeedlite.comm import Group
from deepspeedlite.comm.init import default_timeout, init_process_group
from deepspeedlite.inference.config import DeepSpeedTPConfig
from deepspeedlite.parallel.mpu import replica_of
from deepspeedlite.runtime.env import discover_world
from deepspeedlite.runtime.errors import ConfigError


class TensorGroup:
    """A group of ranks, and whether it was made here and goes with the engine.

    Args:
        asked: the section of the configuration.

    Raises:
        ConfigError: the number of ranks that it names does not divide those that there are, or is not the group's.
        DistributedError: the ranks do not meet, or an mpu has no such group.
    """

    def __init__(self, asked: DeepSpeedTPConfig) -> None:
        self._made: Any = None
        size = asked.tp_size if asked.enabled else 1
        if not asked.enabled:
            self.group = Group.alone()
        elif asked.tp_group is not None:
            self.group = _named(Group(asked.tp_group), size, asked, "tp_group")
        elif asked.mpu is not None:
            self.group = _named(replica_of(asked.mpu).tensor, size, asked, "the mpu's group")
        elif size == 1:
            self.group = Group.alone()
        else:
            self.group = self._of_size(size)

    def _of_size(self, size: int) -> Group:
        if not dist.is_initialized():
            world = discover_world(os.environ).world_size
            if world > 1:
                init_process_group()
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world % size:
            raise ConfigError(
                f"tensor_parallel.tp_size = {size}: {world} rank{'s' * (world != 1)} cannot be divided into groups of "
                f"{size}; start with deepspeedlite --num_gpus {size}, or set tp_size to a number that divides {world}"
            )
        if size == world:
            return Group()
        mine = None
        for first in range(0, world, size):  # every rank takes part in making each group
            ranks = list(range(first, first + size))
            made = dist.new_group(ranks, timeout=default_timeout())
            mine = made if dist.get_rank() in ranks else mine
        self._made = mine
        return Group(mine)

    def close(self) -> None:
        """Leave a group that was made here."""
        if self._made is not None and dist.is_initialized():
            dist.destroy_process_group(self._made)
        self._made = None


def _named(group: Group, size: int, asked: DeepSpeedTPConfig, whose: str) -> Group:
    if "tp_size" in asked.model_fields_set and size != group.size:
        raise ConfigError(f"tensor_parallel.tp_size = {size}, and {whose} has {group.size} ranks; leave tp_size out")
    return group
