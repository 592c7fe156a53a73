"""What a call of an engine is checked for, before and while the model runs."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from deepspeedlite.comm import Group
from deepspeedlite.comm.desync import explained, whereabouts
from deepspeedlite.comm.registry import registry
from deepspeedlite.comm.roll_call import PATIENCE_S
from deepspeedlite.inference.config import DeepSpeedInferenceConfig
from deepspeedlite.runtime.device import Device
from deepspeedlite.runtime.errors import DistributedError, InferenceError
from deepspeedlite.runtime.tensors import tensors_in

_T = TypeVar("_T")
_MOST_S = 60.0  # of looking where the others are, before they are waited for as in any collective
_LOOK_S = 0.02  # at most between two looks at a collective
_SPIN_S = 0.002  # for which the processor is only offered to others
_GIVEN = "what the ranks were given"
_LOOK_EVERY = 64  # forward passes between looks at a device's flag


def prompt_tokens(inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The length of the longest prompt; 0 where there is none, or it is no tensor of tokens."""
    given = kwargs.get("input_ids", kwargs.get("inputs", inputs[0] if inputs else None))
    if isinstance(given, torch.Tensor) and given.dim() == 2 and not given.is_floating_point():
        return given.shape[1]
    embedded = kwargs.get("inputs_embeds")
    return embedded.shape[1] if isinstance(embedded, torch.Tensor) and embedded.dim() == 3 else 0


def check_prompt(
    module: torch.nn.Module, config: DeepSpeedInferenceConfig, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raise where there is no room for a prompt and what is to follow.

    Raises:
        InferenceError: the prompt has more than `max_out_tokens` tokens, or leaves no room for `min_out_tokens`.
    """
    tokens = prompt_tokens(inputs, kwargs)
    least = 0 if getattr(getattr(module, "config", None), "is_encoder_decoder", False) else config.min_out_tokens
    most = config.max_out_tokens
    if tokens > most or (tokens and tokens + least > most and least > 1):
        raise InferenceError(
            f"a prompt of {tokens} tokens{f' and {least} to follow (min_out_tokens)' if least > 1 else ''} is more "
            f"than max_out_tokens = {most}; give a larger max_out_tokens to init_inference, or a shorter prompt"
        )


def together(group: Group, model: torch.nn.Module, make: Callable[[], _T]) -> _T:
    """Do something with a model on every rank of a group, or fail on all of them.

    Raises:
        InferenceError: the ranks' models are not alike, or it failed on another rank.
    """
    if group.size == 1:
        return make()
    shapes = zlib.crc32(repr([(name, tuple(param.shape)) for name, param in model.named_parameters()]).encode())
    models = group.all_gather_objects((shapes, type(model).__name__))
    others = [rank for rank, one in enumerate(models) if one != models[0]]
    if others:
        raise InferenceError(
            f"the ranks of one model have different ones: rank {group.ranks[0]} a {models[0][1]}, and rank "
            f"{group.ranks[others[0]]} a {models[others[0]][1]}, or one with other shapes; give every rank the same"
        )
    return on_all(group, make)


def on_all(group: Group, make: Callable[[], _T]) -> _T:
    """Do something on every rank of a group, or fail on all of them.

    Raises:
        InferenceError: it failed on another rank.
    """
    made: list[_T] = []
    failed: Exception | None = None
    try:
        made.append(make())
    except Exception as error:
        failed = error
    told = group.all_gather_objects("" if failed is None else f"{type(failed).__name__}: {failed}")
    if failed is not None:
        raise failed
    if any(told):
        rank = next(rank for rank, problem in enumerate(told) if problem)
        raise InferenceError(f"no inference engine, as rank {group.ranks[rank]} failed: {told[rank]}")
    return made[0]


def meet(group: Group, call: str) -> None:
    """Return when every rank of a split model has made this call, or none of them can be shown never to.

    Raises:
        DistributedError: another rank waits for this one elsewhere, or has ended.
    """
    if group.size == 1 or _has_strangers(group) or not group.roll_call(call, call):
        return
    late_at = time.monotonic() + _MOST_S
    with whereabouts(f"waits in {call}"):
        while time.monotonic() < late_at and group.roll_call(call, call):
            if refused := _left_alone(group, call, f"waits in {call}"):
                raise DistributedError(refused)


def _meet_in(group: Group, work: Any, what: str, call: str) -> None:
    """Return when a collective has ended; it is looked at often at first, and then seldom.

    Raises:
        DistributedError: another rank waits elsewhere, or has ended.
    """
    refused, start_s = None, time.monotonic()
    with explained(what, group.ranks):
        while refused is None and not work.is_completed():
            waited_s = time.monotonic() - start_s
            time.sleep(min(waited_s / 10, _LOOK_S) if waited_s > _SPIN_S else 0)
            if waited_s > PATIENCE_S and not _has_strangers(group):
                refused = _left_alone(group, call, f"waits in {what}")
        if refused is None:
            work.wait()
    if refused is not None:
        raise DistributedError(f"{refused}. The ranks are out of step now: this engine cannot be used any more")


def _has_strangers(group: Group) -> bool:
    """Whether there are other ranks than the model's: one of it may well wait for one that is not in it."""
    return group.size < Group().size


def _left_alone(group: Group, call: str, here: str) -> str | None:
    """What is wrong, if a rank of the model is known to have ended, or to wait elsewhere than `here`."""
    for rank in group.ranks:
        where = registry.seen(rank) if rank != group.ranks[group.rank] else ""
        elsewhere = where.startswith("waits in ") and not where.startswith(("waits in no ", "waits in its "))
        if where == "has ended" or (elsewhere and where != here):
            return (
                f"{call} was called on rank {group.ranks[group.rank]} of a model that is split over ranks "
                f"{group.ranks}, and rank {rank} {where}: call it on all of them, with the same inputs (other "
                "ranks than the first may ignore what it returns)"
            )
    return None


def check_same_inputs(group: Group, call: str, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise on every rank of a split model where they were given different tensors.

    It is one message, as a forward pass may be a single token's; so a rank that was left alone in it cannot take back
    what it has sent.

    Raises:
        DistributedError: names the ranks that have other ones than the first; or another rank waits for this one
            elsewhere, and the ranks are out of step from then on.
    """
    if group.size == 1:
        return
    tensors = list(tensors_in((inputs, kwargs)))
    mine = zlib.crc32(repr([(tuple(one.shape), str(one.dtype)) for one in tensors]).encode())
    for one in tensors:
        if not one.is_floating_point() and one.numel() <= 1 << 20:
            mine = zlib.crc32(one.detach().cpu().contiguous().numpy().tobytes(), mine)
    both = torch.tensor([mine, -mine], dtype=torch.int64, device=group.device)
    _meet_in(group, group.transport.all_reduce(both, "max", False, _GIVEN), f"all_reduce of {_GIVEN}", call)
    if both[0] == -both[1]:
        return
    told = group.all_gather_objects((mine, str([tuple(one.shape) for one in tensors])))
    others = [(group.ranks[rank], shapes) for rank, (sum_, shapes) in enumerate(told) if sum_ != told[0][0]]
    listed = ", ".join(f"rank {rank} {shapes}" for rank, shapes in others[:8])
    raise DistributedError(
        f"the ranks of a split model were given different inputs: rank {group.ranks[0]} {told[0][1]}, others than its "
        f"are {listed}; give every rank the same (broadcast them from one), or set tp_size to 1 for independent ranks"
    )


def follow_first_rank(group: Group, device: Device) -> None:
    """Give every rank of a split model the random numbers of the first, so that what they sample is one text."""
    if group.size == 1:
        return
    states = group.broadcast_object([torch.get_rng_state(), device.get_rng_state()])
    torch.set_rng_state(states[0])
    device.set_rng_state(states[1])


@contextmanager
def finite_logits(module: torch.nn.Module) -> Iterator[Callable[[], None]]:
    """Watch the logits of a module's forward passes; what it gives raises where some were not finite.

    A minus infinity is fine, as a model may exclude tokens so. On a GPU the flag is looked at now and then, since
    every look waits for the device.

    Raises:
        InferenceError: there is a NaN, or an infinity, from the pass that is named on.
    """
    seen: list[Any] = [0, None]  # passes, and the flag since the last look

    def look() -> None:
        if seen[1] is not None and not bool(seen[1]):
            raise InferenceError(
                f"the model's logits hold NaN or infinity (pass {seen[0]} of this call): its weights do, or overflow "
                "in this dtype; try bf16 or fp32, and look at the weights with torch.isfinite"
            )
        seen[1] = None

    def watch(_: Any, __: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
            return
        seen[0] += 1
        # The last token's are what is chosen from. A sum of squares or of values would overflow; a maximum keeps NaN.
        fine = torch.isfinite(logits[..., -1, :].max()) if logits.dim() > 1 else torch.isfinite(logits.max())
        seen[1] = fine if seen[1] is None else seen[1] & fine
        if logits.device.type == "cpu" or seen[0] % _LOOK_EVERY == 0:
            look()

    hook = module.register_forward_hook(watch)
    try:
        yield look
    finally:
        hook.remove()
