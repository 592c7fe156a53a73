"""Constants and types that scripts import from DeepSpeed's modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from deepspeedlite.comm.init import default_timeout
from deepspeedlite.engine import ROUTE_TRAIN

DeepSpeedOptimizerCallable = Callable[[Iterable[Tensor] | dict[str, Iterable[Any]]], Optimizer]
DeepSpeedSchedulerCallable = Callable[[Optimizer], Any]

ROUTE_EVAL, ROUTE_PREDICT, ROUTE_ENCODE = "eval", "predict", "encode"

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

__all__ = ["ROUTE_TRAIN"]
