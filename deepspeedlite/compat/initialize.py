"""DeepSpeed's `initialize`: its arguments in, its engine and what belongs to it out; `factory` does the work."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import Any

import torch

from deepspeedlite.compat import groups
from deepspeedlite.compat.comm import init_distributed
from deepspeedlite.compat.engine import DeepSpeedEngine
from deepspeedlite.factory import Given, Parameters, build_engine
from deepspeedlite.ops.late_compiler import import_compiler_late
from deepspeedlite.parallel.pipe import Pipeline
from deepspeedlite.runtime.errors import ConfigError, UnsupportedError
from deepspeedlite.runtime.log import log_dist_once


def initialize(
    args: Any = None,
    model: torch.nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[[Parameters], torch.optim.Optimizer] | None = None,
    model_parameters: Parameters | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: str | os.PathLike[str] | dict[str, Any] | None = None,
    mesh_param: Sequence[int] | None = None,
    config_params: str | os.PathLike[str] | dict[str, Any] | None = None,
    **older: Parameters,
) -> tuple[DeepSpeedEngine, Any, Any, Any]:
    """Make a training engine of a model.

    Args:
        args: parsed command line; its `deepspeed_config` is used where `config` is not given.
        model: the module to train. It is moved to this rank's device, cast to the configured precision, and its
            parameters become views of flat buffers.
        optimizer: an elementwise torch optimizer over the model's parameters, or a callable that makes one from them;
            the configuration's if None.
        model_parameters: what to train: tensors, (name, tensor) pairs, a generator of either, or param-group dicts; all
            parameters that require grad if None.
        training_data: a dataset; the returned loader gives each rank its part.
        lr_scheduler: a schedule, or a callable that makes one from the optimizer; the configuration's if None.
        distributed_port: port of rank 0 for start-ups that do not name one.
        mpu: a Megatron-style object whose data-parallel and model-parallel groups are honoured; see
            `parallel.mpu.groups_of`.
        dist_init_required: False: torch.distributed must be initialised already; None: initialise it if it is not.
        collate_fn: for the loader of `training_data`.
        config: path, dict or base64 of the JSON configuration.
        mesh_param: (data-parallel size, sequence-parallel size); only a sequence-parallel size of 1 is supported.
        config_params: an older name of `config`.
        older: `model_params` or `parameters`, which old tutorials have for `model_parameters`.

    Returns:
        (engine, optimizer, training_dataloader, lr_scheduler); those that do not exist are None.

    Raises:
        ConfigError: the configuration is missing or wrong (every fault is listed), or not the same on all ranks.
        OptimizerError: the optimizer or schedule cannot be made or used.
        OffloadError: a rank's disk cannot be used, or has no room.
        DistributedError: the ranks do not meet, or their models differ.

    What the ranks must have alike (configurations but for paths and logging, models, optimizers and their groups) is
    compared, and an error is the same on all of them.
    """
    source = _config_source(args, config, config_params)
    model_parameters = _parameters(model_parameters, older)
    if not isinstance(model, torch.nn.Module):
        raise UnsupportedError(f"initialize needs model=, a torch.nn.Module; got {type(model).__name__}")
    import_compiler_late()
    init_distributed(distributed_port=distributed_port, dist_init_required=dist_init_required)
    given = Given(
        optimizer=optimizer,
        model_parameters=model_parameters,
        lr_scheduler=lr_scheduler,
        mpu=mpu,
        mesh=mesh_param,
        training_data=training_data,
        collate_fn=collate_fn,
    )
    engine = build_engine(_engine_class(model), model, source, given)
    if engine.mpu is not None:
        groups.initialize(mpu=engine.mpu)  # what `utils.groups` answers from
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _engine_class(model: torch.nn.Module) -> type[DeepSpeedEngine]:
    if not isinstance(model, Pipeline):
        return DeepSpeedEngine
    from deepspeedlite.compat.pipeline_engine import PipelineEngine  # 10 ms, which other models need not wait for

    return PipelineEngine


def add_config_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add `--deepspeed` and `--deepspeed_config FILE` to a script's argument parser, and return it."""
    group = parser.add_argument_group("deepspeedlite", "training engine")
    group.add_argument(
        "--deepspeed", action="store_true", help="train with the engine (kept for scripts that ask for it)"
    )
    group.add_argument("--deepspeed_config", default=None, metavar="FILE", help="JSON configuration of the engine")
    return parser


def _parameters(given: Parameters | None, older: dict[str, Parameters]) -> Parameters | None:
    for name, value in older.items():
        if name not in ("model_params", "parameters"):
            raise TypeError(f"initialize() got an unexpected keyword argument {name!r}")
        if given is not None:
            raise TypeError(f"initialize() got its parameters twice, also as {name}; pass model_parameters alone")
        log_dist_once(f"initialize({name}=...) is taken as model_parameters=..., its name of today")
        given = value
    return given


def _config_source(args: Any, config: Any, config_params: Any) -> Any:
    named = {
        "config": config,
        "config_params": config_params,
        "args.deepspeed_config": getattr(args, "deepspeed_config", None),
    }
    given = {name: value for name, value in named.items() if value is not None}
    if not given:
        raise ConfigError(
            "no configuration: pass initialize(config=FILE or dict), or start with --deepspeed_config FILE"
        )
    first = next(iter(given.values()))
    for name, value in given.items():
        if value is not first and value != first:
            raise ConfigError(f"two configurations were given, as {next(iter(given))} and as {name}; pass one of them")
    return first
