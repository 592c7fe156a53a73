"""FLOPs, MACs, parameters and forward latency of every module, for the config section `flops_profiler`.

torch's own FlopCounterMode counts the operations as they are dispatched; two hooks per module read its total and the
clock on the way in and on the way out, so a module's figures include its children's. Counted are matrix products,
convolutions, attention and recurrent layers, forward only; one multiply-accumulate (MAC) is two FLOPs. Element-wise
work, norms and embeddings are not counted: they are bound by memory, not arithmetic. Teach torch a custom kernel's
formula with `torch.utils.flop_counter.register_flop_formula` and it is counted here too.

Latency on a GPU comes from events on the stream, with no synchronisation per module. It includes the counter's own
cost of some microseconds per operation: compare modules with it, and take absolute times from timers.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count
from torch.utils.hooks import RemovableHandle

from deepspeedlite.metrics.flops_report import ModuleProfile, format_report, parent_name, si
from deepspeedlite.metrics.timers import Stopwatch
from deepspeedlite.runtime.device import Device
from deepspeedlite.runtime.errors import ConfigError, EngineStateError


class EngineView(Protocol):
    """What the report says of the engine."""

    @property
    def world_size(self) -> int: ...
    def train_micro_batch_size_per_gpu(self) -> int: ...


@dataclass
class _Frame:
    """A module that is running."""

    profile: ModuleProfile
    flops_before: int


class FlopsProfiler:
    """Profiles the forward passes between `start_profile` and `stop_profile`; afterwards no hook is left.

    Args:
        model: the module whose forward is counted.
        ds_engine: names ranks and batch size in the report; may be None.
        recompute_fwd_factor: how much of the forward is run again in backward by activation checkpointing, 0 to 1.
    """

    def __init__(
        self, model: nn.Module, ds_engine: EngineView | None = None, recompute_fwd_factor: float = 0.0
    ) -> None:
        self.model = model
        self.ds_engine = ds_engine
        self.recompute_fwd_factor = recompute_fwd_factor
        self.started = False
        self._counter: FlopCounterMode | None = None
        self._handles: list[RemovableHandle] = []
        self._profiles: dict[str, ModuleProfile] = {}
        self._watches: dict[str, Stopwatch] = {}
        self._stack: list[_Frame] = []

    def start_profile(self, ignore_list: Iterable[type] | None = None) -> None:
        """Begin counting, from zero.

        Args:
            ignore_list: module classes not to list; their work still counts in the modules around them.
        """
        self.end_profile()
        ignored = tuple(ignore_list or ())
        device = _device_of(self.model)
        for name, module in self.model.named_modules():
            if name and isinstance(module, ignored):
                continue
            profile = ModuleProfile(
                name=name,
                class_name=type(module).__name__,
                depth=name.count(".") + 1 if name else 0,
                params_numel=sum(parameter.numel() for parameter in module.parameters()),
            )
            self._profiles[name] = profile
            self._watches[name] = Stopwatch(device)
            self._handles += (
                module.register_forward_pre_hook(self._entering(profile)),
                module.register_forward_hook(self._leaving(profile)),
            )
        formulas = {packet: formula for packet, formula in _FORMULAS.items() if packet not in flop_registry}
        counter = FlopCounterMode(display=False, custom_mapping=formulas)
        with counter:  # the first operation of a process makes torch import its decompositions: over a second
            torch.zeros(1, 1).matmul(torch.zeros(1, 1))
        self._counter = counter
        counter.__enter__()  # clears what was counted
        self.started = True

    def stop_profile(self) -> None:
        """Stop counting and remove every hook; the figures stay. Waits for the device."""
        if self._counter is None:
            return
        self._counter.__exit__(None, None, None)
        self._counter = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stack.clear()
        for name, profile in self._profiles.items():
            profile.latency_ms = self._watches[name].elapsed_ms()
        self._watches.clear()
        self._fill_containers()

    def end_profile(self) -> None:
        """Stop, and forget the figures."""
        self.stop_profile()
        self._profiles.clear()
        self.started = False

    @property
    def profiles(self) -> list[ModuleProfile]:
        """Figures of every module, the model first, in order of definition.

        Raises:
            EngineStateError: nothing has been profiled.
        """
        if not self._profiles:
            raise EngineStateError(
                "the FLOPs profiler has no figures: call start_profile() before the forward pass and read them "
                "before end_profile()"
            )
        if self._counter is not None:
            for name, profile in self._profiles.items():
                profile.latency_ms = self._watches[name].elapsed_ms(reset=False)
        return list(self._profiles.values())

    def get_total_flops(self, as_string: bool = False) -> int | str:
        """Floating-point operations of the model's forward passes."""
        flops = self.profiles[0].flops
        return f"{si(flops)}FLOPs" if as_string else flops

    def get_total_macs(self, as_string: bool = False) -> int | str:
        """Multiply-accumulates of the model's forward passes."""
        macs = self.profiles[0].macs
        return f"{si(macs)}MACs" if as_string else macs

    def get_total_params(self, as_string: bool = False) -> int | str:
        """Parameters of the model, shared ones counted once."""
        params_numel = self.profiles[0].params_numel
        return si(params_numel).rstrip() if as_string else params_numel

    def get_total_duration(self, as_string: bool = False) -> float | str:
        """Seconds spent in the model's forward passes."""
        latency_ms = self.profiles[0].latency_ms
        return f"{latency_ms:.2f} ms" if as_string else latency_ms / 1e3

    def print_model_profile(
        self,
        profile_step: int = 1,
        module_depth: int = -1,
        top_modules: int = 1,
        detailed: bool = True,
        output_file: str | None = None,
        step_times_ms: Mapping[str, float] | None = None,
    ) -> None:
        """Write the report: totals, the classes that cost most, and with `detailed` the tree of modules.

        Args:
            profile_step: the step named in the heading.
            module_depth: the depth at which classes are compared and the tree ends; -1: the innermost modules.
            top_modules: how many classes to list per measure.
            detailed: add the tree.
            output_file: where to write, replacing what is there; None: standard output.
            step_times_ms: times of the same step without the profiler's cost, by the names forward, backward, step.
        """
        where = ""
        if self.ds_engine is not None:
            batch = self.ds_engine.train_micro_batch_size_per_gpu()
            where = f", one of {self.ds_engine.world_size} ranks, micro-batch {batch}"
        report = format_report(
            self.profiles,
            title=f"step {profile_step}{where}",
            module_depth=module_depth,
            top_modules=top_modules,
            detailed=detailed,
            backward_factor=2 + self.recompute_fwd_factor,
            step_times_ms=step_times_ms or {},
        )
        if output_file is None:
            sys.stdout.write(report)
            return
        os.makedirs(os.path.dirname(os.path.abspath(output_file)), exist_ok=True)
        with open(output_file, "w", encoding="utf-8") as file:
            file.write(report)

    def _entering(self, profile: ModuleProfile) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            counter = self._counter
            if counter is None or counter.mod_tracker.is_bw:  # recomputation in backward is not forward work
                return
            self._stack.append(_Frame(profile, counter.get_total_flops()))
            self._watches[profile.name].start()

        return hook

    def _leaving(self, profile: ModuleProfile) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            counter = self._counter
            if counter is None or counter.mod_tracker.is_bw:
                return
            self._watches[profile.name].stop()
            while self._stack:  # frames above ours belong to modules that raised and never left
                frame = self._stack.pop()
                if frame.profile is profile:
                    profile.flops += counter.get_total_flops() - frame.flops_before
                    profile.calls += 1
                    return

        return hook

    def _fill_containers(self) -> None:
        """Give modules that are never called themselves (ModuleList) the sum of their children."""
        for name, profile in reversed(self._profiles.items()):  # children before parents
            parent = self._profiles.get(parent_name(name, self._profiles))
            if parent is not None and parent is not profile and not parent.calls:
                parent.flops += profile.flops
                parent.latency_ms += profile.latency_ms


def get_model_profile(
    model: nn.Module,
    input_shape: tuple[int, ...] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    print_profile: bool = True,
    detailed: bool = True,
    module_depth: int = -1,
    top_modules: int = 1,
    warm_up: int = 1,
    as_string: bool = True,
    output_file: str | None = None,
    ignore_modules: Iterable[type] | None = None,
    mode: str = "forward",
) -> tuple[int | str, int | str, int | str]:
    """(FLOPs, MACs, parameters) of one pass through a model in evaluation mode; its mode is restored.

    Args:
        model: any module.
        input_shape: shape of a float tensor that is the model's only input, batch first; else give args or kwargs.
        args: positional inputs.
        kwargs: inputs by name.
        print_profile: write the report.
        detailed: as in `FlopsProfiler.print_model_profile`, like the next two and output_file.
        module_depth: see there.
        top_modules: see there.
        warm_up: passes before the one that counts.
        as_string: return figures such as `4.35 GMACs` and not integers.
        output_file: see there.
        ignore_modules: module classes not to list.
        mode: `forward` calls the model, `generate` its method of that name.

    Raises:
        ConfigError: no input is given, or `mode` is another word.
    """
    if mode not in ("forward", "generate"):
        raise ConfigError(f"get_model_profile: mode={mode!r} is not known; use 'forward' or 'generate'")
    inputs, named = tuple(args), dict(kwargs or {})
    if input_shape is not None:
        like = next(model.parameters(), torch.empty(()))
        inputs = (torch.ones(input_shape, dtype=like.dtype, device=like.device),)
    if not inputs and not named:
        raise ConfigError("get_model_profile: the model has no input; give input_shape, args or kwargs")
    run = model if mode == "forward" else model.generate
    profiler = FlopsProfiler(model)
    with _evaluating(model):
        try:
            for _ in range(warm_up):
                run(*inputs, **named)  # type: ignore[operator]
            profiler.start_profile(ignore_list=ignore_modules)
            run(*inputs, **named)  # type: ignore[operator]
            profiler.stop_profile()
            if print_profile:
                profiler.print_model_profile(warm_up, module_depth, top_modules, detailed, output_file)
            totals = (profiler.get_total_flops, profiler.get_total_macs, profiler.get_total_params)
            flops, macs, params = (total(as_string) for total in totals)
            return flops, macs, params
        finally:
            profiler.end_profile()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each module's own mode comes back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _device_of(model: nn.Module) -> Device:
    first = next(model.parameters(), None)
    return Device(torch.device("cpu") if first is None else first.device)


# Formulas for operations that torch's registry leaves out. They receive shapes in place of tensors.
_Shape = Sequence[int]


def _numel(shape: _Shape) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _sdpa(query: _Shape, key: _Shape, value: _Shape, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _matrix_vector(matrix: _Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * _numel(matrix)


def _add_matrix_vector(bias: _Shape, matrix: _Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * _numel(matrix)


def _add_matrix_product(bias: _Shape, left: _Shape, right: _Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * _numel(left) * right[-1]


def _rnn_onednn(inputs: _Shape, weight_ih: _Shape, weight_hh: _Shape, *args: Any, **kwargs: Any) -> int:
    return _rnn(inputs, (weight_ih, weight_hh))


def _rnn(inputs: _Shape, weights: Sequence[_Shape], *args: Any, **kwargs: Any) -> int:
    """Every weight matrix of every layer and direction is applied once per sample and time step."""
    return 2 * (_numel(inputs) // inputs[-1]) * sum(_numel(weight) for weight in weights if len(weight) == 2)


def _fused_self_attention(query: _Shape, key: _Shape, value: _Shape, *args: Any, **kwargs: Any) -> int:
    """Projections of query, key, value and output, and the attention between them."""
    batch, query_len, width = query
    key_len = key[1]
    return 4 * batch * width * (width * (query_len + key_len) + query_len * key_len)


_aten = torch.ops.aten
_FORMULAS: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    _aten._scaled_dot_product_fused_attention_overrideable: _sdpa,
    _aten._native_multi_head_attention: _fused_self_attention,
    _aten._addmm_activation: _add_matrix_product,
    _aten.addmv: _add_matrix_vector,
    _aten.mv: _matrix_vector,
    _aten.dot: _matrix_vector,
    _aten.mkldnn_rnn_layer: _rnn_onednn,
    _aten._cudnn_rnn: _rnn,
    _aten.miopen_rnn: _rnn,
}
