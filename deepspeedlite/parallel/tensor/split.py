"""A model split over a group of ranks, in place: layers replaced by parallel ones, attention told of its own heads.

Works on a model with values, of which each rank keeps its part, and on one on the meta device, whose parts are then
loaded: what is returned says which part of which tensor that is.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch

from deepspeedlite.comm import Group
from deepspeedlite.parallel.tensor.experts import sum_outputs
from deepspeedlite.parallel.tensor.heads import Heads, heads_of, role_ranges, shrink
from deepspeedlite.parallel.tensor.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from deepspeedlite.parallel.tensor.pieces import Piece, Range, balanced, own_range
from deepspeedlite.parallel.tensor.plan import (
    COLUMNS,
    EXPERTS,
    GATHERED,
    SLICED,
    Rule,
    is_transposed,
    plan_of,
    role_of,
    widths,
)
from deepspeedlite.runtime.errors import InferenceError
from deepspeedlite.runtime.log import log_dist

Say = Callable[[str], None]
_EXPERTS_STEP = 8


def split_model(model: torch.nn.Module, group: Group, policy: Any = None, say: Say = log_dist) -> dict[str, Piece]:
    """Split a model in place.

    Args:
        model: on any device, the same on every rank.
        group: the ranks to split it over; on one rank nothing happens.
        policy: {class of a block: names in it of the layers whose outputs are summed}, or None.
        say: is told a line for each pattern of names.

    Returns:
        by the name of each tensor that is split, which part of it this rank has.

    Raises:
        InferenceError: names what cannot be split. The model is as it was, unless attention found out on the way.
    """
    if group.size == 1:
        return {}
    splitter = _Splitter(model, group, plan_of(model, policy))
    splitter.check()
    splitter.split_layers()
    splitter.split_vocabulary()
    for line in splitter.lines():
        say(f"tensor parallelism: {line}")
    return splitter.pieces


class _Splitter:
    """One model, while it is split."""

    def __init__(self, model: torch.nn.Module, group: Group, plan: dict[str, Rule]) -> None:
        self.model, self.group, self.plan = model, group, plan
        self.pieces: dict[str, Piece] = {}
        names = Counter(id(param) for _, param in model.named_parameters(remove_duplicate=False))
        self._tied = {one for one, count in names.items() if count > 1}
        # Of what has several names, the whole (so that its id stays its own) and the part.
        self._parts: dict[int, tuple[torch.Tensor, torch.nn.Parameter]] = {}
        self._told: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._attention: dict[str, Heads] = self._find_attention()

    def _find_attention(self) -> dict[str, Heads]:
        """The modules that have layers of queries which stay split, and their heads."""
        found: dict[str, Heads] = {}
        for name, rule in self.plan.items():
            if rule.how == COLUMNS and role_of(name) in ("q", "qkv"):
                path = name.rpartition(".")[0]
                out = widths(self.model.get_submodule(name))[1]
                found[path] = heads_of(path, self.model.get_submodule(path), out)
        return found

    def check(self) -> None:
        """Before anything is replaced: whether heads and columns can be shared."""
        for name, rule in self.plan.items():
            module = self.model.get_submodule(name)
            if rule.how == COLUMNS:
                self._columns(name, module)
            elif rule.how == EXPERTS:
                self._inner_range(name)
            elif min(widths(module)) < self.group.size:
                raise InferenceError(f"{name} is {widths(module)}: too small for {self.group.size} ranks")
        for heads in self._attention.values():
            heads.query_range(self.group.size, self.group.rank), heads.key_range(self.group.size, self.group.rank)

    def _columns(self, name: str, module: torch.nn.Module) -> tuple[Range, ...]:
        """Which output columns this rank has."""
        path, role = name.rpartition(".")[0], role_of(name)
        size, rank = self.group.size, self.group.rank
        if role is not None and path in self._attention:
            return role_ranges(role, self._attention[path], size, rank, self.model.get_submodule(path))
        out = widths(module)[1]
        if name.endswith("gate_up_proj"):  # two layers in one, one after the other
            first, stop = own_range(out // 2, size, rank)
            return (first, stop), (first + out // 2, stop + out // 2)
        return (own_range(out, size, rank),)

    # --- layers -------------------------------------------------------------------------------------------------------

    def split_layers(self) -> None:
        """Replace those of the plan, and tell attention of its heads."""
        columns = {
            name: self._columns(name, self.model.get_submodule(name))
            for name, rule in self.plan.items()
            if rule.how == COLUMNS
        }
        for name, rule in self.plan.items():
            module: Any = self.model.get_submodule(name)
            if rule.how == EXPERTS:
                self._split_experts(name, module, rule)
                continue
            into, out = widths(module)
            size, rank = self.group.size, self.group.rank
            transposed = is_transposed(module)
            if rule.how in (COLUMNS, GATHERED):
                ranges = columns.get(name) or (own_range(out, size, rank),)
                weight = self._part(f"{name}.weight", module.weight, 1 if transposed else 0, ranges, transposed)
                bias = None if module.bias is None else self._part(f"{name}.bias", module.bias, 0, ranges)
                parts = balanced(out, size) if rule.how == GATHERED else None
                made: torch.nn.Module = ColumnParallelLinear(weight, bias, self.group, parts)
                told = f"{out} output columns, {weight.shape[0]} each"
            else:
                ranges = (own_range(into, size, rank),)
                weight = self._part(f"{name}.weight", module.weight, 0 if transposed else 1, ranges, transposed)
                parts = balanced(into, size) if rule.how == SLICED else None
                made = RowParallelLinear(weight, module.bias, self.group, parts)
                told = f"{into} input columns, {weight.shape[1]} each, summed"
            self._replace(name, made)
            self._told[_pattern(name), f"{told}; by {rule.source}"].append(name)
        for path, heads in self._attention.items():
            self._split_by_head(path, heads)

    def _inner_range(self, name: str) -> Range:
        """Of each expert's inner columns, those of this rank."""
        inner = self.model.get_parameter(f"{name}.down_proj").shape[2]
        if inner < self.group.size:
            raise InferenceError(f"{name}: {inner} inner columns are too few for {self.group.size} ranks")
        # torch's products of groups want rows of whole 16 bytes.
        step = _EXPERTS_STEP if inner % _EXPERTS_STEP == 0 and inner >= _EXPERTS_STEP * self.group.size else 1
        first, stop = own_range(inner // step, self.group.size, self.group.rank)
        return first * step, stop * step

    def _split_experts(self, name: str, module: Any, rule: Rule) -> None:
        count, _, inner = module.down_proj.shape
        first, stop = self._inner_range(name)
        gate_and_up = (first, stop), (first + inner, stop + inner)
        module.gate_up_proj = self._part(f"{name}.gate_up_proj", module.gate_up_proj, 1, gate_and_up)
        module.down_proj = self._part(f"{name}.down_proj", module.down_proj, 2, ((first, stop),))
        sum_outputs(module, self.group)
        told = f"{inner} inner columns of {count} experts, {stop - first} each, summed"
        self._told[_pattern(name), f"{told}; by {rule.source}"].append(name)

    def _split_by_head(self, path: str, heads: Heads) -> None:
        """What an attention module has for every head beside its linear layers, and its own numbers."""
        attention = self.model.get_submodule(path)
        own = heads.query_range(self.group.size, self.group.rank)
        for name, param in list(attention.named_parameters(recurse=False)):
            if param.dim() == 1 and param.shape[0] == heads.queries:
                setattr(attention, name, self._part(f"{path}.{name}", param, 0, (own,)))
        for name, part in attention.named_children():
            if isinstance(part, torch.nn.Embedding) and part.embedding_dim == heads.queries:
                part.weight = self._part(f"{path}.{name}.weight", part.weight, 1, (own,))
        shrink(attention, heads, self.group.size, self.group.rank)

    # --- the vocabulary -----------------------------------------------------------------------------------------------

    def split_vocabulary(self) -> None:
        """Split the rows of the embedding of tokens, and the head's output columns, which may be the same tensor."""
        embedding, head = self._vocabulary("get_input_embeddings"), self._vocabulary("get_output_embeddings")
        tokens = [] if embedding is None else self._that_have(embedding.weight, torch.nn.Embedding)
        heads = [] if head is None else [name for name, part in self.model.named_modules() if part is head]
        can = [name for name in tokens if _scale_of(self.model.get_submodule(name)) is not False]
        tied = embedding is not None and head is not None and embedding.weight is head.weight
        if tied and (len(can) < len(tokens) or not isinstance(head, torch.nn.Linear)):
            return  # one that stays whole is shared by all
        for name in can:
            module: Any = self.model.get_submodule(name)
            rows = own_range(module.weight.shape[0], self.group.size, self.group.rank)
            weight = self._part(f"{name}.weight", module.weight, 0, (rows,))
            scale = _scale_of(module)
            made = VocabParallelEmbedding(weight, self.group, rows[0], module.padding_idx, scale)
            self._replace(name, made)
            self._told[name, f"{module.weight.shape[0]} rows, {weight.shape[0]} each; the vocabulary"].append(name)
        for name in heads if isinstance(head, torch.nn.Linear) else ():
            out = head.weight.shape[0]
            columns = own_range(out, self.group.size, self.group.rank)
            weight = self._part(f"{name}.weight", head.weight, 0, (columns,))
            bias = None if head.bias is None else self._part(f"{name}.bias", head.bias, 0, (columns,))
            self._replace(name, ColumnParallelLinear(weight, bias, self.group, balanced(out, self.group.size)))
            self._told[name, f"{out} output columns, {weight.shape[0]} each, gathered; the vocabulary"].append(name)

    def _vocabulary(self, get: str) -> Any:
        try:
            part = getattr(self.model, get, lambda: None)()
        except (NotImplementedError, AttributeError):
            return None
        is_right = isinstance(part, (torch.nn.Embedding, torch.nn.Linear)) and part.weight.shape[0] >= self.group.size
        return part if is_right else None

    def _that_have(self, weight: torch.Tensor, kind: type) -> list[str]:
        every = self.model.named_modules(remove_duplicate=False)
        return [name for name, part in every if isinstance(part, kind) and getattr(part, "weight", None) is weight]

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _part(
        self, name: str, whole: torch.Tensor, dim: int, ranges: tuple[Range, ...], transposed: bool = False
    ) -> torch.nn.Parameter:
        """This rank's part of a parameter; the same one for every name that the parameter has."""
        piece = Piece(tuple(whole.shape), dim, ranges, transposed)
        self.pieces[name] = piece
        if id(whole) in self._parts:
            return self._parts[id(whole)][1]
        part = torch.nn.Parameter(piece.of(whole.detach()), requires_grad=whole.requires_grad)
        if id(whole) in self._tied:
            self._parts[id(whole)] = (whole, part)
        return part

    def _replace(self, name: str, made: torch.nn.Module) -> None:
        path, _, last = name.rpartition(".")
        parent = self.model.get_submodule(path)
        made.train(self.model.get_submodule(name).training)
        parent._modules[last] = made

    def lines(self) -> list[str]:
        """A line for each pattern of names."""
        split = [
            f"{pattern} ({len(names)} layer{'s' * (len(names) != 1)}): {told}"
            for (pattern, told), names in self._told.items()
        ]
        whole = sum(param.numel() for name, param in self.model.named_parameters() if name not in self.pieces)
        return [*split, f"{whole:,} parameters are on every rank"]


def _scale_of(embedding: Any) -> Any:
    """What an embedding multiplies its outputs by; None: nothing; False: it does something else that is not known."""
    if type(embedding) is torch.nn.Embedding:
        return None
    scale: Any = getattr(embedding, "scalar_embed_scale", None)
    if scale is None or not type(embedding).__name__.endswith("ScaledWordEmbedding"):
        return False
    return torch.tensor(float(scale))


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
