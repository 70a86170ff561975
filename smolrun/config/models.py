"""Group `model`: the network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from smolrun.config.base import (
    Count,
    CustomTargetConfig,
    Kind,
    Name,
    NotNegative,
    Positive,
    Section,
    Share,
    TargetConfig,
    chosen_by_target,
    module_and_name,
)

PRETRAINED_NAMES = {
    "llama32_1b": "meta-llama/Llama-3.2-1B-Instruct",
    "qwen3_4b": "Qwen/Qwen3-4B",
    "qwen3_14b": "Qwen/Qwen3-14B",
    "qwen3_30b_a3b": "Qwen/Qwen3-30B-A3B",
    "qwen3_32b": "Qwen/Qwen3-32B",
}
"""Shipped shape -> the name of its weights on the hub, which task=serve loads."""

PRETRAINED_PARAMETERS = {
    "llama32_1b": 1.24e9,
    "qwen3_4b": 4.02e9,
    "qwen3_14b": 14.8e9,
    "qwen3_30b_a3b": 30.5e9,
    "qwen3_32b": 32.8e9,
}
"""Of these, smallest first."""


class ModelConfig(TargetConfig):
    """What the checks ask of a model. The defaults are those of the user's own."""

    consumes: ClassVar[Kind | None] = None  # None: not known before it is loaded
    loss: Annotated[Name, AfterValidator(module_and_name)] | None = Field(
        default=None,
        json_schema_extra={"allowed": "module:name, of your own code, or null"},
        description="Your own loss(logits, targets), the loss of each target; null = cross entropy",
    )

    def keywords(self) -> dict[str, Any]:
        """Without `loss`, which is no argument of the target."""
        return self.model_dump(exclude={"name", "target", "loss"})


class RopeScalingConfig(Section):
    """RoPE scaling for sequences longer than in pretraining."""

    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Count

    @model_validator(mode="after")
    def _low_is_below_high(self) -> RopeScalingConfig:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be above low_freq_factor")
        return self


class MoeConfig(Section):
    """Experts in place of the feed-forward layer of every block."""

    experts: Count
    experts_per_token: Count
    norm_topk_prob: bool
    capacity_factor: Positive | None
    balance_loss: NotNegative
    z_loss: NotNegative

    @model_validator(mode="after")
    def _there_are_as_many(self) -> MoeConfig:
        if self.experts_per_token > self.experts:
            raise ValueError(f"experts_per_token must be at most experts = {self.experts}")
        return self


class DecoderConfig(ModelConfig):
    """A GPT-like decoder: the models `gpt_*` and `moe_*`."""

    consumes: ClassVar[Kind | None] = "tokens"
    target: Literal["smolrun.models.decoder:build"]
    vocab_size: Count | None
    layers: Count
    width: Count
    heads: Count
    kv_heads: Count | None
    head_width: Count | None
    ffn_width: Count | None
    max_sequence_length: Count
    position: Literal["rope", "learned"]
    norm: Literal["rmsnorm", "layernorm"]
    activation: Literal["swiglu", "gelu"]
    tie_embeddings: bool
    attention_bias: bool | Literal["qkv"]
    mlp_bias: bool
    qk_norm: bool
    sliding_window: Count | None
    rope_theta: Positive
    rope_scaling: RopeScalingConfig | None
    norm_eps: Positive
    moe: MoeConfig | None = None  # runs of earlier versions have no such key


class MlpConfig(ModelConfig):
    """A plain multi-layer perceptron for feature vectors."""

    consumes: ClassVar[Kind | None] = "features"
    target: Literal["smolrun.models.mlp:build"]
    widths: list[Count]
    activation: Literal["relu", "gelu"]


class _NetworkConfig(ModelConfig):
    """Keys of every model whose code is transformers' own."""

    consumes: ClassVar[Kind | None] = "tokens"
    pretrained: bool
    attention: Literal["auto", "eager", "sdpa"]
    dropout: Share


class HuggingFaceConfig(_NetworkConfig):
    """Any causal language model of transformers; `model.name` is a folder or a name of the hub."""

    name: Name
    target: Literal["smolrun.models.huggingface:build"]
    revision: Name | None


class SmolLM2Config(_NetworkConfig):
    """SmolLM2-135M-Instruct, fetched from the package index."""

    target: Literal["smolrun.models.smollm2:build"]


class TrainedConfig(ModelConfig):
    """The model of an earlier run."""

    target: Literal["smolrun.models.trained:find"]
    run: Name


class CustomModelConfig(CustomTargetConfig, ModelConfig, extra="allow"):
    """The user's own model."""


if TYPE_CHECKING:
    AnyModel = ModelConfig
else:
    AnyModel = chosen_by_target(
        CustomModelConfig, DecoderConfig, MlpConfig, HuggingFaceConfig, SmolLM2Config, TrainedConfig
    )
