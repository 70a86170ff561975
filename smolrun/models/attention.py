"""Causal self-attention: grouped key/value heads, rotary positions, qk-norm, sliding window.

Shape suffixes: B batch, T tokens, S keys (= T without a cache), D width, H heads,
G key/value heads, K head width, R = K / 2 rotated pairs.
Source: arXiv:1706.03762 (attention), 2104.09864 (rotary positions), 2305.13245 (grouped heads),
2302.05442 (qk-norm).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolrun.models.kv_cache import CacheStep
from smolrun.models.shape import DecoderShape, RopeScaling

Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class AttentionInputs:
    """The inputs that all attention layers share in one forward: rotation, mask, cache.

    `mask` is True where a query attends to a key, broadcast to [B, H, T, S]; None means plain
    causal. `rotation` is None for learned positions, `step` is None without a cache.
    """

    rotation: Rotation | None
    mask: Tensor | None
    step: CacheStep | None = None


class Attention(nn.Module):
    """Multi-head attention of each token to itself and earlier tokens."""

    def __init__(self, shape: DecoderShape, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads = shape.heads, shape.kv_heads
        self.head_width = shape.head_width
        inner, kv_inner = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
        input_bias, output_bias = shape.attention_bias is not False, shape.attention_bias is True
        self.query = nn.Linear(shape.width, inner, bias=input_bias)
        self.key = nn.Linear(shape.width, kv_inner, bias=input_bias)
        self.value = nn.Linear(shape.width, kv_inner, bias=input_bias)
        self.output = nn.Linear(inner, shape.width, bias=output_bias)
        self.query_norm = _head_norm(shape)
        self.key_norm = _head_norm(shape)

    def forward(self, hidden_BTD: Tensor, shared: AttentionInputs) -> Tensor:
        query_BHTK = self.query_norm(self._split(self.query(hidden_BTD), self.num_heads))
        key_BGSK = self.key_norm(self._split(self.key(hidden_BTD), self.num_kv_heads))
        value_BGSK = self._split(self.value(hidden_BTD), self.num_kv_heads)
        if shared.rotation is not None:
            query_BHTK = rotate(query_BHTK, shared.rotation)
            key_BGSK = rotate(key_BGSK, shared.rotation)
        if shared.step is not None:
            key_BGSK, value_BGSK = shared.step.append(self.layer, key_BGSK, value_BGSK)
        # Autocast leaves norms in float32 and the value in half; attention wants all three alike.
        dtype = value_BGSK.dtype
        mixed_BHTK = F.scaled_dot_product_attention(
            query_BHTK.to(dtype),
            self._repeat(key_BGSK.to(dtype)),
            self._repeat(value_BGSK),
            attn_mask=shared.mask,
            is_causal=shared.mask is None,
        )
        output_BTD: Tensor = self.output(mixed_BHTK.transpose(1, 2).flatten(2))
        return output_BTD

    def _split(self, hidden: Tensor, num_heads: int) -> Tensor:
        """[B, T, heads * K] -> [B, heads, T, K]"""
        heads: Tensor = hidden.unflatten(-1, (num_heads, self.head_width))
        return heads.transpose(1, 2)

    def _repeat(self, hidden_BGSK: Tensor) -> Tensor:
        """[B, G, S, K] -> [B, H, S, K]: explicit, as not every device supports `enable_gqa`."""
        copies = self.num_heads // self.num_kv_heads
        return hidden_BGSK if copies == 1 else hidden_BGSK.repeat_interleave(copies, dim=1)


class HeadNorm(nn.RMSNorm):
    """Norm of each head, in the weight's precision, also under autocast."""

    def forward(self, heads: Tensor) -> Tensor:
        return super().forward(heads.to(self.weight.dtype))


def _head_norm(shape: DecoderShape) -> nn.Module:
    return HeadNorm(shape.head_width, eps=shape.norm_eps) if shape.qk_norm else nn.Identity()


def rotation_of(
    positions: Tensor, head_width: int, theta: float, scaling: RopeScaling | None = None
) -> Rotation:
    """Cosines and sines [..., T, R] in float32 for whole positions [..., T].

    Made anew in every forward: it is tiny, and a model without buffers needs no care on the meta
    device or in casts.
    """
    pairs_R = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32)
    frequencies_R = 1.0 / theta ** (pairs_R / head_width)
    if scaling is not None:
        frequencies_R = _scaled(frequencies_R, scaling)
    angles_TR = positions.float()[..., None] * frequencies_R
    return angles_TR.cos(), angles_TR.sin()


def _scaled(frequencies_R: Tensor, scaling: RopeScaling) -> Tensor:
    """Source: arXiv:2407.21783 (Llama 3), after arXiv:2306.15595."""
    turns_R = scaling.original_max_position_embeddings * frequencies_R / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_R = ((turns_R - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies_R * (kept_R + (1.0 - kept_R) / scaling.factor)


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Turns each pair (i, i + K/2) of heads [B, H, T, K] by its token's angle; keeps the dtype."""
    cos, sin = rotation
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(heads.dtype)
