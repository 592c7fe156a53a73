"""From a model and a configuration to an engine: `initialize` and the functions that build its parts.

Every part is built by a function below, in the order in which they depend on each other: configuration, process
group, batch sizes, device and precision, optimizer, units and step, schedule, loader.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from deepspeedlite import comm
from deepspeedlite.comm import Group
from deepspeedlite.compat.stage3_names import ParameterOffload, describe_whole
from deepspeedlite.config import DeepSpeedConfig, load_config
from deepspeedlite.config.sections.zero import ZeroOptimization
from deepspeedlite.engine import DeepSpeedEngine, EngineParts
from deepspeedlite.metrics.train_log import TrainLog
from deepspeedlite.offload.options import Offload, make_offload
from deepspeedlite.ops.lamb import FusedLamb
from deepspeedlite.optim.lr_schedules import build_scheduler
from deepspeedlite.optim.precision import DTYPES, LossScaler, Precision
from deepspeedlite.optim.registry import build_optimizer, check_flat_compatible, choose_fused
from deepspeedlite.optim.step import ShardedOptimizer, StepSettings
from deepspeedlite.parallel.pipe.engine import PipelineEngine
from deepspeedlite.parallel.pipe.module import PipelineModule, ties_of
from deepspeedlite.parallel.replica import Replica, groups_of
from deepspeedlite.runtime.device import pick_device
from deepspeedlite.runtime.errors import ConfigError, OptimizerError, UnsupportedError
from deepspeedlite.runtime.log import log_dist, log_once
from deepspeedlite.utils import groups
from deepspeedlite.zero.flat_params import FlatParams, make_whole, owner_of
from deepspeedlite.zero.grad_reducer import GradReducer
from deepspeedlite.zero.leaf import get_z3_leaf_modules, mark_leaves
from deepspeedlite.zero.lease import Lease, take_over
from deepspeedlite.zero.plan import ShardingPlan
from deepspeedlite.zero.prefetch import ParamPrefetcher
from deepspeedlite.zero.state_dicts import StateDicts
from deepspeedlite.zero.trace import PrefetchLimits
from deepspeedlite.zero.unit import Lodging, ReducePolicy
from deepspeedlite.zero.usable import check_trains, refuse_unusable, warn_left_out
from deepspeedlite.zero.verify_model import all_state, check_model, check_optimizer, load_alike
from deepspeedlite.zero.wrap import (
    FROZEN,
    NamedParameter,
    frozen_parameters,
    module_buckets,
    name_parameters,
    reverse_buckets,
    split_persistent,
)

Parameters = Iterable[Any]


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
            `zero.replica.groups_of`.
        dist_init_required: False: torch.distributed must be initialised already; None: initialise it if it is not.
        collate_fn: for the loader of `training_data`.
        config: path, dict or base64 of the JSON configuration.
        mesh_param: (data-parallel size, sequence-parallel size); only a sequence-parallel size of 1 is supported.
        config_params: an older name of `config`.

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
    if not isinstance(model, torch.nn.Module):
        raise UnsupportedError(f"initialize needs model=, a torch.nn.Module; got {type(model).__name__}")
    comm.init_distributed(distributed_port=distributed_port, dist_init_required=dist_init_required)
    pick_device(comm.get_local_rank()).make_current()  # where NCCL talks about groups
    mpu, group, replica = _groups(model, mpu)
    _check_mesh(group, mesh_param)
    given = {"optimizer": optimizer, "scheduler": lr_scheduler}
    handed = [section for section, value in given.items() if value is not None]
    settings = load_alike(lambda: load_config(source, world_size=group.size, handed=handed), Group())
    if isinstance(model, PipelineModule):
        model.configure(settings.pipeline.activation_checkpoint_interval, settings.zero_optimization.stage == 3)
    if settings.comms_logger.enabled:
        comm.comms_logger.configure(settings.comms_logger)
    if settings.dump_state:
        log_dist("configuration: " + json.dumps(settings.raw, indent=2, default=str))
    parts = _build_parts(settings, group, replica, model, optimizer, model_parameters, lr_scheduler)
    parts.mpu, parts.collate_fn = mpu, collate_fn
    if mpu is not None:
        groups.initialize(mpu=mpu)  # what `utils.groups` answers from
    engine = PipelineEngine(model, parts) if isinstance(model, PipelineModule) else DeepSpeedEngine(model, parts)
    if training_data is not None:
        engine.training_dataloader = engine.deepspeed_io(training_data)
    _log_summary(engine, parts)
    return engine, parts.optimizer, engine.training_dataloader, parts.lr_scheduler


def add_config_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add `--deepspeed` and `--deepspeed_config FILE` to a script's argument parser, and return it."""
    group = parser.add_argument_group("deepspeedlite", "training engine")
    group.add_argument(
        "--deepspeed", action="store_true", help="train with the engine (kept for scripts that ask for it)"
    )
    group.add_argument("--deepspeed_config", default=None, metavar="FILE", help="JSON configuration of the engine")
    return parser


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


def _groups(model: torch.nn.Module, mpu: Any) -> tuple[Any, Group, Replica]:
    """The mpu, which a pipeline brings itself, and its groups."""
    if not isinstance(model, PipelineModule):
        return mpu, *groups_of(mpu)
    if mpu is not None:
        raise ConfigError("a PipelineModule has its own mpu, by its topology: leave mpu= out of initialize")
    group, replica = groups_of(model.mpu())
    # Stages name their layers by their places in the whole model: in a checkpoint only tensors' parts are kept apart.
    return model.mpu(), group, replace(replica, part=replica.tensor.rank, parts=replica.tensor.size)


def _check_mesh(group: Group, mesh_param: Sequence[int] | None) -> None:
    if mesh_param is not None and len(mesh_param) > 1 and mesh_param[1] != 1:
        raise UnsupportedError(
            f"mesh_param={tuple(mesh_param)}: sequence parallelism is not in this release; use (world, 1)"
        )
    if mesh_param is not None and mesh_param[0] != group.size:
        raise ConfigError(f"mesh_param={tuple(mesh_param)} does not match the {group.size} data-parallel ranks")


def _build_parts(
    settings: DeepSpeedConfig,
    group: Group,
    replica: Replica,
    model: torch.nn.Module,
    optimizer: Any,
    model_parameters: Parameters | None,
    lr_scheduler: Any,
) -> EngineParts:
    batch = settings.batch(group.size)
    plan = ShardingPlan.from_stage(settings.zero_optimization.stage)
    precision = make_precision(settings)
    device = pick_device(comm.get_local_rank())
    device.make_current()
    refuse_unusable(model, plan)
    check_model(model, group, replica)
    model.to(device.torch_device)
    precision.convert(model)
    base = _make_base_optimizer(settings, model, optimizer, model_parameters)
    if base is not None:
        check_flat_compatible(base, allow_untested=settings.zero_allow_untested_optimizer)
    # An engine without an optimizer trains nothing: it has no gradients, and no hooks that wait for them.
    param_groups = [g["params"] for g in base.param_groups] if base is not None else []
    check_trains(model, base, param_groups)
    named = name_parameters(model, param_groups)
    check_optimizer(base, lr_scheduler, named, group, replica)
    trained = [entry for entry in named if entry.param.requires_grad]
    wanted = [entry.param for entry in trained]
    left = take_over(model, wanted, trains=base is not None, shards=plan.shard_params, group=group)
    if base is not None:
        warn_left_out(model, [*(entry.param for entry in named), *left], param_groups)
    offload = make_offload(settings, Group())
    # LAMB needs the norms of whole parameters, so whole units pass through its step.
    run_numel = None if isinstance(base, FusedLamb) else offload.run_numel
    lodging = Lodging(offload.store, offload.grads if offload.takes_grads else None, run_numel)
    reducer, sharded = _make_reducer(settings, plan, group, replica, model, trained, left, (precision, lodging))
    scaler = make_loss_scaler(settings, precision)
    step_settings = _step_settings(settings, precision, offload)
    wrapped = None if base is None else _wrap(base, reducer, scaler, step_settings, model, named)
    scheduler = _make_scheduler(settings, base, lr_scheduler)
    train_log = TrainLog(settings, device, model, batch.train, comm.get_rank())
    lease = Lease(reducer, *sharded, trains=base is not None, borrows=bool(left))
    return EngineParts(
        settings,
        batch,
        device,
        group,
        plan,
        precision,
        scaler,
        reducer,
        wrapped,
        scheduler,
        train_log,
        lease,
        *sharded,
        offload=offload,
        replica=replica,
    )


def _wrap(
    base: torch.optim.Optimizer,
    reducer: GradReducer,
    scaler: LossScaler,
    settings: StepSettings,
    model: torch.nn.Module,
    named: Sequence[NamedParameter],
) -> ShardedOptimizer:
    """The step over the reducer's units, by the optimizer whose groups hold the named parameters."""
    positions = {id(param): position for group in base.param_groups for position, param in enumerate(group["params"])}
    wrapped = ShardedOptimizer(base, reducer, scaler, settings)
    wrapped.dormant = [entry for entry in named if not entry.param.requires_grad]
    wrapped.positions = {entry.name: positions[id(entry.param)] for entry in named}
    if reducer.plan.shard_params:
        wrapped.parameter_offload = ParameterOffload(model)  # type: ignore[attr-defined]
    return wrapped


def _make_reducer(
    settings: DeepSpeedConfig,
    plan: ShardingPlan,
    group: Group,
    replica: Replica,
    model: torch.nn.Module,
    trained: Sequence[NamedParameter],
    left: Collection[torch.Tensor],
    settled: tuple[Precision, Lodging],
) -> tuple[GradReducer, tuple[StateDicts, ParamPrefetcher | None, list[FlatParams]]]:
    """The units; what gathers values for state dicts and for passes, and the sharded values that are not trained."""
    zero, (precision, lodging) = settings.zero_optimization, settled
    mark_leaves(model, zero.leaf_module.classes, zero.leaf_module.names, zero.leaf_module.name_suffixes)
    buckets, frozen = _make_buckets(zero, plan, model, trained, left)
    policy = ReducePolicy(
        group,
        prescale_gradients=settings.prescale_gradients,
        predivide_factor=settings.gradient_predivide_factor,
        wire_dtype=_dtype(settings.communication_data_type),
        scatter=zero.reduce_scatter,
    )
    reducer = GradReducer(
        buckets,
        policy,
        plan=plan,
        grad_dtype=precision.grad_dtype,
        overlap=zero.overlap_comm is not False,
        lodging=lodging,
        replica=replica,
    )
    for unit in reducer.units:
        unit.tied_group = next((tie.group for tie in ties_of(model) if tie.holds(unit.params[0])), None)
    frozen_values = [FlatParams(bucket, group, sharded=True, store=lodging.store) for bucket in frozen]
    sharded = [*(unit for unit in reducer.units if unit.sharded), *frozen_values]
    gathered = {*reducer.units, *frozen_values}
    make_whole(p for p in model.parameters() if p not in left and owner_of(p) not in gathered)  # sharded by others
    _broadcast_rest(model, group)
    if plan.shard_params:
        describe_whole(model.parameters(), group)
    leaves = get_z3_leaf_modules(model)
    dicts = StateDicts(model, leaves)
    prefetcher = ParamPrefetcher(model, sharded, leaves, _prefetch_limits(zero), state_dicts=dicts) if sharded else None
    return reducer, (dicts, prefetcher, frozen_values)


def _step_settings(settings: DeepSpeedConfig, precision: Precision, offload: Offload) -> StepSettings:
    zero = settings.zero_optimization
    return StepSettings(
        settings.gradient_clipping,
        precision.check_overflow,
        zero.sub_group_size,
        share_numel=zero.allgather_bucket_size,
        every_gradient_must_come=not zero.ignore_unused_parameters,
        low_precision_masters=settings.bf16.enabled and settings.bf16.bf16_master_weights_and_grads,
        offload=offload,
    )


def _make_buckets(
    zero: ZeroOptimization,
    plan: ShardingPlan,
    model: torch.nn.Module,
    trained: Sequence[NamedParameter],
    left: Collection[torch.Tensor],
) -> tuple[list[tuple[list[NamedParameter], bool]], list[list[NamedParameter]]]:
    """The parameters of each unit in launch order with whether its values are sharded; those of each frozen one."""
    if not plan.shard_params:
        apart = [[entry for entry in trained if tie.holds(entry.param)] for tie in ties_of(model)]
        tied = {entry.name for entries in apart for entry in entries}
        rest = [entry for entry in trained if entry.name not in tied]
        buckets = [(bucket, False) for bucket in reverse_buckets(rest, zero.reduce_bucket_size)]
        # Alike on every stage that has a copy, so that the copies' gradients can be added up.
        return buckets + [(bucket, False) for entries in apart for bucket in reverse_buckets(entries, sys.maxsize)], []
    everyone = [*trained, *(entry for entry in frozen_parameters(model, trained) if entry.param not in left)]
    held = {id(param) for param in model.parameters()}
    persistent, sharded = split_persistent(
        everyone, held, zero.stage3_param_persistence_threshold, zero.stage3_model_persistence_threshold
    )
    by_module = module_buckets(model, sharded, get_z3_leaf_modules(model))
    buckets = [(bucket, True) for bucket in by_module if bucket[0].group != FROZEN]
    small = [entry for entry in persistent if entry.group != FROZEN]
    buckets += [(bucket, False) for bucket in reverse_buckets(small, zero.reduce_bucket_size)]
    return buckets, [bucket for bucket in by_module if bucket[0].group == FROZEN]


def _prefetch_limits(zero: ZeroOptimization) -> PrefetchLimits:
    return PrefetchLimits(
        prefetch_numel=zero.stage3_prefetch_bucket_size,
        max_live_numel=zero.stage3_max_live_parameters,
        max_reuse_numel=zero.stage3_max_reuse_distance,
    )


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else DTYPES[name]


def make_precision(settings: DeepSpeedConfig) -> Precision:
    """The precision that the fp16, bf16, torch_autocast and data_types sections ask for."""
    model_dtype = torch.float16 if settings.fp16.enabled else torch.bfloat16 if settings.bf16.enabled else None
    autocast = settings.torch_autocast
    autocast_dtype = (_dtype(autocast.dtype) or torch.bfloat16) if autocast.enabled else None
    types = settings.data_types
    grad_dtype = _dtype(types.grad_accum_dtype)
    return Precision(
        model_dtype=model_dtype,
        autocast_dtype=autocast_dtype,
        grad_dtype=grad_dtype,
        buffer_dtype=_dtype(types.buffer_dtype),
        fp32_buffers=None if types.keep_in_fp32_modules == "auto" else types.keep_in_fp32_modules,
        cast_inputs=settings.fp16.enabled and settings.fp16.auto_cast,
        # A loss scale lives by overflows; elsewhere a user may have them pass.
        check_overflow=torch.float16 in (model_dtype, autocast_dtype)
        or (settings.check_grad_overflow and (settings.bf16.check_grad_overflow or not settings.bf16.enabled)),
    )


def make_loss_scaler(settings: DeepSpeedConfig, precision: Precision) -> LossScaler:
    """The loss scale that the fp16 section asks for; a constant 1 where gradients do not pass through fp16."""
    if not precision.needs_loss_scale:
        return LossScaler()
    fp16 = settings.fp16
    if fp16.loss_scale:
        return LossScaler(scale=float(fp16.loss_scale))
    return LossScaler(
        scale=2.0**fp16.initial_scale_power,
        dynamic=True,
        window=fp16.loss_scale_window,
        min_scale=fp16.min_loss_scale,
        hysteresis=fp16.hysteresis,
        consecutive_hysteresis=fp16.consecutive_hysteresis,
    )


def _make_base_optimizer(
    settings: DeepSpeedConfig, model: torch.nn.Module, optimizer: Any, model_parameters: Parameters | None
) -> torch.optim.Optimizer | None:
    parameters = list(model_parameters) if model_parameters is not None else None
    if parameters is None:
        parameters = [param for param in model.parameters() if param.requires_grad]
    if isinstance(optimizer, torch.optim.Optimizer):
        base = optimizer
    elif callable(optimizer):
        base = optimizer(parameters)
    elif optimizer is not None:
        raise OptimizerError(f"optimizer= must be a torch optimizer or make one, not {type(optimizer).__name__}")
    elif settings.optimizer is None or settings.optimizer.type is None:
        return None
    else:
        return build_optimizer(settings.optimizer.type, settings.optimizer.params, parameters)
    if not isinstance(base, torch.optim.Optimizer):
        raise OptimizerError(f"the optimizer callable returned {type(base).__name__}, not a torch optimizer")
    if settings.optimizer is not None:
        log_once(f"the optimizer passed to initialize ({type(base).__name__}) is used, not the configured one")
    choose_fused(base)
    return base


def _make_scheduler(settings: DeepSpeedConfig, base: torch.optim.Optimizer | None, lr_scheduler: Any) -> Any:
    section = settings.scheduler if settings.scheduler is not None and settings.scheduler.type else None
    if lr_scheduler is not None:
        if section is not None:
            log_once("the lr_scheduler passed to initialize is used, not the configuration's scheduler section")
        if hasattr(lr_scheduler, "step"):
            return lr_scheduler
        if not callable(lr_scheduler):
            raise OptimizerError(f"lr_scheduler= must be a schedule or make one, not {type(lr_scheduler).__name__}")
        if base is None:
            raise OptimizerError("lr_scheduler= is a callable that needs an optimizer, and there is none")
        return lr_scheduler(base)
    if section is None:
        return None
    if base is None:
        raise OptimizerError("the configuration's scheduler section needs an optimizer, and there is none")
    return build_scheduler(section.type, section.params, base)


@torch.no_grad()
def _broadcast_rest(model: torch.nn.Module, group: Group) -> None:
    """Give every rank rank 0's buffers, and those parameters that lie in no flat values, which have seen to theirs."""
    for _, tensor in all_state(model):
        if owner_of(tensor) is None and tensor.numel() > 0:
            whole = tensor.data.contiguous()
            group.broadcast(whole, src=0)
            if whole.data_ptr() != tensor.data_ptr():
                tensor.data.copy_(whole)


def _log_summary(engine: DeepSpeedEngine, parts: EngineParts) -> None:
    slots = [slot for unit in parts.reducer.units for slot, param in unit.slots if parts.replica.counts(param)]
    trained_numel = sum(parts.replica.group.all_gather_objects(sum(slot.numel for slot in slots)))
    ranks = " x ".join(str(size) for size in (parts.replica.group.size, parts.group.size) if size > 1) or "1"
    dtype = parts.precision.model_dtype or parts.precision.autocast_dtype or torch.float32
    optimizer = type(parts.optimizer.optimizer).__name__ if parts.optimizer is not None else "no optimizer"
    work = f"training {trained_numel / 1e6:.2f} M parameters" if parts.optimizer is not None else "computing"
    log_dist(
        f"{work} in {str(dtype).removeprefix('torch.')} on "
        f"{ranks} x {parts.device.name}, ZeRO stage {parts.plan.stage}, {optimizer}, "
        f"batch {parts.batch.train} = {parts.batch.micro} x {parts.batch.accumulation} x {parts.group.size}"
        + (f", {parts.offload}" if str(parts.offload) else "")
    )
