"""The cache of keys and values of fused models: static memory, lent by a pool to one cache at a time.

A generation writes each token's keys and values in place. The memory of a cache that is no longer referred to goes
back to the model's pool, and the next generation takes it from there; a cache that the user keeps (`past_key_values`
of an earlier output) keeps its memory, and a new one gets other memory. It grows when a sequence does.

`StaticKVCache` is a `transformers` cache, so that its `generate` reorders beams, crops and repeats it as any other.
This file imports transformers, and is imported where one of its models is fused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from deepspeedlite.runtime.errors import UnsupportedError

_T = TypeVar("_T")

# Memory is given in whole multiples of so many tokens, so that a sequence that grows by one token is not copied each
# time.
_TOKENS_AT_ONCE = 64
# The layers whose contents can be taken over. Offloaded, quantized and linear ones keep something else than keys and
# values.
_ADOPTED = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """What is stored for a token, and where. One entry of `kv_heads` for each layer."""

    kv_heads: tuple[int, ...]
    head_dim: int
    dtype: torch.dtype
    device: torch.device


class Buffers:
    """The memory of one cache: for each layer, keys and values `[batch, kv_heads, tokens, head_dim]`."""

    def __init__(self, shape: CacheShape, batch: int, tokens: int) -> None:
        self.batch, self.tokens = batch, tokens
        sizes = [(batch, heads, tokens, shape.head_dim) for heads in shape.kv_heads]
        # Made under inference_mode, they could be written to only there, and a later generation may be elsewhere.
        with torch.inference_mode(False):
            self.keys = [torch.empty(size, dtype=shape.dtype, device=shape.device) for size in sizes]
            self.values = [torch.empty(size, dtype=shape.dtype, device=shape.device) for size in sizes]

    def copy_from(self, other: Buffers) -> None:
        """What `other` holds, as far as there is room for it."""
        part = (slice(min(self.batch, other.batch)), slice(None), slice(min(self.tokens, other.tokens)))
        for mine, theirs in zip([*self.keys, *self.values], [*other.keys, *other.values]):
            mine[part].copy_(theirs[part])


class BufferPool:
    """Lends memory to caches, and keeps what was given back last.

    Args:
        shape: what is stored.
        batch: sequences that the first memory has room for.
        tokens: positions of each. More of either are given where they are asked for.
    """

    def __init__(self, shape: CacheShape, *, batch: int, tokens: int) -> None:
        self.shape = shape
        self._batch, self._tokens = max(batch, 1), max(tokens, 1)
        # At most one: that of the last generation. A list, since threads may generate beside each other: its pop and
        # append are whole.
        self._free: list[Buffers] = []

    def lend(self, batch: int, tokens: int) -> Lease:
        """Memory for at least so many sequences and positions. What it holds is undefined."""
        return Lease(self, self.take(batch, tokens))

    def take(self, batch: int, tokens: int) -> Buffers:
        """As `lend`, without somebody who gives it back."""
        try:
            free = self._free.pop()
            if free.batch >= batch and free.tokens >= tokens:
                return free
            del free  # before there is more
        except IndexError:
            pass
        rows = max(batch, self._batch)
        # A batch larger than expected gets no more memory than expected, unless it needs it.
        expected = self._tokens if batch <= self._batch else self._batch * self._tokens // batch
        at_once = -(-tokens // _TOKENS_AT_ONCE) * _TOKENS_AT_ONCE
        return Buffers(self.shape, rows, max(at_once, expected))

    def give_back(self, buffers: Buffers) -> None:
        """For the next one; what was given back before is let go."""
        self._free[:] = [buffers]

    def __deepcopy__(self, memo: dict[int, Any]) -> BufferPool:
        return BufferPool(self.shape, batch=self._batch, tokens=self._tokens)


class Lease:
    """Memory in use by one cache; it goes back when nothing refers to the lease any more."""

    def __init__(self, pool: BufferPool, buffers: Buffers) -> None:
        self.pool = pool
        self.buffers = buffers
        # What a model has made for this very memory; see `kept`.
        self._made: dict[Any, Any] = {}

    def kept(self, key: Any, is_good: Callable[[_T], bool], make: Callable[[], _T]) -> _T:
        """What was made for `key` before, if it is still good; else it is made. Let go when the memory changes."""
        found = self._made.get(key)
        if found is None or not is_good(found):
            found = self._made[key] = make()
        return found

    def reserve(self, batch: int, tokens: int) -> None:
        """Room for so many, with what is there kept. Memory at least doubles when it grows."""
        mine = self.buffers
        if batch <= mine.batch and tokens <= mine.tokens:
            return
        if tokens > mine.tokens:
            tokens = max(tokens, 2 * mine.tokens)
        more = self.pool.take(max(batch, mine.batch), tokens)
        more.copy_from(mine)
        self.buffers = more
        self._made.clear()

    def __del__(self) -> None:
        self.pool.give_back(self.buffers)

    def __deepcopy__(self, memo: dict[int, Any]) -> Lease:
        mine = self.buffers
        buffers = Buffers(self.pool.shape, mine.batch, mine.tokens)
        buffers.copy_from(mine)
        return Lease(self.pool, buffers)


class StaticKVLayer(CacheLayerMixin):
    """One layer's part of a lease: the first `batch` sequences and `length` positions of it are in use."""

    is_compileable = False  # `generate` would build whole masks for one that is
    is_croppable = True
    is_sliding = False

    def __init__(self, lease: Lease, index: int) -> None:
        # The base's constructor would assign `keys` and `values`, which are views here.
        self.lease, self.index = lease, index
        self.batch, self.length = 0, 0
        self.is_initialized = True

    @property
    def buffer_keys(self) -> Tensor:
        """`[batch, kv_heads, all positions, head_dim]`."""
        return self.lease.buffers.keys[self.index][: self.batch]

    @property
    def buffer_values(self) -> Tensor:
        """As `buffer_keys`."""
        return self.lease.buffers.values[self.index][: self.batch]

    @property
    def keys(self) -> Tensor:
        """`[batch, kv_heads, length, head_dim]`, a view."""
        return self.buffer_keys[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        """As `keys`."""
        return self.buffer_values[:, :, : self.length]

    def reserve(self, batch: int, tokens: int) -> None:
        """Room for `tokens` more positions of `batch` sequences.

        Raises:
            UnsupportedError: the cache is of another number of sequences.
        """
        if self.length and batch != self.batch:
            raise UnsupportedError(f"the cache holds {self.batch} sequences, and {batch} were given")
        self.lease.reserve(batch, self.length + tokens)
        self.batch = batch

    def advance(self, tokens: int) -> None:
        """So many more positions have been written."""
        self.length += tokens

    def fill(self, keys: Tensor, values: Tensor, length: int) -> None:
        """The last positions of `length` from tensors `[batch, kv_heads, positions, head_dim]`; those before are 0."""
        batch, _, positions, _ = keys.shape
        self.reserve(batch, length)
        for mine, theirs in ((self.buffer_keys, keys), (self.buffer_values, values)):
            mine[:, :, : length - positions].zero_()
            mine[:, :, length - positions : length].copy_(theirs)
        self.length = length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The memory is there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append, for a module that is not fused; all of the layer's keys and values."""
        batch, _, tokens, _ = key_states.shape
        self.reserve(batch, tokens)
        part = (slice(None), slice(None), slice(self.length, self.length + tokens))
        self.buffer_keys[part].copy_(key_states)
        self.buffer_values[part].copy_(value_states)
        self.length += tokens
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Positions in use."""
        return self.length

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that so many more queries see, and the first one's position."""
        return self.length + query_length, 0

    def reset(self) -> None:
        """Empty; the memory stays."""
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` positions."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): a negative number, of the positions to forget")
        self.length = max(self.length + tokens_to_remove, 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what sequence `beam_idx[i]` was."""
        self._keep(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of `indices`, in that order."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self._keep(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times, beside each other."""
        self._keep(torch.arange(self.batch).repeat_interleave(repeats))

    def _keep(self, indices: Tensor) -> None:
        if not self.length:
            return
        indices = indices.to(self.keys.device)
        keys, values = self.keys.index_select(0, indices), self.values.index_select(0, indices)
        self.lease.reserve(len(indices), self.length)
        self.batch = len(indices)
        self.keys.copy_(keys)
        self.values.copy_(values)


class StaticKVCache(Cache):
    """A cache of one fused model, empty.

    Args:
        pool: the model's, which lends the memory.
    """

    def __init__(self, pool: BufferPool) -> None:
        super().__init__(layers=_layers(pool, batch=1, tokens=1))


def layers_of(cache: Any, pool: BufferPool) -> list[StaticKVLayer]:
    """The layers of a cache that was given to a model, which hold static memory afterwards.

    The layers of a dynamic or static cache of transformers are exchanged for ours within the cache, with what they
    hold, so that whoever made it finds in it what the model adds.

    Raises:
        UnsupportedError: a cache of another kind, or of another model.
    """
    layers = getattr(cache, "layers", None)
    if layers and isinstance(layers[0], StaticKVLayer):
        if layers[0].lease.pool.shape != pool.shape:
            raise UnsupportedError("this cache is of a model with other heads, dtype or device")
        return layers
    known = isinstance(cache, (DynamicCache, StaticCache)) and not getattr(cache, "offloading", False)
    if not known or layers is None or not all(type(layer) in _ADOPTED for layer in layers):
        kinds = sorted({type(layer).__name__ for layer in layers or ()})
        raise UnsupportedError(
            f"a fused model keeps keys and values in memory of its own, and cannot use a {type(cache).__name__}"
            f"{' of ' + ', '.join(kinds) if kinds else ''}: give it a DynamicCache, or none"
        )
    if layers and len(layers) != len(pool.shape.kv_heads):
        raise UnsupportedError(f"this cache has {len(layers)} layers, and the model {len(pool.shape.kv_heads)}")
    length = max((int(layer.get_seq_length()) for layer in layers), default=0)
    filled = [layer for layer in layers if length]
    mine = _layers(pool, batch=filled[0].keys.shape[0] if filled else 1, tokens=max(length, 1))
    for old, new in zip(filled, mine):
        # A static layer's memory is longer than what is in use; a window's, shorter.
        in_use = slice(min(length, old.keys.shape[2]))
        new.fill(old.keys[:, :, in_use], old.values[:, :, in_use], length)
    cache.layers[:] = mine
    cache.layer_class_to_replicate = None  # a cache without a configuration would append layers of its own
    return mine


def _layers(pool: BufferPool, batch: int, tokens: int) -> list[StaticKVLayer]:
    lease = pool.lend(batch, tokens)
    return [StaticKVLayer(lease, index) for index in range(len(pool.shape.kv_heads))]
