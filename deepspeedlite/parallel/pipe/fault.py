"""What one stage alone finds wrong in a batch, such as a loss that is no scalar, ends the batch on every rank.

[Note: a stage that has failed keeps step]
Others wait for what it was to send, and its replicas for their reductions. So it goes through the rest of its passes
without computing: it receives what comes, sends an error marker instead of a first activation and zeros instead of what
was announced, and reduces gradients that are dropped. At the batch's end every rank learns whether any has failed, and
raises the same `PipelineError`. Nothing has been trained then, no connection was cut, and the next batch can follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch

from deepspeedlite.comm import Work
from deepspeedlite.parallel.pipe.schedule import Kind
from deepspeedlite.parallel.pipe.topology import PipelineParallelGrid
from deepspeedlite.runtime.errors import DistributedError, PipelineError

_T = TypeVar("_T")


class _Fault(NamedTuple):
    """Orders as causes come before what follows from them: by micro-batch, and down the stages and up again."""

    micro_batch: int
    is_backward: bool
    distance: int
    stage: int
    rank: int
    text: str

    def __str__(self) -> str:
        where = f"the {'backward' if self.is_backward else 'forward'} pass of micro-batch {self.micro_batch}"
        return f"pipeline stage {self.stage} (rank {self.rank}) failed in {where}: {self.text}"


class Faults:
    """What went wrong on this rank in the batch under way. One for each batch."""

    def __init__(self, grid: PipelineParallelGrid) -> None:
        self._grid = grid
        self._fault: _Fault | None = None
        self._error: Exception | None = None
        self._vote: tuple[torch.Tensor, Work | None] | None = None
        self.idle = False
        """Whether this rank only keeps step: it has failed, or a stage before it has said so."""

    def attempt(self, kind: Kind, micro_batch: int, action: Callable[[], _T]) -> _T | None:
        """What `action` returns; None if it fails, or something has failed before.

        Raises:
            DistributedError: of the action: with ranks that cannot be reached no step can be kept.
        """
        if self.idle:
            return None
        try:
            return action()
        except DistributedError:
            raise
        except Exception as error:  # whatever a layer, a loss or a batch may raise
            stage, backward = self._grid.stage_id, kind == "backward"
            told = str(error) if isinstance(error, PipelineError) else f"{type(error).__name__}: {error}"
            place = (micro_batch, backward, -stage if backward else stage, stage)
            self._fault, self._error = _Fault(*place, self._grid.global_rank, told), error
            self.idle = True
        return None

    def keep_step(self) -> None:
        """A stage before this one has said that it failed."""
        self.idle = True

    def ask(self) -> None:
        """Start to find out whether any rank has failed. Collective, as is `settle`, which must follow."""
        flag = torch.tensor([int(self.idle)])
        self._vote = flag, self._grid.everyone.all_reduce(flag, "max", async_op=True, label="whether a stage failed")

    def settle(self, then: Callable[[], Any]) -> None:
        """Return if no rank has failed; else call `then` and raise.

        Raises:
            PipelineError: on every rank the same.
        """
        assert self._vote is not None, "asked before"
        flag, work = self._vote
        if work is not None:
            work.wait()
        if int(flag):
            then()
            self._raise()

    def _raise(self) -> NoReturn:
        told = self._grid.everyone.all_gather_objects(None if self._fault is None else list(self._fault))
        faults = sorted(_Fault._make(fault) for fault in told if fault is not None)
        raise PipelineError(f"{faults[0]}\nNothing of this batch was kept; another one may follow.") from self._error


def scalar(loss: Any) -> torch.Tensor:
    """A micro-batch's loss, if it is one number.

    Raises:
        PipelineError: it is something else.
    """
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        return loss
    found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else f"a {type(loss).__name__}"
    raise PipelineError(
        f"the loss of a micro-batch is {found}; the PipelineModule's loss_fn (or its last layer, without one) must "
        "return one number, a scalar tensor"
    )
