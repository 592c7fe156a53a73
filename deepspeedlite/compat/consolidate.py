"""All weights of a sharded model in one place: gathered piece by piece, kept in CPU memory by one rank."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from deepspeedlite.checkpoint.train_state import EXTRA_STATE
from deepspeedlite.comm import Group
from deepspeedlite.zero.flat_params import FlatParams, owner_of


@torch.no_grad()
def consolidated_state_dict(
    module: torch.nn.Module, group: Group, exclude_frozen: bool = False
) -> dict[str, torch.Tensor] | None:
    """The module's parameters and persistent buffers, whole, in the dtype that the model computes in.

    Collective. At most one unit is whole on a rank at a time. Tied parameters share one tensor under all their names.

    Args:
        module: the model, sharded or not.
        group: the ranks that it is sharded over.
        exclude_frozen: leave out parameters that do not require grad.

    Returns:
        on rank 0 of the group a dict of CPU tensors in the order of `module.state_dict()`; None on the others.
    """
    wanted = {
        name: param
        for name, param in module.named_parameters(remove_duplicate=False)
        if param.requires_grad or not exclude_frozen
    }
    by_owner: dict[FlatParams | None, list[torch.Tensor]] = {}
    for param in {id(param): param for param in wanted.values()}.values():
        by_owner.setdefault(owner_of(param), []).append(param)
    copies: dict[int, torch.Tensor] = {}
    for owner, params in by_owner.items():
        if owner is not None:
            owner.begin_use()
        if group.rank == 0:
            copies.update({id(param): param.detach().to("cpu", copy=True) for param in params})
        if owner is not None:
            owner.end_use()
    if group.rank != 0:
        return None
    state: dict[str, torch.Tensor] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, param in part.named_parameters(recurse=False, remove_duplicate=False):
            if prefix + name in wanted:
                state[prefix + name] = copies[id(param)]
        for name, buffer in part.named_buffers(recurse=False, remove_duplicate=False):
            if name not in part._non_persistent_buffers_set:
                state[prefix + name] = buffer.detach().to("cpu", copy=True)
        if type(part).get_extra_state is not torch.nn.Module.get_extra_state:
            state[prefix + EXTRA_STATE] = part.get_extra_state()
    return state


def write_weights(state: dict[str, Any], path: Path) -> None:
    """Write with `torch.save`, under another name first and then renamed: a file of this name is always complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
