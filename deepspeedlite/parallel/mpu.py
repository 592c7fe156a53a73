"""How a Megatron-style `mpu` object of any age tells of process groups: the data-parallel one, and the replica."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from deepspeedlite.comm import Group, Observer
from deepspeedlite.parallel.replica import Replica
from deepspeedlite.runtime.errors import DistributedError

_DATA = ("get_data_parallel_group",)
_MODEL = ("get_model_parallel_group", "get_tensor_model_parallel_group")
_TENSOR = ("get_tensor_model_parallel_group", "get_slice_parallel_group")
_PIPELINE_SIZES = ("get_pipeline_model_parallel_world_size", "get_pipe_parallel_world_size")


def groups_of(mpu: Any, observer: Observer | None = None) -> tuple[Group, Replica]:
    """The data-parallel group and the replica, as a Megatron-style object of any age tells them. Collective.

    Args:
        mpu: has `get_data_parallel_group()` and, where a model is spread over ranks, `get_model_parallel_group()` or
            `get_tensor_model_parallel_group()`; both, where there is pipeline parallelism too.
        observer: of the groups' collectives.

    Raises:
        DistributedError: a method is missing, or the groups do not make up the world; the same on every rank.
    """
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
