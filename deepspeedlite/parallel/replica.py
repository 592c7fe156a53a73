"""What one copy of the model is spread over: the replica, and how a Megatron-style `mpu` object tells of it.

    world            data-parallel groups ->      a rank averages gradients, and shards states, with its row; all of a
    replica    |     0  2  4  6    of part 0      replica (a column) must skip the same steps and clip by one norm, that
    of ranks   v     1  3  5  7    of part 1      of the whole model.

Without model parallelism a replica is one process, and everything here is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from deepspeedlite.comm import Group, Observer
from deepspeedlite.runtime.errors import DistributedError

_DATA = ("get_data_parallel_group",)
_MODEL = ("get_model_parallel_group", "get_tensor_model_parallel_group")
_TENSOR = ("get_tensor_model_parallel_group", "get_slice_parallel_group")
_PIPELINE_SIZES = ("get_pipeline_model_parallel_world_size", "get_pipe_parallel_world_size")


@dataclass(frozen=True)
class Replica:
    """The ranks that together hold one copy of the model; by default this process alone.

    A parameter is one of three things to a rank: a piece of one that is split over `tensor` (marked
    `tensor_model_parallel` or, by older scripts, `model_parallel`), a copy of what all ranks of `tensor` hold alike, or
    one that this rank alone has, as every one is where `tensor` is one rank. A copy of what another rank of the
    replica holds outside its `tensor` (layers tied over pipeline stages) is marked `ds_pipe_replicated`.
    """

    group: Group = field(default_factory=Group.alone)
    tensor: Group = field(default_factory=Group.alone)
    # In a checkpoint, parameters of one name on two ranks of a replica are one parameter, unless there are `parts` that
    # keep theirs apart: then this rank's names begin with `name_prefix`, and it can only be loaded by equally many.
    part: int = 0
    parts: int = 1

    @property
    def name_prefix(self) -> str:
        """What this rank's parameters and buffers are called in a checkpoint, before their names in the module."""
        return f"mp_rank_{self.part:02d}." if self.parts > 1 else ""

    def counts(self, param: torch.Tensor) -> bool:
        """Whether a norm of the whole model takes a parameter from this rank: from one rank of a replica it does."""
        if getattr(param, "ds_pipe_replicated", False):
            return False
        return self.tensor.rank == 0 or is_model_parallel_parameter(param)


class Tie(NamedTuple):
    """A module of which several ranks of a replica have a copy each, such as embedding and head of a pipeline."""

    key: str
    module: torch.nn.Module
    group: Group  # the ranks that have one
    is_first: bool  # whether this rank's copy is the one that counts in norms and gives the values at the start

    def holds(self, param: torch.Tensor) -> bool:
        """Whether a parameter is of the module."""
        return any(param is own for own in self.module.parameters())


def is_model_parallel_parameter(p: torch.Tensor) -> bool:
    """Whether a parameter is one rank's piece of a tensor-parallel one, as Megatron marks it."""
    return bool(getattr(p, "model_parallel", False) or getattr(p, "tensor_model_parallel", False))


def groups_of(mpu: Any, observer: Observer | None = None) -> tuple[Group, Replica]:
    """The data-parallel group and the replica, as a Megatron-style object of any age tells them. Collective.

    Args:
        mpu: has `get_data_parallel_group()` and, where a model is spread over ranks, `get_model_parallel_group()` or
            `get_tensor_model_parallel_group()`; both, where there is pipeline parallelism too. None: every rank is data
            parallel.
        observer: of the groups' collectives.

    Raises:
        DistributedError: a method is missing, or the groups do not make up the world; the same on every rank.
    """
    if mpu is None:
        return Group(observer=observer), Replica()
    found: list[tuple[Group, Replica]] = []
    problem = ""
    try:
        found.append(_read(mpu, observer))
    except DistributedError as error:
        problem = str(error)
    problems = [(rank, told) for rank, told in enumerate(Group().all_gather_objects(problem)) if told]
    if problems:
        raise DistributedError(f"rank {problems[0][0]}: {problems[0][1]}")
    return found[0]


def replica_of(mpu: Any, observer: Observer | None = None) -> Replica:
    """The replica that a Megatron-style object tells of.

    Raises:
        DistributedError: a method is missing, or its groups contradict each other.
    """
    model = _group(mpu, _MODEL, observer, needed=_model_size(mpu) > 1) or Group.alone()
    stages = _size(mpu, _PIPELINE_SIZES)
    tensor = (_group(mpu, _TENSOR, observer) or Group.alone()) if stages > 1 else model
    if not set(tensor.ranks) <= set(model.ranks):
        raise DistributedError(
            f"the mpu's tensor-parallel group {tensor.ranks} is no part of its model-parallel group {model.ranks}"
        )
    return Replica(model, tensor, part=model.rank, parts=model.size)


def _read(mpu: Any, observer: Observer | None) -> tuple[Group, Replica]:
    data = _group(mpu, _DATA, observer) or Group(observer=observer)
    replica = replica_of(mpu, observer)
    model, world = replica.group, Group()
    if set(data.ranks) & set(model.ranks) != {world.rank} or data.size * model.size != world.size:
        raise DistributedError(
            f"the mpu's groups do not make up the world of {world.size} ranks: the data-parallel group is {data.ranks} "
            f"and the model-parallel group {model.ranks}; data-parallel size x model-parallel size must be the world "
            "size, and this rank alone in both (context, sequence and expert parallelism are not in this release)"
        )
    return data, replica


def _group(mpu: Any, methods: Sequence[str], observer: Observer | None, needed: bool = True) -> Group | None:
    """The group that the first of these methods gives; None where it gives none."""
    method = _first(mpu, methods)
    if method is None and not needed:
        return None
    if method is None:
        whose = getattr(mpu, "__name__", type(mpu).__name__)  # Megatron's is a module
        raise DistributedError(
            f"mpu ({whose}) has no method {' or '.join(f'{name}()' for name in methods)}; see "
            "docs/model-parallelism.md for what is asked of it"
        )
    group = getattr(mpu, method)()
    if group is None:
        return None
    if dist.get_rank(group) < 0:
        raise DistributedError(f"rank {dist.get_rank()} is not in the group that its own mpu.{method}() gives")
    return Group(group, observer)


def _model_size(mpu: Any) -> int:
    names = ("get_model_parallel_world_size", "get_tensor_model_parallel_world_size")
    return max(_size(mpu, (name,)) for name in names)


def _size(mpu: Any, methods: Sequence[str]) -> int:
    method = _first(mpu, methods)
    return 1 if method is None else int(getattr(mpu, method)())


def _first(mpu: Any, methods: Sequence[str]) -> str | None:
    return next((name for name in methods if hasattr(mpu, name)), None)
