"""DeepSpeed's pipeline schedules and instructions, as views of our own lists of passes (`parallel.pipe.schedule`).

    for step in TrainSchedule(micro_batches=4, stages=2, stage_id=0):
        for instruction in step:
            ...                            ForwardPass(buffer_id=0), SendActivation(buffer_id=0), ...

They say what a stage does, in the order in which it does it; each step is one pass with the messages around it. The
engine does not read them: `PipelineModule(schedule=)` chooses its order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from deepspeedlite.parallel.pipe.schedule import Pass, before, gpipe, one_forward_one_backward


class PipeInstruction:
    """One thing that a stage does. Its arguments are its attributes."""

    def __init__(self, **kwargs: Any) -> None:
        self.name, self.kwargs = type(self).__name__, kwargs
        vars(self).update(kwargs)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in self.kwargs.items())})"


class OptimizerStep(PipeInstruction):
    """Step the optimizer."""


class ReduceGrads(PipeInstruction):
    """Average the stage's gradients over its data-parallel ranks."""


class ReduceTiedGrads(PipeInstruction):
    """Sum the gradients of tied parameters over the stages that hold them."""


class CommitP2P(PipeInstruction):
    """Start the messages that were collected; in DualPipeV alone."""


class BufferOpInstruction(PipeInstruction):
    """One that works on a numbered buffer."""

    def __init__(self, buffer_id: int, **kwargs: Any) -> None:
        super().__init__(buffer_id=buffer_id, **kwargs)


class LoadMicroBatch(BufferOpInstruction):
    """Take a micro-batch from the data into the buffer."""


class ForwardPass(BufferOpInstruction):
    """Run the stage's layers on the buffer."""


class BackwardPass(BufferOpInstruction):
    """Run them backward."""


class SendActivation(BufferOpInstruction):
    """Send the buffer's outputs to the next stage."""


class RecvActivation(BufferOpInstruction):
    """Receive inputs from the stage before into the buffer."""


class SendGrad(BufferOpInstruction):
    """Send the gradients of the buffer's inputs to the stage before."""


class RecvGrad(BufferOpInstruction):
    """Receive the gradients of the buffer's outputs from the next stage."""


class PipeSchedule(ABC):
    """What one stage does in one batch: lists of instructions, one for each step.

    Args:
        micro_batches: how many a batch has.
        stages: how many the pipeline has.
        stage_id: this one, from 0.
    """

    def __init__(self, micro_batches: int, stages: int, stage_id: int) -> None:
        self.micro_batches, self.stages, self.stage_id = micro_batches, stages, stage_id
        self.prev_stage, self.next_stage = stage_id - 1, stage_id + 1
        self._steps: Iterator[list[PipeInstruction]] | None = None

    @abstractmethod
    def steps(self) -> Iterator[list[PipeInstruction]]:
        """The instructions, step by step."""

    def num_pipe_buffers(self) -> int:
        """How many buffers the instructions use."""
        return self.micro_batches

    @property
    def stage(self) -> int:
        """This stage."""
        return self.stage_id

    @property
    def num_stages(self) -> int:
        """All stages."""
        return self.stages

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a batch."""
        return self.micro_batches

    @property
    def is_first_stage(self) -> bool:
        """Whether inputs come from the data."""
        return self.stage_id == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether outputs go to the loss."""
        return self.stage_id == self.stages - 1

    def _buffer_idx(self, micro_batch_id: int) -> int:
        return micro_batch_id % self.num_pipe_buffers()

    def _valid_micro_batch(self, micro_batch_id: int) -> bool:
        return 0 <= micro_batch_id < self.micro_batches

    def _valid_stage(self, stage_id: int) -> bool:
        return 0 <= stage_id < self.stages

    def __iter__(self) -> PipeSchedule:
        self._steps = None
        return self

    def __next__(self) -> list[PipeInstruction]:
        if self._steps is None:
            self._steps = self.steps()
        return next(self._steps)

    def _instructions(self, one: Pass) -> list[PipeInstruction]:
        buffer = self._buffer_idx(one.micro_batch)
        around: list[tuple[type[BufferOpInstruction], bool]]
        if one.kind == "backward":
            around = [(RecvGrad, not self.is_last_stage), (BackwardPass, True), (SendGrad, not self.is_first_stage)]
        else:
            around = [
                (RecvActivation, not self.is_first_stage),
                (LoadMicroBatch, self.is_first_stage or self.is_last_stage),
                (ForwardPass, True),
                (SendActivation, not self.is_last_stage),
            ]
        return [instruction(buffer) for instruction, wanted in around if wanted]


class TrainSchedule(PipeSchedule):
    """One forward, one backward: what `PipelineModule(schedule="1f1b")` does."""

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """The instructions, step by step; the last ones reduce gradients and step the optimizer."""
        for one in self._order():
            last = one == Pass("backward", self.micro_batches - 1)
            yield [*self._instructions(one), *([ReduceTiedGrads(), ReduceGrads(), OptimizerStep()] if last else [])]

    def num_pipe_buffers(self) -> int:
        """As many as micro-batches are under way at once, and at least two."""
        order = self._order()
        begun = before(order, "backward", "forward")
        return max(2, *(forward - done for done, forward in enumerate(begun)))

    def _order(self) -> list[Pass]:
        return one_forward_one_backward(self.stages, self.stage_id, self.micro_batches)


class InferenceSchedule(PipeSchedule):
    """Forward passes alone."""

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """The instructions, step by step."""
        for one in gpipe(self.stages, self.stage_id, self.micro_batches):
            if one.kind == "forward":
                yield self._instructions(one)

    def num_pipe_buffers(self) -> int:
        """Two: one is filled while the other is sent."""
        return 2


class DataParallelSchedule(PipeSchedule):
    """A pipeline of one stage: forward and backward in turn, and the optimizer's step after the last."""

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """The instructions, step by step."""
        for index in range(self.micro_batches):
            last = index == self.micro_batches - 1
            yield [
                LoadMicroBatch(0),
                ForwardPass(0),
                BackwardPass(0),
                *([ReduceGrads(), OptimizerStep()] if last else []),
            ]

    def num_pipe_buffers(self) -> int:
        """One."""
        return 1
