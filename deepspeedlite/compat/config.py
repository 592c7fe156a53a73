"""DeepSpeed's ways to a configuration without an engine: `DeepSpeedConfig(FILE or dict)`, `get_monitor_config`."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

from deepspeedlite import comm
from deepspeedlite.config import load_config
from deepspeedlite.metrics.monitor.registry import WRITERS, Monitor, monitor_sections
from deepspeedlite.ops.sparse_attention.sparsity_config import arguments_of

# DeepSpeed's attribute -> where it is in ours.
_ATTRIBUTES = {
    "zero_config": "zero_optimization",
    "zero_optimization_stage": "zero_optimization.stage",
    "float16_config": "fp16",
    "bfloat16_config": "bf16",
    "torch_autocast_enabled": "torch_autocast.enabled",
    "activation_checkpointing_config": "activation_checkpointing",
    "flops_profiler_config": "flops_profiler",
    "comms_config": "comms_logger",
    "aio_config": "aio",
    "checkpoint_config": "checkpoint",
    "load_universal_checkpoint": "checkpoint.load_universal",
    "_param_dict": "raw",
}
_NAMED = {
    "optimizer_name": "type",
    "optimizer_params": "params",
    "scheduler_name": "type",
    "scheduler_params": "params",
}


class DeepSpeedConfig:
    """A checked configuration and its batch sizes, under the attributes that scripts read from DeepSpeed's class.

    Args:
        config: path, dict or base64 of the JSON configuration.
        mpu: its data-parallel ranks count for the batch; without one all ranks do, or 1 before they have met.
        mesh_device: taken for DeepSpeed's sake.

    Raises:
        ConfigError: every fault of the configuration.
    """

    def __init__(self, config: Any, mpu: Any = None, mesh_device: Any = None) -> None:
        if mpu is not None:
            self.world_size = mpu.get_data_parallel_world_size()
        else:
            self.world_size = comm.get_world_size() if comm.is_initialized() else 1
        self._checked = load_config(config, world_size=self.world_size)
        batch = self._checked.batch(self.world_size)
        self.train_batch_size, self.train_micro_batch_size_per_gpu, self.gradient_accumulation_steps = batch

    @property
    def zero_enabled(self) -> bool:
        """Whether any model state is sharded."""
        return self._checked.zero_optimization.stage > 0

    @property
    def monitor_config(self) -> MonitorConfig:
        """The sections of the monitors."""
        return MonitorConfig(**monitor_sections(self._checked))

    @property
    def sparse_attention(self) -> dict[str, Any] | None:
        """The section's mode and what its pattern is made with, to take apart; None where there is no such section."""
        section = attrgetter("sparse_attention")(self._checked)
        return None if section is None else {"mode": section.mode, **arguments_of(section)}

    def __getattr__(self, name: str) -> Any:
        if name == "_checked":  # not there yet: a copy, or an unpickled one
            raise AttributeError(name)
        if name in _NAMED:
            section = getattr(self._checked, name.partition("_")[0])
            return None if section is None else getattr(section, _NAMED[name])
        return attrgetter(_ATTRIBUTES.get(name, name))(self._checked)


def get_zero_config(param_dict: Mapping[str, Any]) -> Any:
    """The section `zero_optimization` of a configuration, checked; what else it holds is not looked at."""
    given = {name: param_dict[name] for name in ("zero_optimization",) if name in param_dict}
    return DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, **given}).zero_config


class MonitorConfig(SimpleNamespace):
    """What `MonitorMaster` reads: the monitors' sections, by their names."""

    @property
    def enabled(self) -> bool:
        """Whether any of them is on."""
        return any(section.enabled for section in vars(self).values())


class MonitorMaster(Monitor):
    """A `Monitor` of one's own, from what `get_monitor_config(dict)` returns. For any rank to make."""

    def __init__(self, monitor_config: Any) -> None:
        super().__init__(rank=comm.get_rank() if comm.is_initialized() else 0, **monitor_sections(monitor_config))


def get_monitor_config(param_dict: Mapping[str, Any]) -> MonitorConfig:
    """The monitors' sections of a configuration, checked; what else it holds is not looked at."""
    given = {name: param_dict[name] for name in WRITERS if name in param_dict}
    return DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, **given}).monitor_config
