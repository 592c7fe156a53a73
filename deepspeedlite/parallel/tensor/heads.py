"""Attention: which of its linear layers make queries, keys and values, how many heads there are, and who has which.

Heads are split whole. Where there are fewer heads of keys and values than ranks, several ranks have the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from deepspeedlite.parallel.tensor.pieces import Range, of_blocks, own_range
from deepspeedlite.runtime.errors import InferenceError

ROLES: dict[str, str] = {
    **dict.fromkeys(("q", "q_proj", "query", "q_lin", "q_attn", "wq"), "q"),
    **dict.fromkeys(("k", "k_proj", "key", "k_lin", "wk"), "k"),
    **dict.fromkeys(("v", "v_proj", "value", "v_lin", "wv"), "v"),
    **dict.fromkeys(("qkv", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "W_pack"), "qkv"),
}
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_attn_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_HEAD_DIMS = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_kv")
_WIDTHS = ("split_size", "all_head_size", "inner_dim", "embed_dim")  # heads x their width
_BY_HEAD = ("alibi", "position_bias", "attention_mask")  # arguments that may have a value per head


class Heads(NamedTuple):
    """The heads of one attention module."""

    name: str
    queries: int
    keys: int
    width: int

    def query_range(self, size: int, rank: int) -> Range:
        """Which heads of queries a rank has.

        Raises:
            InferenceError: the ranks cannot have equally many.
        """
        if self.queries % size:
            fits = [n for n in range(1, self.queries + 1) if self.queries % n == 0]
            raise InferenceError(
                f"{self.name} has {self.queries} heads, which {size} ranks cannot share evenly; tp_size may be "
                f"{', '.join(map(str, fits))}"
            )
        return own_range(self.queries, size, rank)

    def key_range(self, size: int, rank: int) -> Range:
        """Which heads of keys and values a rank has: those of its queries.

        Raises:
            InferenceError: the ranks cannot have equally many.
        """
        first, stop = self.query_range(size, rank)
        if self.keys % size and size % self.keys:
            raise InferenceError(
                f"{self.name} has {self.keys} heads of keys and values, and {size} ranks neither divide nor are "
                f"divided by that; choose a tp_size that is a divisor or a multiple of {self.keys}"
            )
        per_key = self.queries // self.keys
        return first // per_key, (stop - 1) // per_key + 1


def heads_of(name: str, attention: torch.nn.Module, out_features: int) -> Heads:
    """The heads of the module that has the linear layers of queries (`out_features` wide).

    Raises:
        InferenceError: it does not say how many it has.
    """
    config = getattr(attention, "config", None)
    queries = _said(attention, config, _HEADS)
    if queries is None:
        raise InferenceError(
            f"{name} ({type(attention).__name__}) does not say how many heads it has (as "
            f"{', '.join(_HEADS)}), so it cannot be split"
        )
    width = _said(attention, None, _HEAD_DIMS) or out_features // queries
    return Heads(name, queries, _said(attention, config, _KV_HEADS) or queries, width)


def _said(attention: torch.nn.Module, config: Any, names: tuple[str, ...]) -> int | None:
    for holder in (attention, config):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _scaled(heads: Range, width: int) -> Range:
    return heads[0] * width, heads[1] * width


def _blocks(heads: Heads, size: int, rank: int, _: torch.nn.Module) -> tuple[Range, ...]:
    """[all q | all k | all v]."""
    q, k = (_scaled(one, heads.width) for one in (heads.query_range(size, rank), heads.key_range(size, rank)))
    after_q, after_k = heads.queries * heads.width, (heads.queries + heads.keys) * heads.width
    return of_blocks((q, k, k), (0, after_q, after_k))


def _by_head(heads: Heads, size: int, rank: int, _: torch.nn.Module) -> tuple[Range, ...]:
    """[q k v of one head after another]."""
    return (_scaled(heads.query_range(size, rank), 3 * heads.width),)


def _falcon(heads: Heads, size: int, rank: int, attention: torch.nn.Module) -> tuple[Range, ...]:
    """By groups of queries with their key and value; by head; or all queries, then one key and one value."""
    if getattr(attention, "new_decoder_architecture", False):
        if heads.keys % size:
            raise InferenceError(
                f"{heads.name} has {heads.keys} groups of heads, which {size} ranks cannot share evenly"
            )
        group = (heads.queries // heads.keys + 2) * heads.width
        return (_scaled(own_range(heads.keys, size, rank), group),)
    if not getattr(attention, "multi_query", False):
        return _by_head(heads, size, rank, attention)
    return _blocks(heads._replace(keys=1), size, rank, attention)


# How queries, keys and values are laid out in one layer, by the class of the attention that has it.
_FUSED: dict[str, Callable[[Heads, int, int, torch.nn.Module], tuple[Range, ...]]] = {
    "GPT2Attention": _blocks,
    "MptAttention": _blocks,
    "GPTNeoXAttention": _by_head,
    "BloomAttention": _by_head,
    "FalconAttention": _falcon,
}


def role_ranges(role: str, heads: Heads, size: int, rank: int, attention: torch.nn.Module) -> tuple[Range, ...]:
    """Which output columns of a layer with this role a rank has.

    Raises:
        InferenceError: heads cannot be shared evenly, or the layout of a fused layer is not known.
    """
    if role == "q":
        return (_scaled(heads.query_range(size, rank), heads.width),)
    if role in "kv":
        return (_scaled(heads.key_range(size, rank), heads.width),)
    layout = _FUSED.get(type(attention).__name__)
    if layout is None:
        raise InferenceError(
            f"{heads.name} ({type(attention).__name__}) has one layer for queries, keys and values, in an order "
            f"that is not known; those of {', '.join(sorted(_FUSED))} are"
        )
    return layout(heads, size, rank, attention)


def shrink(attention: torch.nn.Module, heads: Heads, size: int, rank: int) -> None:
    """Let an attention module reckon with this rank's heads.

    Raises:
        InferenceError: it has a norm over all heads.
    """
    over_all = {heads.queries * heads.width, heads.keys * heads.width} - {heads.width}
    for name, part in attention.named_children():
        weight = getattr(part, "weight", None)
        if hasattr(part, "in_features") or not isinstance(weight, torch.Tensor) or weight.dim() != 1:
            continue
        if weight.numel() in over_all:
            raise InferenceError(f"{heads.name}.{name} is over all heads, so {heads.name} cannot be split by heads")
    first, stop = heads.query_range(size, rank)
    keys = heads.key_range(size, rank)
    own_keys = keys[1] - keys[0]
    for names, whole, own in (
        (_HEADS, heads.queries, stop - first),
        (_KV_HEADS, heads.keys, own_keys),
        (_WIDTHS, heads.queries * heads.width, (stop - first) * heads.width),
        (("num_key_value_groups",), heads.queries // heads.keys, (stop - first) // own_keys),
    ):
        for name in names:
            if attention.__dict__.get(name) == whole:
                setattr(attention, name, own)
    if {"alibi", "position_bias"} & inspect.signature(attention.forward).parameters.keys():
        attention.register_forward_pre_hook(_SliceByHead(heads, (first, stop)), with_kwargs=True)


class _SliceByHead:
    """Gives an attention module its own heads of arguments that have a value for every head, such as ALiBi's."""

    def __init__(self, heads: Heads, own: Range) -> None:
        self._heads, self._own = heads.queries, own

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = {name: self._sliced(name, kwargs[name]) for name in _BY_HEAD if name in kwargs}
        return tuple(self._sliced("", value) for value in args), {**kwargs, **changed}

    def _sliced(self, name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        first, stop = self._own
        if value.dim() == 4 and value.shape[1] == self._heads:
            return value[:, first:stop]
        if name and value.dim() == 3 and value.shape[0] % self._heads == 0 and name != "attention_mask":
            by_head = value.view(-1, self._heads, *value.shape[1:])
            return by_head[:, first:stop].reshape(-1, *value.shape[1:])
        return value
