"""Constants and types that scripts import from DeepSpeed's modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from deepspeedlite import comm
from deepspeedlite.comm.init import default_timeout
from deepspeedlite.compat.engine import ROUTE_TRAIN

DeepSpeedOptimizerCallable = Callable[[Iterable[Tensor] | dict[str, Iterable[Any]]], Optimizer]
DeepSpeedSchedulerCallable = Callable[[Optimizer], Any]

ROUTE_EVAL, ROUTE_PREDICT, ROUTE_ENCODE = "eval", "predict", "encode"

# Keys of a configuration, as scripts that read one of their own spell them.
TRAIN_BATCH_SIZE, TRAIN_MICRO_BATCH_SIZE_PER_GPU = "train_batch_size", "train_micro_batch_size_per_gpu"
GRADIENT_ACCUMULATION_STEPS, GRADIENT_CLIPPING = "gradient_accumulation_steps", "gradient_clipping"
OPTIMIZER, SCHEDULER, TYPE, FP16, STEPS_PER_PRINT = "optimizer", "scheduler", "type", "fp16", "steps_per_print"
COMMUNICATION_DATA_TYPE, WALL_CLOCK_BREAKDOWN = "communication_data_type", "wall_clock_breakdown"
PRESCALE_GRADIENTS, GRADIENT_PREDIVIDE_FACTOR = "prescale_gradients", "gradient_predivide_factor"
ZERO_ALLOW_UNTESTED_OPTIMIZER, DUMP_STATE = "zero_allow_untested_optimizer", "dump_state"
MAX_GRAD_NORM, GLOBAL_RANK = "max_grad_norm", "global_rank"

ADAM_OPTIMIZER, ADAMW_OPTIMIZER, ADAGRAD_OPTIMIZER = "adam", "adamw", "adagrad"
LAMB_OPTIMIZER, LION_OPTIMIZER = "lamb", "lion"

LR_SCHEDULE = "lr_schedule"
LR_RANGE_TEST, ONE_CYCLE = "LRRangeTest", "OneCycle"
WARMUP_LR, WARMUP_DECAY_LR, WARMUP_COSINE_LR = "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"
WARMUP_MIN_LR, WARMUP_MAX_LR, WARMUP_NUM_STEPS = "warmup_min_lr", "warmup_max_lr", "warmup_num_steps"
WARMUP_TYPE, WARMUP_LOG_RATE, WARMUP_LINEAR_RATE = "warmup_type", "log", "linear"
TOTAL_NUM_STEPS = "total_num_steps"

TORCH_DISTRIBUTED_DEFAULT_PORT = 29500
default_pg_timeout = default_timeout()

DEEPSPEED_ENVIRONMENT_NAME = ".deepspeed_env"
DLTS_HOSTFILE = "/job/hostfile"
PDSH_LAUNCHER, OPENMPI_LAUNCHER, MPICH_LAUNCHER = "pdsh", "openmpi", "mpich"
IMPI_LAUNCHER, SLURM_LAUNCHER, MVAPICH_LAUNCHER = "impi", "slurm", "mvapich"

__all__ = ["ROUTE_TRAIN", "comm"]
