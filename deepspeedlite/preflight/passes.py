"""What is said, once each, about backward passes that may not do what was meant.

Gradients add up until a step, as torch's do. A script that forgets the step, or clears gradients where nothing sees it,
trains without an error; several passes before a step may also be just what was wanted (several losses, a GAN).
"""

from __future__ import annotations

import logging

from deepspeedlite.runtime.log import log_dist_once

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
