"""`data_efficiency` (curriculum learning, random token dropping), `compile` and `autotuning`."""

from typing import Annotated, Literal

from deepspeedlite.config.base import AnyCase, Flag, FreeForm, Int, Section, Text, key, part


class LtdSchedule(Section):
    """How the kept length grows."""

    FEATURE = "data_efficiency"

    min_value: Int | None = key(None, "First length.", ge=1)
    max_value: Int | None = key(None, "Last length.", ge=1)
    schedule_type: Text = key("fixed_linear", "Shape of the growth.")
    schedule_config: FreeForm = key(dict, "require_steps and seq_per_step.")


class LayerTokenLr(Section):
    """A learning-rate schedule by tokens seen."""

    FEATURE = "data_efficiency"

    enabled: Flag = key(False, "Turn it on.")
    total_layer_tokens: Int | None = key(None, "Tokens until the end.", ge=1)
    warmup_type: Text | None = key(None, "Shape of the warm-up.")
    warmup_layer_tokens: Int | None = key(None, "Tokens of the warm-up.", ge=1)


class RandomLtd(Section):
    """Random layerwise token dropping."""

    SWITCH = "enabled"
    FEATURE = "data_efficiency"

    enabled: Flag = key(False, "Turn it on.")
    total_layer_num: Int | None = key(None, "Layers of the model.", ge=1)
    random_ltd_layer_num: Int | None = key(None, "Layers that drop tokens.", ge=0)
    random_ltd_layer_id: list[Int] = key(list, "Their indices.")
    model_mask_name: Text | None = key(None, "Keyword of the attention mask.")
    model_type: Literal["decoder", "encoder"] | None = key(None, "Kind of model.")
    hidden_state_order: Text | None = key(None, "batch_seq_dim or seq_batch_dim.")
    micro_batch_size: Int | None = key(None, "Micro-batch size.", ge=1)
    global_batch_size: Int | None = key(None, "Global batch size.", ge=1)
    random_ltd_schedule: LtdSchedule = part(LtdSchedule, "Growth of the kept length.")
    layer_token_lr_schedule: LayerTokenLr = part(LayerTokenLr, "Learning rate by tokens.")


class DataRouting(Section):
    """Which tokens pass through which layers."""

    SWITCH = "enabled"
    FEATURE = "data_efficiency"

    enabled: Flag = key(False, "Turn it on.")
    random_ltd: RandomLtd = part(RandomLtd, "Random token dropping.")


class CurriculumLearning(Section):
    """Easy samples first."""

    SWITCH = "enabled"
    FEATURE = "data_efficiency"

    enabled: Flag = key(False, "Turn it on.")
    data_cluster_path: Text | None = key(None, "Directory of the index files.")
    curriculum_metrics: FreeForm = key(dict, "One object per metric of difficulty.")


class DynamicBatching(Section):
    """Batches of equal token count."""

    SWITCH = "enabled"
    FEATURE = "data_efficiency"

    enabled: Flag = key(False, "Turn it on.")
    metrics_path: Text | None = key(None, "File of sequence lengths.")
    lr_scaling_method: Literal["linear", "sqrt", "none"] = key("linear", "How the learning rate follows.")
    min_batch_size: Int = key(1, "Smallest batch.", ge=1)
    max_batch_size: Int | None = key(None, "Largest batch.", ge=1)
    sequence_picking_order: Literal["random", "seqlen", "dataloader"] = key("dataloader", "Order of sequences.")
    max_tokens: Int | None = key(None, "Tokens per batch.", ge=1)
    verbose: Flag = key(False, "Log the batches.")


class DataSampling(Section):
    """Which samples come when."""

    SWITCH = "enabled"
    FEATURE = "data_efficiency"

    enabled: Flag = key(False, "Turn it on.")
    num_epochs: Int = key(1000, "Most passes over the data.", ge=1)
    num_workers: Int = key(0, "Loader processes.", ge=0)
    pin_memory: Flag = key(False, "Use page-locked memory.")
    curriculum_learning: CurriculumLearning = part(CurriculumLearning, "Curriculum learning.")
    dynamic_batching: DynamicBatching = part(DynamicBatching, "Dynamic batching.")


class DataEfficiency(Section):
    """Choosing samples and tokens."""

    SWITCH = "enabled"
    FEATURE = "data_efficiency"

    enabled: Flag = key(False, "Turn it on.")
    seed: Int = key(1234, "Seed of the sampling.")
    data_routing: DataRouting = part(DataRouting, "Token dropping.")
    data_sampling: DataSampling = part(DataSampling, "Sampling.")


class Compile(Section):
    """DeepSpeed's graph compiler."""

    SWITCH = "deepcompile"
    FEATURE = "compile_tuning"

    deepcompile: Flag = key(False, "Turn it on.", feature="deepcompile")
    autoep_non_moe: Flag = key(False, "Leave expert layers uncompiled.")
    free_activation: Flag = key(False, "Free large activations early.")
    free_activation_threshold: Int = key(10_485_760, "Bytes from which an activation is large.", ge=0)
    offload_activation: Flag = key(False, "Move activations to the CPU.")
    offload_activation_pin_memory: Flag = key(True, "In page-locked memory.")
    offload_opt_states: Flag = key(False, "Move the optimizer's state to the CPU between steps.")
    offload_parameters: Flag = key(False, "Move parameters to the CPU.")
    double_buffer: Flag = key(True, "Use two communication buffers.")
    symmetric_memory: Flag = key(False, "Use symmetric memory.")
    debug_log: Flag = key(False, "Write the graphs out.")
    sync_before_reduce: Flag = key(False, "Synchronize before a reduction.")
    sync_after_reduce: Flag = key(False, "Synchronize after a reduction.")
    sync_before_allgather: Flag = key(False, "Synchronize before an all-gather.")
    sync_after_allgather: Flag = key(False, "Synchronize after an all-gather.")
    keep_int_input_tensors: Flag = key(True, "Keep the values of integer inputs.")
    keep_all_input_tensors: Flag = key(False, "Keep the values of all inputs.")
    passes: list[Literal["z1", "z3", "autosp", "autotp"]] | None = key(None, "Passes to run.")


class ModelInfo(Section):
    """What the tuner may assume about the model."""

    FEATURE = "autotuning"

    profile: Flag = key(False, "Measure it.")
    num_params: Int | None = key(None, "Parameters.", ge=1)
    hidden_size: Int | None = key(None, "Hidden size.", ge=1)
    num_layers: Int | None = key(None, "Layers.", ge=1)


class Autotuning(Section):
    """Searching for the fastest configuration."""

    SWITCH = "enabled"
    FEATURE = "autotuning"

    enabled: Flag = key(False, "Turn it on.")
    results_dir: Text | None = key("autotuning_results", "Directory for results.")
    exps_dir: Text | None = key("autotuning_exps", "Directory for experiments.")
    overwrite: Flag = key(True, "Run experiments again.")
    metric: Annotated[Literal["latency", "throughput", "flops", "forward", "step"], AnyCase] = key(
        "throughput", "What is best."
    )
    metric_path: Text | None = key(None, "File that holds the metric.")
    start_profile_step: Int = key(3, "First measured step.", ge=0)
    end_profile_step: Int = key(5, "Last measured step.", ge=0)
    fast: Flag = key(True, "Tune only the stage and the micro-batch size.")
    max_train_batch_size: Int | None = key(None, "Largest batch.", ge=1)
    min_train_batch_size: Int = key(1, "Smallest batch.", ge=1)
    max_train_micro_batch_size_per_gpu: Int = key(1024, "Largest micro-batch.", ge=1)
    min_train_micro_batch_size_per_gpu: Int = key(1, "Smallest micro-batch.", ge=1)
    num_tuning_micro_batch_sizes: Int = key(3, "Micro-batch sizes to try.", ge=1)
    mp_size: Int = key(1, "Ranks per model.", ge=1)
    tuner_type: Literal["gridsearch", "random", "model_based"] = key("gridsearch", "Order of the search.")
    tuner_early_stopping: Int = key(5, "Experiments without improvement before stopping.", ge=0)
    tuner_num_trials: Int = key(50, "Most experiments.", ge=1)
    arg_mappings: FreeForm | None = key(None, "Command-line arguments of the script to set.")
    model_info: ModelInfo | None = key(None, "Facts about the model.")
    model_info_path: Text | None = key(None, "File that holds them.")
