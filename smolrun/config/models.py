"""Group `model`: what to train."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, Tag

from smolrun.config.base import Count, Positive, Target
from smolrun.config.targets import Custom, Kind, own_target


class Decoder(Target):
    """A GPT-like decoder: the models `gpt_*`."""

    consumes: ClassVar[Kind | None] = "tokens"
    target: Literal["smolrun.models.decoder:build"]
    layers: Count = Field(description="Blocks, each one attention and one feed-forward layer")
    width: Count = Field(description="Size of the hidden vectors")
    heads: Count = Field(description="Query heads")
    kv_heads: Count | None = Field(
        description="Key and value heads, shared by groups of query heads; null = heads"
    )
    head_width: Count | None = Field(description="Size of one head; null = width / heads")
    ffn_width: Count | None = Field(
        description="Hidden size of the feed-forward layer; null = the usual multiple"
    )
    max_sequence_length: Count = Field(description="Longest sequence it can read, in tokens")
    position: Literal["rope", "learned"] = Field(description="How it knows the order of tokens")
    norm: Literal["rmsnorm", "layernorm"] = Field(
        description="Normalisation in front of each layer"
    )
    activation: Literal["swiglu", "gelu"] = Field(description="Inside the feed-forward layer")
    tie_embeddings: bool = Field(
        description="One matrix for reading tokens and for predicting them"
    )
    attention_bias: bool | Literal["qkv"] = Field(
        description="Biases in the attention projections; qkv = not in the last"
    )
    mlp_bias: bool = Field(description="Biases in the feed-forward layers")
    qk_norm: bool = Field(description="Normalise queries and keys per head")
    sliding_window: Count | None = Field(description="Tokens each one may look back at; null = all")
    rope_theta: Positive = Field(description="Base of the rotary angles")
    norm_eps: Positive = Field(description="Keeps the normalisation away from a division by zero")


class Mlp(Target):
    """A plain multi-layer perceptron for feature vectors."""

    consumes: ClassVar[Kind | None] = "features"
    target: Literal["smolrun.models.mlp:build"]
    widths: list[Count] = Field(description="Sizes of the hidden layers, first to last")
    activation: Literal["relu", "gelu"] = Field(description="Between the layers")


Model = Annotated[
    Annotated[Decoder, Tag("Decoder")] | Annotated[Mlp, Tag("Mlp")] | Custom,
    own_target(Decoder, Mlp),
]
