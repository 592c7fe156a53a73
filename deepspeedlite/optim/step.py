"""The step: apply an ordinary torch optimizer to the flat fp32 runs behind the model's parameters.

The optimizer that the user gave (or named) is kept, and its param groups are kept, dict by dict, so that schedulers
and lr changes go on working; only the tensors in them are replaced by runs: one 1-D tensor per (unit, group), which
masters.py makes.

A step is one loop over sub-groups of runs: give them their gradients in fp32 with loss scale and clipping taken out,
let the optimizer update them, write the model's copy. Whatever must be fetched or flushed around a sub-group (masters
on another tier, parameters on other ranks) has its place in that loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from deepspeedlite.ops.one_pass import FusedOptimizer, OnePassOptimizer
from deepspeedlite.ops.whole_tensors import WholeTensors
from deepspeedlite.optim.masters import MasterMaker, SteppedRun
from deepspeedlite.optim.norms import StepNorm
from deepspeedlite.optim.precision import LossScaler
from deepspeedlite.optim.settings import StepSettings
from deepspeedlite.optim.skipped import SkippedSteps
from deepspeedlite.runtime.device import on_accelerator
from deepspeedlite.runtime.errors import EngineStateError, OptimizerError, UnsupportedError
from deepspeedlite.runtime.log import log_once
from deepspeedlite.runtime.plugins import plugins
from deepspeedlite.zero.clearing import ClearsUnseen
from deepspeedlite.zero.grad_reducer import GradReducer
from deepspeedlite.zero.missing import as_plain
from deepspeedlite.zero.unit import ShardUnit, unit_of
from deepspeedlite.zero.wrap import NamedParameter, reverse_buckets

# Gradients taken to fp32 at a time, 16 MiB of them: more would only make the step's peak higher.
CONVERTED_NUMEL = 1 << 22


class ShardedOptimizer(torch.optim.Optimizer):
    """What `initialize` returns as the optimizer.

    It is a `torch.optim.Optimizer` to schedulers and type checks, and leaves groups, state and defaults to the wrapped
    `optimizer`; `torch.optim.Optimizer.__init__` is not called, since there is nothing of its own to keep.

    Args:
        optimizer: one that `preflight.elementwise` passes, whose params the units of `reducer` hold.
        reducer: the units and the state of their gradients.
        scaler: the loss scale in force.
        settings: clipping, overflow check, sub-group size.
        module: the model.
        named: the parameters of the optimizer's groups.

    Raises:
        OptimizerError: it has state already, and parameters of one run differ in it (in their step counts, say).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        reducer: GradReducer,
        scaler: LossScaler,
        settings: StepSettings,
        module: torch.nn.Module,
        named: Sequence[NamedParameter],
    ) -> None:
        self.optimizer = optimizer
        self.loss_scaler = scaler
        self._reducer, self._settings, self._offload, self._module = reducer, settings, settings.offload, module
        self._norm = StepNorm(reducer, scaler, settings.gradient_clipping, settings.check_overflow)
        self._skipped = SkippedSteps(scaler)
        self._masters = MasterMaker(optimizer, settings.offload, settings.low_precision_masters)
        self.overflow = False  # whether the last step was skipped
        self.stepped_alone = False  # since the last backward pass, by `step`
        self.broken = ""  # why the states are not those of any step; loading a checkpoint mends it
        # Of the wrapped optimizer's groups, but frozen so far. See `train_thawed`.
        self.dormant = [entry for entry in named if not entry.param.requires_grad]
        at = {id(param): position for group in self.param_groups for position, param in enumerate(group["params"])}
        # Of parameters, by name, in the groups that the optimizer was given: a checkpoint names states by them.
        self.positions = {entry.name: at[id(entry.param)] for entry in named}
        self._runs: list[SteppedRun] = []
        self._runs_of_units: list[list[SteppedRun]] = []  # the same, in the order of the reducer's units
        for group in optimizer.param_groups:
            group["params"] = []  # the units' runs take their places
        self._step_also(reducer.units)
        ClearsUnseen(optimizer, reducer)

    # --- construction ---------------------------------------------------------------------------------------------

    def _step_also(self, units: Sequence[ShardUnit]) -> None:
        """Give the wrapped optimizer the units' runs, in their groups."""
        for unit in units:
            runs = self._masters.adopt(unit)
            unit.be_stepped_by(self, [run.master for run in runs], [run.store for run in runs])
            self._runs_of_units.append(runs)
            self._runs += runs
        self._sub_groups = self._cut_sub_groups()
        tell = plugins.find("segments", getattr(self.optimizer, "segments_told_as", ""))
        if tell is not None:  # the optimizer must know where each parameter lies in the runs
            tell(self.optimizer, self._reducer, [len(runs) for runs in self._sub_groups])

    def _cut_sub_groups(self) -> list[list[SteppedRun]]:
        """Runs to step together, cut by sizes that are the same on every rank, so that all take equally many steps."""
        sub_groups: list[list[SteppedRun]] = []
        room = 0
        most, units = self._settings.sub_group_numel, self._reducer.units
        # Kernels on GPUs read 16-bit gradients as they are, and the fewer launches the better.
        as_they_are = isinstance(self.optimizer, FusedOptimizer) and all(on_accelerator(u.flat.device) for u in units)
        as_they_are |= self._settings.low_precision_masters
        if not as_they_are and any(u.grads.dtype.itemsize < 4 for u in units):
            most = min(most, CONVERTED_NUMEL)
        tile = self._offload.run_numel
        for unit, runs in zip(units, self._runs_of_units):
            pieces = [(unit.layout.shard_numel, runs)]
            if tile is not None:
                most = min(most, tile)
                pieces = [(cut.numel, [run]) for (cut, _, _), run in zip(unit.runs(), runs)]
            for numel, piece in pieces:
                if not sub_groups or numel > room:
                    sub_groups.append([])
                    room = most
                sub_groups[-1] += piece
                room -= numel
        return sub_groups

    # --- the step -------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step in place of `engine.step()`, whatever the accumulation; the engine's counts and schedule stay.

        A closure is for optimizers that evaluate the loss several times in a step, such as L-BFGS, where nothing is
        sharded: it runs a forward pass and `engine.backward`, and returns the loss. What `step` returns, and what the
        optimizer decides by, is the ranks' average of it. Collective.

        Beside `engine.step()` it is a mistake: after it, it finds no gradients and does nothing, which is said once;
        before it, `engine.step()` raises.

        Raises:
            EngineStateError: there was no backward pass at all.
            UnsupportedError: there is a closure, and the optimizer is one of those that need no other gradients in a
                step, or fp16's loss scale may skip it.
        """
        if closure is not None:
            return self._step_by(closure)
        if self._reducer.has_grads:
            self.take_step()
            self.stepped_alone = True
        elif self._norm.has_stepped:
            said = "optimizer.step() does nothing after engine.step(), which has taken the step: leave it out"
            log_once(said, logging.WARNING)
        else:
            raise EngineStateError("optimizer.step(): no backward pass has brought gradients; call engine.backward")
        return None

    @torch.no_grad()
    def _step_by(self, closure: Callable[[], Any]) -> Any:
        """A step whose gradients, as often as the optimizer asks for them, come from a closure."""
        if not isinstance(self.optimizer, WholeTensors) or self.loss_scaler.dynamic:
            raise UnsupportedError(
                "step(closure) is for optimizers that evaluate the loss in a step, such as L-BFGS, at stage 0 and "
                "without a dynamic loss scale; call engine.backward, and engine.step without a closure"
            )
        group = self._reducer.group

        def evaluate() -> torch.Tensor:
            self._store_values(self._runs)
            self._reducer.forget()
            with torch.enable_grad():
                loss = torch.as_tensor(closure()).detach().clone()
            self._reducer.finish()
            self._norm.begin_step()
            self._load_grads(self._runs, 1.0 / self.loss_scaler.scale * self._norm.clip_factor())
            group.all_reduce(loss)
            return loss / group.size

        loss = self.optimizer.step(evaluate)
        self._store_values(self._runs)
        self._reducer.clear()
        self.stepped_alone = True
        return loss

    @torch.no_grad()
    def take_step(self) -> None:
        """Update the parameters from the averaged gradients; skip and set `overflow` if they are not finite.

        Raises:
            LossScaleError: fp16 overflow at the smallest loss scale, naming the parameters that overflowed.
        """
        self._reducer.finish()
        for unit in self._reducer.units:
            unit.flat.verify_attached()
            unit.flat.wait_for_readers()
        if self._settings.every_gradient_must_come:
            self._check_all_came()
        guilty = self._norm.begin_step()
        self.overflow = bool(guilty)
        if guilty:
            self._reducer.clear()
            self._skipped.account(guilty)
            return
        factor = 1.0 / self.loss_scaler.scale * self._norm.clip_factor()
        frozen = self._frozen_parts()
        stores = [[run.store for run in runs] for runs in self._sub_groups]
        try:
            self._offload.pipeline.run(stores, lambda index: self._update(self._sub_groups[index], factor, frozen))
        except BaseException as error:
            self.broken = f"a step ended half-way, and the model is that of no step ({error})"
            raise
        self._offload.tell_wear(self._reducer.group.size * self._reducer.replica.group.size)
        self._reducer.share_values(self._settings.share_numel)
        self.loss_scaler.update(overflow=False)
        self._reducer.clear()

    def _update(self, sub_group: list[SteppedRun], factor: float, frozen: dict[torch.Tensor, list[slice]]) -> None:
        """Step runs that are in memory, with their gradients times `factor`."""
        if isinstance(self.optimizer, OnePassOptimizer) and not frozen and not self.optimizer.has_step_hooks:
            self.optimizer.hand_over([run.in_one_pass() for run in sub_group], factor)
            self.optimizer.step()
            for run in sub_group:
                run.send()
            return
        self._load_grads(sub_group, factor)
        kept = self._copy_parts(frozen, sub_group) if frozen else []
        self.optimizer.step()
        for part, copy in kept:
            part.copy_(copy)
        self._store_values(sub_group)

    def _check_all_came(self) -> None:
        missing = [name for unit in self._reducer.units for name in unit.unreached()]
        if missing:
            raise EngineStateError(
                f"zero_optimization.ignore_unused_parameters is false, and no gradient reached {', '.join(missing[:8])}"
                f"{' ...' if len(missing) > 8 else ''}; use them in the loss, freeze them before initialize, or set "
                "the key to true"
            )

    # [Note: parameters frozen for a while]
    # An optimizer updates a run as one tensor. The parts of it whose parameter does not require grad at the moment are
    # put back afterwards, with their elements of the state: what torch gets by passing them over. Only the step count,
    # which a run has once, goes on.
    def _frozen_parts(self) -> dict[torch.Tensor, list[slice]]:
        """Per master, where the parameters lie that were trained and are frozen now."""
        found: dict[torch.Tensor, list[slice]] = {}
        for unit, runs in zip(self._reducer.units, self._runs_of_units):
            with as_plain():
                frozen = {slot.name for slot, param in unit.flat.slots if not param.requires_grad}
            if frozen:
                for cut, run in zip(unit.layout.runs(unit.flat.index), runs):
                    segments = [s for s in unit.layout.segments(cut) if s.slot.name in frozen]
                    found[run.master] = [slice(segment.start, segment.stop) for segment in segments]
        return found

    def _copy_parts(
        self, parts: dict[torch.Tensor, list[slice]], sub_group: list[SteppedRun]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Views of masters and their state at `parts`, each with a copy of what it holds."""
        views = [
            whole[part]
            for master, *_ in sub_group
            for whole in (master, *self.optimizer.state.get(master, {}).values())
            if isinstance(whole, torch.Tensor) and whole.shape == master.shape
            for part in parts.get(master, ())
        ]
        return [(view, view.clone()) for view in views]

    @staticmethod
    def _load_grads(sub_group: list[SteppedRun], factor: float) -> None:
        for master, _, grads, *_ in sub_group:
            master.grad = grads.to(master.device, master.dtype)  # the gradients themselves where the dtypes agree
            if factor != 1.0:
                master.grad.mul_(factor)

    @staticmethod
    def _store_values(sub_group: list[SteppedRun]) -> None:
        for run in sub_group:
            run.master.grad = None
            run.send(updated=False)

    @torch.no_grad()
    def refresh(self, unit: ShardUnit) -> None:
        """A unit's values were written from outside: take the masters from them."""
        for master, values, _, store, _ in self._runs_of_units[self._reducer.units.index(unit)]:
            if master is not values:
                with store.opened(write=True):
                    master.copy_(values)

    # --- norms ----------------------------------------------------------------------------------------------------

    @property
    def needs_norm(self) -> bool:
        """Whether the step asks for the gradients' norm."""
        return self._norm.is_needed

    def grad_norm(self) -> float | None:
        """The 2-norm of the last step's averaged gradients, before clipping; None before the first step.

        Where neither clipping nor an overflow check needed it during the step, it is computed when asked for, which is
        possible until the next backward pass overwrites the gradients; afterwards None.
        """
        return self._norm.last()

    # --- what users and clients of an optimizer touch ----------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's groups; their `params` are runs."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The wrapped optimizer's state, per run."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's defaults."""
        return self.optimizer.defaults

    @property
    def loss_scale(self) -> float:
        """The factor on the loss now in force; 1 where gradients are not scaled."""
        return self.loss_scaler.scale

    cur_scale = loss_scale

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients accumulated so far."""
        self._reducer.forget()

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters from now on: new ones, or ones that were frozen until now.

        They get flat buffers of their own. At stage 3 their values stay whole on every rank; masters, gradients and
        optimizer states are sharded as the stage says. Collective.

        Raises:
            EngineStateError: gradients have been accumulated and not stepped yet.
            OptimizerError: a parameter is trained already, or does not require grad.
        """
        if self._reducer.has_grads:
            raise EngineStateError("add_param_group in the middle of a batch; call it after a step")
        params = param_group["params"]
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        index = len(self.optimizer.param_groups)
        entries = []
        names = {id(param): name for name, param in self._module.named_parameters()}  # the present ones
        for number, param in enumerate(params):
            name = names.get(id(param), "")
            if not name or name in self.positions:  # another parameter had this name before
                name = f"optimizer.param_groups[{index}].params[{number}]"
            if unit_of(param) is not None or not param.requires_grad:
                why = "does not require grad" if unit_of(param) is None else "is trained already"
                raise OptimizerError(f"add_param_group: parameter {names.get(id(param), name)} {why}")
            entries.append(NamedParameter(name, param, index))
        self.positions.update({entry.name: position for position, entry in enumerate(entries)})
        self.optimizer.add_param_group({**param_group, "params": params})
        units = self._reducer.add_units(reverse_buckets(entries, None))
        self.optimizer.param_groups[-1]["params"] = []
        self._step_also(units)

    def mend(self) -> None:
        """All states have come from a checkpoint."""
        self.broken = ""

    def note_backward(self) -> None:
        """A backward pass begins: a step that comes after it is a new one."""
        self.stepped_alone = False

    @torch.no_grad()
    def train_thawed(self) -> None:
        """Train parameters of the groups that were frozen in `initialize` and require grad now.

        As after `add_param_group`, but in their own groups. In the middle of a batch they wait for the next one.
        Collective where there are any.
        """
        thawed = [entry for entry in self.dormant if entry.param.requires_grad]
        if thawed and not self._reducer.has_grads:
            self.dormant = [entry for entry in self.dormant if not entry.param.requires_grad]
            self._step_also(self._reducer.add_units(reverse_buckets(thawed, None)))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # torch would make half of one, and patch this class's step on the way.
        raise OptimizerError("an engine's optimizer cannot be copied or pickled; copy its state_dict()")

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state (per run) and the loss scale's."""
        self._refuse_on_disk("state_dict")
        return {"optimizer": self.optimizer.state_dict(), "loss_scaler": self.loss_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict` of the same model, world size and configuration."""
        self._refuse_on_disk("load_state_dict")
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.loss_scaler.load_state_dict(state_dict["loss_scaler"])

    def _refuse_on_disk(self, what: str) -> None:
        if self._offload.states_on_disk:
            raise UnsupportedError(
                f"optimizer.{what} would bring to memory all that is offloaded to the disk; use engine.save_checkpoint "
                "and engine.load_checkpoint"
            )

    def __repr__(self) -> str:
        return f"ShardedOptimizer({self.optimizer!r})"
