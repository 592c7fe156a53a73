"""`zero_optimization`: what is sharded over the ranks (ZeRO, arXiv:1910.02054) and what is offloaded (ZeRO-Infinity).

Sizes are numbers of elements unless a key says bytes.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from deepspeedlite.config.base import LARGEST, Flag, FreeForm, Int, Number, Path, Section, Text, key, part

OffloadDevice = Literal["none", "cpu", "nvme"]


def _no_flag(value: Any) -> Any:
    """True is 1 to Python, and no stage."""
    if isinstance(value, bool):
        raise ValueError("not a number")
    return value


class OffloadParam(Section):
    """Where sharded parameters wait while no layer uses them (stage 3)."""

    SWITCH = "device"
    FEATURE = "core"

    device: OffloadDevice = key("none", "Where parameters are kept.")
    nvme_path: Path | None = key(None, "An existing directory on the NVMe drive.", may_differ=True)
    buffer_count: Int = key(5, "Shards that may be read from NVMe ahead of their use.", ge=0)
    buffer_size: Int = key(
        100_000_000,
        "Elements in one staging buffer.",
        ge=0,
        status="hint",
        note="changes nothing: a buffer has the size of the shard that is read into it",
    )
    max_in_cpu: Int = key(
        1_000_000_000, "Elements of this rank's shards that stay in CPU memory when the device is nvme.", ge=0
    )
    pin_memory: Flag = key(True, "Use page-locked memory, which copies faster and cannot be swapped out.")


class OffloadOptimizer(Section):
    """Where the optimizer's state lives, and its step runs (stages 1 to 3)."""

    SWITCH = "device"
    FEATURE = "core"

    device: OffloadDevice = key("none", "Where the optimizer's state is kept.")
    nvme_path: Path | None = key(None, "An existing directory on the NVMe drive.", may_differ=True)
    buffer_count: Int = key(
        4, "Sub-groups that may be in memory at a time; 3 let one be read, stepped and written at once.", ge=1
    )
    pin_memory: Flag = key(True, "Use page-locked memory, which copies faster and cannot be swapped out.")
    pipeline_read: Flag | None = key(None, "Read the next sub-group while one is stepped; null: yes.")
    pipeline_write: Flag | None = key(None, "Write the last sub-group while the next is stepped; null: yes.")
    fast_init: Flag = key(
        False,
        "Initialise faster when the device is nvme.",
        status="hint",
        note="changes nothing: each tensor is written once, when it is made",
    )
    ratio: Number = key(1.0, "Share of the elements whose state is offloaded; that of the others stays.", ge=0, le=1)
    super_offload: Flag = key(
        False, "Offload tuned for CPUs that share memory with the GPU (stage 3).", feature="super_offload"
    )
    cpuadam_cores_perc: Number = key(
        0.8,
        "Share of the CPU's cores for the step under super_offload.",
        ge=0,
        le=1,
        status="hint",
        note="changes nothing: it is read only under super_offload",
    )


class ZenFlow(Section):
    """Stepping the important gradients at once and the rest later, on the CPU."""

    FEATURE = "zenflow"

    topk_ratio: Number = key(0.1, "Share of gradient columns that count as important.", gt=0, lt=1)
    select_strategy: Literal["auto", "step", "epoch"] = key("auto", "When the important columns are chosen again.")
    select_interval: Literal["auto"] | Int = key("auto", "How often they are chosen again.")
    update_interval: Literal["auto"] | Int = key("auto", "How often the other gradients are applied.")
    overlap_step: Flag = key(False, "Let the CPU's step overlap forward and backward.")
    offload: Flag = key(False, "Offload the state of the selected part too.")
    auto_ratio: Number = key(0.99, "Threshold by which an automatic update_interval is found.", ge=0, le=1)
    full_warm_up_rounds: Int = key(0, "First rounds in which all gradients are applied.", ge=0)
    pt_reserved_cores_perc: Number = key(0.5, "Share of the cores left to torch.", ge=0, le=1)
    steps_per_epoch: Int | None = key(None, "Set by DeepSpeed as it runs.")


class LeafModule(Section):
    """Modules that stage 3 gathers as one, such as mixture-of-experts blocks."""

    FEATURE = "core"

    classes: list[Text] | Text | None = key(None, "Class names; null: the blocks known to need it.")
    names: list[Text] | Text = key(list, "Full module names.")
    name_suffixes: list[Text] | Text = key(list, "Endings of module names.")


class ZeroOptimization(Section):
    """What is sharded, how communication is grouped, and where the shards live."""

    FEATURE = "zero_tuning"

    stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(_no_flag)] = key(
        0,
        "0: replicate everything. 1: shard the optimizer's state. 2: and gradients. 3: and parameters.",
        feature="core",
    )
    reduce_bucket_size: Int | None = key(
        None, "Elements per gradient reduction; null: the engine chooses.", feature="core", ge=1
    )
    overlap_comm: Flag | None = key(
        None, "Reduce gradients while backward goes on; null: the engine chooses.", feature="core"
    )
    contiguous_gradients: Flag = key(
        True, "Keep gradients in one buffer.", status="hint", note="changes nothing: gradients are always contiguous"
    )
    reduce_scatter: Flag = key(
        True, "Reduce-scatter gradients (stages 1 to 3); false: all-reduce them and keep the shard.", feature="core"
    )
    use_multi_rank_bucket_allreduce: Flag = key(True, "Reduce the buckets of several owners in one collective.")
    allgather_partitions: Flag = key(
        True,
        "All-gather updated parameters instead of broadcasting them.",
        status="hint",
        note="changes nothing: updated parameters are always all-gathered",
    )
    allgather_bucket_size: Int = key(
        500_000_000,
        "Elements of updated parameters that are on their way to the other ranks at a time (stages 1 to 3).",
        ge=0,
        feature="core",
    )
    compute_grad_norm: Flag = key(
        True,
        "Compute the global gradient norm at every step (stages 1 and 2).",
        status="hint",
        note="changes nothing: the norm is taken when clipping, an overflow check or get_global_grad_norm needs it",
    )
    load_from_fp32_weights: Flag = key(True, "Start masters from a checkpoint's fp32 copies.")
    elastic_checkpoint: Flag = key(
        False, "DeepSpeed's older checkpoints for other world sizes.", status="hint", note="changes nothing"
    )
    offload_param: OffloadParam = part(OffloadParam, "Parameter offloading.")
    offload_optimizer: OffloadOptimizer = part(OffloadOptimizer, "Optimizer offloading.")
    zenflow: ZenFlow | None = key(None, "ZenFlow; null: off.", feature="zenflow")
    sub_group_size: Int = key(
        1_000_000_000,
        "Most elements of a rank's shards that the optimizer steps at a time; of 16-bit gradients 4 Mi at most, and "
        "where something is offloaded 4.5 Mi.",
        ge=0,
        feature="core",
    )
    cpu_offload_use_pin_memory: Flag | None = key(
        None,
        "Older spelling that DeepSpeed reads and ignores.",
        status="hint",
        note="changes nothing: set pin_memory in offload_param or offload_optimizer",
    )
    stage3_prefetch_bucket_size: Int = key(50_000_000, "Elements fetched ahead of their use.", ge=0, feature="core")
    stage3_param_persistence_threshold: Int = key(
        100_000, "Parameters with fewer elements are not sharded.", ge=0, feature="core"
    )
    stage3_model_persistence_threshold: Int = key(
        LARGEST, "Upper bound on all unsharded elements.", ge=0, feature="core"
    )
    stage3_max_live_parameters: Int = key(
        1_000_000_000, "Most elements gathered on a device at once.", ge=0, feature="core"
    )
    stage3_max_reuse_distance: Int = key(
        1_000_000_000, "Keep a parameter that is used again within this many elements.", ge=0, feature="core"
    )
    stage3_gather_16bit_weights_on_model_save: Flag = key(
        False, "Gather the weights in save_16bit_model.", feature="core"
    )
    stage3_module_granularity_threshold: Int = key(
        0, "Modules with fewer parameters per descendant are gathered as one.", ge=0
    )
    stage3_use_all_reduce_for_fetch_params: Flag = key(False, "Gather parameters with an all-reduce.")
    stage3_allgather_sequential: Flag = key(False, "Gather parameters one by one, without a bucket.")
    ignore_unused_parameters: Flag = key(
        True, "False: a trained parameter that no gradient reached before a step is an error.", feature="core"
    )
    legacy_stage1: Flag = key(
        False, "DeepSpeed's older stage 1.", status="refused", note="there is one stage 1; leave the key out"
    )
    round_robin_gradients: Flag = key(
        False,
        "Spread gradient copies to the CPU over the ranks.",
        status="hint",
        note="changes nothing: it is about gradients offloaded to the CPU",
    )
    parameter_alignment: Flag = key(
        False,
        "Start every parameter at a 16-byte boundary of the flat buffer.",
        status="hint",
        note="changes nothing: parameters always start at multiples of 64 elements",
    )
    zero_hpz_partition_size: Int = key(1, "Ranks of ZeRO++'s second shard.", feature="zero_plus_plus", ge=0)
    zero_quantized_weights: Flag = key(False, "All-gather int8 weights.", feature="zero_plus_plus")
    zero_quantized_nontrainable_weights: Flag = key(False, "Store frozen weights as int8.", feature="zero_plus_plus")
    zero_quantized_gradients: Flag = key(False, "Reduce int4 gradients.", feature="zero_plus_plus")
    zeropp_loco_param: FreeForm | None = key(None, "ZeRO++'s error feedback.", feature="zero_plus_plus")
    mics_shard_size: Int = key(-1, "Ranks per MiCS group.", feature="mics")
    mics_hierarchical_params_gather: Flag = key(False, "Gather in two stages within MiCS.", feature="mics")
    memory_efficient_linear: Flag = key(True, "A Linear that keeps no gathered weight for backward.")
    pipeline_loading_checkpoint: Flag = key(False, "Load a stage 3 checkpoint layer by layer.")
    override_module_apply: Flag = key(True, "Let Module.apply see gathered parameters.")
    log_trace_cache_warnings: Flag = key(False, "Warn when the order of modules changes.")
    enable_sanity_checks: Flag = key(False, "Check internal state as training goes.")
    save_muon_momentum_buffer_in_memory: Flag = key(False, "Do not swap Muon's momentum to NVMe.")
    leaf_module: LeafModule = part(LeafModule, "Modules to gather as one.")
