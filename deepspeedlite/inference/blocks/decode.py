"""Decode steps with everything that does not change between them done once: arguments bound, results' memory kept.

A small model's token takes a few milliseconds, in which a hundred operations begin; making a tensor for each result,
and looking up modules and buffers, would take as long as several of them. A plan belongs to one cache, so generations
beside each other (in threads) have memory of their own. It computes what `FusedBlock.forward` does, by the same ops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from deepspeedlite.inference.blocks.attention import Step
from deepspeedlite.inference.blocks.block import FusedBlock
from deepspeedlite.inference.blocks.parts import Norm
from deepspeedlite.inference.kv_cache import StaticKVLayer
from deepspeedlite.ops import find_op
from deepspeedlite.ops.packed_linear import FEW_ROWS
from deepspeedlite.ops.transformer_inference import PackedLinear, activation_number

_OPS = ("few_row_product", "add_norm", "rotary_to_cache", "decode_attention", "gated_activation")

# What a half of a block does to its input; the result lies in the plan's memory until the next block runs.
_Half = Callable[[Tensor, Step], Tensor]
_Linear = Callable[[Tensor], Tensor]
# (x, residual or None) -> (normed, summed)
_Norming = Callable[[Tensor, "Tensor | None"], "tuple[Tensor, Tensor]"]
_Run = Callable[[Tensor, "Tensor | None", Step], "tuple[Tensor, Tensor | None]"]


class DecodePlan:
    """One step of `batch` sequences of `tokens` tokens each, over one cache.

    Args:
        blocks: a decoder's.
        layers: the cache's, with their memory, which stays where it is as long as the plan is used.
        like: an input of the first block, `[batch, tokens, hidden]`.
    """

    def __init__(self, blocks: Sequence[FusedBlock], layers: Sequence[StaticKVLayer], like: Tensor) -> None:
        self._ops: dict[str, Any] = {name: find_op(name, like.device.type) for name in _OPS}
        self._like = like
        self._kept: dict[tuple[str, int], Tensor] = {}
        # By whether it is still the first block's weight one sees whether the model was moved or cast.
        self._first_weight = _weight_of(blocks)
        self._runs = [self._bind(index, block, layer) for index, (block, layer) in enumerate(zip(blocks, layers))]

    @staticmethod
    def fits(blocks: Sequence[FusedBlock], x: Tensor, step: Step) -> bool:
        """Whether a step is one for a plan: few rows, and ops for its device."""
        if not step.is_decode or x.shape[0] * x.shape[1] > FEW_ROWS:
            return False
        return all(find_op(name, x.device.type) is not None for name in _OPS)

    def still_fits(self, blocks: Sequence[FusedBlock]) -> bool:
        """Whether the model's weights are where they were."""
        return self._first_weight is _weight_of(blocks)

    def run(self, delta: Tensor, step: Step) -> tuple[Tensor, Tensor | None]:
        """All blocks; what `FusedBlock.forward` of the last one returns, in the plan's memory."""
        delta, stream = delta.contiguous(), None
        for run in self._runs:
            delta, stream = run(delta, stream, step)
        return delta, stream

    def _memory(self, name: str, width: int) -> Tensor:
        """A result's, `[batch, tokens, width]`; all blocks share it."""
        key = (name, width)
        if key not in self._kept:
            self._kept[key] = self._like.new_empty((*self._like.shape[:-1], width))
        return self._kept[key]

    def _bind(self, index: int, block: FusedBlock, layer: StaticKVLayer) -> _Run:
        hidden = self._like.shape[-1]
        attend, widen = self._attention(block, layer), self._wide(block)
        # What a norm reads, it does not write: neighbours have different memory, in the next block too.
        norms = [self._norm(norm, hidden, f"{at % 2}", f"{at} {index % 2}") for at, norm in enumerate(block.norms)]
        first, second = norms[0], norms[-1]

        def pre(delta: Tensor, stream: Tensor | None, step: Step) -> tuple[Tensor, Tensor | None]:
            normed, stream = first(delta, stream)
            normed, stream = second(attend(normed, step), stream)
            return widen(normed), stream

        def sandwich(delta: Tensor, stream: Tensor | None, step: Step) -> tuple[Tensor, Tensor | None]:
            normed, stream = first(delta, stream)
            normed, stream = norms[2](norms[1](attend(normed, step), None)[0], stream)
            return norms[3](widen(normed), None)[0], stream

        def parallel(delta: Tensor, stream: Tensor | None, step: Step) -> tuple[Tensor, Tensor | None]:
            normed, stream = first(delta, stream)
            attended = attend(normed, step)
            other = second(stream, None)[0] if len(norms) > 1 else normed
            return attended.add_(widen(other)), stream

        def post(delta: Tensor, stream: Tensor | None, step: Step) -> tuple[Tensor, Tensor | None]:
            normed, _ = first(attend(delta, step), delta)
            return second(widen(normed), normed)[0], None

        return {"pre": pre, "sandwich": sandwich, "parallel": parallel, "post": post}[block.residual]

    def _norm(self, norm: Any, hidden: int, normed_to: str, summed_to: str) -> _Norming:
        module: Norm = norm
        op = self._ops["add_norm"]
        normed, summed = self._memory(f"normed {normed_to}", hidden), self._memory(f"summed {summed_to}", hidden)
        weight, bias, eps = module.weight, module.bias, module.eps
        is_layer, unit_offset = module.kind == "layer", module.unit_offset

        def run(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
            if residual is None:
                op(x, None, weight, bias, normed, None, eps, is_layer, unit_offset)
                return normed, x
            op(x, residual, weight, bias, normed, summed, eps, is_layer, unit_offset)
            return normed, summed

        return run

    def _linear(self, module: nn.Module, name: str) -> _Linear:
        if not isinstance(module, PackedLinear):
            return module  # ranks add up or gather: it has memory of its own
        op, out = self._ops["few_row_product"], self._memory(name, module.out_features)
        weight, scales, bias = module.weight, module.scales, module.bias
        bits, group_size = module.bits or 0, module.group_size

        def run(x: Tensor) -> Tensor:
            op(x, weight, scales, bias, out, bits, group_size)
            return out

        return run

    def _attention(self, block: FusedBlock, layer: StaticKVLayer) -> _Half:
        shape, like = block.geometry, self._like
        turn, attend = self._ops["rotary_to_cache"], self._ops["decode_attention"]
        qkv, out = self._linear(block.qkv, "qkv"), self._linear(block.out, "out")
        keys, values = layer.buffer_keys, layer.buffer_values
        attended = self._memory("attended", shape.heads * shape.head_dim)
        q = like.new_empty((like.shape[0], shape.heads, like.shape[1], shape.head_dim))
        scale, softcap, window = shape.scale, shape.softcap, shape.window
        norm_heads = self._head_norms(block)

        def run(x: Tensor, step: Step) -> Tensor:
            turn(norm_heads(qkv(x)), step.cos, step.sin, keys, values, q, step.start, step.rotary_dim, False)
            attend(q, keys, values, step.padding, step.slopes, attended, step.length, scale, softcap, window)
            return out(attended)

        return run

    def _head_norms(self, block: FusedBlock) -> _Linear:
        """Norms of each head's queries and keys, in place, where the block has some."""
        if not len(block.qk_norms):
            return lambda qkv: qkv
        if self._like.shape[:-1].numel() > 1:
            return block.norm_heads
        op, shape = self._ops["add_norm"], block.geometry
        queries = shape.heads * shape.head_dim
        # Of one token, all queries lie in one piece, and so do all keys.
        bound: list[tuple[slice, Any]] = [
            (slice(0, queries), block.qk_norms[0]),
            (slice(queries, queries + shape.kv_heads * shape.head_dim), block.qk_norms[1]),
        ]
        parts = [(where, norm.weight, norm.bias, norm.eps, norm.kind == "layer") for where, norm in bound]

        def run(qkv: Tensor) -> Tensor:
            flat = qkv.view(-1)
            for where, weight, bias, eps, is_layer in parts:
                heads = flat[where].view(-1, shape.head_dim)
                op(heads, None, weight, bias, heads, None, eps, is_layer, False)
            return qkv

        return run

    def _wide(self, block: FusedBlock) -> _Linear:
        op, activation, is_gated = self._ops["gated_activation"], activation_number(block.activation), block.is_gated
        up, down = self._linear(block.up, "up"), self._linear(block.down, "down")
        up_module: Any = block.up
        width = up_module.out_features // 2 if is_gated else up_module.out_features
        activated = self._memory("activated", width)

        def run(x: Tensor) -> Tensor:
            op(up(x), activated, activation, is_gated)
            return down(activated)

        return run


def _weight_of(blocks: Sequence[FusedBlock]) -> Tensor:
    qkv: Any = blocks[0].qkv
    weight: Tensor = qkv._buffers["weight"]
    return weight
