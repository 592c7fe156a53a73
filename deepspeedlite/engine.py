"""The engine: what `initialize` returns, and what a training loop calls.

    loss = engine(batch)        forward, in the precision the configuration asks for
    engine.backward(loss)       gradients, scaled, accumulated and averaged over the ranks
    engine.step()               every gradient_accumulation_steps calls: clip, update, schedule, clear

The engine keeps count and passes the work on: gradients to `zero.GradReducer`, the update to
`optim.ShardedOptimizer`, what is printed to `metrics.TrainLog`.

[Note: backward passes the engine does not start]
`loss.backward()` works as `engine.backward(loss)` does. The forward pass puts a hook on every output; the first one to
fire announces the pass, and asks autograd to call back when the pass (the outermost one, should reentrant checkpoints
nest others in it) is over. The loss itself is out of reach then, so its share of the accumulated batch and the loss
scale are applied to the parameters' gradients as they arrive: the same result, less fp16's protection from underflow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from deepspeedlite.checkpoint.checkpoints import Checkpoints
from deepspeedlite.checkpoint.foreign import Formats
from deepspeedlite.checkpoint.train_state import COUNTERS, LoadOptions, TrainState
from deepspeedlite.comm import Group
from deepspeedlite.config import BatchSizes, DeepSpeedConfig
from deepspeedlite.data.loader import LoaderOptions
from deepspeedlite.metrics.comms_logger import comms_logger
from deepspeedlite.metrics.train_log import StepReport, TrainLog
from deepspeedlite.offload.options import Offload
from deepspeedlite.optim.precision import LossScaler, Precision, cast_floating, widen
from deepspeedlite.optim.step import ShardedOptimizer
from deepspeedlite.parallel.replica import Replica, Tie
from deepspeedlite.preflight.attached import Attached
from deepspeedlite.preflight.passes import check_loss, explain_types, note_clearing, note_hidden, note_losses
from deepspeedlite.runtime.device import Device
from deepspeedlite.runtime.errors import EngineStateError
from deepspeedlite.runtime.log import log_once, logger
from deepspeedlite.runtime.plugins import plugins
from deepspeedlite.runtime.tensors import tensors_in
from deepspeedlite.zero.clearing import ModuleClearing
from deepspeedlite.zero.flat_params import FlatParams
from deepspeedlite.zero.grad_reducer import GradReducer
from deepspeedlite.zero.lease import Lease
from deepspeedlite.zero.plan import ShardingPlan
from deepspeedlite.zero.prefetch import ParamPrefetcher

STEPPED = "optimizer.step() has taken this step: leave it out, for engine.step() also counts and moves the schedule"
NO_PASS = (
    "there was no backward pass since the last one; a rank that has no data calls engine.backward on a loss "
    "multiplied by 0"
)


@dataclass(kw_only=True)
class EngineParts:
    """What `factory` builds and an engine runs on."""

    config: DeepSpeedConfig
    batch: BatchSizes
    device: Device
    group: Group  # data parallel
    plan: ShardingPlan
    precision: Precision
    scaler: LossScaler
    reducer: GradReducer
    optimizer: ShardedOptimizer | None  # None: the engine only computes
    lr_scheduler: Any
    train_log: TrainLog
    lease: Lease
    prefetcher: ParamPrefetcher | None = None  # where parameters are sharded
    frozen: Sequence[FlatParams] = ()  # sharded values that are not trained
    offload: Offload = field(default_factory=Offload)
    replica: Replica = field(default_factory=Replica)  # the ranks that hold one copy of the model together
    mpu: Any = None
    loading: LoaderOptions = field(default_factory=LoaderOptions)  # of every loader that the engine makes
    training_dataloader: Any = None


class Engine(torch.nn.Module):
    """A model with its optimizer, precision, accumulation and data-parallel average. Made by `factory.build_engine`.

    Attributes that the engine does not have are looked up on the wrapped `module`. The class methods tell the factory
    what an engine for a special kind of model needs; see `parallel/pipe/engine.py`.
    """

    optimizer_class = ShardedOptimizer
    checkpoint_formats = Formats()  # besides our own

    @classmethod
    def mpu_of(cls, model: torch.nn.Module, mpu: Any) -> tuple[Any, Group, Replica]:
        """The Megatron-style object that tells of process groups, and its groups; None: every rank is data parallel."""
        if mpu is None:
            return None, Group(observer=comms_logger), Replica()
        return mpu, *plugins.find("groups", "mpu")(mpu, comms_logger)

    @classmethod
    def prepare(cls, model: torch.nn.Module, config: DeepSpeedConfig) -> None:
        """Tell the model what the configuration says of it, before its parameters are looked at."""

    @classmethod
    def ties_of(cls, model: torch.nn.Module) -> Sequence[Tie]:
        """Its modules that have copies on other ranks, in an order that those agree on."""
        return ()

    def __init__(self, module: torch.nn.Module, parts: EngineParts) -> None:
        super().__init__()
        self.module = module
        # What a script was given of the parts; it may put another object in its place.
        self.optimizer = parts.optimizer
        self.lr_scheduler = parts.lr_scheduler
        self.training_dataloader = parts.training_dataloader
        self.mpu = parts.mpu
        self._parts = parts
        self._batch = parts.batch  # a script may change it between two batches
        self._reducer = parts.reducer
        self._prefetcher = parts.prefetcher
        self._scaler = parts.scaler
        self._casts_inputs = parts.precision.cast_inputs  # of a pipeline, its first stage alone
        self._train_log = parts.train_log
        # Saved in checkpoints: calls of `step`, those that ended a window, their samples, those that overflowed.
        self.micro_steps = self.global_steps = self.global_samples = self.skipped_steps = 0
        self._window_steps = 0  # micro-steps since the last boundary
        self._forced_boundary: bool | None = None  # what a script says of the coming micro-steps, over the count
        self._in_no_sync = False
        self._loss_is_scaled = False  # the loss of the coming backward pass carries loss scale and share of the batch
        # Backward passes, and of those the calls of `backward`; for what is told and refused, not for what is computed.
        self._passes_since_step = self._losses_since_step = 0
        self._step_applied = False  # by the last `step`
        self._destroyed = False
        # What holds the module: the lease refers weakly to the engine, which may go before its module does.
        parts.lease.held_by(self)
        self._clearing = ModuleClearing(module, self._reducer)
        self._attached = Attached(module)
        self._checkpoints = Checkpoints(parts.config.checkpoint, self.checkpoint_formats)
        # What of the model and the last loaded checkpoint did not fit, with `load_module_strict=False`.
        self.load_mismatches: list[str] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is not None and hasattr(module, name):
                return getattr(module, name)
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise EngineStateError("an engine cannot be copied: copy what it trains, engine.module")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise EngineStateError("an engine cannot be pickled: save engine.module, or engine.save_checkpoint(...)")

    # --- the training loop ----------------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the model, under autocast or with inputs cast where the configuration says so."""
        self._check_alive("forward")
        if self._reducer.in_backward and torch._C._current_graph_task_id() == -1:
            log_once("a backward pass was left by an exception; its gradients are dropped")
            self._abandon_backward()
        precision, recording = self._parts.precision, torch.is_grad_enabled()
        if recording and self.optimizer is not None:
            self.optimizer.train_thawed()
        watched = self._train_log.forward_pass(self.global_steps, self.training and recording)
        if self._casts_inputs and precision.model_dtype is not None:
            inputs = cast_floating(inputs, precision.model_dtype)
            kwargs = cast_floating(kwargs, precision.model_dtype)
        if self._prefetcher is not None:
            self._prefetcher.begin_forward(recording)
        try:
            with watched, precision.autocast(self.device.type):
                outputs = self.module(*inputs, **kwargs)
        except RuntimeError as error:
            self._parts.lease.verify_attached()  # a dtype that torch complains of may have been changed since
            explain_types(error, precision)
            raise
        if self._prefetcher is not None and not recording:
            self._prefetcher.reshard()
        if recording and (self.optimizer is not None or self._prefetcher is not None):
            for tensor in tensors_in(outputs):
                if tensor.requires_grad:
                    tensor.register_hook(self.announce_backward)
        return outputs

    def backward(self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> torch.Tensor:
        """Compute and accumulate gradients; on an accumulation boundary average them over the ranks.

        Args:
            loss: a scalar that depends on the parameters.
            retain_graph: keep the graph for another pass through it.
            scale_wrt_gas: divide the loss by `gradient_accumulation_steps`, so that gradients are the mean over the
                accumulated micro-batches.

        Returns:
            the loss, divided by the accumulation steps if `scale_wrt_gas`.

        Raises:
            EngineStateError: `loss` is not a scalar, or no parameter depends on it.
        """
        self._check_alive("backward")
        check_loss(loss)
        self._losses_since_step += 1
        note_losses(self._losses_since_step, self._batch.accumulation)
        share = 1.0 / self._batch.accumulation if scale_wrt_gas else 1.0
        self._train_log.saw_loss(loss)
        factor = share * self._scaler.scale
        self._run_backward([widen(loss) * factor if factor != 1.0 else loss], None, retain_graph)
        return loss.detach() * share if share != 1.0 else loss.detach()

    def _run_backward(
        self, tensors: Sequence[torch.Tensor], grads: Sequence[torch.Tensor] | None, retain_graph: bool = False
    ) -> None:
        """A backward pass from tensors that carry loss scale and share of the batch, or from their gradients."""
        with self._train_log.phase("backward"):
            self._loss_is_scaled = True
            self._begin_backward()
            try:
                if tensors:
                    torch.autograd.backward(tensors, grads, retain_graph=retain_graph)
            except BaseException:
                self._abandon_backward()
                self._parts.lease.verify_attached()
                raise
            self._end_backward()

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss as `engine.scale(loss).backward()` needs it: its share of the batch times the loss scale."""
        check_loss(loss)
        self._train_log.saw_loss(loss)
        self._loss_is_scaled = True
        return widen(loss) * (self._scaler.scale / self._batch.accumulation)

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """On an accumulation boundary update the parameters, step the schedule and clear the gradients.

        Args:
            lr_kwargs: handed to the schedule's `step`, such as a metric for ReduceLROnPlateau.

        Raises:
            EngineStateError: inside `no_sync`, without a backward pass since the last call, or without an optimizer.
            LossScaleError: fp16 diverged; the message names the parameters.
        """
        self._check_alive("step")
        self._step_applied = False
        if self._in_no_sync:
            raise EngineStateError(
                "engine.step() inside engine.no_sync(): gradients are not averaged there; leave it first"
            )
        if self.optimizer is None:
            raise EngineStateError(
                "engine.step() needs an optimizer: name one in the configuration or pass one to initialize"
            )
        if self._passes_since_step == 0 or self.optimizer.stepped_alone:
            raise EngineStateError(
                f"engine.step() at micro step {self.micro_steps}: "
                + (STEPPED if self.optimizer.stepped_alone else NO_PASS)
            )
        boundary = self.is_gradient_accumulation_boundary()
        with self._train_log.phase("step"):
            self._reducer.end_backward()
            if boundary:
                self._take_step(self.optimizer, lr_kwargs or {})
        self._passes_since_step = self._losses_since_step = 0
        self.micro_steps += 1
        self._window_steps = 0 if boundary else self._window_steps + 1
        self._train_log.end_micro_step(boundary)
        if boundary:
            self._train_log.after_step(self._report(self.optimizer))

    def _take_step(self, optimizer: ShardedOptimizer, lr_kwargs: dict[str, Any]) -> None:
        self._attached.verify_trained(optimizer.dormant)
        optimizer.take_step()
        self.global_steps += 1
        self.global_samples += self._batch.train
        if optimizer.overflow:
            self.skipped_steps += 1
            return
        self._step_applied = True
        if self.lr_scheduler is not None:
            self.lr_scheduler.step(**lr_kwargs)

    def _report(self, optimizer: ShardedOptimizer) -> StepReport:
        return StepReport(
            global_steps=self.global_steps,
            global_samples=self.global_samples,
            skipped_steps=self.skipped_steps,
            param_groups=optimizer.param_groups,
            loss_scale=self._scaler.scale,
            grad_norm=optimizer.grad_norm() if self._train_log.writes_norm else None,
        )

    # --- backward passes ------------------------------------------------------------------------------------------

    def _begin_backward(self) -> None:
        if self._passes_since_step > 0 and self._clearing.is_needed and self._reducer.has_grads:
            note_hidden(self._parts.plan.stage)
        self._passes_since_step += 1
        if self.optimizer is not None:
            self.optimizer.note_backward()
        scale = 1.0 if self._loss_is_scaled else self._scaler.scale / self._batch.accumulation
        if not self._loss_is_scaled and self._parts.precision.needs_loss_scale:
            log_once(
                "loss.backward() under fp16 scales gradients only as they reach the parameters; "
                "engine.backward(loss) or engine.scale(loss).backward() also protects those on the way",
            )
        ends = self.is_gradient_accumulation_boundary()
        reduces = (ends or self._parts.plan.shard_grads) and not self._in_no_sync
        if self._prefetcher is not None:
            self._prefetcher.begin_backward()
        needs_norm = self.optimizer is not None and self.optimizer.needs_norm
        self._reducer.begin_backward(scale, reduces, measure=ends and needs_norm)

    def _abandon_backward(self) -> None:
        self._loss_is_scaled = False
        self._reducer.clear()
        if self._prefetcher is not None:
            self._prefetcher.abandon()

    def _end_backward(self) -> None:
        self._loss_is_scaled = False
        self._reducer.end_backward()

    def announce_backward(self, grad: torch.Tensor | None = None) -> None:
        """A backward pass is under way; called by hooks, of the outputs and of the parameters."""
        self._reducer.note_pass()
        if not self._reducer.in_backward and not self._destroyed:
            self._begin_backward()
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether this micro-step ends an accumulation window: its backward averages and its step updates."""
        if self._forced_boundary is not None:
            return self._forced_boundary
        return self._window_steps + 1 >= self._batch.accumulation

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in this context only accumulate; `step` is not allowed in it."""
        if self._in_no_sync:
            raise EngineStateError("engine.no_sync() cannot be nested")
        self._in_no_sync = True
        try:
            yield
        finally:
            self._in_no_sync = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients accumulated since the last step. `step` does this by itself."""
        self._reducer.forget()
        for param in self.module.parameters():
            param.grad = None

    def note_clearing(self) -> None:
        """A user clears gradients."""
        self._losses_since_step = 0
        note_clearing(self._window_steps, self._batch.accumulation)

    # --- what the engine is asked ---------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._parts.device.torch_device

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as it was given."""
        return self._parts.config.raw

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str,
        tag: Any = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        client_sd: dict[str, Any] | None = None,
    ) -> bool:
        """Write `save_dir/tag` (`global_step<N>` by default), whole or not at all. Called by every rank.

        `client_state` (older callers: `client_sd`) comes back from `load_checkpoint`: JSON-able data and tensors.
        Raises `CheckpointError`, the same on every rank; earlier checkpoints are then as they were.
        """
        self._check_alive("save_checkpoint")
        state = self._train_state(client_sd if client_state is None else client_state)
        self._checkpoints.save(state, save_dir, tag, save_latest, exclude_frozen_parameters)
        return True

    def load_checkpoint(
        self,
        load_dir: str,
        tag: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str | None, dict[str, Any]]:
        """Continue from a checkpoint of any number of ranks and any stage. Called by every rank.

        Returns (path, client_state); (None, {}) where there is none. `load_mismatches` then lists what did not fit.
        `custom_load_fn(src=state_dict, dst=module)` loads the weights itself. Raises `CheckpointError`.
        """
        self._check_alive("load_checkpoint")
        options = LoadOptions(
            strict=load_module_strict,
            optimizer_states=load_optimizer_states,
            lr_scheduler_states=load_lr_scheduler_states,
            module_only=load_module_only,
            custom_load_fn=custom_load_fn,
        )
        state = self._train_state()
        path = self._checkpoints.load(state, load_dir, tag, options)
        self.load_mismatches = state.mismatches
        if path is not None and not load_module_only:
            vars(self).update(state.counters, _window_steps=0)
        return path, state.client_state

    def _train_state(self, client_state: dict[str, Any] | None = None) -> TrainState:
        """What there is to save, or to load into, as it is now."""
        parts = self._parts
        return TrainState(
            module=self.module,
            reducer=parts.reducer,
            frozen=parts.frozen,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            dataloader=self.training_dataloader,
            loss_scaler=self._scaler,
            group=parts.group,
            replica=parts.replica,
            stage=parts.plan.stage,
            share_numel=parts.config.zero_optimization.allgather_bucket_size,
            config=parts.config.raw,
            counters={name: getattr(self, name) for name in COUNTERS},
            client_state=client_state or {},
        )

    # --- life cycle -------------------------------------------------------------------------------------------------

    def _check_alive(self, what: str) -> None:
        if self._destroyed:
            self._parts.lease.resume(what)
            self._destroyed = False
        refusal = self._parts.lease.refusal(what)
        if refusal:
            raise EngineStateError(f"engine.{what}(): {refusal}")
        if self.optimizer is not None and self.optimizer.broken and what != "load_checkpoint":
            raise EngineStateError(f"engine.{what}(): {self.optimizer.broken}; load a checkpoint first")

    def destroy(self) -> None:
        """Remove the engine's hooks and close its monitors. May be called on one rank alone.

        Up to stage 2 the module keeps its trained values and works alone. At stage 3 its parameters stay sharded, as
        `zero.Init` would have left them: for `GatheredParameters`, `state_dict()` on all ranks, or another engine.
        An engine that is used again goes on at stage 0, and raises at stages 1 to 3.
        """
        if self._destroyed:
            return
        self._checkpoints.close()
        self._destroyed = True
        self._parts.lease.close()
        self._parts.offload.close()
        self._clearing.close()
        self._attached.close()
        self._train_log.close()
        logger.debug("engine destroyed after %d steps", self.global_steps)
