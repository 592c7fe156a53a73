"""Calls to make of `deepspeed`, whichever library has the name, and what each returned as JSON: for two to be compared.

    RANK=0 WORLD_SIZE=1 ... python same_calls.py FOLDER     writes FOLDER/RANK.json: {case: result}

A case is a function; what it returns is written down as `plain` has it. What it raises is a result too.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import inspect
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

CASES: dict[str, Callable[[], Any]] = {}


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    CASES[function.__name__] = function
    return function


def plain(value: Any) -> Any:
    """A value as JSON that two libraries' are compared by: kinds, shapes, dtypes, and small numbers."""
    if isinstance(value, torch.Tensor):
        kind = [str(value.dtype), list(value.shape)]
        return [*kind, [round(float(x), 5) for x in value.detach().flatten()[:8]]]
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return round(float(value), 6)
    if hasattr(value, "__index__"):  # numpy's
        return int(value)
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [type(value).__name__ if type(value) in (list, tuple) else "tuple", *(plain(inner) for inner in value)]
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if inspect.isclass(value):
        return f"class {value.__name__}"
    return "callable" if callable(value) else f"a {type(value).__name__}"


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return plain(call())
    except Exception as error:
        return raised(error)


def raised(error: Exception) -> str:
    """What it may be caught as, the nearest class first."""
    kinds = [kind.__name__ for kind in type(error).__mro__ if issubclass(kind, Exception) and kind is not Exception]
    return "raises " + " ".join(kinds)


def each(owner: Any, names: str, *arguments: Any) -> dict[str, Any]:
    """What each method returns; what is no method, as it is."""

    def ask(name: str) -> Any:
        found = getattr(owner, name)
        return found(*arguments) if callable(found) else found

    return {name: outcome(lambda name=name: ask(name)) for name in names.split()}


# --- signatures -------------------------------------------------------------------------------------------------------


@case
def signatures() -> Any:
    """Of the functions that names.json lists: what may be given by position, in order, and what may be left out."""
    found = {}
    for path, names in json.loads((Path(os.environ["SAME_FOLDER"]) / "names.json").read_text()).items():
        module = importlib.import_module(f"deepspeed.{path}".rstrip("."))
        for name in names:
            value = getattr(module, name)
            if not inspect.isfunction(value):
                continue
            given = inspect.signature(value).parameters.values()
            if any(one.kind is one.VAR_POSITIONAL for one in given):
                continue  # a wrapper, which does not tell
            placed = [one for one in given if one.kind is one.POSITIONAL_OR_KEYWORD]
            found[f"{path}:{name}"] = [one.name if one.default is one.empty else f"{one.name}=" for one in placed]
    return found


# --- engines ----------------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """Sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = torch.nn.Linear(3, 5), torch.nn.Linear(5, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(inputs).tanh()).square().mean()


def engine_of(stage: int, dtype: str = "fp32", **more: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_force_ds_cpu_optimizer": False,
        **({"bf16": {"enabled": True}} if dtype == "bf16" else {}),
        **more,
    }
    return deepspeed.initialize(model=Model(), config=config)[0]


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.linspace(-1, 1, 6).view(2, 3).to(dtype)


GETTERS = """
train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps zero_optimization zero_optimization_stage
fp16_enabled bfloat16_enabled gradient_clipping get_lr get_mom wall_clock_breakdown memory_breakdown dump_state
steps_per_print dynamic_loss_scale optimizer_name optimizer_params scheduler_name scheduler_params get_batch_info
zero_optimization_partition_gradients zero_optimization_partition_weights zero_cpu_offload zero_offload_optimizer
zero_reduce_scatter zero_overlap_comm zero_allgather_bucket_size zero_reduce_bucket_size zero_sub_group_size
zero_contiguous_gradients zero_max_live_parameters zero_max_reuse_distance zero_prefetch_bucket_size
zero_param_persistence_threshold zero_gather_16bit_weights_on_model_save get_data_types was_step_applied
is_gradient_accumulation_boundary postscale_gradients gradient_predivide_factor communication_data_type
flops_profiler_enabled flops_profiler_profile_step flops_profiler_module_depth curriculum_learning_enabled
checkpoint_tag_validation_enabled checkpoint_tag_validation_fail global_steps global_samples micro_steps skipped_steps
world_size global_rank local_rank dp_world_size mp_world_size sequence_parallel_size has_moe_layers is_compiled
managed_gradient_accumulation zero_allow_untested_optimizer zero_ignore_unused_parameters zero_round_robin_gradients
zero_load_from_fp32_weights zero_elastic_checkpoint zero_legacy_stage1 torch_autocast_enabled torch_autocast_dtype
get_global_grad_norm log_level
"""


def part(param: Any, local: torch.Tensor) -> Any:
    """The part of a parameter that this rank has, and its size with the padding, in which DeepSpeed has anything."""
    here = min(local.numel(), max(0, param.ds_numel - int(os.environ["RANK"]) * local.numel()))
    return [list(local.shape), plain(local[:here])]


def trained(stage: int, dtype: str = "fp32") -> dict[str, Any]:
    engine = engine_of(stage, dtype)
    found: dict[str, Any] = {"new": each(engine, GETTERS)}
    loss = engine(inputs(next(engine.module.parameters()).dtype))
    found["loss"] = plain(loss)
    found["backward"] = outcome(lambda: engine.backward(loss))
    params = dict(engine.module.named_parameters())
    full = "safe_get_full_fp32_param safe_get_full_grad"
    from deepspeed import utils

    found["before"] = {name: each(utils, full, param) for name, param in params.items()}
    if stage == 3:
        found["local grads"] = {name: part(param, utils.safe_get_local_grad(param)) for name, param in params.items()}
        for param in params.values():
            utils.safe_set_local_grad(param, utils.safe_get_local_grad(param) * 2)
        found["doubled"] = {name: each(utils, "safe_get_full_grad", param) for name, param in params.items()}
    found["step"] = outcome(engine.step)
    found["after"] = {
        name: {
            **each(utils, "safe_get_full_fp32_param", param),
            **each(utils, "safe_get_full_optimizer_state", param, "exp_avg"),
        }
        for name, param in params.items()
    }
    found["trained"] = each(engine, GETTERS)
    if stage == 3:
        for name, param in params.items():
            local = utils.safe_get_local_fp32_param(param)
            found[f"local {name}"] = [
                part(param, local),
                part(param, utils.safe_get_local_optimizer_state(param, "exp_avg")),
            ]
            found[f"set {name}"] = outcome(lambda p=param, v=local: utils.safe_set_local_fp32_param(p, v + 1))  # type: ignore[misc]
            found[f"is {name}"] = part(param, utils.safe_get_local_fp32_param(param))
            found[f"state {name}"] = outcome(
                lambda p=param, v=local: utils.safe_set_local_optimizer_state(p, v * 0 + 2, "exp_avg")  # type: ignore[misc]
            )
            found[f"full {name}"] = outcome(lambda p=param: utils.safe_get_full_fp32_param(p))  # type: ignore[misc]
            found[f"moment {name}"] = outcome(lambda p=param: utils.safe_get_full_optimizer_state(p, "exp_avg"))  # type: ignore[misc]
    return found


@case
def engine_stage_0() -> Any:
    return trained(0)


@case
def engine_stage_1() -> Any:
    return trained(1)


@case
def engine_stage_2_bf16() -> Any:
    return trained(2, "bf16")


@case
def engine_stage_3() -> Any:
    return trained(3)


@case
def engine_stage_3_bf16() -> Any:
    return trained(3, "bf16")


@case
def throughput_timer() -> Any:
    engine = engine_of(1)
    timer = engine.tput_timer
    for _ in range(4):
        engine.backward(engine(inputs()))
        engine.step()
    timer.update_epoch_count()
    return {
        **each(timer, "epoch_count batch_size start_step global_step_count local_step_count micro_step_count"),
        "update": outcome(timer.update_epoch_count),
        "epochs": timer.epoch_count,
        "speed": timer.avg_samples_per_sec() > 0,
    }


@case
def checkpoints() -> Any:
    engine = engine_of(1)
    engine.backward(engine(inputs()))
    engine.step()
    folder = os.environ["SAME_FOLDER"]
    saved = outcome(lambda: engine.save_checkpoint(folder + "/ckpt", client_state={"epoch": 3}))
    loaded = engine.load_checkpoint(folder + "/ckpt")
    none = outcome(lambda: engine.load_checkpoint(folder + "/nothing"))
    return {
        "saved": saved,
        "path": os.path.relpath(loaded[0], folder).split("/")[:2],
        "client": {"epoch": loaded[1].get("epoch")},
        "none": none,
        "16 bit": outcome(lambda: engine.save_16bit_model(folder + "/half")),
    }


# --- modules ----------------------------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.ReLU()])


def nested() -> torch.nn.Module:
    return torch.nn.ModuleDict({"first": Block(), "second": Block(), "third": torch.nn.Linear(2, 2)})


def names_in(model: torch.nn.Module, value: Any) -> Any:
    """Lists of modules as their names; the rest as it is."""
    known = {id(module): name for name, module in model.named_modules()}
    if isinstance(value, torch.nn.Module):
        return known.get(id(value), "another")
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *(names_in(model, inner) for inner in value)]
    return plain(value)


@case
def leaf_modules() -> Any:
    from deepspeed import utils

    def on(call: Callable[[torch.nn.Module], Any]) -> Any:
        model = nested()
        try:
            found = names_in(model, call(model))
        except Exception as error:
            return raised(error)
        return [found, names_in(model, utils.get_z3_leaf_modules(model))]

    def undone(model: torch.nn.Module) -> Any:
        utils.set_z3_leaf_modules(model, [Block])
        return utils.unset_z3_leaf_modules(model, [Block])

    def undone_by_name(model: torch.nn.Module) -> Any:
        utils.set_z3_leaf_modules(model, [Block])
        return utils.set_z3_leaf_modules_by_name(model, ["first"], flag=False)

    return {
        "class": on(lambda m: utils.set_z3_leaf_modules(m, [Block])),
        "text": on(lambda m: utils.set_z3_leaf_modules(m, ["Block"])),
        "full": on(lambda m: utils.set_z3_leaf_modules(m, [f"{Block.__module__}.Block"])),
        "none": on(lambda m: utils.set_z3_leaf_modules(m, ["Nothing"])),
        "allowed": on(lambda m: utils.set_z3_leaf_modules(m, ["Nothing"], raise_if_not_found=False)),
        "undone": on(undone),
        "undone by name": on(undone_by_name),
        "single": on(lambda m: utils.set_z3_leaf_module(m["first"], True)),
        "asked": on(lambda m: utils.z3_leaf_module(m["first"])),
        "name": on(lambda m: utils.set_z3_leaf_modules_by_name(m, ["first", "second"])),
        "name and none": on(lambda m: utils.set_z3_leaf_modules_by_name(m, ["first", "x"])),
        "name and none allowed": on(
            lambda m: utils.set_z3_leaf_modules_by_name(m, ["first", "x"], raise_if_not_found=False)
        ),
        "suffix": on(lambda m: utils.set_z3_leaf_modules_by_suffix(m, ["inner"])),
        "suffix of none": on(lambda m: utils.set_z3_leaf_modules_by_suffix(m, ["x"])),
        "suffix and none allowed": on(
            lambda m: utils.set_z3_leaf_modules_by_suffix(m, ["inner", "x"], raise_if_not_found=False)
        ),
    }


@case
def leaf_section() -> Any:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    section = DeepSpeedZeroConfig().leaf_module
    return {name: plain(getattr(section, name)) for name in ("classes", "names", "name_suffixes")}


@case
def runtime_utils() -> Any:
    from deepspeed.runtime import utils

    param = torch.nn.Parameter(torch.arange(4.0))
    param.grad = torch.full((4,), 3.0)
    return {
        "uniform": [plain(utils.partition_uniform(n, k)) for n, k in ((10, 3), (2, 4), (8, 8), (0, 2))],
        "balanced": [
            plain(utils.partition_balanced(w, k)) for w, k in (([1, 2, 3, 4, 5], 2), ([5, 1, 1], 3), ([1], 3))
        ],
        "move": plain(utils.move_to_device({"a": [torch.ones(2)]}, "cpu", torch.is_tensor)),
        "copy": plain(utils.copy_to_device({"a": (torch.ones(2),)}, "cpu", torch.is_tensor)),
        "clip": outcome(lambda: utils.clip_grad_norm_([param], 1.0)),
        "clipped": plain(param.grad),
        "norm": outcome(lambda: utils.get_global_norm([3.0, 4.0])),
        "norm of": outcome(lambda: utils.get_global_norm_of_tensors([torch.full((4,), 3.0)])),
        "clip by": outcome(lambda: utils.clip_tensors_by_global_norm([torch.full((4,), 3.0)], max_norm=1.0)),
        "bad": [plain(utils.has_inf_or_nan(torch.tensor(x))) for x in (1.0, float("inf"), float("nan"))],
        "folder": outcome(lambda: utils.ensure_directory_exists(os.path.join(tempfile.mkdtemp(), "a", "b"))),
        "mp": plain(utils.is_model_parallel_parameter(param)),
        "only": outcome(lambda: utils.get_only_unique_item([2, 2])),
        "not only": outcome(lambda: utils.get_only_unique_item([2, 3])),
        "bytes": outcome(lambda: utils.get_tensor_bytes(torch.zeros(3, dtype=torch.bfloat16))),
        "decorator": outcome(lambda: utils.noop_decorator(len)([1, 2])),
        "status": outcome(lambda: utils.memory_status("here")),
        "usage": outcome(lambda: utils.see_memory_usage("here", force=False)),
        "dummy": outcome(lambda: type(utils.DummyOptim([param])).__name__),
        "seed": outcome(lambda: utils.set_random_seed(7)),
        "drawn": plain(torch.rand(2)),
    }


@case
def schedules() -> Any:
    from deepspeed.runtime import lr_schedules

    made = {
        "LRRangeTest": {"lr_range_test_step_size": 3},
        "OneCycle": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 3},
        "WarmupLR": {"warmup_num_steps": 4, "warmup_max_lr": 0.3},
        "WarmupDecayLR": {"total_num_steps": 8, "warmup_num_steps": 3},
        "WarmupCosineLR": {"total_num_steps": 8, "warmup_num_steps": 3},
    }
    found: dict[str, Any] = {"valid": plain(lr_schedules.VALID_LR_SCHEDULES)}
    for name, params in made.items():
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
        schedule = getattr(lr_schedules, name)(optimizer, **params)
        rates = []
        for _ in range(9):
            schedule.step()
            rates.append(round(optimizer.param_groups[0]["lr"], 6))
        found[name] = [rates, plain(schedule.get_last_lr()), plain(schedule.state_dict()), plain(schedule.get_lr())]
    return found


@case
def topologies() -> Any:
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology, PipeModelDataParallelTopology, ProcessTopology

    found = {}
    for name, topology in {
        "plain": ProcessTopology(axes=["x", "y"], dims=[2, 3]),
        "pipe": PipeDataParallelTopology(2, 2),
        "three": PipeModelDataParallelTopology(2, 2, 2),
    }.items():
        axis = topology.get_axis_names()[0]
        found[name] = {
            **each(topology, "get_axis_names world_size"),
            "dims": [topology.get_dim(a) for a in topology.get_axis_names()],
            "none": outcome(lambda t=topology: t.get_dim("none")),  # type: ignore[misc]
            "coord": plain(topology.get_coord(1)),
            "repr": [topology.get_rank_repr(1), topology.get_rank_repr(1, omit_axes=[], inner_sep="=")],
            "lists": plain(topology.get_axis_comm_lists(axis)),
            "filter": plain(topology.filter_match(**{axis: 1})),
            "axis": plain(topology.get_axis_list(axis, 0)),
            "text": str(topology),
        }
    return found


@case
def loaders() -> Any:
    from deepspeed.utils import RepeatingLoader

    loader = RepeatingLoader([1, 2, 3])
    return {"drawn": [next(loader) for _ in range(7)], "iter": iter(loader) is loader}


@case
def helpers() -> Any:
    from deepspeed import utils
    from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
    from deepspeed.runtime.zero.partition_parameters import is_zero_param

    with utils.OnDevice(dtype=torch.bfloat16, device="meta"):
        layer = torch.nn.Linear(2, 2)
    state = {"a": [torch.arange(6.0)[:2]], "b": 3}
    cloned = clone_tensors_for_torch_save(state)
    return {
        "on device": [str(layer.weight.device), str(layer.weight.dtype)],
        "clone": [plain(cloned), cloned["a"][0].untyped_storage().nbytes()],
        "zero param": [plain(is_zero_param(torch.ones(1))), plain(is_zero_param(3))],
        "nvtx": outcome(lambda: utils.instrument_w_nvtx(lambda x: x + 1)(2)),
        "log": outcome(lambda: utils.log_dist("text", ranks=[0])),
        "once": outcome(lambda: utils.log_dist_once("text", ranks=[0])),
        "level": outcome(
            lambda: __import__("deepspeed.utils.logging", fromlist=["x"]).set_log_level_from_string("info")
        ),
        "no level": outcome(
            lambda: __import__("deepspeed.utils.logging", fromlist=["x"]).set_log_level_from_string("x")
        ),
    }


# --- groups ----------------------------------------------------------------------------------------------


@case
def groups() -> Any:
    from deepspeed.utils import groups

    engine_of(0)
    names = [name for name in dir(groups) if name.startswith(("get_", "_get_")) and "parallel" in name]
    known = [
        "get_data_parallel_world_size",
        "get_data_parallel_rank",
        "get_model_parallel_world_size",
        "get_model_parallel_rank",
        "get_tensor_model_parallel_world_size",
        "get_tensor_model_parallel_rank",
        "get_tensor_model_parallel_src_rank",
        "_get_data_parallel_world_size",
        "_get_data_parallel_rank",
        "_get_model_parallel_world_size",
        "_get_sequence_parallel_world_size",
        "_get_sequence_parallel_rank",
        "_get_sequence_data_parallel_world_size",
        "_get_sequence_data_parallel_rank",
        "_get_broadcast_src_rank",
    ]
    return each(groups, " ".join(name for name in known if name in [*names, "_get_broadcast_src_rank"]))


# --- collectives ------------------------------------------------------------------------------------------------------


def numbers(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Others on each rank."""
    return (torch.arange(count) + 10 * int(os.environ["RANK"])).to(dtype)


@case
def collectives() -> Any:
    """In place, by the name of the op, at once and by a handle; what is returned, and what then is where."""
    from deepspeed import comm

    world, rank = comm.get_world_size(), comm.get_rank()
    found: dict[str, Any] = {}

    def call(name: str, function: Callable[..., Any], seen: Any, *arguments: Any, **options: Any) -> None:
        """What the function returned and left in `seen`; a handle, after it was waited for."""
        try:
            returned = function(*arguments, **options)
            handle = hasattr(returned, "wait")
            if handle:
                returned.wait()
            found[name] = ["a handle" if handle else plain(returned), plain(seen)]
        except Exception as error:
            found[name] = raised(error)

    for op in ("SUM", "AVG", "MAX", "MIN", "PRODUCT"):
        value = numbers(3)
        call(f"all_reduce {op}", comm.all_reduce, value, value, getattr(comm.ReduceOp, op))
        value = numbers(3)
        call(f"reduce {op}", comm.reduce, value if rank == 0 else None, value, 0, getattr(comm.ReduceOp, op))
        out = torch.zeros(2)
        call(
            f"reduce_scatter {op}",
            comm.reduce_scatter,
            out,
            out,
            list(numbers(2 * world).split(2)),
            getattr(comm.ReduceOp, op),
        )
        for name in ("reduce_scatter_tensor", "reduce_scatter_fn"):
            out = torch.zeros(2)
            call(f"{name} {op}", getattr(comm, name), out, out, numbers(2 * world), getattr(comm.ReduceOp, op))
    if world == 1:  # DeepSpeed 0.19.8's own for CPUs ends the process by a wrong address where there are two
        value = numbers(3)
        call("inference_all_reduce", comm.inference_all_reduce, value, value)
    for dtype in (torch.int64, torch.bfloat16, torch.float64, torch.uint8, torch.bool):
        value = numbers(3).to(dtype)
        call(f"all_reduce {dtype}", comm.all_reduce, value, value)
        value = numbers(3).to(dtype)
        call(f"broadcast {dtype}", comm.broadcast, value, value, world - 1)
    for by_handle in (False, True):
        also = {"async_op": by_handle}
        label = " by handle" if by_handle else ""
        value = numbers(3)
        call(f"all_reduce{label}", comm.all_reduce, value, value, **also)
        value = numbers(3)
        call(f"broadcast{label}", comm.broadcast, value, value, 0, **also)
        outs = [torch.zeros(2) for _ in range(world)]
        call(f"all_gather{label}", comm.all_gather, outs, outs, numbers(2), **also)
        for name in ("all_gather_into_tensor", "allgather_fn"):
            out = torch.zeros(2 * world)
            call(f"{name}{label}", getattr(comm, name), out, out, numbers(2), **also)
        out = torch.zeros(2 * world)
        call(f"all_to_all_single{label}", comm.all_to_all_single, out, out, numbers(2 * world), **also)
        outs = [torch.zeros(2) for _ in range(world)]
        call(f"reduce_scatter{label}", comm.reduce_scatter, outs[0], outs[0], list(numbers(2 * world).split(2)), **also)
        outs = [torch.zeros(2) for _ in range(world)] if rank == 0 else None
        call(f"gather{label}", comm.gather, outs, numbers(2), outs, 0, **also)
        out = torch.zeros(2)
        parts = list(numbers(2 * world).split(2)) if rank == 0 else None
        call(f"scatter{label}", comm.scatter, out, out, parts, 0, **also)
        values = [numbers(2), numbers(3)]
        call(f"all_reduce_coalesced{label}", comm.all_reduce_coalesced, values, values, **also)
    outs = [torch.zeros(2) for _ in range(world)]
    if world > 1:  # gloo has none: DeepSpeed's raises on all ranks alike
        call("all_to_all", comm.all_to_all, outs, outs, list(numbers(2 * world).split(2)))
        cut = [1, 3] if rank == 0 else [2, 2]
        out = torch.zeros(3 if rank == 0 else 5)
        call("all_to_all_single cut", comm.all_to_all_single, out, out, numbers(4), [[1, 2], [3, 2]][rank], cut)
        value, other = numbers(2), 1 - rank
        call("send" if rank == 0 else "recv", comm.send if rank == 0 else comm.recv, value, value, other)
        value = numbers(2)
        call("back", comm.recv if rank == 0 else comm.send, value, value, other)
        value = numbers(2)
        call("isend", comm.isend if rank == 0 else comm.irecv, value, value, other)
        value, here = numbers(2), numbers(2) + 100
        ops = [comm.P2POp(comm.isend, here, other), comm.P2POp(comm.irecv, value, other)]
        call("batch", lambda: [handle.wait() for handle in comm.batch_isend_irecv(ops)] and None, value)
    objects = [{"rank": rank}, rank] if rank == 0 else [None, None]
    call("broadcast_object_list", comm.broadcast_object_list, objects, objects, 0)
    objects = [None] * world
    call("all_gather_object", comm.all_gather_object, objects, objects, {"rank": rank})
    call("barrier", comm.barrier, None)
    call("monitored_barrier", comm.monitored_barrier, None)
    alone, group = comm.new_group([rank_ := 0]), comm.new_group(list(range(world)))
    if rank == rank_:
        value = numbers(2)
        call("in a group", comm.all_reduce, value, value, group=alone)
    last = comm.new_group([world - 1])
    if rank == world - 1:
        found["in the last"] = [comm.get_global_rank(last, 0), plain(comm.get_all_ranks_from_group(last))]
    value = numbers(2)
    call("in another", comm.all_reduce, value, value, group=group)
    found["groups"] = {
        "sizes": [outcome(lambda: comm.get_world_size(group)), outcome(lambda: comm.get_world_size())],
        "ranks": [outcome(lambda: comm.get_rank(group)), outcome(lambda: comm.get_rank())],
        "global": outcome(lambda: comm.get_global_rank(group, world - 1)),
        "global of none": outcome(lambda: comm.get_global_rank()),
        "all": outcome(lambda: comm.get_all_ranks_from_group(group)),
        "all of none": outcome(lambda: comm.get_all_ranks_from_group()),
        "world": outcome(lambda: comm.get_world_group() is torch.distributed.group.WORLD),
        "local": outcome(comm.get_local_rank),
        "initialized": [outcome(comm.is_initialized), outcome(comm.is_available)],
        "mesh": outcome(lambda: list(comm.initialize_mesh_device((world, 1), ("a", "b")).mesh_dim_names)),
        **each(
            comm, "has_all_gather_into_tensor has_reduce_scatter_tensor has_all_reduce_coalesced has_coalescing_manager"
        ),
    }
    # The last one: DeepSpeed's leaves torch's groups unusable on gloo, which cannot do it.
    pairs = [torch.zeros(2 * world), torch.zeros(world)]
    call("all_gather_coalesced", comm.all_gather_coalesced, pairs, pairs, [numbers(2), numbers(1)])
    return found


# --- the accelerator --------------------------------------------------------------------------------------------------


@case
def accelerator() -> Any:
    found = {}
    one = get_accelerator()
    asked = [
        "is_synchronized_device",
        "use_host_timers",
        "resolves_data_dependency",
        "handles_memory_backpressure",
        "device_name",
        "current_device",
        "current_device_name",
        "current_stream",
        "default_stream",
        "is_bf16_supported",
        "is_fp16_supported",
        "supported_dtypes",
        "is_available",
        "range_push",
        "range_pop",
        "lazy_call",
        "communication_backend_name",
        "is_triton_supported",
        "amp",
        "memory_allocated",
        "max_memory_allocated",
        "reset_max_memory_allocated",
        "memory_cached",
        "max_memory_cached",
        "reset_max_memory_cached",
        "reset_peak_memory_stats",
        "memory_reserved",
        "max_memory_reserved",
        "empty_cache",
        "synchronize",
        "is_pinned",
        "on_accelerator",
        "op_builder_dir",
        "export_envs",
        "visible_devices_envs",
        "get_compile_backend",
        "BFloat16Tensor",
        "ByteTensor",
        "DoubleTensor",
        "FloatTensor",
        "HalfTensor",
        "IntTensor",
        "LongTensor",
        "Event",
        "Stream",
        "temperature",
        "utilization",
    ]
    arguments: dict[str, tuple[Any, ...]] = {
        "range_push": ("text",),
        "lazy_call": (lambda: None,),
        "is_pinned": (torch.ones(1),),
        "on_accelerator": (torch.ones(1),),
    }
    for name in asked:
        if not hasattr(one, name):
            found[name] = "absent"
            continue
        value = getattr(one, name)
        found[name] = outcome(
            lambda v=value, n=name: v(*arguments.get(n, ())) if callable(v) and not inspect.isclass(v) else v
        )  # type: ignore[misc]
    for name in ["total_memory", "available_memory", "device_count", "initial_seed"]:
        found[name] = outcome(lambda n=name: type(getattr(one, n)()).__name__)  # type: ignore[misc]
    for name in ["create_graph", "capture_to_graph", "replay_graph", "create_op_builder", "get_op_builder"]:
        found[name] = hasattr(one, name)
    found["device"] = outcome(lambda: one.device(0))
    found["tensor"] = [
        plain(getattr(one, f"{kind}Tensor")([1, 2])) for kind in ["Float", "Half", "BFloat16", "Long", "Int"]
    ]
    found["pin"] = plain(one.pin_memory(torch.ones(2)))
    found["pin empty"] = outcome(lambda: list(one.pin_empty(2, dtype=torch.float16).shape))
    found["pin like"] = outcome(lambda: list(one.pin_empty_like(torch.ones(3)).shape))
    found["unpin"] = outcome(lambda: one.unpin_memory(torch.ones(2)))
    found["alignment"] = outcome(one.pin_memory_alignment)
    found["name 0"] = outcome(lambda: one.device_name(0))
    with one.stream(one.current_stream()):
        found["stream"] = True
    found["set device"] = outcome(lambda: one.set_device(0))
    found["builder"] = outcome(lambda: one.get_op_builder("CPUAdamBuilder").__name__)
    found["made"] = outcome(lambda: type(one.create_op_builder("CPUAdamBuilder")).__name__)
    state = one.get_rng_state()
    found["rng"] = [str(state.dtype), outcome(lambda: one.set_rng_state(state))]
    found["seed"] = [outcome(lambda: one.manual_seed(3)), outcome(lambda: one.manual_seed_all(3))]
    found["default generator"] = type(one.default_generator(0)).__name__
    found["build_extension"] = outcome(lambda: one.build_extension().__name__)
    return found


# --- the rest ---------------------------------------------------------------------------------------------------------


@case
def timers() -> Any:
    from deepspeed.utils.timer import NoopTimer, SynchronizedWallClockTimer

    timers, off = SynchronizedWallClockTimer(), NoopTimer()
    timer = timers("forward")
    timer.start()
    timer.stop(record=True)
    return {
        "mean": outcome(lambda: isinstance(timer.mean(), float)),
        "elapsed": outcome(lambda: type(timer.elapsed(reset=False)).__name__),
        "names": outcome(lambda: list(timers.get_timers())),
        "means": outcome(lambda: {name: bool(mean >= 0) for name, mean in timers.get_mean(["forward"]).items()}),
        "log": outcome(lambda: timers.log(["forward"])),
        "usage": outcome(lambda: type(SynchronizedWallClockTimer.memory_usage()).__name__),
        "off": [outcome(off("x").start), outcome(off("x").stop)],
        "off elapsed": outcome(lambda: off("x").elapsed()),
        "off log": outcome(lambda: off.log(["x"])),
    }


@case
def sections() -> Any:
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.runtime.zero import config as zero

    found = {
        "stages": {member.name: member.value for member in zero.ZeroStageEnum},
        "devices": [
            member.value
            for member in __import__("deepspeed.runtime.zero.offload_config", fromlist=["x"]).OffloadDeviceEnum
        ],
    }
    monitor = get_monitor_config({"tensorboard": {"enabled": True, "output_path": "x"}, "csv_monitor": {}})
    for name in ("tensorboard", "wandb", "csv_monitor", "comet"):
        section = getattr(monitor, name)
        fields = type(section).model_fields
        found[name] = {key: plain(getattr(section, key)) for key in sorted(fields)}
    found["enabled"] = monitor.enabled
    section = zero.DeepSpeedZeroConfig()
    keys = """
        stage contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions
        load_from_fp32_weights elastic_checkpoint sub_group_size ignore_unused_parameters legacy_stage1
        round_robin_gradients override_module_apply memory_efficient_linear pipeline_loading_checkpoint
    """
    found["zero"] = each(section, keys)
    return found


@case
def activation_checkpointing() -> Any:
    from deepspeed import checkpointing

    before = checkpointing.is_configured()
    checkpointing.configure(None, partition_activations=False, checkpoint_in_cpu=False)
    value = torch.ones(2, requires_grad=True)
    out = checkpointing.checkpoint(lambda x: x * 3, value)
    out.sum().backward()
    return {
        "configured": [before, checkpointing.is_configured()],
        "out": plain(out),
        "grad": plain(value.grad),
        "several": outcome(lambda: checkpointing.checkpoint(lambda a, b: (a, b), value, value * 2)),
        "reset": outcome(checkpointing.reset),
        "tracker": type(checkpointing.get_cuda_rng_tracker()).__name__,
    }


@case
def flops() -> Any:
    from deepspeed.profiling.flops_profiler import get_model_profile

    with contextlib.redirect_stdout(io.StringIO()):
        return get_model_profile(torch.nn.Linear(4, 3), (2, 4), print_profile=False, warm_up=0, as_string=False)


@case
def arguments() -> Any:
    import argparse

    parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", "x.json"])
    from deepspeed.runtime.lr_schedules import add_tuning_arguments, get_config_from_args

    tuned = add_tuning_arguments(argparse.ArgumentParser()).parse_args(["--lr_schedule", "WarmupLR"])
    return {
        "args": {name: value for name, value in vars(args).items() if name in ("deepspeed", "deepspeed_config")},
        "tuned": plain(vars(tuned)),
        "config": outcome(lambda: get_config_from_args(tuned)),
        "none": outcome(lambda: get_config_from_args(SimpleNamespace())),
    }


def main() -> None:
    rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
    os.environ["SAME_FOLDER"] = str(folder)
    deepspeed.init_distributed(dist_backend="gloo")
    wanted = sys.argv[2:] or list(CASES)
    results: dict[str, Any] = {}
    for name in wanted:
        results[name] = outcome(CASES[name])
        (folder / f"{rank}.json").write_text(json.dumps(results))  # after each: should a later one not return


if __name__ == "__main__":
    main()
