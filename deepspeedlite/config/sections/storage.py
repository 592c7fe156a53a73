"""What is written to disks and what is recomputed: `aio`, `checkpoint`, `activation_checkpointing`."""

from typing import Annotated, Literal

from deepspeedlite.config.base import AnyCase, Flag, Int, Section, key


class Aio(Section, beside="aio"):
    """Asynchronous file access, used by NVMe offload; `dslite_io tune` finds the numbers for a disk."""

    MAY_DIFFER = True

    block_size: Int = key(1_048_576, "Bytes per request.", ge=1)
    queue_depth: Int = key(8, "Requests in flight.", ge=1)
    intra_op_parallelism: Int = key(1, "Threads that share one read or write.", ge=1)
    single_submit: Flag = key(False, "Submit requests one by one.")
    overlap_events: Flag = key(True, "Submit without waiting for earlier requests.")


class Checkpoint(Section, beside="checkpoint"):
    """Saving and loading."""

    tag_validation: Annotated[Literal["ignore", "warn", "fail"], AnyCase] = key(
        "warn", "What to do when ranks save under different tags."
    )
    format: Annotated[Literal["deepspeedlite", "deepspeed"], AnyCase] = key("deepspeedlite", "Whose layout is written.")
    async_save: Flag = key(False, "Write in the background, after a copy to host memory.")
    keep_last: Int | None = key(None, "Checkpoints to keep; older ones are removed after a save.", ge=1)
    fsync: Flag = key(True, "Flush files to the disk; without, a crash of the machine may damage the last checkpoints.")


class ActivationCheckpointing(Section):
    """Recomputing activations in backward: what `checkpointing.configure(deepspeed_config=...)` reads."""

    partition_activations: Flag = key(False, "Shard kept activations over model-parallel ranks.")
    cpu_checkpointing: Flag = key(False, "Keep checkpointed inputs in CPU memory.")
    contiguous_memory_optimization: Flag = key(
        False, "Keep sharded activations in one buffer for each size, allocated once."
    )
    number_checkpoints: Int | None = key(None, "How many such activations a buffer holds.", ge=1)
    synchronize_checkpoint_boundary: Flag = key(False, "Synchronize the device at every boundary.")
    profile: Flag = key(False, "Log the time of every checkpointed function.", may_differ=True)
