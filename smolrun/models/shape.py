"""The numbers that make a decoder a GPT-2, a Llama or a Qwen: its keys, completed and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

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
    return problems
