"""Attention over the blocks of scores that a layout keeps: time and memory go with those, not with all.

    S = scale * q k^T + masks     P = softmax of S's rows     out = dropout(P) v

Where a block is not kept, or a mask hides, S is -infinity; a row that sees nothing gives 0, and no gradients. Scores
are made tile by tile and never kept (Dao et al. 2022, arXiv:2205.14135), in float32. bfloat16 is multiplied in pairs on
CPUs that have the instruction, and P and its gradient are rounded to bfloat16 for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepspeedlite.ops import find_op
from deepspeedlite.ops.sparse_attention import reference
from deepspeedlite.ops.sparse_attention.block_lists import BlockLists
from deepspeedlite.runtime.errors import OpError, UnsupportedError

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_DIM = 256
_NO_BIAS, _ADDED, _HIDES_ZEROS, _SEEN = range(4)  # dsl_bias_kind
_MODES = ("add", "mul")


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Tensor | BlockLists,
    block: int,
    *,
    scale: float | None = None,
    causal: bool = False,
    attn_mask: Tensor | None = None,
    attn_mask_mode: str = "mul",
    key_padding_mask: Tensor | None = None,
    key_padding_mask_mode: str = "add",
    rpe: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention over kept blocks, with gradients of q, k, v and rpe.

    q, k and v may lie as they like as long as the numbers of a head are neighbours (so `[B, L, H, D]` transposed is not
    copied), and be expanded over heads; the result lies as q does.

    Args:
        q: `[B, H, L, D]`; D is at most 256. fp32, bf16, fp16; fp64 is done by torch, with all scores at once.
        k: `[B, H, S, D]`; S may differ from L.
        v: as k.
        layout: `[H or 1, L / block, S / block]`, or `[B, H or 1, ...]`, or `BlockLists.of` it, which is worth keeping.
        block: 16, 32, 64 or 128; divides L and S.
        scale: of the products; `D ** -0.5` where it is None.
        causal: whether query i sees keys 0 to i alone.
        attn_mask: what broadcasts to `[B, H, L, S]`. bool: True is seen. Numbers: added to scores ("add"), or hide
            where they are 0 and change nothing elsewhere ("mul").
        attn_mask_mode: "add" or "mul".
        key_padding_mask: `[B, S]`, or `[B, H, S]`, as attn_mask.
        key_padding_mask_mode: "add" or "mul".
        rpe: relative position bias, what broadcasts to `[B, H, L, S]`, added. Its gradient is made for all of L x S.
        dropout_p: the share of P's numbers that are dropped, by bits that two numbers of torch's default generator
            choose; so recomputation under activation checkpointing drops the same.

    Returns:
        `[B, H, L, D]`.

    Raises:
        OpError: shapes, dtypes or devices that do not fit; the message has them and the layout's.
        UnsupportedError: a gradient of a mask (give it as rpe).
    """
    q, k, v = _of_autocast(q, k, v)
    lists = layout if isinstance(layout, BlockLists) else BlockLists.of(layout, block)
    _check(q, k, v, lists, block, dropout_p)
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    biases = _biases(shape, q.device, attn_mask, attn_mask_mode, key_padding_mask, key_padding_mask_mode, rpe)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    op = find_op("sparse_attention_forward", q.device.type) if q.dtype in _DTYPES else None
    if op is None:
        tensors = [bias.for_torch() for bias in biases if bias.tensor is not None]
        return reference.sparse_attention(
            q, k, v, lists.to(q.device), scale=scale, causal=causal, biases=tensors, dropout_p=dropout_p
        )
    seed, stream = torch.randint(-(2**63), 2**63 - 1, (2,)).tolist() if dropout_p > 0 else (0, 0)
    settings = _Settings(
        lists=lists.to(q.device),
        kinds=sum(bias.kind * 4**i for i, bias in enumerate(biases)),
        numbers=(scale, causal, dropout_p, seed, stream),
    )
    found: Tensor = _SparseAttention.apply(q, k, v, biases[0].tensor, biases[1].tensor, rpe, settings)
    return found


def _biases(
    shape: tuple[int, int, int, int],
    device: torch.device,
    attn_mask: Tensor | None,
    attn_mask_mode: str,
    key_padding_mask: Tensor | None,
    key_padding_mask_mode: str,
    rpe: Tensor | None,
) -> tuple[_Bias, _Bias, _Bias]:
    """The three, seen as scores of a shape."""
    padding = key_padding_mask
    if padding is not None:
        if padding.dim() not in (2, 3):
            raise OpError(
                f"sparse_attention: key_padding_mask of shape {list(padding.shape)}, not [{shape[0]}, {shape[3]}]"
            )
        padding = padding[:, None, None, :] if padding.dim() == 2 else padding[:, :, None, :]
    biases = (
        _Bias.of("attn_mask", attn_mask, attn_mask_mode, shape, device),
        _Bias.of("key_padding_mask", padding, key_padding_mask_mode, shape, device),
        _Bias.of("rpe", rpe, "add", shape, device),
    )
    if any(bias.tensor is not None and bias.tensor.requires_grad for bias in biases[:2]):
        raise UnsupportedError("sparse_attention: a mask requires a gradient, which only rpe has; give it as rpe")
    return biases


class _Settings(NamedTuple):
    """What an op is given beside tensors of the call."""

    lists: BlockLists
    kinds: int
    numbers: tuple[float, bool, float, int, int]

    def rest(self) -> tuple[object, ...]:
        lists = self.lists
        list_head = int(lists.heads > 1)
        return (lists.block, lists.heads if lists.batches > 1 else 0, list_head, *self.numbers)


class _Bias(NamedTuple):
    """A mask, seen as `[B, H, L, S]`, and what its numbers mean."""

    tensor: Tensor | None
    kind: int

    @classmethod
    def of(cls, name: str, mask: Tensor | None, mode: str, shape: tuple[int, ...], device: torch.device) -> _Bias:
        if mode not in _MODES:
            raise OpError(f"sparse_attention: {name}_mode={mode!r} is none of {', '.join(_MODES)}")
        if mask is None:
            return cls(None, _NO_BIAS)
        if mask.device != device:
            raise OpError(f"sparse_attention: {name} is on {mask.device}, and q on {device}")
        if mask.dtype not in (*_DTYPES, torch.bool):
            mask = mask != 0 if mode == "mul" else mask.to(torch.float32)
        try:
            seen = mask.expand(shape)
        except RuntimeError:
            raise OpError(
                f"sparse_attention: {name} of shape {list(mask.shape)} does not broadcast to [B, H, L, S] = "
                f"{list(shape)}"
            ) from None
        return cls(seen, _SEEN if mask.dtype == torch.bool else _ADDED if mode == "add" else _HIDES_ZEROS)

    def for_torch(self) -> Tensor:
        """Numbers to add, or bool."""
        assert self.tensor is not None
        return self.tensor != 0 if self.kind == _HIDES_ZEROS else self.tensor


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        padding: Tensor | None,
        rpe: Tensor | None,
        settings: _Settings,
    ) -> Tensor:
        q, k, v = map(_side_by_side, (q, k, v))
        lists = settings.lists
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        tensors = (lists.masks, mask, padding, _expanded(rpe, q, k))
        op = find_op("sparse_attention_forward", q.device.type)
        op(q, k, v, lists.starts, lists.blocks, lists.partial, *tensors, settings.kinds, out, lse, *settings.rest())
        ctx.save_for_backward(q, k, v, out, lse, mask, padding, rpe)
        ctx.settings = settings
        return out

    @staticmethod
    @once_differentiable  # says so to who asks for a gradient of a gradient
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, mask, padding, rpe = ctx.saved_tensors
        settings: _Settings = ctx.settings
        lists, dout = settings.lists, _side_by_side(dout.to(q.dtype))
        dq, dk, dv = map(torch.empty_like, (q, k, v))
        dpositions = None
        positions = _expanded(rpe, q, k)
        if ctx.needs_input_grad[5]:  # one for all sequences or heads that share a bias
            own = (1,) * (4 - rpe.dim()) + rpe.shape
            dpositions = torch.zeros(*own[:2], q.shape[2], k.shape[2], dtype=torch.float32, device=q.device)
        op = find_op("sparse_attention_backward", q.device.type)
        op(
            *(q, k, v, out, lse, dout, lists.starts, lists.blocks, lists.partial),
            *(lists.column_starts, lists.column_blocks, lists.column_partial),
            *(lists.masks, mask, padding, positions, settings.kinds, dq, dk, dv, dpositions, *settings.rest()),
        )
        grad = None if dpositions is None else dpositions.sum_to_size(rpe.shape).to(rpe.dtype)
        return dq, dk, dv, None, None, grad, None


def _expanded(rpe: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    return None if rpe is None else rpe.expand(*q.shape[:3], k.shape[2])


def _check(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, block: int, dropout_p: float) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or v.shape != k.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise OpError(f"sparse_attention: {shapes}; they must be [B, H, L, D], [B, H, S, D] and the same for v")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (*_DTYPES, torch.float64):
        raise OpError(
            f"sparse_attention: q is {q.dtype}, k {k.dtype} and v {v.dtype}; all must be float32, bfloat16, float16 or "
            "float64, and the same"
        )
    if not q.device == k.device == v.device:
        raise OpError(f"sparse_attention: q is on {q.device}, k on {k.device} and v on {v.device}")
    if not 0 < q.shape[3] <= _MOST_DIM:
        raise OpError(f"sparse_attention: {shapes}; a head must have 1 to {_MOST_DIM} numbers")
    if lists.block != block:
        raise OpError(f"sparse_attention: block={block}, and BlockLists of {lists.block}")
    if q.shape[2] % block or k.shape[2] % block:
        raise OpError(
            f"sparse_attention: {shapes}; block={block} must divide their lengths (pad them to a multiple of it)"
        )
    layout = (lists.batches, lists.heads, lists.rows, lists.columns)
    wanted = (q.shape[0], q.shape[1], q.shape[2] // block, k.shape[2] // block)
    if layout[2:] != wanted[2:] or any(size not in (1, want) for size, want in zip(layout[:2], wanted[:2])):
        raise OpError(
            f"sparse_attention: a layout [batch, heads, rows, columns] of {list(layout)} for {shapes} in blocks of "
            f"{block}, which are {list(wanted)} (batch and heads may be 1)"
        )
    if not 0 <= dropout_p <= 1:
        raise OpError(f"sparse_attention: dropout_p={dropout_p} is not in [0, 1]")


def _of_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) if tensor.dtype in _DTYPES else tensor for tensor in tensors)


def _side_by_side(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
