"""All weights of a sharded model in one place: gathered piece by piece, kept in CPU memory by one rank.

`GivesWeights` is the part of the engine that clients ask for them.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from deepspeedlite.checkpoint.files import check_folder
from deepspeedlite.checkpoint.manifest import EXTRA_STATE
from deepspeedlite.comm import Group
from deepspeedlite.runtime.errors import CheckpointError, ConfigError, EngineStateError
from deepspeedlite.runtime.log import logger
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


class GivesWeights:
    """What an engine does with its module's weights; `_parts` are the engine's."""

    module: torch.nn.Module
    _parts: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise EngineStateError("an engine cannot be copied: copy what it trains, engine.module")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise EngineStateError("an engine cannot be pickled: save engine.module, or engine.save_checkpoint(...)")

    def module_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any]:
        """The module's `state_dict`, whole on every rank. Collective at stage 3."""
        state = self.module.state_dict()
        if exclude_frozen_parameters:
            for name, param in self.module.named_parameters(remove_duplicate=False):
                if not param.requires_grad:
                    state.pop(name, None)
        return state

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """Whether `save_16bit_model` may gather the weights at stage 3."""
        return self._parts.config.zero_optimization.stage3_gather_16bit_weights_on_model_save

    def _consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, torch.Tensor] | None:
        """The weights on the first rank of each part of the model that keeps its own names; see `zero.replica`."""
        group, replica = self._parts.group, self._parts.replica
        state = consolidated_state_dict(self.module, group, exclude_frozen_parameters)
        if state is None or replica.parts == replica.group.size:
            return state
        parts = replica.group.all_gather_objects(replica.part)
        united = None
        for part in range(replica.parts):
            held = replica.group.gather_objects(state if part == replica.part else {}, dst=parts.index(part))
            if held:
                united = {name: weight for stage in reversed(held) for name, weight in stage.items()}
        return united

    def _zero3_consolidated_16bit_state_dict(
        self, exclude_frozen_parameters: bool = False
    ) -> dict[str, torch.Tensor] | None:
        """All weights as CPU tensors on rank 0, None elsewhere; collective. The name is the one that clients call.

        Raises:
            ConfigError: at stage 3, without `stage3_gather_16bit_weights_on_model_save`.
        """
        if self._parts.plan.shard_params and not self.zero_gather_16bit_weights_on_model_save():
            raise ConfigError(
                "gathering all weights on rank 0 needs zero_optimization.stage3_gather_16bit_weights_on_model_save: "
                "true; rank 0 must have CPU memory for the whole model"
            )
        return self._consolidated_16bit_state_dict(exclude_frozen_parameters)

    def save_fp16_model(self, save_dir: str, save_filename: str = "pytorch_model.bin") -> bool:
        """An older name of `save_16bit_model`."""
        return self.save_16bit_model(save_dir, save_filename)

    def save_16bit_model(
        self, save_dir: str, save_filename: str = "pytorch_model.bin", exclude_frozen_parameters: bool = False
    ) -> bool:
        """Write the weights, in the dtype that the model computes in, to one file that `torch.load` reads. Collective.

        Model-parallel ranks write a file each, with `mp_rank_00_` and so on before its name.

        Returns:
            whether they were written: at stage 3 only where `stage3_gather_16bit_weights_on_model_save` is true.
        """
        if self._parts.plan.shard_params and not self.zero_gather_16bit_weights_on_model_save():
            logger.warning(
                "save_16bit_model wrote nothing: zero_optimization.stage3_gather_16bit_weights_on_model_save is false"
            )
            return False
        state = self._consolidated_16bit_state_dict(exclude_frozen_parameters)
        replica = self._parts.replica
        problem = ""
        if state is not None:  # so that where a rank that writes nothing was told to write does not matter
            try:
                folder = check_folder(save_dir, "save_16bit_model")
                if not os.path.basename(save_filename):
                    raise CheckpointError(f"{save_filename!r} is no file's name")
                name = f"{replica.name_prefix.replace('.', '_')}{save_filename}"
                write_weights(state, folder / name)
            except (OSError, TypeError, CheckpointError) as error:
                problem = f"{save_filename} into {save_dir}: {error}"
        problems = replica.group.all_gather_objects(self._parts.group.broadcast_object(problem))
        if any(problems):
            raise EngineStateError(f"save_16bit_model could not write {next(filter(None, problems))}")
        return True
