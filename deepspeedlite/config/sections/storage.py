"""What is written to disks and what is recomputed: `aio`, `checkpoint`, `activation_checkpointing`."""

from typing import Annotated, Literal

from deepspeedlite.config.base import AnyCase, Flag, Int, Section, key, part


class Aio(Section):
    """Asynchronous file access, used by NVMe offload; `dslite_io tune` finds the numbers for a disk."""

    FEATURE = "core"
    MAY_DIFFER = True

    block_size: Int = key(1_048_576, "Bytes per request.", ge=1)
    queue_depth: Int = key(8, "Requests in flight.", ge=1)
    intra_op_parallelism: Int = key(1, "Threads that share one read or write.", ge=1)
    single_submit: Flag = key(False, "Submit requests one by one.")
    overlap_events: Flag = key(True, "Submit without waiting for earlier requests.")
    use_gds: Flag = key(False, "Move data between NVMe and GPU directly (GPUDirect Storage).", feature="gds")


class ParallelWrite(Section):
    """Sharing the work of writing a checkpoint."""

    FEATURE = "checkpoint_tuning"

    pipeline_stage: Flag = key(False, "Pipeline stages write in parallel.")


class CheckpointWriter(Section):
    """How a checkpoint's bytes reach the disk."""

    FEATURE = "checkpoint_tuning"

    type: Annotated[Literal["mock", "python", "fast"], AnyCase] = key("fast", "The writer.")
    io_buffer_size: Int = key(67_108_864, "Bytes of buffer.", ge=1)
    io_buffer_double: Flag = key(True, "Fill one buffer while another is written.")
    show_statistics: Flag = key(False, "Log throughput.")
    data_parallel: Annotated[Literal["replica", "socket", "machine"] | None, AnyCase] = key(
        None, "Which data-parallel ranks share the writing."
    )
    decoupled: Flag = key(False, "Write in the background.")
    io_multiplier: Int = key(1, "Writers per rank.", ge=1)


class Checkpoint(Section):
    """Saving and loading."""

    FEATURE = "checkpoint"

    tag_validation: Annotated[Literal["ignore", "warn", "fail"], AnyCase] = key(
        "warn", "What to do when ranks save under different tags."
    )
    async_save: Flag = key(False, "Write in the background, after a copy to host memory.")
    keep_last: Int | None = key(None, "Checkpoints to keep; older ones are removed after a save.", ge=1)
    fsync: Flag = key(True, "Flush files to the disk; without, a crash of the machine may damage the last checkpoints.")
    load_universal: Flag = key(
        False, "Load a checkpoint that was converted for any world size.", feature="checkpoint_tuning"
    )
    use_node_local_storage: Flag = key(
        False, "Nodes share no file system: each keeps its own shards.", feature="node_local_checkpoints"
    )
    checkpoint_serialization: Flag = key(True, "Use DeepSpeed's zip format.", feature="checkpoint_tuning")
    parallel_write: ParallelWrite = part(ParallelWrite, "Parallel writing.")
    writer: CheckpointWriter | None = key(None, "The writer; null: the plain one.")


class ActivationCheckpointing(Section):
    """Recomputing activations in backward: what `checkpointing.configure(deepspeed_config=...)` reads."""

    FEATURE = "activation_checkpointing"

    partition_activations: Flag = key(False, "Shard kept activations over model-parallel ranks.")
    cpu_checkpointing: Flag = key(False, "Keep checkpointed inputs in CPU memory.")
    contiguous_memory_optimization: Flag = key(
        False, "Keep sharded activations in one buffer.", feature="contiguous_checkpoints"
    )
    number_checkpoints: Int | None = key(None, "How many checkpoints that buffer holds.", ge=1)
    synchronize_checkpoint_boundary: Flag = key(False, "Synchronize the device at every boundary.")
    profile: Flag = key(False, "Log the time of every checkpointed function.", may_differ=True)
