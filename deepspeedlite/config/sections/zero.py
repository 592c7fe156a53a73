"""`zero_optimization`: what is sharded over the ranks (ZeRO, arXiv:1910.02054) and what is offloaded (ZeRO-Infinity).

Sizes are numbers of elements unless a key says bytes.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from deepspeedlite.config.base import LARGEST, Flag, Int, Number, Path, Section, Text, key

OffloadDevice = Literal["none", "cpu", "nvme"]


def _no_flag(value: Any) -> Any:
    """True is 1 to Python, and no stage."""
    if isinstance(value, bool):
        raise ValueError("not a number")
    return value


class OffloadParam(Section, beside="zero_optimization.offload_param"):
    """Where sharded parameters wait while no layer uses them (stage 3)."""

    SWITCH = "device"

    device: OffloadDevice = key("none", "Where parameters are kept.")
    nvme_path: Path | None = key(None, "An existing directory on the NVMe drive.", may_differ=True)
    buffer_count: Int = key(5, "Shards that may be read from NVMe ahead of their use.", ge=0)
    max_in_cpu: Int = key(
        1_000_000_000, "Elements of this rank's shards that stay in CPU memory when the device is nvme.", ge=0
    )
    pin_memory: Flag = key(True, "Use page-locked memory, which copies faster and cannot be swapped out.")


class OffloadOptimizer(Section, beside="zero_optimization.offload_optimizer"):
    """Where the optimizer's state lives, and its step runs (stages 1 to 3)."""

    SWITCH = "device"

    device: OffloadDevice = key("none", "Where the optimizer's state is kept.")
    nvme_path: Path | None = key(None, "An existing directory on the NVMe drive.", may_differ=True)
    buffer_count: Int = key(
        4, "Sub-groups that may be in memory at a time; 3 let one be read, stepped and written at once.", ge=1
    )
    pin_memory: Flag = key(True, "Use page-locked memory, which copies faster and cannot be swapped out.")
    pipeline_read: Flag | None = key(None, "Read the next sub-group while one is stepped; null: yes.")
    pipeline_write: Flag | None = key(None, "Write the last sub-group while the next is stepped; null: yes.")
    ratio: Number = key(1.0, "Share of the elements whose state is offloaded; that of the others stays.", ge=0, le=1)


# Blocks of transformers that route tokens to experts.
KNOWN_LEAVES = (
    "transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock",
    "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
    "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
)


class LeafModule(Section):
    """Modules that stage 3 gathers as one, such as mixture-of-experts blocks."""

    classes: list[Text] | Text | None = key(
        lambda: list(KNOWN_LEAVES),
        "Class names; those of the default may be missing from the model. null: the default.",
    )
    names: list[Text] | Text = key(list, "Full module names.")
    name_suffixes: list[Text] | Text = key(list, "Endings of module names.")


class ZeroOptimization(Section, beside="zero_optimization"):
    """What is sharded, how communication is grouped, and where the shards live."""

    stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(_no_flag)] = key(
        0,
        "0: replicate everything. 1: shard the optimizer's state. 2: and gradients. 3: and parameters.",
    )
    reduce_bucket_size: Int | None = key(None, "Elements per gradient reduction; null: the engine chooses.", ge=1)
    overlap_comm: Flag | None = key(None, "Reduce gradients while backward goes on; null: the engine chooses.")
    reduce_scatter: Flag = key(
        True, "Reduce-scatter gradients (stages 1 to 3); false: all-reduce them and keep the shard."
    )
    allgather_bucket_size: Int = key(
        500_000_000,
        "Elements of updated parameters that are on their way to the other ranks at a time (stages 1 to 3).",
        ge=0,
    )
    offload_param: OffloadParam = key(OffloadParam, "Parameter offloading.")
    offload_optimizer: OffloadOptimizer = key(OffloadOptimizer, "Optimizer offloading.")
    sub_group_size: Int = key(
        1_000_000_000,
        "Most elements of a rank's shards that the optimizer steps at a time; of 16-bit gradients 4 Mi at most, and "
        "where something is offloaded 4.5 Mi.",
        ge=0,
    )
    stage3_prefetch_bucket_size: Int = key(50_000_000, "Elements fetched ahead of their use.", ge=0)
    stage3_param_persistence_threshold: Int = key(100_000, "Parameters with fewer elements are not sharded.", ge=0)
    stage3_model_persistence_threshold: Int = key(LARGEST, "Upper bound on all unsharded elements.", ge=0)
    stage3_max_live_parameters: Int = key(1_000_000_000, "Most elements gathered on a device at once.", ge=0)
    stage3_max_reuse_distance: Int = key(
        1_000_000_000, "Keep a parameter that is used again within this many elements.", ge=0
    )
    stage3_gather_16bit_weights_on_model_save: Flag = key(False, "Gather the weights in save_16bit_model.")
    ignore_unused_parameters: Flag = key(
        True, "False: a trained parameter that no gradient reached before a step is an error."
    )
    leaf_module: LeafModule = key(LeafModule, "Modules to gather as one.")
