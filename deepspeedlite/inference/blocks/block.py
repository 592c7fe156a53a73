"""One fused block, of any family: two halves (attention, and the products of width `inter`) between norms.

Sums are put off: a half returns what is still to be added to the stream of residuals, and the next norm adds it while
it reads. So a block takes and gives two tensors, `delta` and `stream`, and the model's last norm adds the last ones.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deepspeedlite.inference.blocks.attention import Step, attend, whole_attention
from deepspeedlite.inference.blocks.parts import BlockParts, Norm
from deepspeedlite.ops.transformer_inference import activate, gated, rotary_to_cache
from deepspeedlite.runtime.errors import UnsupportedError


class FusedBlock(nn.Module):
    """A block of a decoder, over static memory of keys and values.

    Its state's names are its own (`qkv`, `out`, `up`, `down`, `norms.N`, `qk_norms.N`): a checkpoint of the model
    that it was made from has to be loaded before.
    """

    def __init__(self, parts: BlockParts) -> None:
        super().__init__()
        self.geometry, self.residual = parts.geometry, parts.residual
        self.norms, self.qk_norms = nn.ModuleList(parts.norms), nn.ModuleList(parts.qk_norms)
        self.qkv, self.out, self.up, self.down = parts.qkv, parts.out, parts.up, parts.down
        self.is_gated, self.activation = parts.is_gated, parts.activation

    def forward(
        self, delta: Tensor, stream: Tensor | None, step: Step, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What is to be added to the residuals next, and the residuals; both `[batch, tokens, hidden]`.

        Args:
            delta: what the block before returned; of the first, the embeddings.
            stream: the residuals; None for the first.
            step: positions and masks.
            keys: this layer's cache, `[batch, kv_heads, most, head_dim]`, written from `step.start` on; so is
                `values`.
            values: as `keys`.
        """
        norms: Any = self.norms
        if self.residual == "pre":
            normed, stream = norms[0](delta, stream)
            delta = self._attention(normed, step, keys, values)
            normed, stream = norms[1](delta, stream)
            return self._widen(normed), stream
        if self.residual == "sandwich":
            normed, stream = norms[0](delta, stream)
            delta, _ = norms[1](self._attention(normed, step, keys, values))
            normed, stream = norms[2](delta, stream)
            delta, _ = norms[3](self._widen(normed))
            return delta, stream
        if self.residual == "parallel":
            normed, stream = norms[0](delta, stream)
            other = norms[1](stream)[0] if len(norms) > 1 else normed
            return self._attention(normed, step, keys, values).add_(self._widen(other)), stream
        return self._post(self._attention(delta, step, keys, values), delta), None

    def _post(self, attended: Tensor, x: Tensor) -> Tensor:
        norms: Any = self.norms
        normed, _ = norms[0](attended, x)
        return norms[1](self._widen(normed), normed)[0]

    def _attention(self, x: Tensor, step: Step, keys: Tensor, values: Tensor) -> Tensor:
        shape = self.geometry
        qkv = self.qkv(x)
        if len(self.qk_norms):
            qkv = self.norm_heads(qkv)
        q = rotary_to_cache(
            *(qkv, step.cos, step.sin, keys, values, step.start),
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            rotary_dim=step.rotary_dim,
            interleaved=False,
        )
        return self.out(attend(q, keys, values, step, shape))

    def norm_heads(self, qkv: Tensor) -> Tensor:
        """Norms of each head's queries and keys in `[batch, tokens, (heads + 2 kv_heads) * head_dim]`, in place."""
        shape, norms = self.geometry, self.qk_norms
        heads = qkv.unflatten(-1, (-1, shape.head_dim))
        for part, norm in zip((heads[:, :, : shape.heads], heads[:, :, shape.heads : -shape.kv_heads]), norms):
            part.copy_(norm(part)[0])
        return qkv

    def _widen(self, x: Tensor) -> Tensor:
        wide = self.up(x)
        return self.down(gated(wide, self.activation) if self.is_gated else activate(wide, self.activation))


class FusedEncoderBlock(FusedBlock):
    """A block of an encoder: nothing is cached, and every token sees every other."""

    def encode(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """The call that transformers makes of a block, with the mask that its model made: `[batch, tokens, hidden]`.

        Args:
            hidden_states: the block's input.
            attention_mask: None, bool or added to scores `[batch or 1, heads or 1, tokens, tokens]`, or `[batch,
                tokens]`.
            args: None, each.
            kwargs: None, each, or what does not change the result.

        Raises:
            UnsupportedError: the call gives another model's states, or a cache.
        """
        if any(arg is not None for arg in args) or kwargs.get("encoder_hidden_states") is not None:
            raise UnsupportedError("a fused encoder block attends to no other model's states, and was given some")
        mask = attention_mask
        if mask is not None and mask.dim() == 2:
            mask = mask[:, None, None, :].bool()
        shape = self.geometry
        heads = self.qkv(hidden_states).unflatten(-1, (-1, shape.head_dim)).transpose(1, 2)
        q, keys, values = heads.split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
        attended = whole_attention(q, keys, values, mask, shape, is_causal=False)
        return self._post(self.out(attended), hidden_states)


def final_norm(norm: Norm | None, delta: Tensor, stream: Tensor | None) -> Tensor:
    """The model's output: the last sum, and the norm over it where the model has one."""
    if norm is not None:
        return norm(delta, stream)[0]
    return delta if stream is None else delta + stream
