"""What is said of passes that cannot work and, once each, of backward passes that may not do what was meant.

Gradients add up until a step, as torch's do. A script that forgets the step, or clears gradients where nothing sees it,
trains without an error; several passes before a step may also be just what was wanted (several losses, a GAN).
"""

from __future__ import annotations

import logging
import re

import torch

from deepspeedlite.optim.precision import Precision
from deepspeedlite.runtime.errors import EngineStateError
from deepspeedlite.runtime.log import log_dist_once

# What torch's operations say of two types that do not go together.
_OF_TYPES = re.compile(r"dtype|scalar type|(bias|weight) type|Type promoting")
MANY_PASSES = 8
"""Losses that a step may well be made of."""


def note_losses(losses: int, accumulation: int) -> None:
    """`losses`: how often `engine.backward` was called since the last `engine.step()`."""
    if losses != (accumulation if accumulation > 1 else MANY_PASSES + 1):
        return
    every = f"; it updates the weights at every {accumulation}th call" if accumulation > 1 else ""
    log_dist_once(
        f"engine.backward(loss) was called {losses} times without engine.step(). Add engine.step() after every "
        f"engine.backward(loss): it counts micro-batches (gradient_accumulation_steps={accumulation}){every}. "
        "If they are losses of one and the same micro-batch, all is well: their gradients add up",
        level=logging.WARNING,
    )


def note_hidden(stage: int) -> None:
    """A pass begins on top of gradients that no step has used, and `param.grad` does not show."""
    log_dist_once(
        f"a backward pass adds to the gradients of one before it, without a step between them. At ZeRO stage {stage} "
        "param.grad does not show them, and `param.grad = None` does not clear them: engine.zero_grad() does",
        level=logging.WARNING,
    )


def note_clearing(micro_batches: int, accumulation: int) -> None:
    """Gradients are cleared when a window has had `micro_batches` of its `accumulation`."""
    if micro_batches:
        log_dist_once(
            f"gradients were cleared after {micro_batches} of the {accumulation} micro-batches that a step is made of, "
            "which leaves them out of it. engine.step() clears gradients by itself when it has used them: zero_grad() "
            "before every micro-batch, as in a plain torch loop, is to be removed",
            level=logging.WARNING,
        )


def explain_types(error: RuntimeError, precision: Precision) -> None:
    """Add to an error of the model's about types which the model computes in, and how inputs get it."""
    dtype = precision.model_dtype
    if dtype is None or not _OF_TYPES.search(str(error)):
        return
    name = "fp16" if dtype is torch.float16 else "bf16"
    advice = f"cast inputs with .to({dtype}), or set {name}.auto_cast to true"
    if precision.cast_inputs:
        advice = f"{name}.auto_cast casts inputs, and not what the model makes itself"
    error.args = (f"{error}\n{name} is enabled, and parameters are {dtype}: {advice}",)


def check_loss(loss: torch.Tensor) -> None:
    """Raise for what no backward pass can start from.

    Raises:
        EngineStateError: it is not a scalar, or nothing that requires grad leads to it.
    """
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise EngineStateError(f"engine.backward needs a scalar loss, got {what}; reduce it first (loss.mean())")
    if not loss.requires_grad:
        raise EngineStateError(
            "engine.backward: no parameter that requires grad leads to this loss; was it computed under "
            "torch.no_grad, detached, or are all parameters frozen?"
        )
