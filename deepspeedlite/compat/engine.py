"""The engine that `initialize` returns: the core's, with the methods that scripts written for DeepSpeed call."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from deepspeedlite.checkpoint.files import check_folder
from deepspeedlite.checkpoint.formats import FORMATS
from deepspeedlite.compat.consolidate import consolidated_state_dict, write_weights
from deepspeedlite.compat.engine_accessors import EngineAccessors
from deepspeedlite.compat.offload_states import StatesAway
from deepspeedlite.compat.stage3_names import NamedOptimizer
from deepspeedlite.compat.zero_params import describe
from deepspeedlite.data.loader import DeepSpeedDataLoader
from deepspeedlite.engine import EngineParts
from deepspeedlite.optim.step import ShardedOptimizer
from deepspeedlite.runtime.errors import CheckpointError, ConfigError, EngineStateError
from deepspeedlite.runtime.log import logger

ROUTE_TRAIN = "train"


class DeepSpeedEngine(EngineAccessors):
    """A model with its optimizer, precision, accumulation and data-parallel average. Made by `initialize`.

    Attributes that the engine does not have are looked up on the wrapped `module`.
    """

    optimizer_class = NamedOptimizer
    checkpoint_formats = FORMATS

    def __init__(self, module: torch.nn.Module, parts: EngineParts) -> None:
        super().__init__(module, parts)
        self.collate_fn = parts.loading.collate_fn
        optimizer: Any = self._parts.optimizer
        self._away = StatesAway(self._reducer.units, dict) if optimizer is None else optimizer.states_away
        # Whether a script, and no count, says which micro-step is the last: every call of `step` is one then.
        self._steps_at_every_call = not parts.config.managed_gradient_accumulation
        if self._steps_at_every_call:
            self._forced_boundary = False
        if (level := self.log_level()) is not None:
            from deepspeedlite.compat.helpers import set_log_level_from_string  # with much that few ask for

            set_log_level_from_string(level)
        if parts.plan.shard_params:
            describe(module.parameters(), parts.group)
        self._checkpoints.check(self._train_state())

    def set_gradient_accumulation_boundary(self, is_boundary: bool | None) -> None:
        """Decide from outside whether the coming micro-steps are boundaries; None gives the count back its say.

        Raises:
            EngineStateError: `managed_gradient_accumulation` is false, and every call of `step` is a boundary.
        """
        if self._steps_at_every_call:
            raise EngineStateError(
                "set_gradient_accumulation_boundary with managed_gradient_accumulation: false, where engine.step() is "
                "the boundary; leave the call out, or the key"
            )
        self._forced_boundary = is_boundary

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """See `Engine.step`; with `managed_gradient_accumulation: false` every call updates the parameters."""
        if not self._steps_at_every_call:
            return super().step(lr_kwargs)
        self._forced_boundary = True
        try:
            super().step(lr_kwargs)
        finally:
            self._forced_boundary = False

    def _begin_backward(self) -> None:
        super()._begin_backward()
        if self._steps_at_every_call:
            self._losses_since_step = 0  # however many there are before a step, they are meant

    def _take_step(self, optimizer: ShardedOptimizer, lr_kwargs: dict[str, Any]) -> None:
        super()._take_step(optimizer, lr_kwargs)
        if self._steps_at_every_call:  # the samples that were, not those of the batch that the configuration names
            more = self._passes_since_step - self._batch.accumulation
            self.global_samples += more * self._batch.micro * self.dp_world_size

    @contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        """Backward passes in this context add up on every rank; leaving it averages their sum over the ranks, once.

        One context is one step: `engine.step()` comes after it. Ranks may run different numbers of passes. Whole
        gradients are kept meanwhile, also where they are sharded (stages 2 and 3). Left by an exception it averages
        nothing: `engine.zero_grad()` then forgets what has added up.

        Raises:
            EngineStateError: it is nested, in itself or in `no_sync`; (of `step`) inside it.
        """
        self._check_alive("coalesce_grad_reduction")
        with self.no_sync():
            yield
        # A pass that brings nothing, and averages what the others have left.
        self._reducer.begin_backward(1.0, True, self.optimizer is not None and self.optimizer.needs_norm)
        self._reducer.end_backward(is_shared=True)

    def compile(self, backend: str | None = None, compile_kwargs: dict[str, Any] | None = None) -> None:
        """Compile the module with `torch.compile`; at stage 3 in pieces, between the hooks that bring parameters."""
        self.module.compile(**({"backend": backend} if backend else {}), **(compile_kwargs or {}))

    def deepspeed_io(
        self,
        dataset: Any,
        batch_size: int | None = None,
        route: str = ROUTE_TRAIN,
        pin_memory: bool | None = None,
        data_sampler: Any = None,
        collate_fn: Callable[..., Any] | None = None,
        num_local_io_workers: int | None = None,
    ) -> Any:
        """A loader that gives this rank its part of `dataset`.

        Args:
            dataset: a torch map-style or iterable dataset.
            batch_size: samples per batch of this rank; the micro-batch if None.
            route: `train` shuffles; `eval` and `predict` keep the order.
            pin_memory: copy batches to page-locked memory; on a GPU by default.
            data_sampler: replaces the distributed sampler.
            collate_fn: as torch's DataLoader takes it.
            num_local_io_workers: worker processes; 0 by default.
        """
        options = replace(
            self._parts.loading,
            collate_fn=collate_fn or self.collate_fn,
            num_workers=num_local_io_workers or 0,
            pin_memory=self._parts.loading.pin_memory if pin_memory is None else pin_memory,
            shuffle=route == ROUTE_TRAIN,
        )
        group = self._parts.group
        return DeepSpeedDataLoader(
            dataset, batch_size or self._batch.micro, group.rank, group.size, options, data_sampler
        )

    # --- states away from the device --------------------------------------------------------------------------------

    def offload_states(
        self,
        include: Container[Any] | None = None,
        device: Any = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Free the device of model states until `reload_states`. Meanwhile nothing can train.

        Args:
            include: which states, by DeepSpeed's names for them; all if None.
            device: where to; only "cpu".
            pin_memory: keep them in page-locked memory.
            non_blocking: taken for DeepSpeed's sake; they have left when this returns.
        """
        self._check_alive("offload_states")
        self._away.offload(include, device, pin_memory)

    def reload_states(self, non_blocking: bool = False) -> None:
        """Bring back what `offload_states` took away."""
        self._away.reload(non_blocking)

    def _check_alive(self, what: str) -> None:
        super()._check_alive(what)
        if self._away.away is not None:
            raise EngineStateError(f"engine.{what}() after offload_states: call reload_states first")

    def destroy(self) -> None:
        """Bring back states that are away, remove the engine's hooks and close its monitors; see `Engine.destroy`."""
        if not self._destroyed:
            self._checkpoints.wait()
            self.reload_states()
        super().destroy()

    # --- all weights ------------------------------------------------------------------------------------------------

    def module_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any]:
        """The module's `state_dict`, whole on every rank. Collective at stage 3."""
        state = self.module.state_dict()
        if exclude_frozen_parameters:
            for name, param in self.module.named_parameters(remove_duplicate=False):
                if not param.requires_grad:
                    state.pop(name, None)
        return state

    def _consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, torch.Tensor] | None:
        """The weights on the first rank of each part of the model that keeps its own names; see `parallel.replica`."""
        group, replica = self._parts.group, self._parts.replica
        state = consolidated_state_dict(self.module, group, exclude_frozen_parameters)
        if state is None or replica.parts == replica.group.size:
            return state
        parts = replica.group.all_gather_objects(replica.part)
        merged = None
        for part in range(replica.parts):
            held = replica.group.gather_objects(state if part == replica.part else {}, dst=parts.index(part))
            if held:
                merged = {name: weight for stage in reversed(held) for name, weight in stage.items()}
        return merged

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
