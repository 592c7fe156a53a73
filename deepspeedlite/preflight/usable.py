"""Whether an engine can train a model with the optimizer that it was given, asked before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from deepspeedlite.runtime.errors import OptimizerError, UnsupportedError
from deepspeedlite.runtime.log import logger
from deepspeedlite.zero.flat_params import full_shape
from deepspeedlite.zero.plan import ShardingPlan
from deepspeedlite.zero.wrap import NamedParameter

_SHOWN = 5  # names in a message
_Groups = Sequence[Sequence[torch.Tensor]]


def refuse_unusable_modules(model: torch.nn.Module, plan: ShardingPlan) -> None:
    """Raise for modules whose parameters an engine cannot take over.

    Raises:
        UnsupportedError: a lazy module that has not seen a batch; a scripted one where hooks are needed; a DTensor.
    """
    for name, module in model.named_modules():
        where = name or "the model"
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if isinstance(tensor, (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer)):
                raise UnsupportedError(
                    f"{where} is a {type(module).__name__} whose {key} has no shape yet: lazy modules get theirs from "
                    "the first batch; call the model on one before initialize (or build the module with its sizes)"
                )
            if hasattr(tensor, "device_mesh"):  # of a class that takes long to import
                raise UnsupportedError(
                    f"{where}'s {key} is a DTensor, and an engine trains plain tensors alone: give initialize the "
                    "module as it was before parallelize_module or fully_shard; it trains what a Megatron-style mpu "
                    "has split"
                )
        scripted = isinstance(module, torch.jit.ScriptModule)
        if scripted and (module is model or (plan.shard_params and any(True for _ in module.parameters()))):
            raise UnsupportedError(
                f"{where} was compiled by torch.jit (script, trace or load), and its compiled code passes over the "
                "hooks of the engine; give initialize the Python module that was compiled"
                + ("" if module is model else ", or use stage 0, 1 or 2")
            )


def refuse_unusable_parameters(trained: Sequence[NamedParameter]) -> None:
    """Raise for parameters that cannot be trained.

    Raises:
        UnsupportedError: two share memory without being the same parameter, or one is complex or not dense.
    """
    owner: dict[int, str] = {}
    for name, param, _ in trained:
        if param.is_complex():
            raise UnsupportedError(
                f"parameter {name} is {param.dtype}; only real numbers can be trained: hold it as torch.view_as_real"
            )
        if param.layout is not torch.strided:
            raise UnsupportedError(f"parameter {name} has layout {param.layout}; only dense parameters can be trained")
        if param.numel() == 0:
            continue
        address = param.data_ptr()
        if address in owner:
            raise UnsupportedError(
                f"parameters {owner[address]} and {name} share memory without being the same Parameter; tie them by "
                "assigning one Parameter to both modules"
            )
        owner[address] = name


def check_trains(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, groups: _Groups) -> None:
    """Raise if the optimizer would train nothing of the model.

    Raises:
        OptimizerError: none of its parameters is one of the model's.
    """
    given = [param for group in groups for param in group]
    if optimizer is None or not given or not set(given).isdisjoint(model.parameters()):
        return
    shapes = ", ".join(str(tuple(full_shape(param))) for param in given[:_SHOWN])
    names = ", ".join(name for name, _ in list(model.named_parameters())[:_SHOWN])
    raise OptimizerError(
        f"{type(optimizer).__name__} holds {len(given)} parameters (shapes {shapes}{' ...' if given[_SHOWN:] else ''}) "
        f"and none of them is the model's ({names}{' ...' if names else ''}): it would train nothing. Build it, or "
        "model_parameters, from model.parameters() of the model that initialize is given, after the last change of "
        "its parameters (a copy, a wrapper that replaces them); and build a new one for every initialize, since an "
        "engine keeps the one that it is given"
    )


def warn_left_out(model: torch.nn.Module, known: Iterable[torch.Tensor], groups: _Groups) -> None:
    """Warn of parameters that require grad and that no optimizer trains.

    Args:
        model: the model.
        known: parameters of an optimizer's groups, of this engine or of one that trains the others.
        groups: this optimizer's groups.
    """
    seen, here = set(known), set(model.parameters())
    left_out = [name for name, param in model.named_parameters() if param.requires_grad and param not in seen]
    if not left_out:
        return
    more = f" and {len(left_out) - _SHOWN} more" if len(left_out) > _SHOWN else ""
    foreign = sum(param not in here for group in groups for param in group)
    logger.warning(
        "%d parameters require grad but belong to no optimizer group; they are not trained: %s%s",
        len(left_out),
        ", ".join(left_out[:_SHOWN]) + more,
        f" (and {foreign} that the optimizer holds are not in the model: was it built before they were replaced?)"
        if foreign
        else "",
    )
