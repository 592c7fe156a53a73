"""`InferenceEngine`: a model that is run, not trained.

It forwards to the model, which has been loaded, split, cast and fused as the configuration says (`prepare`), and adds
what goes wrong quietly elsewhere: prompts that are too long, prompts and random numbers that differ between ranks, and
logits that are no numbers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from deepspeedlite.checkpoint.foreign import Formats
from deepspeedlite.comm import Group
from deepspeedlite.comm.ranks import get_local_rank
from deepspeedlite.inference.checks import (
    check_prompt,
    check_same_inputs,
    finite_logits,
    follow_first_rank,
    meet,
    together,
)
from deepspeedlite.inference.config import DeepSpeedInferenceConfig, read_inference_config
from deepspeedlite.inference.groups import TensorGroup
from deepspeedlite.inference.prepare import Setting, hold, is_trained, prepare, release, setting_of
from deepspeedlite.inference.recorded import RecordedForward
from deepspeedlite.metrics.stall_watch import watch_for_stalls
from deepspeedlite.runtime.device import pick_device
from deepspeedlite.runtime.errors import ConfigError, EngineStateError, InferenceError
from deepspeedlite.runtime.log import log_dist

_NO_TRAINING = (
    "an inference engine does not train: train the model itself, with deepspeedlite.initialize(model=...), and make an "
    "inference engine of it again"
)


class InferenceEngine(torch.nn.Module):
    """A model to run, on this rank or split over several. Made by `deepspeedlite.init_inference`.

    Attributes that the engine does not have are looked up on `module`.

    Args:
        model: any module; one of transformers' generates too. It is changed in place: see `prepare`.
        config: what is asked for, as a dict, a file, or a checked configuration.
        formats: checkpoints of other programs that can be loaded.

    Raises:
        ConfigError: the configuration is wrong (every fault is listed).
        InferenceError: the model cannot be split, or has tensors without values.
        UnsupportedError: the device cannot compute in the dtype, or `model` is no module.
        CheckpointError: the weights cannot be read, or do not fit.
    """

    def __init__(self, model: torch.nn.Module, config: Any = None, *, formats: Formats | None = None) -> None:
        super().__init__()
        model = _module_of(model)
        self._config: DeepSpeedInferenceConfig = read_inference_config(config, {})
        self._device = pick_device(get_local_rank())
        self._device.make_current()
        self._tensor_group = TensorGroup(self._config.tensor_parallel)
        self._times: list[float] | None = None  # in ms, of every forward pass; None: they are not measured
        self._timers: list[Any] = []  # hooks
        self._is_compiled = self._destroyed = False
        group = self._tensor_group.group
        everyone = Group() if self._config.zero.stage == 3 else group  # streamed weights are all ranks'
        if everyone.size > 1:
            watch_for_stalls()

        def make() -> tuple[torch.nn.Module, Setting]:
            setting = setting_of(self._config, model, group, self._device)
            return prepare(model, self._config, setting, group, self._device, formats or Formats()), setting

        try:
            self.module, self._setting = together(everyone, model, make)
        except BaseException:
            self._tensor_group.close()
            raise
        hold(self.module, self)
        records = self._config.enable_cuda_graph and self._device.type == "cuda"
        self._recorded: RecordedForward | None = RecordedForward(self.module) if records else None
        if self._config.enable_cuda_graph and not records:
            log_dist("inference engine: enable_cuda_graph changes nothing on a CPU")
        self.training = False  # the engine's own mode; the module's is left to whoever trains it
        if not is_trained(self.module):
            self.module.eval()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is not None and hasattr(module, name):
                return getattr(module, name)
            raise

    # --- running ------------------------------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the model, without recording anything for a backward pass.

        Raises:
            DistributedError: the ranks of a split model were given different inputs, or not all of them call it.
        """
        self._check_alive("forward")
        check_same_inputs(self._tensor_group.group, "engine()", inputs, kwargs)
        with torch.no_grad(), _evaluating(self.module):
            run = self.module if self._recorded is None else self._recorded
            return run(*inputs, **kwargs)

    def generate(self, *inputs: Any, **kwargs: Any) -> Any:
        """Generate with the model's own `generate`, which takes the arguments: beams, sampling, streamers and all.

        The ranks of a split model draw the random numbers of their first.

        Raises:
            InferenceError: the model has no `generate`; a prompt is too long; logits are not finite.
            DistributedError: the ranks of a split model were given different prompts, or not all of them call it.
        """
        self._check_alive("generate")
        if not hasattr(self.module, "generate"):
            raise InferenceError(f"{type(self.module).__name__} has no generate(): call the engine for its outputs")
        group = self._tensor_group.group
        check_prompt(self.module, self._config, inputs, kwargs)
        meet(group, "engine.generate()")
        check_same_inputs(group, "engine.generate()", inputs, kwargs)
        follow_first_rank(group, self._device)
        module: Any = self.module
        if self._setting.zero and Group().size > 1:
            kwargs.setdefault("synced_gpus", True)  # all take part in every pass: see `streamed`
        with torch.no_grad(), _evaluating(module), finite_logits(module) as check:
            out = module.generate(*inputs, **kwargs)
            check()
        return out

    def compile(self, backend: Any = None, compile_kwargs: dict[str, Any] | None = None) -> None:
        """Compile the module with `torch.compile`; a second call changes nothing."""
        self._check_alive("compile")
        if not self._is_compiled:
            self.module.compile(**({"backend": backend} if backend else {}), **(compile_kwargs or {}))
        self._is_compiled = True

    @property
    def is_compiled(self) -> bool:
        """Whether `compile` was called."""
        return self._is_compiled

    # --- times --------------------------------------------------------------------------------------------------------

    def profile_model_time(self, use_cuda_events: bool = True) -> None:
        """Measure every forward pass of the model from now on, those inside `generate` too; see `model_times`."""
        self._check_alive("profile_model_time")
        if self._times is not None:
            return
        times: list[float] = []
        begun: list[float] = []

        def begin(*_: Any) -> None:
            self._device.synchronize()
            begun.append(time.perf_counter())

        def end(*_: Any) -> None:
            self._device.synchronize()
            times.append((time.perf_counter() - begun.pop()) * 1e3)

        self._times = times
        self._timers = [
            self.module.register_forward_pre_hook(begin),
            self.module.register_forward_hook(end),
        ]

    def model_times(self) -> list[float]:
        """Milliseconds of each forward pass since the last call.

        Raises:
            EngineStateError: `profile_model_time` was not called.
        """
        if self._times is None:
            raise EngineStateError("model_times before profile_model_time: call engine.profile_model_time() first")
        found = list(self._times)
        self._times.clear()
        return found

    # --- what an engine of `initialize` has ---------------------------------------------------------------------------

    def train(self, mode: bool = True) -> InferenceEngine:
        """An inference engine stays in evaluation mode.

        Raises:
            EngineStateError: `mode` is true.
        """
        if mode:
            raise EngineStateError(f"engine.train(): {_NO_TRAINING}")
        return self

    def backward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Say what to do instead."""
        raise EngineStateError(f"engine.backward(): {_NO_TRAINING}")

    def step(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Say what to do instead."""
        raise EngineStateError(f"engine.step(): {_NO_TRAINING}")

    @property
    def mp_world_size(self) -> int:
        """Ranks that the model is split over."""
        return self._tensor_group.group.size

    def destroy(self) -> None:
        """Take back hooks and groups; `module` stays as it is, and the engine cannot run it any more."""
        if self._destroyed:
            return
        for hook in self._timers:
            hook.remove()
        self._timers, self._times, self._recorded = [], None, None
        self._tensor_group.close()
        self._destroyed = True
        release(self.module, self)

    def _check_alive(self, what: str) -> None:
        if self._destroyed:
            raise EngineStateError(f"engine.{what}() after destroy(): make a new engine with init_inference")


def _module_of(model: Any) -> torch.nn.Module:
    """The module of an engine, or the module itself."""
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"init_inference needs model=, a torch.nn.Module; got {type(model).__name__}")
    inner = model.__dict__.get("_modules", {}).get("module")
    is_engine = isinstance(model, InferenceEngine) or hasattr(type(model), "optimizer_class")
    return inner if is_engine and inner is not None else model


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards the modes that there were: somebody may train the module."""
    if not module.training:
        yield
        return
    trained = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in trained:
            part.training = True
