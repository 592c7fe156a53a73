"""What scripts written for DeepSpeed ask an engine: its place among the ranks, its parts, and its settings by methods.

`SETTINGS` says which key of the configuration each method answers; `ABSENT` why the engine has not the others.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist

from deepspeedlite import comm
from deepspeedlite.compat import groups
from deepspeedlite.config import BatchSizes, solve_batch
from deepspeedlite.engine import Engine
from deepspeedlite.metrics.timers import ThroughputTimer
from deepspeedlite.metrics.train_log import learning_rates, momenta
from deepspeedlite.runtime.errors import ConfigError, EngineStateError
from deepspeedlite.runtime.tensors import dtype_named

_ZERO = """
allgather_bucket_size allgather_partitions compute_grad_norm contiguous_gradients elastic_checkpoint
ignore_unused_parameters legacy_stage1 load_from_fp32_weights log_trace_cache_warnings parameter_alignment
reduce_scatter round_robin_gradients sub_group_size save_muon_momentum_buffer_in_memory
"""
_ZERO_STAGE3 = """
max_live_parameters max_reuse_distance model_persistence_threshold module_granularity_threshold
param_persistence_threshold prefetch_bucket_size
"""
_TOP = """
communication_data_type dataloader_drop_last dump_state gradient_clipping gradient_predivide_factor log_level
managed_gradient_accumulation memory_breakdown sparse_attention steps_per_print wall_clock_breakdown
zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
"""
_FLOPS = "enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file"

# A method's name -> the key that it answers.
SETTINGS: dict[str, str] = {
    **{name: name for name in _TOP.split() if name != "communication_data_type"},
    **{f"zero_{name}": f"zero_optimization.{name}" for name in _ZERO.split()},
    **{f"zero_{name}": f"zero_optimization.stage3_{name}" for name in _ZERO_STAGE3.split()},
    **{f"flops_profiler_{name}": f"flops_profiler.{name}" for name in _FLOPS.split()},
    **{f"zero_quantized_{name}": f"zero_optimization.zero_quantized_{name}" for name in ("weights", "gradients")},
    "zero_quantized_nontrainable_weights": "zero_optimization.zero_quantized_nontrainable_weights",
    "zero_gather_16bit_weights_on_model_save": "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_hpz_partition_size": "zero_optimization.zero_hpz_partition_size",
    "zero_multi_rank_bucket_allreduce": "zero_optimization.use_multi_rank_bucket_allreduce",
    "zero_allgather_sequential": "zero_optimization.stage3_allgather_sequential",
    "is_sanity_checks_enabled": "zero_optimization.enable_sanity_checks",
    "aio_config": "aio",
    "bf16_master_weights_and_gradients": "bf16.bf16_master_weights_and_grads",
    "bf16_optimizer_states": "bf16.bf16_optimizer_states",
    "fp16_auto_cast": "fp16.auto_cast",
    "fp16_master_weights_and_gradients": "fp16.fp16_master_weights_and_grads",
    "loss_scale": "fp16.loss_scale",  # 0: dynamic; optimizer.cur_scale is the one in force
    "load_universal_checkpoint": "checkpoint.load_universal",
    "use_node_local_storage": "checkpoint.use_node_local_storage",
    "torch_autocast_enabled": "torch_autocast.enabled",
    "torch_autocast_lower_precision_safe_modules": "torch_autocast.lower_precision_safe_modules",
}
# What this release has not, and can therefore answer.
OFF = """
autotuning_enabled curriculum_learning_enabled data_efficiency_enabled data_sampling_enabled random_ltd_enabled
is_deepcompile_active is_deepcompile_enabled super_offload zero_nvme_offload_optimizer
"""

_HERE = "the schedule of gradients does it by itself"
_ABSENT_BECAUSE = {
    f"gradients are averaged in the backward pass: {_HERE}": "allreduce_gradients allreduce_bucket allreduce_no_retain "
    "allreduce_and_copy buffered_allreduce_fallback all_gather_scalar",
    "gradients are reduced densely": "sparse_all_gather sparse_allreduce sparse_allreduce_bucket "
    "sparse_allreduce_no_retain",
    "it clips by itself; set gradient_clipping": "clip_fp32_gradients",
    "use engine.load_checkpoint, or load_state_dict of the module": "load_module_state_dict load_moe_state_dict",
    "DeepCompile is not in this release; engine.compile uses torch.compile": "compile_autosp compile_autotp "
    "compile_zero_optimization_stage get_autosp_backend get_autotp_backend get_compile_time get_deepcompile_backend "
    "get_deepspeed_compile_backend register_compile_pass uses_parallelization_pass_only",
    "autotuning is not in this release": "autotuning_end_profile_step autotuning_metric autotuning_metric_path "
    "autotuning_model_info_path autotuning_profile_model_info autotuning_start_profile_step",
    "curricula and data sampling are not in this release": "curriculum_learning_config data_efficiency_config "
    "data_sampling_config random_ltd_config random_ltd_initialize set_custom_curriculum_learning_schedule "
    "set_data_post_process_func",
    "tensor parallelism is not in this release": "autotp_size tensor_parallel_config",
    "engine.timers are not kept; set wall_clock_breakdown": "get_wall_clock_timers print_forward_breakdown",
    "an internal of DeepSpeed's engine, of which nothing is left here": "checkpoint_serialization_enabled "
    "checkpoint_writer_enabled collect_python_gc cpuadam_cores_perc dynamic_loss_scale_args get_type "
    "get_optimizer_configuration is_first_weights_partition_group is_iterable_style_dataset is_map_style_dataset "
    "optimizer_legacy_fusion swap_tensor_config zenflow_config",
}
ABSENT = {name: reason for reason, names in _ABSENT_BECAUSE.items() for name in names.split()}


class EngineAccessors(Engine):
    """An engine that answers to DeepSpeed's questions."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ABSENT:
                raise AttributeError(f"DeepSpeedEngine has no {name}: {ABSENT[name]}") from None
            raise

    # --- this rank's place ----------------------------------------------------------------------------------------

    @property
    def local_rank(self) -> int:
        """This rank among those of its machine."""
        return comm.get_local_rank()

    @property
    def global_rank(self) -> int:
        """This rank among all."""
        return comm.get_rank()

    @property
    def world_size(self) -> int:
        """All ranks, of whatever parallelism."""
        return comm.get_world_size()

    @property
    def dp_world_size(self) -> int:
        """Ranks that train the same parameters on different data."""
        return self._parts.group.size

    @property
    def mp_world_size(self) -> int:
        """Ranks that hold a model together."""
        return self._parts.replica.group.size

    @property
    def data_parallel_group(self) -> Any:
        """The process group of `dp_world_size` ranks."""
        return self._parts.group.process_group or dist.group.WORLD

    seq_data_parallel_group = data_parallel_group

    @property
    def sequence_parallel_size(self) -> int:
        """Ranks that share a sequence."""
        return groups._get_sequence_parallel_world_size()

    def get_data_parallel_rank(self) -> int:
        """This rank among those of `data_parallel_group`."""
        return self._parts.group.rank

    def get_model_parallel_rank(self) -> int:
        """This rank among those that hold a model together."""
        return self._parts.replica.group.rank

    def get_tensor_parallel_rank(self) -> int:
        """This rank among those that hold a layer's tensors together."""
        return self._parts.replica.tensor.rank

    def get_sequence_parallel_group(self) -> Any:
        """The ranks that share a sequence; KeyError where sequences are not shared."""
        return groups._get_sequence_parallel_group()

    # --- its parts ------------------------------------------------------------------------------------------------

    @property
    def basic_optimizer(self) -> Any:
        """The optimizer that steps the flat runs, such as torch's AdamW; None where there is none."""
        return None if self.optimizer is None else self.optimizer.optimizer

    @property
    def monitor(self) -> Any:
        """Where training's numbers go: `engine.monitor.write_events([(name, value, step), ...])`."""
        return self._train_log.monitor

    @property
    def tput_timer(self) -> ThroughputTimer:
        """What measures samples per second, and counts the epochs that scripts tell it of."""
        return self._train_log.throughput

    @property
    def param_names(self) -> dict[torch.nn.Parameter, str]:
        """Each parameter's full name."""
        return {param: name for name, param in self.module.named_parameters()}

    @property
    def dist_backend(self) -> str:
        """What carries the collectives: nccl or gloo."""
        return str(torch.distributed.get_backend())

    @property
    def has_moe_layers(self) -> bool:
        """Whether experts are spread over ranks, which is not in this release."""
        return False

    @property
    def is_compiled(self) -> bool:
        """Whether `compile` was called."""
        return self.module._compiled_call_impl is not None

    def empty_partition_cache(self) -> None:
        """Let go of the whole parameters that nobody uses at this moment (stage 3), and of the device's free memory."""
        if self._prefetcher is not None:
            self._prefetcher.reshard()
        self._parts.device.empty_cache()

    # --- its progress ---------------------------------------------------------------------------------------------

    def was_step_applied(self) -> bool:
        """Whether the last `step()` updated the parameters: a boundary that did not overflow."""
        return self._step_applied

    def get_global_grad_norm(self) -> float | None:
        """The 2-norm of the last step's averaged gradients before clipping.

        Available until the next backward pass, and beyond it where clipping or fp16 measured it anyway; else None.
        """
        return self.optimizer.grad_norm() if self.optimizer is not None else None

    def get_lr(self) -> list[float]:
        """The learning rate of each param group."""
        return learning_rates(self.optimizer.param_groups) if self.optimizer is not None else []

    def get_mom(self) -> list[Any]:
        """The momentum, or the betas, of each param group."""
        return momenta(self.optimizer.param_groups) if self.optimizer is not None else []

    # --- its settings ---------------------------------------------------------------------------------------------

    def get_batch_info(self) -> BatchSizes:
        """(samples of a step over all ranks, samples of a forward pass, passes of a step)."""
        return self._batch

    def train_batch_size(self) -> int:
        """Samples per optimizer step over all ranks."""
        return self._batch.train

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples per forward pass of one rank."""
        return self._batch.micro

    def gradient_accumulation_steps(self) -> int:
        """Micro-steps per optimizer step."""
        return self._batch.accumulation

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the batch by changing the accumulation steps; the micro-batch stays.

        Raises:
            EngineStateError: in the middle of an accumulation window.
            ConfigError: it is not a multiple of micro-batch times ranks.
        """
        if self._reducer.has_grads:
            raise EngineStateError("set_train_batch_size in the middle of a batch; call it after a step")
        world = self._parts.group.size
        if train_batch_size < 1 or train_batch_size % (self._batch.micro * world):
            raise ConfigError(
                f"train_batch_size={train_batch_size} is not a multiple of train_micro_batch_size_per_gpu "
                f"({self._batch.micro}) x world size ({world}) = {self._batch.micro * world}"
            )
        self._batch = solve_batch(train_batch_size, self._batch.micro, None, world)
        self._train_log.set_batch_size(train_batch_size)

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Change the samples of a forward pass, and with them the batch; the accumulation steps stay."""
        accumulation = self._batch.accumulation
        self._batch = BatchSizes(micro_batch_size * accumulation * self.dp_world_size, micro_batch_size, accumulation)
        self._train_log.set_batch_size(self._batch.train)

    def zero_optimization_stage(self) -> int:
        """The ZeRO stage in force."""
        return self._parts.plan.stage

    def zero_optimization(self) -> bool:
        """Whether any model state is sharded."""
        return self._parts.plan.stage > 0

    def fp16_enabled(self) -> bool:
        """Whether the model computes in fp16."""
        return self._parts.precision.model_dtype is torch.float16

    def bfloat16_enabled(self) -> bool:
        """Whether the model computes in bf16."""
        return self._parts.precision.model_dtype is torch.bfloat16

    def get_data_types(self) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes of the parameters and of the gradients that accumulate."""
        model = self._parts.precision.model_dtype or torch.float32
        return model, self._parts.precision.grad_dtype or model

    def optimizer_name(self) -> str | None:
        """The optimizer's name in the configuration, or its class where it was passed."""
        named = self._parts.config.optimizer
        if named is not None:
            return str(named.type).lower()
        return None if self.optimizer is None else type(self.basic_optimizer).__name__

    def optimizer_params(self) -> dict[str, Any] | None:
        """The optimizer's parameters in the configuration."""
        named = self._parts.config.optimizer
        return None if named is None else named.params

    def scheduler_name(self) -> str | None:
        """The schedule's name in the configuration."""
        named = self._parts.config.scheduler
        return None if named is None else named.type

    def scheduler_params(self) -> dict[str, Any] | None:
        """The schedule's parameters in the configuration."""
        named = self._parts.config.scheduler
        return None if named is None else named.params

    def postscale_gradients(self) -> bool:
        """Whether gradients are divided after the reduction."""
        return not self._parts.config.prescale_gradients

    @property
    def communication_data_type(self) -> torch.dtype:
        """The dtype in which gradients travel: the configured one, or the model's own."""
        named = dtype_named(self._parts.config.communication_data_type)
        return named or self._parts.precision.model_dtype or torch.float32

    def zero_overlap_comm(self) -> bool:
        """The configured value, or DeepSpeed's default. (Here gradients are reduced in backward unless it is false.)"""
        configured = self._parts.config.zero_optimization.overlap_comm
        return self._parts.plan.shard_params if configured is None else configured

    def zero_reduce_bucket_size(self) -> int:
        """The configured number of elements, or DeepSpeed's default. (Here the engine chooses.)"""
        return self._parts.config.zero_optimization.reduce_bucket_size or 500_000_000

    def zero_offload_optimizer(self) -> Any:
        """The section of the configuration; None where nothing is offloaded."""
        section = self._parts.config.zero_optimization.offload_optimizer
        return None if section.switched_off() else section

    def zero_offload_param(self) -> Any:
        """The section of the configuration; None where nothing is offloaded."""
        section = self._parts.config.zero_optimization.offload_param
        return None if section.switched_off() else section

    def dynamic_loss_scale(self) -> bool:
        """Whether fp16's loss scale looks for itself."""
        return self._parts.config.fp16.loss_scale == 0

    def initial_dynamic_scale(self) -> float:
        """Where it begins."""
        return float(2**self._parts.config.fp16.initial_scale_power)

    def torch_autocast_dtype(self) -> torch.dtype | None:
        """The dtype of torch.autocast; None where it is off."""
        return self._parts.precision.autocast_dtype

    def zero_optimization_partition_gradients(self) -> bool:
        """Whether gradients are sharded."""
        return self._parts.plan.shard_grads

    def zero_optimization_partition_weights(self) -> bool:
        """Whether parameters are sharded."""
        return self._parts.plan.shard_params

    def zero_cpu_offload(self) -> bool:
        """Whether the optimizer's state is in CPU memory."""
        return self._parts.config.zero_optimization.offload_optimizer.device == "cpu"

    def zero_use_cpu_optimizer(self) -> bool:
        """Whether its step runs on the CPU."""
        return self._parts.config.zero_optimization.offload_optimizer.device in ("cpu", "nvme")

    def zero_partial_offload(self) -> float:
        """The share of it that is offloaded."""
        return self._parts.config.zero_optimization.offload_optimizer.ratio

    def checkpoint_tag_validation_enabled(self) -> bool:
        """Whether ranks must name the same tag."""
        return str(self._parts.config.checkpoint.tag_validation).lower() != "ignore"

    def checkpoint_tag_validation_fail(self) -> bool:
        """Whether it is an error if they do not."""
        return str(self._parts.config.checkpoint.tag_validation).lower() == "fail"


def _answer(path: str) -> Callable[[Any], Any]:
    read = attrgetter(path)

    def answer(self: Any) -> Any:
        return read(self._parts.config)

    answer.__doc__ = f"The configuration's `{path}`."
    return answer


def _off(self: Any) -> bool:
    """Not in this release."""
    return False


for _name, _path in SETTINGS.items():
    setattr(EngineAccessors, _name, _answer(_path))
for _name in OFF.split():
    setattr(EngineAccessors, _name, _off)
