"""The engine of a PipelineModule: `train_batch` and `eval_batch` pass micro-batches through the stages.

Every rank follows its stage's order of passes (`schedule.py`). What is left to the base engine: gradients that
accumulate over the micro-batches and are averaged over the replicas in the last one's backward pass, the step, and
checkpoints.

[Note: batches are fetched before the first pass]
The first stage reads inputs and the last one labels, each from its own iterator. Were one of them, or one replica, to
find its iterator empty in the middle of a batch, the others would wait for it for good. So both fetch all micro-batches
first, and all ranks agree that they have them; a StopIteration or an error is then raised on every rank. What fails in
the passes does so on every rank too (`fault.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch

from deepspeedlite.comm import Group
from deepspeedlite.config import DeepSpeedConfig
from deepspeedlite.data.loader import RepeatingLoader
from deepspeedlite.engine import Engine, EngineParts
from deepspeedlite.metrics.comms_logger import comms_logger
from deepspeedlite.optim.precision import widen
from deepspeedlite.parallel.pipe.fault import Faults, scalar
from deepspeedlite.parallel.pipe.module import PipelineModule
from deepspeedlite.parallel.pipe.stage_comm import StageComm
from deepspeedlite.parallel.replica import Replica, Tie
from deepspeedlite.preflight.passes import check_loss
from deepspeedlite.runtime.errors import ConfigError, DistributedError, PipelineError
from deepspeedlite.runtime.tensors import map_tensors

_READY, _EXHAUSTED, _FAILED = 0, 1, 2


class PipelineEngine(Engine):
    """Trains a PipelineModule. Made by `initialize`."""

    module: PipelineModule

    @classmethod
    def mpu_of(cls, model: Any, mpu: Any) -> tuple[Any, Group, Replica]:
        """The pipeline's own, by its topology."""
        if mpu is not None:
            raise ConfigError("a PipelineModule has its own mpu, by its topology: leave mpu= out of initialize")
        mpu, group, replica = super().mpu_of(model, model.mpu())
        # Stages name layers by their places in the whole model: in a checkpoint only tensors' parts are kept apart.
        return mpu, group, replace(replica, part=replica.tensor.rank, parts=replica.tensor.size)

    @classmethod
    def prepare(cls, model: Any, config: DeepSpeedConfig) -> None:
        """Take the configuration's checkpoint interval; raises UnsupportedError for stage 3."""
        model.configure(config.pipeline.activation_checkpoint_interval, config.zero_optimization.stage == 3)

    @classmethod
    def ties_of(cls, model: Any) -> Sequence[Tie]:
        """Of layers that several stages have."""
        ties: Sequence[Tie] = model.ties
        return ties

    def __init__(self, module: PipelineModule, parts: EngineParts) -> None:
        super().__init__(module, parts)
        self.grid = module.mpu()
        self.num_stages, self.stage_id = module.num_stages, module.stage_id
        self._casts_inputs = parts.precision.cast_inputs and self.is_first_stage()
        self._pipe = Group(self.grid.get_pipe_parallel_group(), comms_logger)
        self._comm = StageComm(self.grid, self.device, module.schedule, module.dynamic_shape)
        self._batches: Iterator[Any] | None = None
        self._split: Callable[[Any], Any] = lambda batch: batch
        self._outputs: list[Any] | None = None  # of the last stage, where evaluation is to return them

    # --- what a script calls ----------------------------------------------------------------------------------------

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> torch.Tensor:
        """Train on one batch: `gradient_accumulation_steps` micro-batches through all stages, then a step.

        Args:
            data_iter: gives (inputs, labels) of a micro-batch, each a tensor or a tuple of tensors. Read by the first
                and the last stage alone. If None: what `set_dataiterator` was given, or the loader of `initialize`.

        Returns:
            the loss, averaged over micro-batches and replicas: a 0-dim fp32 tensor, the same on every rank.

        Raises:
            StopIteration: the iterator ended before the batch was complete, on some rank; nothing was trained.
            PipelineError: a batch, or what a stage returns, is not what a pipeline can carry, or a stage has failed;
                on every rank, and nothing was trained.
        """
        self._check_alive("train_batch")
        self.module.train()
        count = self.micro_batches
        batches = self._fetch(data_iter, count)
        self._begin(count)
        losses: list[torch.Tensor] = []
        held: dict[int, tuple[Any, Any]] = {}
        for kind, index in self.module.schedule(self.num_stages, self.stage_id, count):
            if kind == "forward":
                held[index] = self._forward_micro_batch(index, batches[index], training=True)
                if self.is_last_stage() and (loss := held[index][1]) is not None:
                    losses.append(loss.detach().reshape(()))
                continue
            self._backward_micro_batch(index, *held.pop(index))
            if index < count - 1:
                super().step()
        self._comm.end_batch()
        self._faults.ask()
        mean = self._mean(losses)
        self._faults.settle(self._forget_batch)
        self._train_log.saw_loss(mean)
        super().step()
        return mean

    def eval_batch(
        self,
        data_iter: Iterator[Any] | None = None,
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
    ) -> Any:
        """Evaluate one batch, without gradients and with the module in eval mode.

        Args:
            data_iter: as of `train_batch`.
            return_logits: also return the last stage's outputs, joined along their first dimension; None elsewhere.
            compute_loss: run the loss function; else the result is what the last layer returns.
            reduce_output: `avg`: the mean over micro-batches and replicas; None: the last stage's list of results.
            bcast_loss: give the mean loss to every stage; else only the last one has it, and others None.
            num_micro_batches: how many; as in training if None.

        Returns:
            the result, or (result, logits).

        Raises:
            StopIteration, PipelineError: as `train_batch`.
        """
        self._check_alive("eval_batch")
        if reduce_output not in ("avg", None):
            raise PipelineError(f"eval_batch(reduce_output={reduce_output!r}): use 'avg' or None")
        count = self.micro_batches if num_micro_batches is None else num_micro_batches
        batches = self._fetch(data_iter, count)
        self._begin(count)
        was_training = self.module.training
        self.module.eval()
        self._outputs, results = [] if return_logits else None, []
        try:
            with torch.no_grad():
                for index, batch in enumerate(batches):
                    _, result = self._forward_micro_batch(index, batch, training=False, compute_loss=compute_loss)
                    results += [result] if self.is_last_stage() else []
        finally:
            self.module.train(was_training)
            outputs, self._outputs = self._outputs, None
        self._comm.end_batch()
        return self._result(results, outputs, reduce_output, compute_loss and bcast_loss)

    def set_dataiterator(self, iterator: Iterator[Any]) -> None:
        """Read batches from this iterator where `train_batch` and `eval_batch` are given none."""
        self._batches = iterator

    def set_dataloader(self, loader: Iterable[Any]) -> None:
        """Read batches from this loader, over and over."""
        self._batches = iter(RepeatingLoader(loader))

    def set_batch_fn(self, fn: Callable[[Any], Any]) -> None:
        """Make (inputs, labels) of what the iterator gives by `fn`."""
        self._split = fn

    def reset_activation_shape(self) -> None:
        """For scripts that call it between batches of other shapes: each batch's shapes are found out anew here."""

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a batch."""
        return self._batch.accumulation

    def is_first_stage(self) -> bool:
        """Whether this rank reads inputs."""
        return self.stage_id == 0

    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.stage_id == self.num_stages - 1

    @property
    def is_pipe_parallel(self) -> bool:
        """Whether there is more than one stage."""
        return self.num_stages > 1

    @property
    def is_data_parallel(self) -> bool:
        """Whether there is more than one replica."""
        return self.grid.data_parallel_size > 1

    @property
    def is_model_parallel(self) -> bool:
        """Whether a stage's tensors are divided too."""
        return self.grid.slice_parallel_size > 1

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises `PipelineError`: passes are run by `train_batch` and `eval_batch`."""
        self._refuse("forward")

    def backward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises `PipelineError`: passes are run by `train_batch`."""
        self._refuse("backward")

    def step(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises `PipelineError`: the step is part of `train_batch`."""
        self._refuse("step")

    @staticmethod
    def _refuse(what: str) -> NoReturn:
        raise PipelineError(f"engine.{what}() of a pipeline: call engine.train_batch or engine.eval_batch instead")

    # --- batches ------------------------------------------------------------------------------------------------------

    def _fetch(self, data_iter: Iterator[Any] | None, count: int) -> list[Any]:
        """This stage's micro-batches, when all ranks have theirs; None for each on stages that read none."""
        batches: list[Any] = [None] * count
        state, failure = _READY, None
        if self.is_first_stage() or self.is_last_stage():
            try:
                iterator = self._iterator(data_iter)
                batches = [self._checked(self._split(next(iterator))) for _ in range(count)]
            except StopIteration:
                state = _EXHAUSTED
            except Exception as error:  # whatever a user's loader may raise
                state, failure = _FAILED, error
        flag = torch.tensor([state])
        self.grid.everyone.all_reduce(flag, "max")
        worst = int(flag)
        if worst == _EXHAUSTED:
            raise StopIteration("the batches ended before a pipeline batch was complete; nothing was trained")
        if worst == _FAILED:
            self.grid.agree(failure)
        return batches

    def _iterator(self, data_iter: Iterator[Any] | None) -> Iterator[Any]:
        if data_iter is not None:
            if not hasattr(data_iter, "__next__"):
                raise PipelineError(
                    f"a pipeline reads from an iterator, not a {type(data_iter).__name__}: give iter(it)"
                )
            return data_iter
        if self._batches is None:
            if self.training_dataloader is None:
                raise PipelineError("no batches: give train_batch an iterator, or initialize training_data=")
            self.set_dataloader(self.training_dataloader)
        assert self._batches is not None
        return self._batches

    @staticmethod
    def _checked(batch: Any) -> tuple[Any, Any]:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise PipelineError(
                f"a pipeline's batch is (inputs, labels), not a {type(batch).__name__}; engine.set_batch_fn makes it so"
            )
        inputs, labels = batch
        return tuple(inputs) if isinstance(inputs, list) else inputs, labels

    # --- passes -------------------------------------------------------------------------------------------------------

    def _begin(self, count: int) -> None:
        self._comm.begin_batch(count)
        self._faults = Faults(self.grid)
        self._before = self.micro_steps, self.module.micro_offset

    def _forget_batch(self) -> None:
        """Leave the engine as it was before a batch that has failed."""
        self.zero_grad()
        self.micro_steps, micro_offset = self._before
        self.module.rewind(micro_offset)
        self._window_steps = self._passes_since_step = 0

    def _forward_micro_batch(
        self, index: int, batch: Any, training: bool, compute_loss: bool = True
    ) -> tuple[Any, Any]:
        """One forward pass of this stage: its inputs, and its output (on the last stage, its loss if it has one)."""
        inputs = None if self.is_first_stage() else self._comm.receive_activation(training)
        if inputs is None and not self.is_first_stage():
            self._faults.keep_step()
        found = self._faults.attempt(
            "forward", index, partial(self._compute, inputs, batch, training=training, compute_loss=compute_loss)
        )
        result, described = found or (None, None)
        if not self.is_last_stage():
            self._comm.send_activation(result, described, training)
        return inputs, result

    def _compute(self, inputs: Any, batch: Any, training: bool, compute_loss: bool) -> tuple[Any, Any]:
        """What this stage makes of its inputs, and how it is described to the next one."""
        if self.is_first_stage():
            inputs = map_tensors(batch[0], lambda tensor: tensor.to(self.device))
        given = tuple(map(_changeable, inputs)) if isinstance(inputs, tuple) else _changeable(inputs)
        result = super().forward(given)
        if not self.is_last_stage():
            return result, self._comm.outline(result)
        if self._outputs is not None:
            self._outputs.append(result)
        if self.module.loss_fn is not None and compute_loss:
            labels = map_tensors(batch[1], lambda tensor: tensor.to(self.device))
            with self._parts.precision.autocast(self.device.type):
                result = self.module.loss_fn(result, labels)
        return scalar(result) if training else result, None

    def _backward_micro_batch(self, index: int, inputs: Any, result: Any) -> None:
        """One backward pass of this stage, from the loss or from what the next stage sends."""
        grads = None if self.is_last_stage() else self._comm.receive_gradients()
        passes = self._passes_since_step
        self._faults.attempt("backward", index, partial(self._differentiate, result, grads))
        if self._passes_since_step == passes:
            self._run_backward([], None)  # its replicas reduce in theirs
        if inputs is not None:
            self._comm.send_gradients(_tensors(inputs))

    def _differentiate(self, result: Any, grads: list[torch.Tensor] | None) -> None:
        if grads is None:
            check_loss(result)
            self._run_backward([widen(result) * (self._scaler.scale / self._batch.accumulation)], None)
        else:
            self._run_backward([tensor for tensor in _tensors(result) if tensor.requires_grad], grads)

    def _end_backward(self) -> None:
        self._loss_is_scaled = False
        self._reducer.end_backward(is_shared=True)

    def _abandon_backward(self) -> None:
        """A pass that fails here alone is brought to its end, for the sake of the replicas that reduce in theirs."""
        error = sys.exc_info()[1]
        if isinstance(error, Exception) and not isinstance(error, DistributedError):
            self._end_backward()
        else:
            super()._abandon_backward()

    # --- results ----------------------------------------------------------------------------------------------------

    def _mean(self, losses: list[torch.Tensor]) -> torch.Tensor:
        """The mean of the last stage's losses over micro-batches and replicas, on every rank."""
        mean = torch.stack(losses).float().mean() if losses else torch.zeros((), device=self.device)
        if self.is_last_stage():
            self._parts.group.all_reduce(mean, "avg")
        self._pipe.broadcast(mean, src=self.num_stages - 1)
        return mean

    def _result(self, results: list[Any], outputs: list[Any] | None, reduce: str | None, everywhere: bool) -> Any:
        """What `eval_batch` returns."""

        def joined() -> tuple[Any, Any]:
            mean = torch.stack(results).float().mean(0) if results and reduce else None
            return mean, _joined(outputs or [])

        found = self._faults.attempt("forward", self._comm.micro_batches - 1, joined)
        self._faults.ask()
        self._faults.settle(self._forget_batch)
        result, logits = found or (None, None)
        if not reduce:
            result = results or None
        elif everywhere:
            result = self._mean([] if result is None else [result])
        elif result is not None:
            self._parts.group.all_reduce(result, "avg")
        return result if outputs is None else (result, logits)


class _Alias(torch.autograd.Function):
    """The same memory, as a tensor that autograd takes for another one."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def _changeable(tensor: Any) -> Any:
    """What a stage's first layer may change in place, such as nn.ReLU(inplace=True), which a leaf does not allow."""
    return _Alias.apply(tensor) if isinstance(tensor, torch.Tensor) and tensor.requires_grad else tensor


def _tensors(message: Any) -> tuple[torch.Tensor, ...]:
    return message if isinstance(message, tuple) else (message,)


def _joined(outputs: list[Any]) -> Any:
    if not outputs or not isinstance(outputs[0], torch.Tensor):
        return outputs or None
    return torch.cat(outputs) if outputs[0].dim() else torch.stack(outputs)
