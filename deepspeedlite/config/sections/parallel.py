"""Parallelism beyond data: `tensor_parallel`, `expert_parallel`, `pipeline`, `hybrid_engine`."""

from typing import Any, Literal

from deepspeedlite.config.base import Dtype, Flag, FreeForm, Int, Number, Section, Text, key, part


class LayerSpec(Section):
    """Which parameters to split, and how."""

    FEATURE = "tensor_parallel"

    patterns: list[Text] = key(list, "Regular expressions over parameter names.")
    partition_type: Literal["row", "column", "skip"] = key("column", "How matching weights are split.")
    shape: list[Any] | None = key(None, "Shape of a fused weight before it is split.")
    partition_dim: Int | None = key(None, "Dimension of that shape to split.")
    model_types: list[Text] | None = key(None, "Apply only to these model types.")


class PartitionConfig(Section):
    """Splitting rules."""

    FEATURE = "tensor_parallel"

    use_default_specs: Flag = key(True, "Add the rules to the preset's.")
    layer_specs: list[LayerSpec] = key(list, "Rules, first match first.")


class TensorParallelGroup(Section):
    """An older way to size tensor parallelism."""

    FEATURE = "tensor_parallel"

    tp_size: Int = key(1, "Ranks per model.", ge=1)
    tp_grain_size: Int = key(1, "Granularity of a split.", ge=1)
    mpu: Any = key(None, "Object that knows the groups.")
    tp_group: Any = key(None, "Process group.")


class TensorParallel(Section):
    """Splitting layers over ranks (AutoTP)."""

    SWITCH = "autotp_size"
    OFF = (0, 1)
    FEATURE = "tensor_parallel"

    autotp_size: Int = key(0, "Ranks per model; 0: off.", ge=0)
    dtype: Dtype = key("fp16", "Type to convert the model to.")
    preset_model: Text | None = key(None, "Built-in rules for a model family.")
    tp_overlap_comm: Flag = key(False, "Overlap its all-reduce with computation.")
    vocab_parallel_lm_head: Flag | None = key(None, "Keep the output layer's vocabulary split.")
    vocab_parallel_ce_backend: Literal["torch", "liger"] = key("torch", "Implementation of the split loss.")
    partition_config: PartitionConfig | None = key(None, "Rules of one's own.")
    tp: TensorParallelGroup = part(TensorParallelGroup, "Older form of the size.")
    injection_policy_tuple: list[Any] | None = key(None, "Layers named by hand.")
    keep_module_on_host: Flag = key(False, "Load weights on the CPU first.")
    kernel_inject: Flag = key(False, "Replace layers by inference kernels.")


class ExpertParallel(Section):
    """Spreading experts over ranks (AutoEP)."""

    SWITCH = "enabled"
    FEATURE = "expert_parallel"

    enabled: Flag = key(False, "Turn expert parallelism on.")
    autoep_size: Int = key(1, "Ranks that share the experts.", ge=1)
    expert_tensor_parallel_size: Int = key(1, "Reserved; 1.", ge=1)
    validate_folding_routing: Flag = key(False, "Check the routing.")
    async_split_plan: Flag = key(False, "Overlap the transfer of split sizes with packing.")
    preset_model: Text | None = key(None, "Built-in rules for a model family.")
    use_grouped_mm: Flag = key(True, "Use a grouped matrix multiplication.")
    disable_triton_grouped_mm: Flag = key(False, "Do not use its Triton version.")
    moe_layer_pattern: Text | None = key(None, "Regular expression for mixture-of-experts modules.")
    router_pattern: Text | None = key(None, "Attribute that holds the router.")
    expert_pattern: Text | None = key(None, "Attribute that holds the experts.")
    shared_experts_pattern: Text | None = key(None, "Attribute that holds shared experts.")
    shared_experts_gate_pattern: Text | None = key(None, "Attribute that holds their gate.")
    has_shared_experts: Flag | None = key(None, "Whether there are shared experts; null: detect.")
    score_func: Literal["auto", "softmax", "sigmoid"] = key("auto", "Function of the router's scores.")
    score_apply: Literal["auto", "pre", "post"] = key("auto", "Apply scores before or after the experts.")
    combine_impl: Literal["auto", "weighted_sum", "fused_weighted_sum", "legacy_bmm"] = key(
        "auto", "How outputs are combined."
    )
    row_weighting_impl: Literal["auto"] | Text = key("auto", "How rows are weighted.")
    gate_up_impl: Text = key("separate", "How the gate and up projections run.")
    comm_backend: Text = key("comm", "Library for the exchange of tokens.")
    comm_num_sm: Int = key(12, "Multiprocessors given to it.", ge=0)
    comm_qp_margin: Int = key(4, "Spare queue pairs.", ge=0)
    comm_max_tokens_per_rank: Int = key(0, "Upper bound on tokens per rank; 0: none.", ge=0)
    route_norm: Flag | None = key(None, "Normalise the chosen scores; null: detect.")
    route_scale: Number = key(1.0, "Factor on the scores.")
    top_k: Literal["auto"] | Int = key("auto", "Experts per token.")
    routed_scaling_factor: Literal["auto"] | Number = key("auto", "Factor on the experts' output.")
    num_expert_groups: Int | None = key(None, "Groups of experts.", ge=1)
    num_limited_groups: Int | None = key(None, "Groups a token may choose from.", ge=1)
    load_balance_coeff: None = key(None, "Reserved; null.")
    expert_w1: Text | None = key(None, "Name of the gate projection.")
    expert_w2: Text | None = key(None, "Name of the down projection.")
    expert_w3: Text | None = key(None, "Name of the up projection.")
    num_experts_attr: Text | None = key(None, "Attribute of the model's configuration: number of experts.")
    top_k_attr: Text | None = key(None, "Attribute of the model's configuration: experts per token.")
    expert_activation: Text | None = key(None, "Activation of the experts.")


class Pipeline(Section):
    """Settings of the pipeline engine, which is chosen by passing a PipelineModule."""

    FEATURE = "pipeline"

    stages: Literal["auto"] | Int = key("auto", "Number of stages.", feature="pipeline_tuning")
    partition: Text = key("best", "How layers are spread over them.", feature="pipeline_tuning")
    seed_layers: Flag = key(False, "Seed every layer on its own.", feature="pipeline_tuning")
    activation_checkpoint_interval: Int = key(0, "Layers between checkpoints; 0: none.", ge=0)
    pipe_partitioned: Flag = key(True, "Send activations sharded.", feature="pipeline_tuning")
    grad_partitioned: Flag = key(True, "Send gradients sharded.", feature="pipeline_tuning")
    use_reentrant: Flag | None = key(None, "Use torch's reentrant checkpoint.", feature="pipeline_tuning")


class HybridEngine(Section):
    """Training and generation with one engine."""

    SWITCH = "enabled"
    FEATURE = "hybrid_engine"

    enabled: Flag = key(False, "Turn it on.")
    max_out_tokens: Int = key(512, "Longest generation.", ge=1)
    inference_tp_size: Int = key(1, "Ranks per model in generation.", ge=1)
    release_inference_cache: Flag = key(False, "Free the cache after generation.")
    pin_parameters: Flag = key(True, "Keep parameters on the device.")
    tp_gather_partition_size: Int = key(8, "Layers gathered at once.", ge=1)
    enable_cuda_graph: Flag = key(False, "Capture generation into CUDA graphs.")


class WeightQuantization(Section):
    """Quantizing weights as they are loaded."""

    SWITCH = "enabled"
    FEATURE = "weight_quantization"

    enabled: Flag = key(True, "Turn it on (the default where the section is present).")
    num_bits: Int = key(8, "Bits per weight.", ge=1)
    q_type: Literal["symmetric", "asymmetric"] = key("symmetric", "Kind of quantization.")
    q_groups: Int = key(1, "Groups with a scale each.", ge=1)
    quantized_initialization: FreeForm = key(dict, "Quantize while parameters are made.")
    post_init_quant: FreeForm = key(dict, "Quantize afterwards.")
