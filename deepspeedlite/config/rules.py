"""Contradictions: pairs of keys that are each right and cannot both be meant, or of which one makes the other moot.

A rule runs on the checked model and is skipped when one of its keys is already at fault, so one mistake is
reported once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from deepspeedlite.config.root import DeepSpeedConfig
from deepspeedlite.config.sections.precision import name_pattern
from deepspeedlite.config.sections.zero import OffloadOptimizer, OffloadParam, ZeroOptimization


class Rule(NamedTuple):
    """`broken(config)` is true when the keys contradict each other; the first key is the one to report.

    Without a remedy nothing is wrong: the first key changes nothing, which is said once.
    """

    keys: tuple[str, ...]
    broken: Callable[[DeepSpeedConfig], bool]
    problem: str
    remedy: str = ""


def _model_dtype(config: DeepSpeedConfig) -> str:
    return "fp16" if config.fp16.enabled else "bf16" if config.bf16.enabled else "fp32"


def _searchable(patterns: Iterable[str]) -> bool:
    try:
        return all(name_pattern(pattern) for pattern in patterns)
    except re.error:
        return False


def _batch_product_broken(config: DeepSpeedConfig) -> bool:
    train, micro = config.train_batch_size, config.train_micro_batch_size_per_gpu
    if train is None:
        return False
    return train % ((micro or 1) * (config.gradient_accumulation_steps or 1)) != 0


def _nvme_without_path(section: OffloadParam | OffloadOptimizer) -> bool:
    return section.device == "nvme" and not section.nvme_path


def _two_drives(zero: ZeroOptimization) -> bool:
    params, states = zero.offload_param, zero.offload_optimizer
    return zero.stage == 3 and params.device == states.device == "nvme" and params.nvme_path != states.nvme_path


RULES: tuple[Rule, ...] = (
    Rule(
        ("fp16.enabled", "bf16.enabled"),
        lambda c: c.fp16.enabled and c.bf16.enabled,
        "fp16 and bf16 are both enabled",
        "enable one of them",
    ),
    Rule(
        ("torch_autocast.enabled", "fp16.enabled"),
        lambda c: c.torch_autocast.enabled and c.fp16.enabled,
        "torch_autocast wants fp32 or bf16 weights, and fp16 is enabled",
        'disable fp16, and set torch_autocast.dtype to "fp16"',
    ),
    Rule(
        ("data_types.grad_accum_dtype", "fp16.enabled", "bf16.enabled"),
        lambda c: c.data_types.grad_accum_dtype not in (None, "fp32", _model_dtype(c)),
        "gradients accumulate in fp32 or in the model's own type, and this is neither",
        'use "fp32", or enable the section of that type',
    ),
    Rule(
        ("data_types.param_dtype", "fp16.enabled", "bf16.enabled"),
        lambda c: c.data_types.param_dtype not in (None, _model_dtype(c)),
        "is not the type that the fp16 and bf16 sections train in",
        "enable the section of that type (none for fp32), or leave this key out",
    ),
    Rule(
        ("data_types.keep_in_fp32_modules",),
        lambda c: not _searchable(c.data_types.keep_in_fp32_modules),
        "is no list of regular expressions",
        "mend it; a bare * stands for anything",
    ),
    Rule(
        ("fp16.min_loss_scale", "fp16.initial_scale_power", "fp16.enabled", "fp16.loss_scale"),
        lambda c: c.fp16.enabled and c.fp16.loss_scale == 0 and c.fp16.min_loss_scale > 2**c.fp16.initial_scale_power,
        "is above the initial scale, 2 to the power of fp16.initial_scale_power",
        "lower it or raise initial_scale_power",
    ),
    Rule(
        ("bf16.bf16_optimizer_states", "bf16.bf16_master_weights_and_grads", "bf16.enabled"),
        lambda c: c.bf16.enabled and c.bf16.bf16_optimizer_states != c.bf16.bf16_master_weights_and_grads,
        "torch's optimizers keep their moments in the masters' type, so the two keys go together",
        "set both bf16_master_weights_and_grads and bf16_optimizer_states to true, or neither",
    ),
    Rule(
        ("bf16.bf16_master_weights_and_grads", "data_types.grad_accum_dtype"),
        lambda c: c.bf16.enabled and c.bf16.bf16_master_weights_and_grads and c.data_types.grad_accum_dtype == "fp32",
        "gradients are kept in bf16, and data_types.grad_accum_dtype asks for fp32",
        "drop one of the two",
    ),
    Rule(
        ("gradient_predivide_factor", "prescale_gradients"),
        lambda c: c.prescale_gradients and c.gradient_predivide_factor != 1.0,
        "changes nothing beside prescale_gradients, which divides by the whole world size",
    ),
    Rule(
        ("comms_logger.prof_ops", "comms_logger.prof_all", "comms_logger.enabled"),
        lambda c: c.comms_logger.enabled and not c.comms_logger.prof_all and not c.comms_logger.prof_ops,
        "nothing would be recorded: prof_all is false and no operation is listed",
        'list operations, such as ["all_reduce"], or set prof_all to true',
    ),
    Rule(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
        _batch_product_broken,
        "is not a multiple of train_micro_batch_size_per_gpu x gradient_accumulation_steps, so no world size fits",
        "change one of the three or leave it out",
    ),
    Rule(
        ("zero_optimization.offload_param.device", "zero_optimization.stage"),
        lambda c: c.zero_optimization.offload_param.device != "none" and c.zero_optimization.stage < 3,
        "changes nothing below stage 3, where parameters are not sharded",
    ),
    Rule(
        ("zero_optimization.offload_optimizer.device", "zero_optimization.stage"),
        lambda c: c.zero_optimization.offload_optimizer.device != "none" and c.zero_optimization.stage < 1,
        "changes nothing at stage 0, where the optimizer's state is not sharded",
    ),
    *(
        Rule(
            (f"zero_optimization.{name}.nvme_path", f"zero_optimization.{name}.device"),
            lambda c, name=name, stages=stages: (  # type: ignore[misc]
                c.zero_optimization.stage in stages and _nvme_without_path(getattr(c.zero_optimization, name))
            ),
            'is needed when device is "nvme"',
            "give a directory on the drive",
        )
        for name, stages in (("offload_param", (3,)), ("offload_optimizer", (1, 2, 3)))
    ),
    Rule(
        ("zero_optimization.offload_param.nvme_path", "zero_optimization.offload_optimizer.nvme_path"),
        lambda c: _two_drives(c.zero_optimization),
        "is another directory than offload_optimizer's; a rank keeps all it offloads in one file",
        "name one directory in both; to use several drives, join them (RAID 0, or a striped logical volume)",
    ),
    Rule(
        (
            "activation_checkpointing.contiguous_memory_optimization",
            "activation_checkpointing.partition_activations",
            "activation_checkpointing.number_checkpoints",
        ),
        lambda c: (
            c.activation_checkpointing.contiguous_memory_optimization
            and not (c.activation_checkpointing.partition_activations and c.activation_checkpointing.number_checkpoints)
        ),
        "needs partition_activations and number_checkpoints",
        "set both, or set it to false",
    ),
)
