"""What a decoder is stacked from: norm, feed-forward and the block that joins them with attention.

Shape suffixes: B batch, T tokens, D width, F feed-forward width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from smolrun.models.attention import Attention, Sight
from smolrun.models.shape import DecoderShape


def norm_of(shape: DecoderShape) -> nn.Module:
    """A new norm over the width."""
    kind = nn.LayerNorm if shape.norm == "layernorm" else nn.RMSNorm
    return kind(shape.width, eps=shape.norm_eps)


class FeedForward(nn.Module):
    """Each token thinks for itself: width -> ffn_width -> width.

    Source: arXiv:2002.05202 (SwiGLU), 1606.08415 (GELU).
    """

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.is_gated = shape.activation == "swiglu"
        if self.is_gated:
            self.gate = nn.Linear(shape.width, shape.ffn_width, bias=shape.mlp_bias)
        self.up = nn.Linear(shape.width, shape.ffn_width, bias=shape.mlp_bias)
        self.down = nn.Linear(shape.ffn_width, shape.width, bias=shape.mlp_bias)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        if self.is_gated:
            inner_BTF = F.silu(self.gate(hidden_BTD)) * self.up(hidden_BTD)
        else:
            # GPT-2's GELU is the tanh approximation; its checkpoints need exactly this one.
            inner_BTF = F.gelu(self.up(hidden_BTD), approximate="tanh")
        output_BTD: Tensor = self.down(inner_BTF)
        return output_BTD


class Block(nn.Module):
    """Attention, then feed-forward; each reads a normed copy and adds to the residual stream."""

    def __init__(self, shape: DecoderShape, layer: int) -> None:
        super().__init__()
        self.attention_norm = norm_of(shape)
        self.attention = Attention(shape, layer)
        self.feed_forward_norm = norm_of(shape)
        self.feed_forward = FeedForward(shape)

    def forward(self, hidden_BTD: Tensor, sight: Sight) -> Tensor:
        hidden_BTD = hidden_BTD + self.attention(self.attention_norm(hidden_BTD), sight)
        output_BTD: Tensor = hidden_BTD + self.feed_forward(self.feed_forward_norm(hidden_BTD))
        return output_BTD
