"""Activation checkpointing: keep a function's inputs instead of what it computes, and compute it again in backward.

    deepspeedlite.checkpointing.configure(mpu, partition_activations=True)     once
    hidden = deepspeedlite.checkpointing.checkpoint(layer, hidden, mask)       in the model's forward pass

torch's own recomputation (without reentrant backward passes) does the work, so functions may take keywords, return
anything, be nested, and depend on no input that requires grad. What is added here: inputs may be sharded over the
model-parallel ranks, which all hold them alike, or be kept in CPU memory (`saved_inputs.py`); and every random number
is drawn again as it was, those of Megatron's tracker too (`rng.py`).

Method: Chen et al. 2016, arXiv:1604.06174; sharded and in CPU memory: Rajbhandari et al. 2020, arXiv:1910.02054, 6.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from deepspeedlite.activation_checkpointing.rng import CudaRNGStatesTracker, Generators
from deepspeedlite.activation_checkpointing.saved_inputs import InputSaver, PartBuffers, Restored
from deepspeedlite.comm import Group
from deepspeedlite.config import load_config
from deepspeedlite.metrics.comms_logger import comms_logger
from deepspeedlite.metrics.timers import Stopwatch
from deepspeedlite.runtime.device import accelerator, device_in_use
from deepspeedlite.runtime.errors import ConfigError
from deepspeedlite.runtime.log import log_dist

__all__ = [
    "CudaRNGStatesTracker",
    "checkpoint",
    "configure",
    "get_cuda_rng_tracker",
    "is_configured",
    "model_parallel_cuda_manual_seed",
    "model_parallel_reconfigure_tp_seed",
    "non_reentrant_checkpoint",
    "partition_activations_in_checkpoint",
    "reset",
    "set_num_layers",
]

_SEED_APART = 2718  # as in Megatron, so that its seeds give its numbers


@dataclass
class _Settings:
    """What `configure` was told."""

    configured: bool = False
    mpu: Any = None
    group: Group | None = None  # the model-parallel ranks
    partition: bool = False
    on_host: bool = False
    contiguous: bool = False
    number: int | None = None
    synchronize: bool = False
    profile: bool = False
    buffers: PartBuffers | None = None  # where `contiguous` puts the parts of inputs


_settings = _Settings()
_tracker = CudaRNGStatesTracker()


def configure(
    mpu_: Any,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Say how inputs are kept from now on. Arguments that are given count more than the configuration's section.

    Args:
        mpu_: a Megatron-style object with the model-parallel group, or None.
        deepspeed_config: a configuration, of which the section `activation_checkpointing` is read.
        partition_activations: each model-parallel rank keeps a part of every input; they are gathered in backward.
        contiguous_checkpointing: these parts are put into one buffer for each size, with room for `num_checkpoints` of
            them, instead of memory of their own; needs `partition_activations` and `num_checkpoints`.
        num_checkpoints: how many checkpointed calls of a forward pass wait for their backward.
        checkpoint_in_cpu: inputs on a GPU are copied to page-locked CPU memory while the forward pass goes on, and
            back before backward needs them.
        synchronize: wait for the device at both ends of every checkpointed function.
        profile: log the milliseconds of every checkpointed function, forward and backward.

    Raises:
        ConfigError: `contiguous_checkpointing` without what it needs.
    """
    section = None
    if deepspeed_config is not None:
        world = Group(mpu_.get_data_parallel_group()).size if mpu_ is not None else Group().size
        section = load_config(deepspeed_config, world_size=world, peek=True).activation_checkpointing
    given = {
        "partition": (partition_activations, "partition_activations"),
        "contiguous": (contiguous_checkpointing, "contiguous_memory_optimization"),
        "number": (num_checkpoints, "number_checkpoints"),
        "on_host": (checkpoint_in_cpu, "cpu_checkpointing"),
        "synchronize": (synchronize, "synchronize_checkpoint_boundary"),
        "profile": (profile, "profile"),
    }
    chosen: dict[str, Any] = {
        name: value if value is not None else getattr(section, key)
        for name, (value, key) in given.items()
        if value is not None or section is not None
    }
    settings = _Settings(configured=True, mpu=mpu_, group=_model_parallel_group(mpu_), **chosen)
    if settings.contiguous and not (settings.partition and settings.number):
        raise ConfigError("contiguous_checkpointing needs partition_activations and num_checkpoints")
    if settings.contiguous and settings.number:
        settings.buffers = PartBuffers(settings.number)
    vars(_settings).update(vars(settings))


def is_configured() -> bool:
    """Whether `configure` was called."""
    return _settings.configured


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, computed again in the backward pass.

    Gradients equal those of the plain call. The function may be called with other tensors for the same values, and must
    not depend on anything that changes until backward. Without grad it is called plainly.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    leaves, spec = tree_flatten((args, kwargs))
    saver = InputSaver(_settings.group if _settings.partition else None, _settings.on_host, _settings.buffers)
    segment = _Segment(function, spec, {i: leaf for i, leaf in enumerate(leaves) if saver.moves(leaf)}, saver)
    there = [None if index in segment.moved else leaf for index, leaf in enumerate(leaves)]
    return torch_checkpoint(segment, *there, use_reentrant=False, preserve_rng_state=False)


def non_reentrant_checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """The same as `checkpoint`, which is never reentrant."""
    return checkpoint(function, *args)


class _Segment:
    """One checkpointed call. The first time it runs on the inputs themselves, afterwards on what was kept of them."""

    def __init__(
        self, function: Callable[..., Any], spec: Any, moved: dict[int, torch.Tensor], saver: InputSaver
    ) -> None:
        self._function, self._spec = function, spec
        self._live = moved
        self.moved = {index: saver.save(tensor) for index, tensor in moved.items()}
        self._generators = Generators(_tracker)
        self._is_first = True

    def __call__(self, *there: Any) -> Any:
        if _settings.synchronize:
            accelerator().synchronize()
        watch = Stopwatch(device_in_use()) if _settings.profile else None
        if watch is not None:
            watch.start()
        name, self._is_first = ("forward" if self._is_first else "backward"), False
        try:
            return self._run(there) if name == "forward" else self._run_again(there)
        finally:
            if watch is not None:
                watch.stop()
                log_dist(f"checkpointed {name}: {watch.elapsed_ms():.2f} ms")
            if _settings.synchronize:
                accelerator().synchronize()

    def _run(self, there: Any) -> Any:
        live, self._live = self._live, {}
        return self._call(there, live)

    def _run_again(self, there: Any) -> Any:
        fetched = {index: Restored.of(kept) for index, kept in self.moved.items()}
        with self._generators.as_they_were():
            return self._call(there, fetched)

    def _call(self, there: Any, moved: dict[int, torch.Tensor]) -> Any:
        leaves = [moved.get(index, leaf) for index, leaf in enumerate(there)]
        args, kwargs = tree_unflatten(leaves, self._spec)
        moved.clear()  # the function's own references are the last ones
        return self._function(*args, **kwargs)


def partition_activations_in_checkpoint(partition_activation: bool) -> None:
    """Shard inputs over the model-parallel ranks from now on, or no longer."""
    _settings.partition = partition_activation


def set_num_layers(nlayers: int) -> None:
    """Say how many checkpointed calls of a forward pass wait for their backward: `num_checkpoints` of `configure`."""
    _settings.number = nlayers
    if _settings.buffers is not None:
        _settings.buffers = PartBuffers(nlayers)


def reset() -> None:
    """Free the buffers of `contiguous_checkpointing`, where there are any; the next forward pass allocates them anew.

    What a forward pass has kept and no backward pass has used keeps its memory as long as its graph lives.
    """
    if _settings.buffers is not None:
        _settings.buffers = PartBuffers(_settings.number or 1)


# --- random numbers ---------------------------------------------------------------------------------------------------


def get_cuda_rng_tracker() -> CudaRNGStatesTracker:
    """The random number states by name that Megatron's layers fork into."""
    return _tracker


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """Seed the device's generator alike on all model-parallel ranks, and the tracker's state apart on each of them."""
    _tracker.reset()
    accelerator().manual_seed(seed)
    _tracker.add(_tracker.MODEL_PARALLEL, seed + _SEED_APART + _model_parallel_rank())


def model_parallel_reconfigure_tp_seed(seed: int) -> None:
    """Seed the tracker's model-parallel state anew."""
    with _tracker.fork():
        accelerator().manual_seed(seed + _SEED_APART + _model_parallel_rank())


def _model_parallel_rank() -> int:
    return 0 if _settings.group is None else _settings.group.rank


def _model_parallel_group(mpu: Any) -> Group | None:
    method = getattr(mpu, "get_tensor_model_parallel_group", None) or getattr(mpu, "get_model_parallel_group", None)
    group = None if method is None else method()  # None: nothing is sharded over ranks
    return None if group is None else Group(group, comms_logger)
