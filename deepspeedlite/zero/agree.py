"""Whether the ranks have built what one engine can train: the same along its group, one model across a replica."""

from __future__ import annotations

import hashlib

import torch

from deepspeedlite.comm import Group
from deepspeedlite.errors import DistributedError
from deepspeedlite.log import logger
from deepspeedlite.zero.replica import Replica, is_model_parallel_parameter
from deepspeedlite.zero.values import full_shape, owner_of

_SHOWN = 8  # names in a message


def all_state(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name."""
    return [*model.named_parameters(), *model.named_buffers()]


def check_model(model: torch.nn.Module, group: Group, replica: Replica) -> None:
    """Compare the ranks' models. Collective over both groups.

    Raises:
        DistributedError: models of a data-parallel group differ in a parameter's or buffer's name, shape or dtype, or
            `zero.Init` has sharded parameters over other ranks than those; on every rank of the world the same.
    """
    mine = _differences(model, group) or _sharded_elsewhere(model, group)
    problems = [problem for problem in replica.group.all_gather_objects(mine) if problem]
    if problems:
        raise DistributedError(problems[0])
    _warn_of_unmarked(model, replica)


def _differences(model: torch.nn.Module, group: Group) -> str:
    """How models of the group's ranks differ, the same on all of them; empty if they do not."""
    mine = [f"{name} {tuple(full_shape(t))} {t.dtype}" for name, t in all_state(model)]
    digest = hashlib.sha256("\n".join(mine).encode()).hexdigest()
    digests = group.all_gather_objects(digest)
    if len(set(digests)) == 1:
        return ""
    everyone: list[list[str]] = group.all_gather_objects(mine)
    other = next(rank for rank, theirs in enumerate(everyone) if theirs != everyone[0])
    ours, theirs = set(everyone[0]), set(everyone[other])
    first, second = group.ranks[0], group.ranks[other]
    return (
        f"the model of rank {second} differs from rank {first}'s: only rank {first} has {sorted(ours - theirs)[:3]}, "
        f"only rank {second} has {sorted(theirs - ours)[:3]} (or the order differs); build the same model on every rank"
    )


def _sharded_elsewhere(model: torch.nn.Module, group: Group) -> str:
    for name, param in model.named_parameters():
        owner = owner_of(param)
        if owner is not None and owner.group.ranks != group.ranks:
            return (
                f"zero.Init has sharded {name} over ranks {owner.group.ranks}, and the data-parallel group of "
                f"initialize is {group.ranks}; give zero.Init(mpu=...) the same mpu"
            )
    return ""


@torch.no_grad()
def _warn_of_unmarked(model: torch.nn.Module, replica: Replica) -> None:
    """Warn of parameters that are taken for copies of what all tensor-parallel ranks hold, and are none.

    A piece of a split parameter that nobody has marked would be counted from one rank only, in every norm.
    """
    if replica.tensor.size == 1:
        return
    mine = {
        name: (tuple(param.shape), param.sum().item(), torch.linalg.vector_norm(param).item())
        for name, param in model.named_parameters()
        if owner_of(param) is None and not is_model_parallel_parameter(param) and param.is_floating_point()
    }
    everyone = replica.tensor.all_gather_objects(mine)
    unlike = [name for name, value in mine.items() if any(theirs.get(name) != value for theirs in everyone)]
    if unlike and replica.tensor.rank == 0:
        more = f" and {len(unlike) - _SHOWN} more" if len(unlike) > _SHOWN else ""
        logger.warning(
            "tensor-parallel ranks %s differ in parameters that are not marked as pieces, and that norms "
            "count from one rank: %s%s; mark pieces with param.tensor_model_parallel = True, start copies alike",
            *(replica.tensor.ranks, ", ".join(unlike[:_SHOWN]), more),
        )
