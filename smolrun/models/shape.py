"""The numbers that make a decoder a GPT-2, a Llama or a Qwen: its keys, completed and checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from smolrun.errors import ConfigError


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3 stretches rotary positions to texts longer than it was first trained on.

    Angles that turn slowly (less than low_freq_factor turns in the original length) turn `factor`
    times slower still, those with more than high_freq_factor turns stay, between them it blends.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class MoeShape:
    """Experts in place of the feed-forward layer of every block; see conf/model/moe_tiny.yaml."""

    experts: int
    experts_per_token: int
    norm_topk_prob: bool
    capacity_factor: float | None
    balance_loss: float
    z_loss: float

    def capacity(self, tokens: int) -> int | None:
        """Tokens of one sequence that an expert takes at most; None: all of them."""
        if self.capacity_factor is None:
            return None
        even = self.experts_per_token * tokens / self.experts
        return max(1, math.ceil(self.capacity_factor * even))


@dataclass(frozen=True)
class DecoderShape:
    """A decoder's keys with every null replaced by its number; see conf/model/gpt_tiny.yaml.

    Raises ConfigError with every problem found.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    ffn_width: int
    max_sequence_length: int
    position: Literal["rope", "learned"]
    norm: Literal["rmsnorm", "layernorm"]
    activation: Literal["swiglu", "gelu"]
    tie_embeddings: bool
    attention_bias: bool | Literal["qkv"]
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    rope_theta: float
    rope_scaling: RopeScaling | None
    norm_eps: float
    moe: MoeShape | None = None

    def __post_init__(self) -> None:
        problems = _problems(self)
        if problems:
            raise ConfigError(problems)


def rope_scaling_of(keys: Mapping[str, float] | None) -> RopeScaling | None:
    """From the key `rope_scaling`; raises ConfigError for keys that are missing or unknown."""
    if keys is None:
        return None
    needed = [field.name for field in fields(RopeScaling)]
    if set(keys) != set(needed):
        found = ", ".join(keys)
        raise ConfigError(f"model.rope_scaling needs {', '.join(needed)}, or null; found {found}")
    scaling = RopeScaling(
        keys["factor"],
        keys["low_freq_factor"],
        keys["high_freq_factor"],
        int(keys["original_max_position_embeddings"]),
    )
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if min(scaling.factor, low, scaling.original_max_position_embeddings) <= 0 or high <= low:
        raise ConfigError(
            f"model.rope_scaling={dict(keys)}: numbers must be above 0, and high_freq_factor "
            "above low_freq_factor"
        )
    return scaling


def completed_shape(
    *,
    kv_heads: int | None,
    head_width: int | None,
    ffn_width: int | None,
    rope_scaling: Mapping[str, float] | None,
    moe: Mapping[str, Any] | None = None,  # runs of earlier versions have no such key
    **keys: Any,
) -> DecoderShape:
    """The shape that the keys of `decoder.build` mean, all but vocab_size; ConfigError as there."""
    width, heads = keys["width"], keys["heads"]
    return DecoderShape(
        kv_heads=heads if kv_heads is None else kv_heads,
        head_width=default_head_width(width, heads) if head_width is None else head_width,
        ffn_width=default_ffn_width(width, keys["activation"]) if ffn_width is None else ffn_width,
        rope_scaling=rope_scaling_of(rope_scaling),
        moe=None if moe is None else MoeShape(**moe),
        **keys,
    )


def default_head_width(width: int, heads: int) -> int:
    """width / heads; raises ConfigError if that is not a whole number."""
    if heads < 1 or width % heads:
        remedy = f"must divide model.width={width}, or set model.head_width"
        raise ConfigError(f"model.heads={heads}: {remedy}")
    return width // heads


def default_ffn_width(width: int, activation: str) -> int:
    """4 x width for gelu, 8/3 x width for swiglu (in steps of 64): about as many parameters."""
    return 4 * width if activation == "gelu" else 64 * math.ceil(width * 8 / 3 / 64)


def _problems(shape: DecoderShape) -> list[str]:
    """Everything that cannot be built, one sentence each."""
    sizes = "layers width heads kv_heads head_width ffn_width max_sequence_length"
    problems = [
        f"model.{key}={getattr(shape, key)}: must be at least 1"
        for key in sizes.split()
        if getattr(shape, key) < 1
    ]
    choices = {
        "position": ("rope", "learned"),
        "norm": ("rmsnorm", "layernorm"),
        "activation": ("swiglu", "gelu"),
        "attention_bias": (True, False, "qkv"),
    }
    for key, allowed in choices.items():
        if getattr(shape, key) not in allowed:
            names = ", ".join(str(value).lower() for value in allowed)
            problems.append(f"model.{key}={getattr(shape, key)!r}: must be one of {names}")
    if shape.kv_heads >= 1 and shape.heads % shape.kv_heads:
        problems.append(f"model.kv_heads={shape.kv_heads}: must divide model.heads={shape.heads}")
    if shape.position == "rope" and shape.head_width % 2:
        problems.append(f"model.head_width={shape.head_width}: must be even, as rope turns pairs")
    if shape.sliding_window is not None and shape.sliding_window < 1:
        problems.append(f"model.sliding_window={shape.sliding_window}: must be at least 1, or null")
    return problems + ([] if shape.moe is None else _moe_problems(shape.moe))


def _moe_problems(moe: MoeShape) -> list[str]:
    problems = []
    if not 1 <= moe.experts_per_token <= moe.experts:
        problems.append(
            f"model.moe.experts_per_token={moe.experts_per_token}: must be within 1 .. "
            f"model.moe.experts={moe.experts}"
        )
    if moe.capacity_factor is not None and moe.capacity_factor <= 0:
        problems.append(
            f"model.moe.capacity_factor={moe.capacity_factor}: experts would take no token; must "
            "be above 0, or null to drop none"
        )
    losses = {"balance_loss": moe.balance_loss, "z_loss": moe.z_loss}
    negative = {key: value for key, value in losses.items() if value < 0}
    return problems + [
        f"model.moe.{key}={value}: must be at least 0" for key, value in negative.items()
    ]


def parameter_shapes(
    shape: DecoderShape,
    vocab_size: int,
    first_layer: int,
    last_layer: int,
    has_embedding: bool,
    has_head: bool,
) -> dict[str, tuple[int, ...]]:
    """The parameters of a stage of the decoder, without building it: names and shapes."""
    width = shape.width
    inner, kv_inner = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, outputs: int, inputs: int, has_bias: bool) -> None:
        found[f"{name}.weight"] = (outputs, inputs)
        if has_bias:
            found[f"{name}.bias"] = (outputs,)

    def norm(name: str) -> None:
        found[f"{name}.weight"] = (width,)
        if shape.norm == "layernorm":
            found[f"{name}.bias"] = (width,)

    if has_embedding or (has_head and shape.tie_embeddings):
        found["token_embedding.weight"] = (vocab_size, width)
    if has_embedding and shape.position == "learned":
        found["position_embedding.weight"] = (shape.max_sequence_length, width)
    for layer in range(first_layer, last_layer + 1):
        block = f"blocks.{layer}"
        norm(f"{block}.attention_norm")
        for name, size in (("query", inner), ("key", kv_inner), ("value", kv_inner)):
            linear(f"{block}.attention.{name}", size, width, shape.attention_bias is not False)
        linear(f"{block}.attention.output", width, inner, shape.attention_bias is True)
        if shape.qk_norm:
            found[f"{block}.attention.query_norm.weight"] = (shape.head_width,)
            found[f"{block}.attention.key_norm.weight"] = (shape.head_width,)
        norm(f"{block}.feed_forward_norm")
        if shape.moe is not None:
            linear(f"{block}.feed_forward.router", shape.moe.experts, width, has_bias=False)
        for part in feed_forwards(shape):
            for name in ("gate", "up") if shape.activation == "swiglu" else ("up",):
                linear(f"{block}.{part}.{name}", shape.ffn_width, width, shape.mlp_bias)
            linear(f"{block}.{part}.down", width, shape.ffn_width, shape.mlp_bias)
    if has_head:
        norm("norm")
        if not shape.tie_embeddings:
            linear("head", vocab_size, width, has_bias=False)
    return found


def feed_forwards(shape: DecoderShape) -> list[str]:
    """The names of the feed-forward layers of a block: one, or one for each expert."""
    if shape.moe is None:
        return ["feed_forward"]
    return [f"feed_forward.experts.{expert}" for expert in range(shape.moe.experts)]


@dataclass(frozen=True)
class ModelBytes:
    """Bytes of a decoder's parts; `shared` of embedding and head: a stage with both holds that
    once."""

    layers: int
    layer: int
    embedding: int
    head: int
    shared: int
    cache_per_token: int  # of one layer

    @property
    def weights(self) -> int:
        """Of the whole model on one rank."""
        return self.layers * self.layer + self.embedding + self.head - self.shared


def model_bytes(
    shape: DecoderShape,
    vocab_size: int,
    itemsize: int,
    size_of: Callable[[str, tuple[int, ...]], int] | None = None,
) -> ModelBytes:
    """The sizes of a decoder whose numbers have `itemsize` bytes; `size_of` says the bytes of a
    parameter by name and shape where weights are smaller."""

    def size(has_embedding: bool, has_head: bool) -> int:
        shapes = parameter_shapes(shape, vocab_size, 0, 0, has_embedding, has_head)
        if size_of is None:
            return itemsize * sum(map(math.prod, shapes.values()))
        return sum(size_of(name, one) for name, one in shapes.items())

    layer = size(False, False)
    return ModelBytes(
        layers=shape.layers,
        layer=layer,
        embedding=size(True, False) - layer,
        head=size(False, True) - layer,
        shared=size(True, False) + size(False, True) - layer - size(True, True),
        cache_per_token=2 * shape.kv_heads * shape.head_width * itemsize,
    )
