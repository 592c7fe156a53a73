"""The table: DeepSpeed's public modules and names, where each is here, how it differs, or why it is absent.

docs/compatibility.md is generated from it. `tests/field/test_drop_in.py` asks every entry for its object and, where the
real DeepSpeed is installed, checks that each name exists there and that what is called "same" takes the same arguments.
"""

from __future__ import annotations

from collections.abc import Mapping

from deepspeedlite.compat.drop_in.entry import Names, at, no, renamed

_NO_DUALPIPE = "DualPipeV is not in this release; PipelineModule has the 1F1B and GPipe schedules"
_VIEW = "says what a stage does; the engine does not read it: PipelineModule(schedule=) chooses the order"
_MONITOR = "a failing disk ends it, not the training"
_FILES = "for scripts' own files: the engine writes its checkpoints without it, and loads no arbitrary objects"
_FOREIGN = "of checkpoints in DeepSpeed's own layout, as `python -m deepspeedlite.checkpoint export` writes them"
_NO_MOE = "expert parallelism and its layers are not in this release; models that bring their own experts train"
_NO_BATCHING = "continuous batching (FastGen) is not in this release; init_inference has engines, or use vLLM"
_NO_POLICIES = "init_inference finds what a model is made of; injection_policy={Block: names of layers} helps it"
_NO_INFERENCE = "not in this release; init_inference makes engines of modules"
_INFERENCE = "splits, loads, casts and checks as docs/inference.md says; kwargs go before config"
_INFERENCE_CONFIG = "a frozen section that names every fault; dtype is a name; see docs/config.md"
_NO_TENSOR = "tensor parallelism is not in this release; a model that a Megatron-style mpu has split trains"
_NO_SEQUENCE = "sequence parallelism is not in this release"
_NO_UNIVERSAL = (
    "there is no universal format: a checkpoint loads at any number of ranks and any stage as it is, and "
    "`python -m deepspeedlite.checkpoint` imports and exports DeepSpeed's own"
)
_REPLACED = "of training, as DeepSpeed had it up to 0.6; for inference init_inference puts layers in"
ONE_SPARSE_OP = "ops.sparse_attention.sparse_attention is products and softmax in one; see docs/sparse-attention.md"
INTERNAL = "an internal of DeepSpeed, of which nothing is here"
_ONE_OPTIMIZER = "one class does all stages; isinstance tells them apart as in DeepSpeed"

_MADE = (
    "made by initialize; its methods take what DeepSpeed's take, but for module_state_dict's destination, prefix and "
    "keep_vars, and what compile takes for DeepCompile; get_batch_info returns numbers; those that it has not, such as "
    "allreduce_gradients, say why"
)
_CONFIG = "settings and sections under the configuration's own names, and a dozen of DeepSpeed's; read-only"
_PIPELINE = "also takes schedule=; ties all parameters of a tied module; see docs/pipeline.md"
_PIPELINE_ENGINE = "made by initialize; refuses stage 3; ends a batch that some rank has no data for on all ranks"
_MPU = "an mpu may have data, tensor and pipeline parallel groups, no others; see docs/model-parallelism.md"
_EXTERNAL = "returned parameters, and those read in a forward, are noticed without it"
_TILED = at("compat.tiled_linear", "TiledLinear TiledLinearReturnBias")
_INIT = "takes nothing of ZeRO++ (quantized weights, hierarchical groups), nor tensor_overrides"

_SAFE = (
    "safe_get_full_fp32_param safe_get_full_grad safe_get_full_optimizer_state safe_set_full_fp32_param "
    "safe_set_full_grad safe_set_full_optimizer_state safe_update_full_grad_vectorized"
)
_LOCAL = at(
    "utils",
    "safe_get_local_fp32_param safe_get_local_grad safe_get_local_optimizer_state safe_set_local_fp32_param "
    "safe_set_local_grad safe_set_local_optimizer_state",
    "called by every rank at stage 3, since parts are sent; at stages 0 to 2 too, where DeepSpeed asserts",
)
_LEAVES = "set_z3_leaf_modules unset_z3_leaf_modules get_z3_leaf_modules z3_leaf_module set_z3_leaf_module"
_LEAVES_BY_NAME = at("compat.leaf_modules", "set_z3_leaf_modules_by_name set_z3_leaf_modules_by_suffix")
_GROUPS = (
    "get_tensor_model_parallel_group get_model_parallel_group get_data_parallel_group "
    "get_tensor_model_parallel_world_size get_model_parallel_world_size get_tensor_model_parallel_rank "
    "get_model_parallel_rank get_tensor_model_parallel_src_rank get_data_parallel_world_size get_data_parallel_rank "
    "_get_data_parallel_group _get_data_parallel_world_size _get_data_parallel_rank _get_model_parallel_world_size "
    "_get_broadcast_src_rank _get_sequence_parallel_world_size _get_sequence_parallel_rank "
    "_get_sequence_parallel_group _get_sequence_data_parallel_world_size _get_sequence_data_parallel_rank "
    "_get_sequence_data_parallel_group"
)
_EXPERT_GROUPS = (
    "_create_expert_and_data_parallel _create_expert_data_and_model_parallel _get_expert_parallel_group "
    "_get_expert_parallel_group_dict _get_expert_parallel_ranks _get_expert_parallel_rank "
    "_get_expert_parallel_world_size _get_expert_data_parallel_group _get_expert_data_parallel_group_dict "
    "_get_expert_data_parallel_rank _get_expert_data_parallel_world_size _get_max_expert_size "
    "_get_max_expert_size_name _get_max_expert_parallel_group"
)
_LAYERS = (
    "takes the dtype of its weights, any batch, and one argument more, gelu=; adjusts initial weights on every rank"
)
_AIO = "loads the module ops.aio; failures are errors, and files of any length will do"
_FILE_WRITERS = at("compat.file_writers", "FastFileWriter FastFileWriterConfig PyFileWriter MockFileWriter")
_COLLECTIVES = (
    "broadcast broadcast_object_list all_gather all_gather_object reduce_scatter_fn reduce_scatter_tensor "
    "all_gather_into_tensor allgather_fn all_to_all_single all_to_all send recv isend irecv batch_isend_irecv "
    "gather scatter barrier monitored_barrier reduce reduce_scatter all_gather_coalesced all_reduce "
    "inference_all_reduce all_reduce_coalesced"
)

# Modules of which nothing is here, and all below them.
ABSENT_MODULES: Mapping[str, str] = {
    "moe": _NO_MOE,
    "runtime.pipe.p2p": INTERNAL,
    "runtime.pipe.dualpipev": _NO_DUALPIPE,
    "inference.v2": _NO_BATCHING,
    "inference.quantization": "init_inference(dtype=torch.int8) quantizes; see docs/inference.md",
    "module_inject": _NO_POLICIES,
    "model_implementations": _NO_POLICIES,
    "runtime.hybrid_engine": "not in this release; zero.unwrap_model_for_generation makes a model whole to generate",
    "runtime.tensor_parallel": _NO_TENSOR,
    "runtime.sequence_parallel": _NO_SEQUENCE,
    "runtime.domino": _NO_TENSOR,
    "sequence": _NO_SEQUENCE,
    "linear": "OptimizedLinear is not in this release; peft has LoRA layers",
    "compression": "the compression library is not part of this library",
    "autotuning": "the autotuner is not in this release; `python -m deepspeedlite.zero.estimate` says what fits",
    "elasticity": "elastic training is not part of this library; --max_restarts restarts with spare machines",
    "nebula": "Nebula is not part of this library; checkpoint.async_save saves in the background",
    "compile": "DeepCompile is not in this release; torch.compile the module, or call engine.compile()",
    "datastates": "DataStates checkpointing is not in this release; checkpoint.async_save saves in the background",
    "nvme": "dslite_io measures and tunes disks; see docs/ops.md",
    "runtime.zenflow": "ZenFlow is not in this release",
    "runtime.superoffload": "SuperOffload is not in this release",
    "runtime.data_pipeline": "the data efficiency library is not in this release",
    "runtime.rollout": _NO_INFERENCE,
    "runtime.swap_tensor": INTERNAL,
    "runtime.checkpoint_engine": "checkpoints are written by deepspeedlite.checkpoint; see docs/checkpoints.md",
    "runtime.model_checkpointing": "checkpoints are written by deepspeedlite.checkpoint; see docs/checkpoints.md",
    "runtime.compressed": "gradients are not compressed; communication_data_type halves their traffic",
    "runtime.comm": "coalesced collectives are deepspeedlite.comm's *_coalesced",
    "runtime.state_dict_factory": _NO_INFERENCE,
    "runtime.weight_quantizer": _NO_INFERENCE,
    "runtime.sparse_tensor": "sparse gradients are not averaged; use nn.Embedding(sparse=False)",
    "runtime.zero.linear": INTERNAL,
    "runtime.zero.muon": "Muon is not in this release; it needs whole matrices, which ZeRO shards",
    "checkpoint.ds_to_universal": _NO_UNIVERSAL,
    "checkpoint.universal_checkpoint": _NO_UNIVERSAL,
    "checkpoint.deepspeed_checkpoint": _NO_UNIVERSAL,
    "checkpoint.reshape_meg_2d": _NO_UNIVERSAL,
    "checkpoint.reshape_3d_utils": _NO_UNIVERSAL,
    "checkpoint.reshape_utils": _NO_UNIVERSAL,
    "checkpoint.zero_checkpoint": _NO_UNIVERSAL,
    "launcher.launch": "the agent is part of `deepspeedlite`, which starts ranks here and elsewhere",
    "launcher.multinode_runner": "launchers are small functions in deepspeedlite.launcher.backends",
    "ops.fp_quantizer": "floating point of few bits is not in this release; ops.group_quantize makes integers",
    "ops.quantizer": "training with rounded weights is not in this release; ops.group_quantize makes integers",
    "ops.deepspeed4science": "use torch.nn.attention.flex_attention",
    "ops.random_ltd": "random layer dropping is not part of this library",
    "ops.sparse_attention.matmul": ONE_SPARSE_OP,
    "ops.sparse_attention.softmax": ONE_SPARSE_OP,
    "ops.gds": "GPUDirect Storage is not in this release; ops.aio goes past the page cache",
    "utils.numa": "deepspeedlite --bind_cores_to_rank gives each rank its cores",
    "utils.bwc": INTERNAL,
    "utils.debug": INTERNAL,
    "utils.mixed_precision_linkage": INTERNAL,
    "accelerator.cuda_accelerator": "one class, accelerator.DeepSpeedAccelerator, is all accelerators",
    "accelerator.cpu_accelerator": "one class, accelerator.DeepSpeedAccelerator, is all accelerators",
    "runtime.fp16.onebit": "the 1-bit optimizers are not here; communication_data_type halves the gradients' traffic",
}

MODULES: Mapping[str, Names] = {
    "": at("compat.initialize", "initialize", _MPU)
    | at("compat.initialize", "add_config_arguments")
    | at("compat.comm", "init_distributed")
    | at("compat.engine", "DeepSpeedEngine", _MADE)
    | at("utils", "log_dist logger OnDevice")
    | at("accelerator", "get_accelerator")
    | at("compat.config", "DeepSpeedConfig", _CONFIG)
    | at("compat.version", "version git_hash git_branch")
    | at("compat.names", "TORCH_DISTRIBUTED_DEFAULT_PORT")
    | renamed("compat.names", dist="comm")
    | renamed("runtime.errors", DeepSpeedConfigError="ConfigError")
    | renamed("optim.step", _ONE_OPTIMIZER, DeepSpeedOptimizer="ShardedOptimizer")
    | at("compat.names", "DeepSpeedOptimizerCallable DeepSpeedSchedulerCallable")
    | at("data.loader", "DeepSpeedDataLoader", "made by build_dataloader; its position can be saved")
    | at("compat.version", "__version_major__ __version_minor__ __version_patch__ __git_hash__ __git_branch__")
    | at("compat.inference", "init_inference", _INFERENCE)
    | at("compat.inference", "default_inference_config", "has this library's defaults")
    | at("inference.engine", "InferenceEngine", _INFERENCE)
    | at("inference.config", "DeepSpeedInferenceConfig", _INFERENCE_CONFIG)
    | at("compat.module_inject", "replace_transformer_layer", _REPLACED)
    | no(_NO_INFERENCE, "DeepSpeedHybridEngine")
    | no(_NO_TENSOR, "tp_model_init set_autotp_mode")
    | at("pipe", "PipelineModule", _PIPELINE)
    | at("compat.pipeline_engine", "PipelineEngine", _PIPELINE_ENGINE)
    | no(_NO_DUALPIPE, "DualPipeVModule DualPipeVEngine")
    | at("ops.transformer", "DeepSpeedTransformerLayer DeepSpeedTransformerConfig", _LAYERS)
    | no("Muon is not in this release; it needs whole matrices, which ZeRO shards", "MUON_OPTIMIZER")
    | no("resolved when heads are split, which is not in this release", "resolve_per_head_muon_after_sharding")
    | no(INTERNAL, "set_optimizer_flags"),
    "module_inject": at("compat.module_inject", "replace_transformer_layer revert_transformer_layer", _REPLACED),
    "module_inject.replace_module": at(
        "compat.module_inject", "replace_transformer_layer revert_transformer_layer", _REPLACED
    ),
    "module_inject.inject": at("compat.module_inject", "module_inject"),
    # --- runtime ------------------------------------------------------------------------------------------------------
    "runtime.engine": at("compat.engine", "DeepSpeedEngine", _MADE)
    | at("compat.names", "DeepSpeedOptimizerCallable DeepSpeedSchedulerCallable")
    | at("compat.helpers", "autocast_if_enabled")
    | no(INTERNAL, "EngineTimers split_half_float_double_sparse"),
    "runtime.base_optimizer": renamed("optim.step", _ONE_OPTIMIZER, DeepSpeedOptimizer="ShardedOptimizer")
    | at("compat.optimizers", "ZeROOptimizer", _ONE_OPTIMIZER),
    "runtime.bf16_optimizer": at("compat.optimizers", "BF16_Optimizer", _ONE_OPTIMIZER),
    "runtime.fp16.fused_optimizer": at("compat.optimizers", "FP16_Optimizer", _ONE_OPTIMIZER),
    "runtime.fp16.unfused_optimizer": at("compat.optimizers", "FP16_UnfusedOptimizer", _ONE_OPTIMIZER),
    "runtime.fp16.loss_scaler": at(
        "optim.precision", "LossScaler", "static and dynamic in one, LossScaler(dynamic=True)"
    )
    | no("use optim.precision.LossScaler(dynamic=True); the configuration's fp16 section makes it", "DynamicLossScaler")
    | no("the engine makes it from the fp16 section", "CreateLossScaler LossScalerBase LossScaleConfig"),
    "runtime.config": at("compat.config", "DeepSpeedConfig", _CONFIG)
    | renamed("runtime.errors", DeepSpeedConfigError="ConfigError")
    | at("compat.names", "ADAM_OPTIMIZER ADAMW_OPTIMIZER ADAGRAD_OPTIMIZER LAMB_OPTIMIZER LION_OPTIMIZER")
    | no("write the dict and give it to initialize(config=...)", "DeepSpeedConfigWriter"),
    "runtime.config_utils": renamed(
        "config.base", "a pydantic model that rejects what it does not know", DeepSpeedConfigModel="Section"
    ),
    "runtime.constants": at("compat.names", "ROUTE_TRAIN ROUTE_EVAL ROUTE_PREDICT ROUTE_ENCODE")
    | at(
        "compat.names",
        "TRAIN_BATCH_SIZE TRAIN_MICRO_BATCH_SIZE_PER_GPU GRADIENT_ACCUMULATION_STEPS GRADIENT_CLIPPING OPTIMIZER "
        "SCHEDULER TYPE FP16 STEPS_PER_PRINT COMMUNICATION_DATA_TYPE WALL_CLOCK_BREAKDOWN PRESCALE_GRADIENTS "
        "GRADIENT_PREDIVIDE_FACTOR ZERO_ALLOW_UNTESTED_OPTIMIZER DUMP_STATE MAX_GRAD_NORM GLOBAL_RANK",
    ),
    "runtime.dataloader": at("data.loader", "RepeatingLoader")
    | at("data.loader", "DeepSpeedDataLoader", "made by build_dataloader; its position can be saved"),
    "runtime.lr_schedules": at(
        "schedules",
        "LRRangeTest OneCycle WarmupLR WarmupDecayLR WarmupCosineLR VALID_LR_SCHEDULES",
    )
    | at("compat.tuning_arguments", "add_tuning_arguments get_config_from_args")
    | at(
        "compat.names",
        "LR_SCHEDULE LR_RANGE_TEST ONE_CYCLE WARMUP_LR WARMUP_DECAY_LR WARMUP_COSINE_LR WARMUP_MIN_LR WARMUP_MAX_LR "
        "WARMUP_NUM_STEPS WARMUP_TYPE WARMUP_LOG_RATE WARMUP_LINEAR_RATE TOTAL_NUM_STEPS",
    )
    | no("add_tuning_arguments and argparse's parse_known_args", "parse_arguments")
    | no("get_config_from_args takes what the command line says", "override_params get_lr_from_config"),
    "runtime.utils": at(
        "compat.helpers",
        "set_random_seed move_to_device copy_to_device clip_grad_norm_ get_global_norm get_global_norm_of_tensors "
        "clip_tensors_by_global_norm has_inf_or_nan ensure_directory_exists empty_cache is_model_parallel_parameter "
        "get_only_unique_item get_tensor_bytes noop_decorator get_ma_status memory_status",
    )
    | at("compat.helpers", "DummyOptim")
    | at("metrics.memory", "see_memory_usage")
    | no("optimizer.overflow says whether the last step overflowed", "CheckOverflow")
    | no("engine.get_global_grad_norm()", "get_flattened_grad_norm get_grad_zeros get_weight_norm")
    | at("parallel.pipe.partition", "partition_uniform partition_balanced")
    | at("compat.partitioned_tensor", "PartitionedTensor")
    | no(INTERNAL, "prefix_sum_inc call_to_str")
    | no(_NO_MOE, "get_norm_with_moe_layers get_norm_with_moe_layers_fast"),
    "runtime.compiler": at("compat.helpers", "is_compile_supported")
    | no("use torch.compiler.disable", "disable enable lazy_disable"),
    "runtime.activation_checkpointing.checkpointing": at(
        "activation_checkpointing",
        "checkpoint non_reentrant_checkpoint configure is_configured get_cuda_rng_tracker "
        "model_parallel_cuda_manual_seed model_parallel_reconfigure_tp_seed partition_activations_in_checkpoint "
        "set_num_layers reset CudaRNGStatesTracker",
    )
    | renamed("activation_checkpointing", _CUDA_RNG_STATE_TRACKER="_tracker")
    | no("checkpoint() is a function over torch's own recomputation", "CheckpointFunction")
    | no(INTERNAL, "partition_activations gather_partitioned_activations"),
    "runtime.activation_checkpointing.config": renamed(
        "config.sections.storage",
        "a section of DeepSpeedConfig",
        DeepSpeedActivationCheckpointingConfig="ActivationCheckpointing",
    ),
    # --- inference ----------------------------------------------------------------------------------------------------
    "inference": at("inference.config", "DeepSpeedTPConfig", _INFERENCE_CONFIG)
    | no(_NO_BATCHING, "InferenceEngineV2 RaggedInferenceEngineConfig build_hf_engine build_engine_from_ds_checkpoint"),
    "inference.engine": at("inference.engine", "InferenceEngine", _INFERENCE),
    "inference.config": at(
        "inference.config",
        "DeepSpeedInferenceConfig DeepSpeedTPConfig DeepSpeedMoEConfig QuantizationConfig WeightQuantConfig "
        "ActivationQuantConfig QKVQuantConfig InferenceCheckpointConfig",
        _INFERENCE_CONFIG,
    )
    | at("compat.inference", "DtypeEnum MoETypeEnum")
    | no("a key's words are literals: symmetric, asymmetric", "QuantTypeEnum BaseQuantConfig"),
    # --- pipelines ----------------------------------------------------------------------------------------------------
    "pipe": at("pipe", "LayerSpec TiedLayerSpec")
    | at("pipe", "PipelineModule", _PIPELINE)
    | no(_NO_DUALPIPE, "DualPipeVModule"),
    "runtime.pipe": at("pipe", "LayerSpec TiedLayerSpec")
    | at("pipe", "PipelineModule", _PIPELINE)
    | at("parallel.pipe.topology", "ProcessTopology"),
    "runtime.pipe.module": at("pipe", "LayerSpec TiedLayerSpec")
    | at("pipe", "PipelineModule", _PIPELINE)
    | at("runtime.errors", "PipelineError"),
    "runtime.pipe.engine": at("compat.pipeline_engine", "PipelineEngine", _PIPELINE_ENGINE),
    "runtime.pipe.schedule": at(
        "compat.pipe_schedule", "PipeSchedule TrainSchedule InferenceSchedule DataParallelSchedule", _VIEW
    )
    | at(
        "compat.pipe_schedule",
        "PipeInstruction BufferOpInstruction LoadMicroBatch ForwardPass BackwardPass SendActivation RecvActivation "
        "SendGrad RecvGrad ReduceGrads ReduceTiedGrads OptimizerStep CommitP2P",
    )
    | no(_NO_DUALPIPE, "DualPipeVSchedule"),
    "runtime.pipe.topology": at(
        "parallel.pipe.topology", "ProcessTopology PipeDataParallelTopology PipeModelDataParallelTopology"
    )
    | at("parallel.pipe.topology", "PipelineParallelGrid", "takes a topology; its groups are those of all ranks"),
    # --- ZeRO ---------------------------------------------------------------------------------------------------------
    "runtime.zero": at("sharded_params.gathered", "GatheredParameters")
    | at("zero", "ZeroParamStatus")
    | at("compat.zero_params", "Init", _INIT)
    | at("compat.zero_params", "register_external_parameter", _EXTERNAL)
    | at("sharded_params.gathered", "unwrap_model_for_generation", "takes an engine or a module")
    | at("compat.zero", "ZeroParamType")
    | _TILED
    | no(INTERNAL, "DeepSpeedZeRoOffload DeepSpeedTensorOverride"),
    "runtime.zero.partition_parameters": at("sharded_params.gathered", "GatheredParameters")
    | at("zero", "ZeroParamStatus")
    | at("compat.zero_params", "Init", _INIT)
    | at("compat.zero_params", "register_external_parameter unregister_external_parameter", _EXTERNAL)
    | at("compat.zero", "ZeroParamType")
    | at(
        "compat.zero",
        "zero_wrapper_for_fp_tensor_constructor _orig_torch_arange",
        "replacing it changes nothing: zero.Init leaves torch's constructors alone",
    )
    | at("accelerator", "get_accelerator")
    | no("zero.Init is a context: leave it", "shutdown_init_context restore_init_context"),
    "runtime.zero.tiling": _TILED,
    "runtime.zero.config": renamed(
        "config.sections.zero", "a section of DeepSpeedConfig", DeepSpeedZeroConfig="ZeroOptimization"
    )
    | at("compat.config", "get_zero_config")
    | at("compat.zero", "ZeroStageEnum"),
    "runtime.zero.leaf_module_config": renamed(
        "config.sections.zero", "a section of DeepSpeedConfig", DeepSpeedZeroLeafModuleConfig="LeafModule"
    ),
    "runtime.zero.offload_config": at("compat.zero", "OffloadDeviceEnum")
    | at("compat.offload_states", "OffloadStateTypeEnum")
    | renamed(
        "config.sections.zero",
        "a section of DeepSpeedConfig",
        DeepSpeedZeroOffloadParamConfig="OffloadParam",
        DeepSpeedZeroOffloadOptimizerConfig="OffloadOptimizer",
    ),
    "runtime.zero.utils": at("compat.zero", "is_zero_param ZeRORuntimeException")
    | no("preflight.elementwise says why an optimizer cannot be sharded", "is_zero_supported_optimizer"),
    "runtime.zero.stage3": at("compat.optimizers", "DeepSpeedZeroOptimizer_Stage3", _ONE_OPTIMIZER)
    | at("sharded_params.gathered", "unwrap_model_for_generation", "takes an engine or a module")
    | at(
        "tools.memory_plan.estimate",
        "estimate_zero3_model_states_mem_needs_all_live estimate_zero3_model_states_mem_needs_all_cold",
    )
    | no("tools.memory_plan.states.model_states_bytes", "estimate_zero3_model_states_mem_needs"),
    "runtime.zero.stage_1_and_2": at("compat.optimizers", "DeepSpeedZeroOptimizer", _ONE_OPTIMIZER)
    | at(
        "tools.memory_plan.estimate",
        "estimate_zero2_model_states_mem_needs_all_live estimate_zero2_model_states_mem_needs_all_cold",
    )
    | no("tools.memory_plan.states.model_states_bytes", "estimate_zero2_model_states_mem_needs"),
    # --- ops ----------------------------------------------------------------------------------------------------------
    "ops.adam": at("ops.adam", "DeepSpeedCPUAdam FusedAdam") | no("ZenFlow is not in this release", "ZenFlowCPUAdam"),
    "ops.adam.cpu_adam": at("ops.adam", "DeepSpeedCPUAdam"),
    "ops.adam.fused_adam": at("ops.adam", "FusedAdam"),
    "ops.adagrad": at("ops.adagrad", "DeepSpeedCPUAdagrad"),
    "ops.adagrad.cpu_adagrad": at("ops.adagrad", "DeepSpeedCPUAdagrad"),
    "ops.lion": at("ops.lion", "DeepSpeedCPULion FusedLion"),
    "ops.lion.cpu_lion": at("ops.lion", "DeepSpeedCPULion"),
    "ops.lion.fused_lion": at("ops.lion", "FusedLion"),
    "ops.lamb": at("ops.lamb", "FusedLamb"),
    "ops.lamb.fused_lamb": at("ops.lamb", "FusedLamb"),
    "ops.transformer": at("ops.transformer", "DeepSpeedTransformerLayer DeepSpeedTransformerConfig", _LAYERS)
    | no(_NO_POLICIES, "DeepSpeedTransformerInference"),
    "ops.transformer.transformer": at(
        "ops.transformer", "DeepSpeedTransformerLayer DeepSpeedTransformerConfig TransformerConfig", _LAYERS
    ),
    "ops.op_builder": at("compat.op_builders", "CPUAdamBuilder CPUAdagradBuilder CPULionBuilder")
    | at("compat.op_builders", "AsyncIOBuilder", _AIO)
    | at(
        "compat.op_builders",
        "FusedAdamBuilder FusedLambBuilder FusedLionBuilder UtilsBuilder InferenceBuilder QuantizerBuilder OpBuilder",
    )
    | at("compat.op_builders", "PinMemoryBuilder", "compiles nothing")
    | at("compat.op_builders", "TransformerBuilder StochasticTransformerBuilder")
    | at(
        "compat.op_builders",
        "InferenceCoreBuilder InferenceCutlassBuilder RaggedOpsBuilder RaggedUtilsBuilder SpatialInferenceBuilder "
        "FlashAttentionBuilder EvoformerAttnBuilder FPQuantizerBuilder DeepCompileBuilder "
        "RandomLTDBuilder GDSBuilder ShareMemCommBuilder CCLCommBuilder",
        "not compatible anywhere: load says why",
    )
    | no(INTERNAL, "NotImplementedBuilder"),
    "ops": renamed("compat.op_names", __compatible_ops__="compatible_ops"),
    "ops.op_builder.all_ops": at("compat.op_names", "ALL_OPS", "our ops, whatever the device"),
    "ops.op_builder.builder": at("compat.op_builders", "OpBuilder"),
    "ops.op_builder.async_io": at("compat.op_builders", "AsyncIOBuilder", _AIO),
    "ops.aio": at("compat.op_builders", "AsyncIOBuilder", _AIO),
    # --- communication and machine ------------------------------------------------------------------------------------
    "comm": at("compat.comm", _COLLECTIVES)
    | at("comm", "is_initialized get_rank get_world_size get_local_rank destroy_process_group")
    | at(
        "compat.comm",
        "init_distributed is_available get_global_rank get_world_group get_all_ranks_from_group new_group log_summary "
        "reset_log configure P2POp initialize_mesh_device has_all_gather_into_tensor has_reduce_scatter_tensor "
        "has_all_reduce_coalesced has_coalescing_manager",
    )
    | at("compat.comm", "ReduceOp ProcessGroup", "torch.distributed's own")
    | at("compat.comm_backend", "mpi_discovery", "needs mpi4py, and sets the variables that init_distributed reads")
    | no("clusters' own variables are read by init_distributed", "in_aml in_aws_sm in_dlts")
    | no(INTERNAL, "cdb timed_op set_backend init_deepspeed_backend enable_symm_mem_for_group"),
    "comm.reduce_op": at("compat.comm", "ReduceOp", "torch.distributed's own"),
    "comm.torch": at("compat.comm_backend", "TorchBackend", "its methods are the functions of comm"),
    "comm.config": renamed("config.sections.monitors", "a section of DeepSpeedConfig", CommsLoggerConfig="CommsLogger"),
    "accelerator": at("accelerator", "get_accelerator set_accelerator is_current_accelerator_supported")
    | at("accelerator", "DeepSpeedAccelerator", "one class for cuda, rocm and cpu; see get_accelerator"),
    "constants": at("compat.names", "TORCH_DISTRIBUTED_DEFAULT_PORT default_pg_timeout"),
    "git_version_info": at("compat.version", "version git_hash git_branch installed_ops torch_info accelerator_name"),
    "env_report": at("env_report", "main", "takes our options; see docs/env-report.md")
    | renamed("compat.commands", "takes our options too; see docs/env-report.md", cli_main="report"),
    "launcher.runner": at("compat.names", "DEEPSPEED_ENVIRONMENT_NAME DLTS_HOSTFILE")
    | at("launcher.cli", "main", "takes DeepSpeed's options and some more; see docs/launcher.md")
    | at("compat.hosts", "EXPORT_ENVS", "NCCL's variables are among them")
    | at("compat.hosts", "fetch_hostfile", "names all lines that are wrong, in a ValueError")
    | at("compat.hosts", "parse_resource_filter parse_inclusion_exclusion", "take ranges; refuse to leave nothing"),
    "launcher.constants": at(
        "compat.names", "PDSH_LAUNCHER OPENMPI_LAUNCHER MPICH_LAUNCHER IMPI_LAUNCHER SLURM_LAUNCHER MVAPICH_LAUNCHER"
    ),
    # --- utils --------------------------------------------------------------------------------------------------------
    "utils": at("utils", f"{_SAFE} {_LEAVES} logger log_dist RepeatingLoader OnDevice log_dist_once")
    | _LOCAL
    | _LEAVES_BY_NAME
    | at("compat.groups", " ".join(name for name in _GROUPS.split() if not name.startswith("_")))
    | at("compat.helpers", "instrument_w_nvtx")
    | no("whole parameters are leaves' own; mark the module", "z3_leaf_parameter")
    | no(INTERNAL, "tensor_fragment get_full_hp_param get_full_hp_grad link_hp_params")
    | no("deepspeedlite --bind_cores_to_rank", "get_numactl_cmd"),
    "utils.groups": at("compat.groups", _GROUPS)
    | at("compat.groups", "initialize", "takes an mpu; an expert-parallel size over 1 is refused")
    | no(_NO_MOE, _EXPERT_GROUPS),
    "utils.logging": at("runtime.log", "logger log_dist")
    | at("utils", "log_dist_once")
    | at("compat.helpers", "print_dist warning_once set_log_level_from_string"),
    "utils.timer": at("compat.timers", "SynchronizedWallClockTimer NoopTimer")
    | at("compat.timers", "CudaEventTimer trim_mean")
    | at("compat.timers", "ThroughputTimer", "times are of the device"),
    "utils.tensor_fragment": at("utils", _SAFE) | _LOCAL,
    "utils.z3_leaf_module": at("compat.leaf_modules", _LEAVES) | _LEAVES_BY_NAME,
    "utils.nvtx": at("compat.helpers", "instrument_w_nvtx"),
    "utils.init_on_device": at("utils", "OnDevice"),
    "utils.comms_logging": at(
        "metrics.comms_logger", "CommsLogger", "made without arguments; configured by its section"
    ),
    "utils.torch": at("compat.helpers", "required_torch_version"),
    "utils.zero_to_fp32": at(
        "compat.zero_to_fp32",
        "get_fp32_state_dict_from_zero_checkpoint convert_zero_checkpoint_to_fp32_state_dict "
        "load_state_dict_from_zero_checkpoint",
    )
    | at("compat.checkpoint_files", "get_checkpoint_files get_optim_files get_model_state_files", _FOREIGN)
    | at("compat.checkpoint_files", "get_model_state_file parse_optim_states parse_model_states", _FOREIGN),
    # --- the rest -----------------------------------------------------------------------------------------------------
    "checkpoint": no(_NO_UNIVERSAL, "DeepSpeedCheckpoint ZeROCheckpoint enable_universal_checkpoint"),
    "checkpoint.utils": at("compat.helpers", "clone_tensors_for_torch_save")
    | at(
        "compat.checkpoint_files",
        "get_layer_ckpt_name_for_rank get_model_ckpt_name_for_rank get_zero_ckpt_name_for_rank",
        _FOREIGN,
    ),
    "monitor.monitor": at("metrics.monitor.registry", "Monitor", "a failing disk ends a monitor, not the training")
    | at("compat.config", "MonitorMaster", "a failing disk ends a monitor, not the training"),
    "monitor.config": at("compat.config", "get_monitor_config")
    | renamed("compat.config", "an object with the sections", DeepSpeedMonitorConfig="MonitorConfig")
    | renamed(
        "config.sections.monitors",
        "a section of the configuration",
        TensorBoardConfig="TensorBoard",
        WandbConfig="Wandb",
        CSVConfig="CsvMonitor",
        CometConfig="Comet",
    ),
    "monitor.tensorboard": at("compat.monitors", "TensorBoardMonitor", _MONITOR),
    "monitor.wandb": at("compat.monitors", "WandbMonitor", _MONITOR),
    "monitor.csv_monitor": renamed("compat.monitors", _MONITOR, csvMonitor="CsvMonitor"),
    "monitor.comet": at("compat.monitors", "CometMonitor", _MONITOR),
    "compression.helper": at("compat.helpers", "recursive_getattr recursive_setattr"),
    "utils.module_utils": at("compat.helpers", "recursive_getattr recursive_setattr"),
    "runtime.checkpoint_engine.torch_checkpoint_engine": at(
        "compat.checkpoint_engine", "TorchCheckpointEngine", _FILES
    ),
    "runtime.checkpoint_engine.checkpoint_engine": at(
        "compat.checkpoint_engine", "CheckpointEngine CheckpointCommitInfo", _FILES
    ),
    "io": _FILE_WRITERS,
    "io.fast_file_writer": at("compat.file_writers", "FastFileWriter FastFileWriterConfig"),
    "io.py_file_writer": at("compat.file_writers", "PyFileWriter"),
    "io.mock_file_writer": at("compat.file_writers", "MockFileWriter"),
    "profiling.flops_profiler": at("profiling", "FlopsProfiler get_model_profile"),
    "profiling.flops_profiler.profiler": at("profiling", "FlopsProfiler get_model_profile"),
}
