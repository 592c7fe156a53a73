"""Weights into a model, without a detour: each rank reads what it keeps, straight into the memory where it stays.

Names are the model's own, or those of a model around it or inside it (`transformer.h.0` for `h.0`). What the model has
and the files lack, what the files have and the model lacks, and what has another shape is told, all of it.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any, NamedTuple

import torch

from deepspeedlite.checkpoint.foreign import Formats
from deepspeedlite.host.text import size_text
from deepspeedlite.inference.weight_files import Stored, Weights, open_weights
from deepspeedlite.parallel.tensor.pieces import Piece
from deepspeedlite.runtime.errors import CheckpointError, InferenceError
from deepspeedlite.runtime.log import current_rank, log_dist, logger

_MOST_NAMED = 40
_LINE_EVERY_S = 5.0
# What older files have beside weights: masks, and frequencies of positions.
_COMPUTED = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias")
# What older files call something else: (in the file, in the model).
_OLDER = (
    (re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"),
    (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"),
    (re.compile(r"^embed_out\."), "lm_head."),
)


class Place(NamedTuple):
    """A tensor of the model that is to be loaded, under its first name; tied ones have more."""

    name: str
    tensor: torch.Tensor
    names: list[str]
    stored: str  # its name in the files


def load_weights(
    model: torch.nn.Module,
    weights: Weights,
    *,
    dtype_of: Callable[[str, torch.Tensor], torch.dtype],
    device: torch.device | None,
    pieces: Mapping[str, Piece],
) -> None:
    """Fill a model's parameters and persistent buffers, those on the meta device too, which get memory for it.

    Args:
        model: whole, or split, which `pieces` then tells.
        weights: see `open_weights`.
        dtype_of: the dtype to keep a tensor in, by its name and what it is in the model.
        device: where tensors of the meta device come to; None: the CPU.
        pieces: by name, the part of a tensor that this rank keeps.

    Raises:
        CheckpointError: tensors are missing or have other shapes, all named; nothing has changed then.
    """
    places = plan_loading(model, weights.tensors, pieces)
    total = sum(_nbytes(place, dtype_of) for place in places)
    slots = _slots_of(model)
    for place in _told(places, total, dtype_of):
        piece = pieces.get(place.name)
        dtype = dtype_of(place.name, place.tensor)
        if place.tensor.is_meta or place.tensor.dtype != dtype:
            home = place.tensor.device if not place.tensor.is_meta else device or torch.device("cpu")
            values = torch.empty(place.tensor.shape, dtype=dtype, device=home)
            weights.read(place.stored, piece, values)
            _put(slots[id(place.tensor)], place.tensor, values)
        else:
            weights.read(place.stored, piece, place.tensor.detach())


def plan_loading(model: torch.nn.Module, stored: Mapping[str, Stored], pieces: Mapping[str, Piece]) -> list[Place]:
    """Which tensor of the files goes where.

    Raises:
        CheckpointError: tensors are missing or have other shapes, all named.
    """
    wanted = _wanted(model)
    renamed = _renamed(model, stored, {name for _, names in wanted.values() for name in names})
    places: list[Place] = []
    missing: list[str] = []
    misshapen: list[str] = []
    used: set[str] = set()
    for tensor, names in wanted.values():
        found = next((name for name in names if name in renamed), None)
        used.update(renamed[name] for name in names if name in renamed)
        if found is None:
            missing.append(names[0])
            continue
        piece = next((pieces[name] for name in names if name in pieces), None)
        shape, there = tuple(tensor.shape) if piece is None else piece.shape, stored[renamed[found]].shape
        if shape != there:
            misshapen.append(f"{found} is {there} in the files and {shape} in the model")
        first = next((name for name in names if name in pieces), names[0])
        places.append(Place(first, tensor, names, renamed[found]))
    surplus = [name for name in stored if name not in used and not _is_ignored(model, name)]
    problems = [
        *_listed(missing, "missing"),
        *_listed(misshapen, "of another shape"),
        *(_listed(surplus, "in the files alone") if missing or misshapen else []),
    ]
    if problems:
        raise CheckpointError(f"the checkpoint does not fit {type(model).__name__}: " + "; ".join(problems))
    for line in _listed(surplus, "in the files alone, and are left out"):
        logger.warning(f"loading {type(model).__name__}: {line}")
    return places


def _wanted(model: torch.nn.Module) -> dict[int, tuple[torch.Tensor, list[str]]]:
    """Parameters and persistent buffers with all of their names."""
    wanted: dict[int, tuple[torch.Tensor, list[str]]] = {}
    for path, part in model.named_modules(remove_duplicate=False):
        for key, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None and key not in part._non_persistent_buffers_set:
                wanted.setdefault(id(tensor), (tensor, []))[1].append(f"{path}.{key}" if path else key)
    return wanted


def _renamed(model: torch.nn.Module, stored: Iterable[str], names: set[str]) -> dict[str, str]:
    """By the model's name for a tensor, the files'."""
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    found: dict[str, str] = {}
    for there in stored:
        older = there
        for pattern, now in _OLDER:
            older = pattern.sub(now, older)
        ways = [there, older, older.removeprefix("module."), older.removeprefix("model.")]
        ways += [f"{prefix}.{older}", older.removeprefix(f"{prefix}.")] if prefix else []
        name = next((way for way in ways if way in names), None)
        if name is not None:
            found.setdefault(name, there)
    return found


def _is_ignored(model: torch.nn.Module, name: str) -> bool:
    """Whether a tensor that the model lacks is one that it computes itself, or says that it does without."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    own = {key for part in model.modules() for key in part._non_persistent_buffers_set}
    if any(re.search(pattern, name) for pattern in patterns) or name.rpartition(".")[2] in own:
        return True
    return name.endswith(_COMPUTED)


def _listed(names: list[str], what: str) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    are = "tensor is" if len(names) == 1 else "tensors are"
    return [f"{len(names)} {are} {what}: {', '.join(names[:_MOST_NAMED])}{more}"]


# --- memory -----------------------------------------------------------------------------------------------------------


def _nbytes(place: Place, dtype_of: Callable[[str, torch.Tensor], torch.dtype]) -> int:
    return place.tensor.numel() * dtype_of(place.name, place.tensor).itemsize


def _slots_of(model: torch.nn.Module) -> dict[int, list[tuple[dict[str, Any], str]]]:
    """Where each tensor is held."""
    slots: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for part in model.modules():
        for holder in (part._parameters, part._buffers):
            for key, tensor in holder.items():
                if tensor is not None:
                    slots.setdefault(id(tensor), []).append((holder, key))
    return slots


def _put(slots: list[tuple[dict[str, Any], str]], tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Put values in a tensor's place: a parameter stays the object that it is, unless it has no memory."""
    if isinstance(tensor, torch.nn.Parameter) and not tensor.is_meta:
        tensor.data = values
        return
    made: torch.Tensor = values
    if isinstance(tensor, torch.nn.Parameter):
        made = torch.nn.Parameter(values, requires_grad=tensor.requires_grad and values.is_floating_point())
        made.__dict__.update(tensor.__dict__)
    for holder, key in slots:
        holder[key] = made


def fill_computed(model: torch.nn.Module, device: torch.device | None) -> None:
    """Give values to buffers that no file has, such as the frequencies of positions, by the model's own means.

    Raises:
        InferenceError: names those that there is no way for.
    """
    left: list[str] = []
    for path, part in model.named_modules():
        empty = [key for key, buffer in part._buffers.items() if buffer is not None and buffer.is_meta]
        if not empty:
            continue
        for key in empty:
            old: Any = part._buffers[key]
            fresh = torch.full(old.shape, math.nan if old.is_floating_point() else -1, dtype=old.dtype)
            part._buffers[key] = fresh.to(device or "cpu")
        own: Any = getattr(model, "_init_weights", None) or getattr(part, "reset_buffers", None)
        if own is not None:
            with torch.no_grad():
                _call_own(own, part)
        left += [f"{path}.{key}".lstrip(".") for key in empty if _is_unfilled(part._buffers[key])]
    if left:
        raise InferenceError(
            f"{len(left)} buffers of the model have no values, and are in no checkpoint: {', '.join(left[:10])}; build "
            "the model with its buffers (only parameters on the meta device)"
        )


def _call_own(own: Callable[..., Any], part: torch.nn.Module) -> None:
    """Call transformers' `_init_weights`, which makes such buffers anew; parameters keep what they have."""
    before = {key: param for key, param in part._parameters.items() if param is not None}
    empty = {key: torch.nn.Parameter(torch.empty_like(param, device="meta"), False) for key, param in before.items()}
    part._parameters.update(empty)
    try:
        own(part)
    except (AttributeError, TypeError):
        pass  # it wanted the parameters: the buffers are then found to be without values
    finally:
        part._parameters.update(before)


def _is_unfilled(buffer: torch.Tensor | None) -> bool:
    if buffer is None or not buffer.numel():
        return False
    return bool(buffer.isnan().any()) if buffer.is_floating_point() else bool((buffer == -1).all())


# --- telling ----------------------------------------------------------------------------------------------------------


def _told(places: list[Place], total: int, dtype_of: Callable[[str, torch.Tensor], torch.dtype]) -> Iterator[Place]:
    """The places, with a progress bar on rank 0's terminal, or a line now and then where there is none."""
    begun = said = time.monotonic()
    done = 0
    is_bar = sys.stderr.isatty() and current_rank() == 0
    for place in places:
        yield place
        done += _nbytes(place, dtype_of)
        now = time.monotonic()
        if is_bar and (now - said > 0.1 or place is places[-1]):
            width = 30 * done // (total or 1)
            sys.stderr.write(f"\rloading [{'#' * width}{'.' * (30 - width)}] {size_text(done)} of {size_text(total)} ")
            sys.stderr.flush()
            said = now
        elif not is_bar and now - said > _LINE_EVERY_S:
            log_dist(f"loading: {size_text(done)} of {size_text(total)}")
            said = now
    if is_bar and places:
        sys.stderr.write("\n")
    took = time.monotonic() - begun
    log_dist(f"loaded {size_text(total)} in {took:.1f} s")


class LayerReader:
    """Gives a model on the meta device its values, a module at a time and whole: for what is made of them at once.

    Args:
        model: its names count, and what it is made of now; it is in its dtypes.
        checkpoint: see `open_weights`, as are `base_dir` and `formats`.
        device: where `fill` puts values; None: the CPU.

    Raises:
        CheckpointError: tensors are missing or have other shapes, all named.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        checkpoint: Any,
        base_dir: str,
        formats: Formats,
        *,
        device: torch.device | None = None,
    ) -> None:
        self._weights, self._device = open_weights(checkpoint, base_dir, formats), device
        try:
            places = plan_loading(model, self._weights.tensors, {})
        except BaseException:
            self.close()
            raise
        self._by_name = {name: place for place in places for name in place.names}
        self._by_tensor = {id(place.tensor): place for place in places}  # which `places` keep alive
        self._slots = _slots_of(model)

    def __call__(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The tensors with these names, on the CPU."""
        return {name: self._values(self._by_name[name]) for name in names}

    def fill(self, module: torch.nn.Module, buffers_alone: bool = False) -> None:
        """Give what a part of the model has on the meta device its values. A tied tensor gets them everywhere."""
        for part in module.modules():
            for tensor in [*(() if buffers_alone else part._parameters.values()), *part._buffers.values()]:
                if tensor is not None and tensor.is_meta and (place := self._by_tensor.get(id(tensor))) is not None:
                    values = self._values(place).to(self._device or "cpu")
                    _put(self._slots[id(tensor)], tensor, values)

    def _values(self, place: Place) -> torch.Tensor:
        values = torch.empty(place.tensor.shape, dtype=place.tensor.dtype)
        self._weights.read(place.stored, None, values)
        return values

    def close(self) -> None:
        """Close the files."""
        self._weights.close()


def load_checkpoint(
    model: torch.nn.Module,
    checkpoint: Any,
    base_dir: str,
    formats: Formats,
    *,
    dtype_of: Callable[[str, torch.Tensor], torch.dtype],
    device: torch.device | None,
    pieces: Mapping[str, Piece],
) -> None:
    """Open a checkpoint, load it, and fill what no checkpoint has; see `load_weights` and `open_weights`."""
    with closing(open_weights(checkpoint, base_dir, formats)) as weights:
        load_weights(model, weights, dtype_of=dtype_of, device=device, pieces=pieces)
    fill_computed(model, device)
