"""Whether the ranks have built what one engine can train: the same along its group, one model across a replica.

Each comparison is one exchange of a digest; only where digests differ do the ranks send what they stand for, and all of
them raise the same error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from deepspeedlite.comm import Group
from deepspeedlite.config import DeepSpeedConfig
from deepspeedlite.config.agreement import in_words, must_agree
from deepspeedlite.parallel.replica import Replica, is_model_parallel_parameter
from deepspeedlite.runtime.errors import ConfigError, DistributedError
from deepspeedlite.runtime.log import logger
from deepspeedlite.zero.flat_params import full_shape, owner_of

_SHOWN = 8  # names in a message
_REMEDY = "give every rank the same (paths and what is logged may differ)"


def load_alike(load: Callable[[], DeepSpeedConfig], world: Group) -> DeepSpeedConfig:
    """The configuration that `load` gives, once it is known to be every rank's. Collective.

    Raises:
        ConfigError: a rank's configuration is wrong, or differs from another's in a key that must agree; on every rank.
    """
    settings, mine, wrong = None, {}, ""
    try:
        settings = load()
        mine = must_agree(settings)
    except ConfigError as error:
        wrong = str(error)
    told = world.all_gather_objects((_digest(mine), wrong))
    faults = [fault for _, fault in told]
    first = next((rank for rank, fault in enumerate(faults) if fault), None)
    if first is not None:
        alike = all(fault == faults[0] for fault in faults)
        raise ConfigError(faults[0] if alike else f"rank {world.ranks[first]}: {faults[first]}")
    difference = _first_difference(mine, [digest for digest, _ in told], world)
    if difference or settings is None:
        raise ConfigError(f"the ranks' configurations differ: {difference}; {_REMEDY}")
    return settings


def check_optimizer(
    optimizer: torch.optim.Optimizer | None,
    schedule: Any,
    named: Sequence[tuple[str, Any, int]],
    group: Group,
    replica: Replica,
) -> None:
    """Compare the optimizers that the ranks were handed or have built. Collective over both groups.

    Args:
        optimizer: its class and its groups' hyperparameters must be alike.
        schedule: one that was handed to `initialize`, or None; its class and its numbers must be alike.
        named: the parameters' names, themselves, and the groups that they are in.
        group: the data-parallel ranks.
        replica: the ranks that hold one copy of the model.

    Raises:
        ConfigError: they differ along a data-parallel group; on every rank of its replicas.
    """
    mine = {**_optimizer_facts(optimizer, named), **_schedule_facts(schedule)}
    problem = _difference(mine, group)
    problems = [told for told in replica.group.all_gather_objects(problem) if told]
    if problems:
        raise ConfigError(f"the ranks train differently: {problems[0]}; {_REMEDY}")


def _optimizer_facts(
    optimizer: torch.optim.Optimizer | None, named: Sequence[tuple[str, Any, int]]
) -> Mapping[str, str]:
    if optimizer is None:
        return {"optimizer": "none"}
    facts = {"optimizer": type(optimizer).__name__}
    for index, options in enumerate(optimizer.param_groups):
        for name, value in options.items():
            if name != "params" and not name.startswith("_"):
                facts[f"optimizer.param_groups[{index}].{name}"] = in_words(value)
    return {**facts, **{f"the optimizer's group of {name}": str(index) for name, _, index in named}}


def _schedule_facts(schedule: Any) -> Mapping[str, str]:
    if not hasattr(schedule, "state_dict"):
        return {}
    state = {f"lr_scheduler.{name}": in_words(value) for name, value in schedule.state_dict().items()}
    return {"lr_scheduler": type(schedule).__name__, **state}


def _digest(facts: Mapping[str, str]) -> str:
    return hashlib.sha256("\n".join(f"{name} {facts[name]}" for name in sorted(facts)).encode()).hexdigest()


def _difference(mine: Mapping[str, str], group: Group) -> str:
    """See `_first_difference`. Collective."""
    return _first_difference(mine, group.all_gather_objects(_digest(mine)), group)


def _first_difference(mine: Mapping[str, str], digests: Sequence[str], group: Group) -> str:
    """The first key in which ranks differ, with each value and its ranks; empty if they do not. The same on all."""
    if len(set(digests)) == 1:
        return ""
    everyone = group.all_gather_objects(dict(mine))
    names = dict.fromkeys(name for facts in everyone for name in facts)
    differing = [name for name in names if len({facts.get(name) for facts in everyone}) > 1]
    by_value: dict[str, list[int]] = {}
    for rank, facts in zip(group.ranks, everyone):
        by_value.setdefault(facts.get(differing[0], "not there"), []).append(rank)
    values = " and ".join(f"{value} on rank{_ranks(ranks)}" for value, ranks in by_value.items())
    others = ", ".join(differing[1:_SHOWN]) + (", ..." if len(differing) > _SHOWN else "")
    return f"{differing[0]} is {values}" + (f" (and so do {others})" if others else "")


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:_SHOWN]) + (", ..." if len(ranks) > _SHOWN else "")
    return f"{'s' if len(ranks) > 1 else ''} {shown}"


def check_model(model: torch.nn.Module, group: Group, replica: Replica) -> None:
    """Compare the ranks' models. Collective over both groups.

    Raises:
        DistributedError: models of a data-parallel group differ in a parameter's or buffer's name, shape, dtype or
            whether it is trained, or `zero.Init` has sharded parameters over other ranks than those; on every rank of
            the world the same.
    """
    mine = _differences(model, group) or _sharded_elsewhere(model, group)
    problems = [problem for problem in replica.group.all_gather_objects(mine) if problem]
    if problems:
        raise DistributedError(problems[0])
    _warn_of_unmarked(model, replica)


def _differences(model: torch.nn.Module, group: Group) -> str:
    """How models of the group's ranks differ, the same on all of them; empty if they do not."""
    state = [*model.named_parameters(), *model.named_buffers()]
    kinds = {name: f"{tuple(full_shape(t))} {t.dtype}{' trained' if t.requires_grad else ''}" for name, t in state}
    places = {name: f"number {place}" for place, (name, _) in enumerate(state)}
    found = _difference(kinds, group) or _difference(places, group)
    return found and f"the ranks' models differ: {found}; build the same model on every rank"


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
