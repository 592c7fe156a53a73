"""The generators of random numbers that training code commonly draws from, as a checkpoint holds them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from deepspeedlite.runtime.device import Device, accelerators, device_in_use


def rng_state() -> dict[str, Any]:
    """The state of each of this process's generators."""
    device = device_in_use()
    return {
        "torch": torch.get_rng_state(),
        "cuda": device.get_rng_state() if device.is_accelerator else None,
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Set the generators to what `rng_state` gave."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and (device := accelerators()).is_accelerator:
        Device(device.current).set_rng_state(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
