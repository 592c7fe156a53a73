"""`DeepSpeedConfig`: the whole file as one model, under DeepSpeed's names.

`load.load_config` makes one.
"""

import math
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, PrivateAttr

from deepspeedlite.config.base import AnyCase, Dtype, Flag, Int, Number, key
from deepspeedlite.config.batch import BatchSizes, solve_batch
from deepspeedlite.config.sections.monitors import CommsLogger, FlopsProfiler, Monitors
from deepspeedlite.config.sections.optim import Optimizer, Scheduler
from deepspeedlite.config.sections.parallel import Pipeline
from deepspeedlite.config.sections.precision import Bf16, DataTypes, Fp16, TorchAutocast
from deepspeedlite.config.sections.storage import ActivationCheckpointing, Aio, Checkpoint
from deepspeedlite.config.sections.zero import ZeroOptimization
from deepspeedlite.config.source import copy_tree


def _never(value: Any) -> Any:
    """Infinity, which Accelerate passes for "never", is null here."""
    return None if isinstance(value, float) and value == math.inf else value


Steps = Annotated[Int | None, BeforeValidator(_never)]


class DeepSpeedConfig(Monitors, beside=""):
    """A checked configuration. Frozen; every section is present, with defaults where the file says nothing."""

    _raw: dict[str, Any] = PrivateAttr(default_factory=dict)
    _hints: tuple[str, ...] = PrivateAttr(default=())
    _left_open: tuple[str, ...] = PrivateAttr(default=())
    _passed_over: tuple[str, ...] = PrivateAttr(default=())

    train_batch_size: Int | None = key(None, "Samples per optimizer step over all ranks.", ge=1)
    train_micro_batch_size_per_gpu: Int | None = key(None, "Samples per forward pass on one rank.", ge=1)
    gradient_accumulation_steps: Int | None = key(None, "Forward passes per optimizer step.", ge=1)
    managed_gradient_accumulation: Flag = key(
        True, "Count micro-batches and step at the last one; false: every engine.step() is a step."
    )

    optimizer: Optimizer | None = key(None, "The optimizer, unless `initialize` is given one.")
    scheduler: Scheduler | None = key(None, "The learning-rate schedule, unless `initialize` is given one.")

    gradient_clipping: Number = key(1.0, "Largest global L2 norm of the gradients; 0: no clipping.", ge=0)
    check_grad_overflow: Flag = key(
        True, "Skip a step whose gradients hold an infinity or NaN. fp16 always does, for its loss scale."
    )
    prescale_gradients: Flag = key(False, "Divide by the world size before the reduction instead of after it.")
    gradient_predivide_factor: Number = key(
        1.0, "Divide by this before the reduction and by the rest of the world size after it.", gt=0
    )
    gradient_allreduce_op: Annotated[Literal["mean", "sum"], AnyCase] = key(
        "mean", "How gradients of ranks are combined; their sum is divided by nothing."
    )
    communication_data_type: Dtype | None = key(None, "Type in which gradients travel; null: their own.")

    fp16: Fp16 = key(Fp16, "fp16 training.")
    bf16: Bf16 = key(Bf16, "bf16 training.")
    torch_autocast: TorchAutocast = key(TorchAutocast, "torch.autocast training.")
    data_types: DataTypes = key(DataTypes, "Types of what the engine stores.")

    zero_optimization: ZeroOptimization = key(ZeroOptimization, "Sharding and offloading.")
    zero_allow_untested_optimizer: Flag = key(
        False,
        "Shard optimizers that DeepSpeed has not tested.",
        stands="hint: changes nothing: optimizers that cannot be sharded are refused by name",
    )
    aio: Aio = key(Aio, "Asynchronous file access.")
    checkpoint: Checkpoint = key(Checkpoint, "Saving and loading.")
    activation_checkpointing: ActivationCheckpointing = key(ActivationCheckpointing, "Recomputation.")

    steps_per_print: Steps = key(None, "Steps between progress lines; null or Infinity: none.", may_differ=True, ge=1)
    wall_clock_breakdown: Flag = key(False, "Time forward, backward and step.", may_differ=True)
    memory_breakdown: Flag = key(False, "Log device memory around forward, backward and step.", may_differ=True)
    dump_state: Flag = key(False, "Log the engine's settings after initialisation.", may_differ=True)
    comms_logger: CommsLogger = key(CommsLogger, "Record of collectives.")
    flops_profiler: FlopsProfiler = key(FlopsProfiler, "FLOP counts.")

    dataloader_drop_last: Flag = key(False, "Leave out the last batch when it is not full.")
    dataloader_split_iterable: Flag = key(
        True, "Give each rank its part of an IterableDataset; false: the dataset does that itself."
    )

    pipeline: Pipeline = key(Pipeline, "Pipeline parallelism.")

    @property
    def raw(self) -> dict[str, Any]:
        """The configuration as it was given: fresh dicts and lists, the same leaves."""
        return cast(dict[str, Any], copy_tree(self._raw))

    @property
    def hints(self) -> tuple[str, ...]:
        """One line per group of given keys that change nothing."""
        return self._hints

    @property
    def left_open(self) -> tuple[str, ...]:
        """The keys that were still "auto" and had their defaults put in."""
        return self._left_open

    @property
    def passed_over(self) -> tuple[str, ...]:
        """A line on each thing that DeepSpeed lets pass in silence: unknown keys at the top level, what is "auto"."""
        return self._passed_over

    def batch(self, world_size: int) -> BatchSizes:
        """The batch sizes for `world_size` data-parallel ranks; ConfigError if they do not come out."""
        return solve_batch(
            self.train_batch_size, self.train_micro_batch_size_per_gpu, self.gradient_accumulation_steps, world_size
        )
