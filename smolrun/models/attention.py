"""Causal self-attention with grouped key/value heads, rotary positions, qk-norm and a sliding
window.

Shape suffixes: B batch, T tokens, S tokens looked at (= T without a cache), D width, H heads, G
key/value heads, K head width, R = K / 2 rotated pairs.
Source: arXiv:1706.03762 (attention), 2104.09864 (rotary), 2305.13245 (grouped heads), 2302.05442
(qk-norm).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolrun.models.kv_cache import CacheStep, KVCache
from smolrun.models.shape import DecoderShape

Rotation = tuple[Tensor, Tensor]


class HeadNorm(nn.RMSNorm):
    """Norm of each head's query or key, in the weight's precision: autocast hands it half
    precision.
    """

    def forward(self, heads: Tensor) -> Tensor:
        return super().forward(heads.to(self.weight.dtype))


class Attention(nn.Module):
    """Each token gathers values from itself and the tokens before it."""

    def __init__(self, shape: DecoderShape, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_width = (
            shape.heads,
            shape.kv_heads,
            shape.head_width,
        )
        input_bias = shape.attention_bias in (True, "qkv")
        self.query = nn.Linear(shape.width, shape.heads * shape.head_width, bias=input_bias)
        self.key = nn.Linear(shape.width, shape.kv_heads * shape.head_width, bias=input_bias)
        self.value = nn.Linear(shape.width, shape.kv_heads * shape.head_width, bias=input_bias)
        self.output = nn.Linear(
            shape.heads * shape.head_width, shape.width, bias=shape.attention_bias is True
        )
        self.query_norm = (
            HeadNorm(shape.head_width, eps=shape.norm_eps) if shape.qk_norm else nn.Identity()
        )
        self.key_norm = (
            HeadNorm(shape.head_width, eps=shape.norm_eps) if shape.qk_norm else nn.Identity()
        )

    def forward(
        self,
        hidden_BTD: Tensor,
        rotation: Rotation | None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        step: CacheStep | None = None,
    ) -> Tensor:
        """`mask` is True where a token may look, broadcast to [B, H, T, S]; None means plain
        causal.
        """
        query_BHTK = self.query_norm(self._split(self.query(hidden_BTD), self.num_heads))
        key_BGSK = self.key_norm(self._split(self.key(hidden_BTD), self.num_kv_heads))
        value_BGSK = self._split(self.value(hidden_BTD), self.num_kv_heads)
        if rotation is not None:
            query_BHTK, key_BGSK = rotate(query_BHTK, rotation), rotate(key_BGSK, rotation)
        if cache is not None and step is not None:
            key_BGSK, value_BGSK = cache.append(self.layer, step, key_BGSK, value_BGSK)
        # Autocast leaves norms in float32 and the value in half; attention wants all three alike.
        dtype = value_BGSK.dtype
        mixed_BHTK = F.scaled_dot_product_attention(
            query_BHTK.to(dtype),
            self._repeat(key_BGSK.to(dtype)),
            self._repeat(value_BGSK),
            attn_mask=mask,
            is_causal=mask is None,
        )
        return self.output(mixed_BHTK.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]  # nn.Module.__call__

    def _split(self, hidden: Tensor, num_heads: int) -> Tensor:
        """[B, T, heads * K] -> [B, heads, T, K]"""
        return hidden.unflatten(-1, (num_heads, self.head_width)).transpose(1, 2)

    def _repeat(self, hidden_BGSK: Tensor) -> Tensor:
        """[B, G, S, K] -> [B, H, S, K]: by hand, because `enable_gqa` is not on every device torch
        knows.
        """
        copies = self.num_heads // self.num_kv_heads
        return hidden_BGSK if copies == 1 else hidden_BGSK.repeat_interleave(copies, dim=1)


def rotation_of(positions: Tensor, head_width: int, theta: float) -> Rotation:
    """Cosines and sines [..., T, R] in float32 for integer positions [..., T].

    Made anew in every forward: it is tiny, and a model without buffers needs no care on the meta
    device or in casts.
    """
    exponents_R = (
        torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32) / head_width
    )
    angles_TR = positions.float()[..., None] * (1.0 / theta**exponents_R)
    return angles_TR.cos(), angles_TR.sin()


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Turns each pair (i, i + K/2) of a head [B, H, T, K] by its token's angle; same dtype out as
    in.
    """
    cos, sin = rotation
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(
        heads.dtype
    )
