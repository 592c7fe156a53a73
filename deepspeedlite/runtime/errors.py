"""Every error that deepspeedlite raises on purpose.

Each message says what is wrong, where (a parameter's full name, a rank, a config key) and how to mend it.
All derive from `DeepSpeedLiteError`; each also derives from the builtin that callers of DeepSpeed or torch
would already be catching, so `except ValueError` around `initialize` keeps working.
"""

from __future__ import annotations


class DeepSpeedLiteError(Exception):
    """Root of this package's exceptions."""


class ConfigError(DeepSpeedLiteError, ValueError):
    """The configuration is wrong. The message lists every fault found, one per line, with its key's full path."""


class DistributedError(DeepSpeedLiteError, RuntimeError):
    """Start-up or a collective failed: ranks missing, ranks that disagree, a timeout."""


class EngineStateError(DeepSpeedLiteError, RuntimeError):
    """The engine was called in an order that cannot be right, such as `step` after `destroy`."""


class UnsupportedError(DeepSpeedLiteError, RuntimeError):
    """Something that is understood but not done here. The message gives the reason and the alternative."""


class OptimizerError(DeepSpeedLiteError, ValueError):
    """An optimizer or schedule that is unknown, cannot be built from its parameters, or cannot be used."""


class LossScaleError(DeepSpeedLiteError, RuntimeError):
    """fp16 training overflowed at the smallest allowed loss scale: the run has diverged."""


class OpError(DeepSpeedLiteError, RuntimeError):
    """A compiled op cannot be had here (no compiler, a library that does not load), or not for these tensors."""


class DataError(DeepSpeedLiteError, ValueError):
    """Training data that cannot be used as asked."""


class CheckpointError(DeepSpeedLiteError, RuntimeError):
    """A checkpoint that could not be written, is damaged, or does not fit the model. Nothing was changed by it."""


class OffloadError(DeepSpeedLiteError, RuntimeError):
    """What lives on a disk between its uses could not be put there or brought back: a full disk, a failing one."""


class LaunchError(DeepSpeedLiteError, RuntimeError):
    """The launcher could not start the ranks."""


class PipelineError(DeepSpeedLiteError, RuntimeError):
    """A pipeline was called as one cannot be, or a stage was to pass on what a pipeline cannot carry, or failed."""


class InferenceError(DeepSpeedLiteError, RuntimeError):
    """A model that cannot be split, or a prompt or logits that nothing can be generated from."""


class AbsentError(DeepSpeedLiteError, ImportError):
    """A module or name of DeepSpeed's that is not here. The message says why, and what to use instead."""
