"""Which tier of memory each of the model states lives on, as the configuration's offload sections say.

    params    the shards of stage 3's parameters, between the layers' uses of them
    grads     this rank's shards of the averaged gradients
    states    what the optimizer updates (fp32 masters of 16-bit parameters) and what it keeps (moments)

The tier decides where the step runs: the CPU steps states that are not on the device. On CPU ranks the device's memory
and the CPU's are the same, and so are the two tiers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from deepspeedlite.config.sections.zero import ZeroOptimization
from deepspeedlite.runtime.errors import ConfigError, UnsupportedError


class Tier(Enum):
    """A kind of memory: the accelerator's, the host's, or a file on a fast disk."""

    DEVICE = "none"
    CPU = "cpu"
    NVME = "nvme"


@dataclass(frozen=True)
class Placement:
    """A tier for each of the model states. See the file's first lines."""

    params: Tier = Tier.DEVICE
    grads: Tier = Tier.DEVICE
    states: Tier = Tier.DEVICE

    @classmethod
    def from_config(cls, zero: ZeroOptimization) -> Placement:
        """What `offload_param` and `offload_optimizer` ask for. Gradients go where the CPU can read them."""
        states = Tier(zero.offload_optimizer.device if zero.stage > 0 else "none")
        grads = Tier.DEVICE if states is Tier.DEVICE else Tier.CPU
        return cls(Tier(zero.offload_param.device if zero.stage == 3 else "none"), grads, states)

    @classmethod
    def of_built(cls, zero: ZeroOptimization, remote_device: str | None) -> Placement:
        """Where the shards of a model that `zero.Init` builds live; `remote_device` goes before `offload_param`.

        Raises:
            UnsupportedError: a device that there is not.
            ConfigError: "nvme" without a configuration that says where.
        """
        section = zero.offload_param
        device = section.device if remote_device is None else {"cuda": "none"}.get(remote_device, remote_device)
        if device not in [tier.value for tier in Tier]:
            raise UnsupportedError(f"zero.Init(remote_device={remote_device!r}): use none, cpu or nvme")
        if device == "nvme" and not section.nvme_path:
            raise ConfigError('zero.Init(remote_device="nvme") needs zero_optimization.offload_param.nvme_path')
        return cls(params=Tier(device))

    @property
    def uses_disk(self) -> bool:
        """Whether anything lives in a file."""
        return Tier.NVME in (self.params, self.states)

    def __str__(self) -> str:
        named = {"parameters": self.params, "optimizer states": self.states}
        return ", ".join(f"{what} on {tier.value}" for what, tier in named.items() if tier is not Tier.DEVICE)
