"""From a model and a configuration to an engine: `build_engine` and the functions that build its parts.

Every part is built by a function below, in the order in which they depend on each other: configuration, process
group, batch sizes, device and precision, optimizer, units and step, schedule, loader.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from deepspeedlite import comm
from deepspeedlite.comm import Group
from deepspeedlite.config import BatchSizes, DeepSpeedConfig, load_config
from deepspeedlite.config.sections.zero import ZeroOptimization
from deepspeedlite.data.loader import DeepSpeedDataLoader, LoaderOptions
from deepspeedlite.engine import Engine, EngineParts
from deepspeedlite.metrics.comms_logger import comms_logger
from deepspeedlite.metrics.stall_watch import watch_for_stalls
from deepspeedlite.metrics.train_log import TrainLog
from deepspeedlite.offload.options import make_offload
from deepspeedlite.ops.lamb import FusedLamb
from deepspeedlite.ops.whole_tensors import WholeTensors
from deepspeedlite.optim.precision import LossScaler, Precision
from deepspeedlite.optim.registry import build_optimizer, choose_fused
from deepspeedlite.optim.schedules import build_scheduler
from deepspeedlite.optim.step import StepSettings
from deepspeedlite.parallel.replica import Replica, Tie
from deepspeedlite.preflight.elementwise import check_flat_compatible
from deepspeedlite.preflight.usable import (
    check_trains,
    refuse_unusable_modules,
    refuse_unusable_parameters,
    warn_left_out,
)
from deepspeedlite.preflight.verify_model import check_model, check_optimizer, load_alike
from deepspeedlite.runtime.device import pick_device
from deepspeedlite.runtime.errors import ConfigError, OptimizerError, UnsupportedError
from deepspeedlite.runtime.log import log_dist, log_once
from deepspeedlite.zero.flat_params import FlatParams, make_whole, owner_of
from deepspeedlite.zero.grad_reducer import GradReducer
from deepspeedlite.zero.leaf import leaf_modules, mark_leaves
from deepspeedlite.zero.lease import Holder, Lease, take_over
from deepspeedlite.zero.plan import ShardingPlan
from deepspeedlite.zero.prefetch import ParamPrefetcher
from deepspeedlite.zero.state_dicts import StateDicts
from deepspeedlite.zero.unit import ShardUnit, UnitOptions
from deepspeedlite.zero.use_order import PrefetchLimits
from deepspeedlite.zero.wrap import (
    FROZEN,
    Bucket,
    NamedParameter,
    frozen_parameters,
    module_buckets,
    name_parameters,
    reverse_buckets,
    split_persistent,
)

Parameters = Iterable[Any]
_E = TypeVar("_E", bound=Engine)


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a script hands over besides model and configuration; see `compat.initialize`."""

    optimizer: torch.optim.Optimizer | Callable[[Parameters], torch.optim.Optimizer] | None = None
    model_parameters: Parameters | None = None
    lr_scheduler: Any = None
    mpu: Any = None
    mesh: Sequence[int] | None = None  # (data-parallel size, sequence-parallel size)
    training_data: Any = None
    collate_fn: Callable[..., Any] | None = None


def build_engine(engine_class: type[_E], model: torch.nn.Module, source: Any, given: Given) -> _E:
    """An engine of `engine_class` for a model, by the configuration that `source` is. Called by every rank.

    What the ranks must have alike (configurations but for paths and logging, models, optimizers and their groups) is
    compared, and an error is the same on all of them.

    Raises:
        ConfigError: the configuration is wrong (every fault is listed), or not the same on all ranks.
        OptimizerError: the optimizer or schedule cannot be made or used.
        OffloadError: a rank's disk cannot be used, or has no room.
        DistributedError: the ranks do not meet, or their models differ.
    """
    pick_device(comm.get_local_rank()).make_current()  # where NCCL talks about groups
    watch_for_stalls()
    mpu, group, replica = engine_class.mpu_of(model, given.mpu)
    _check_mesh(group, given.mesh)
    objects = {"optimizer": given.optimizer, "scheduler": given.lr_scheduler}
    handed = [section for section, value in objects.items() if value is not None]
    settings = load_alike(lambda: load_config(source, world_size=group.size, handed=handed), Group())
    engine_class.prepare(model, settings)
    if settings.comms_logger.enabled:
        comms_logger.configure(settings.comms_logger)
    if settings.dump_state:
        log_dist("configuration: " + json.dumps(settings.raw, indent=2, default=str))
    parts = _build_parts(engine_class, settings, model, given, (mpu, group, replica))
    engine = engine_class(model, parts)
    _log_summary(parts)
    return engine


def _check_mesh(group: Group, mesh_param: Sequence[int] | None) -> None:
    if mesh_param is not None and len(mesh_param) > 1 and mesh_param[1] != 1:
        raise UnsupportedError(
            f"mesh_param={tuple(mesh_param)}: sequence parallelism is not in this release; use (world, 1)"
        )
    if mesh_param is not None and mesh_param[0] != group.size:
        raise ConfigError(f"mesh_param={tuple(mesh_param)} does not match the {group.size} data-parallel ranks")


def _build_parts(
    engine_class: type[Engine],
    settings: DeepSpeedConfig,
    model: torch.nn.Module,
    given: Given,
    ranks: tuple[Any, Group, Replica],
) -> EngineParts:
    mpu, group, replica = ranks
    batch = settings.batch(group.size)
    plan = ShardingPlan.from_stage(settings.zero_optimization.stage)
    precision = Precision.from_config(settings)
    device = pick_device(comm.get_local_rank())
    refuse_unusable_modules(model, plan)
    check_model(model, group, replica)
    model.to(device.torch_device)
    precision.convert(model)
    base = _make_base_optimizer(settings, model, given.optimizer, given.model_parameters)
    # An engine without an optimizer trains nothing: it has no gradients, and no hooks that wait for them.
    param_groups = [g["params"] for g in base.param_groups] if base is not None else []
    check_trains(model, base, param_groups)
    named = name_parameters(model, param_groups)
    trained = [entry for entry in named if entry.param.requires_grad]
    refuse_unusable_parameters(trained)
    check_optimizer(base, given.lr_scheduler, named, group, replica)
    left = take_over(model, [e.param for e in trained], trains=base is not None, shards=plan.shard_params, group=group)
    if base is not None:
        warn_left_out(model, [*(entry.param for entry in named), *left], param_groups)
    # LAMB needs the norms of whole parameters, so whole units pass through its step.
    offload = make_offload(settings, Group(), cuts_runs=not isinstance(base, FusedLamb))
    ties, holder = engine_class.ties_of(model), Holder()
    options = UnitOptions.from_config(settings, group, precision.grad_dtype, offload, replica.counts)
    reducer, sharded = _make_reducer(settings, options, replica, model, trained, left, ties, holder)
    scaler = LossScaler.from_config(settings, precision)
    step_settings = StepSettings.from_config(settings, precision, offload)
    optimizer = None
    if base is not None:
        optimizer = engine_class.optimizer_class(base, reducer, scaler, step_settings, model, named)
    _, prefetcher, frozen = sharded
    loading = LoaderOptions.from_config(settings, device, given.collate_fn)
    return EngineParts(
        config=settings,
        batch=batch,
        device=device,
        group=group,
        plan=plan,
        precision=precision,
        scaler=scaler,
        reducer=reducer,
        optimizer=optimizer,
        lr_scheduler=_make_scheduler(settings, base, given.lr_scheduler),
        train_log=TrainLog(settings, device, model, batch.train, comm.get_rank()),
        lease=Lease(reducer, *sharded, holder=holder, trains=base is not None, borrows=bool(left)),
        prefetcher=prefetcher,
        frozen=frozen,
        offload=offload,
        replica=replica,
        mpu=mpu,
        loading=loading,
        training_dataloader=_make_loader(given.training_data, batch, group, loading),
    )


def _make_loader(data: Any, batch: BatchSizes, group: Group, loading: LoaderOptions) -> DeepSpeedDataLoader | None:
    return None if data is None else DeepSpeedDataLoader(data, batch.micro, group.rank, group.size, loading)


def _make_reducer(
    settings: DeepSpeedConfig,
    options: UnitOptions,
    replica: Replica,
    model: torch.nn.Module,
    trained: Sequence[NamedParameter],
    left: Collection[torch.Tensor],
    ties: Sequence[Tie],
    holder: Holder,
) -> tuple[GradReducer, tuple[StateDicts, ParamPrefetcher | None, list[FlatParams]]]:
    """The units; what gathers values for state dicts and for passes, and the sharded values that are not trained."""
    zero, plan, group = settings.zero_optimization, options.plan, options.policy.group
    mark_leaves(model, zero.leaf_module.classes, zero.leaf_module.names, zero.leaf_module.name_suffixes)
    buckets, frozen = _make_buckets(zero, plan, model, trained, left, ties)
    units = [ShardUnit(bucket, options) for bucket in buckets]
    frozen_values = [
        FlatParams(bucket, group, sharded=True, offload=options.offload, live=options.live) for bucket in frozen
    ]
    sharded = [*(unit.flat for unit in units if unit.flat.sharded), *frozen_values]
    gathered = {*(unit.flat for unit in units), *frozen_values}
    make_whole(p for p in model.parameters() if p not in left and owner_of(p) not in gathered)  # sharded by others
    _broadcast_rest(model, group)
    leaves = leaf_modules(model)
    dicts = StateDicts(model, leaves)
    limits = PrefetchLimits.from_config(zero)
    prefetcher = None
    if sharded:
        prefetcher = ParamPrefetcher(model, sharded, leaves, limits, trace=options.live, state_dicts=dicts)
    overlap = zero.overlap_comm is not False
    reducer = GradReducer(units, options, overlap=overlap, replica=replica, prefetcher=prefetcher, listener=holder)
    return reducer, (dicts, prefetcher, frozen_values)


def _make_buckets(
    zero: ZeroOptimization,
    plan: ShardingPlan,
    model: torch.nn.Module,
    trained: Sequence[NamedParameter],
    left: Collection[torch.Tensor],
    ties: Sequence[Tie],
) -> tuple[list[Bucket], list[list[NamedParameter]]]:
    """The parameters of each unit in launch order; those of each frozen one."""
    if not plan.shard_params:
        apart = [(tie.group, [entry for entry in trained if tie.holds(entry.param)]) for tie in ties]
        tied = {entry.name for _, entries in apart for entry in entries}
        rest = [entry for entry in trained if entry.name not in tied]
        buckets = [Bucket(members) for members in reverse_buckets(rest, zero.reduce_bucket_size)]
        # Alike on every stage that has a copy, so that the copies' gradients can be added up.
        for tied_group, entries in apart:
            buckets += [Bucket(members, False, tied_group) for members in reverse_buckets(entries, sys.maxsize)]
        return buckets, []
    everyone = [*trained, *(entry for entry in frozen_parameters(model, trained) if entry.param not in left)]
    held = {id(param) for param in model.parameters()}
    persistent, sharded = split_persistent(
        everyone, held, zero.stage3_param_persistence_threshold, zero.stage3_model_persistence_threshold
    )
    by_module = module_buckets(model, sharded, leaf_modules(model))
    buckets = [Bucket(members, sharded=True) for members in by_module if members[0].group != FROZEN]
    small = [entry for entry in persistent if entry.group != FROZEN]
    buckets += [Bucket(members) for members in reverse_buckets(small, zero.reduce_bucket_size)]
    return buckets, [members for members in by_module if members[0].group == FROZEN]


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
        base = build_optimizer(
            settings.optimizer.type, settings.optimizer.params, parameters, settings.zero_optimization.stage > 0
        )
    if not isinstance(base, torch.optim.Optimizer):
        raise OptimizerError(f"the optimizer callable returned {type(base).__name__}, not a torch optimizer")
    if optimizer is not None:
        choose_fused(base)
        if settings.optimizer is not None:
            log_once(f"the optimizer passed to initialize ({type(base).__name__}) is used, not the configured one")
    try:
        check_flat_compatible(base, allow_untested=settings.zero_allow_untested_optimizer)
    except UnsupportedError:
        if settings.zero_optimization.stage > 0 or isinstance(base, torch.optim.SparseAdam):
            raise
        return WholeTensors.around(base)
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
    for tensor in (*model.parameters(), *model.buffers()):
        if owner_of(tensor) is None and tensor.numel() > 0:
            whole = tensor.data.contiguous()
            group.broadcast(whole, src=0)
            if whole.data_ptr() != tensor.data_ptr():
                tensor.data.copy_(whole)


def _log_summary(parts: EngineParts) -> None:
    slots = [slot for unit in parts.reducer.units for slot, param in unit.flat.slots if parts.replica.counts(param)]
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
