"""A small decoder to test with, and the keys to change it by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from smolrun.models.decoder import Decoder, build
from smolrun.models.initialise import build_model

TINY: dict[str, Any] = {
    "vocab_size": None,
    "layers": 4,
    "width": 32,
    "heads": 4,
    "kv_heads": None,
    "head_width": None,
    "ffn_width": None,
    "max_sequence_length": 48,
    "position": "rope",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "tie_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "qk_norm": False,
    "sliding_window": None,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "norm_eps": 1e-5,
    "moe": None,
}
GPT2 = {
    "position": "learned",
    "norm": "layernorm",
    "activation": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
}
QWEN = {"kv_heads": 2, "qk_norm": True, "head_width": 16, "tie_embeddings": False}
MISTRAL = {"kv_heads": 1, "sliding_window": 5}
MOE = {
    "experts": 4,
    "experts_per_token": 2,
    "norm_topk_prob": True,
    "capacity_factor": None,
    "balance_loss": 0.01,
    "z_loss": 0.001,
}
KINDS = [
    pytest.param(keys, id=name)
    for name, keys in (("gpt2", GPT2), ("qwen3", QWEN), ("mistral", MISTRAL), ("moe", {"moe": MOE}))
]


@dataclass(frozen=True)
class Spec:
    """What data would ask for."""

    num_outputs: int = 61
    num_inputs: int | None = None
    sequence_length: int | None = 48
    model_folder: str | None = None


MakeDecoder = Callable[..., Decoder]


def make_tiny_decoder(stage: tuple[Any, ...] = (), seed: int = 0, **keys: Any) -> Decoder:
    """A float32 decoder on the CPU; `stage` is what `build` takes before its star."""
    model = build_model(
        lambda: build(Spec(), *stage, **{**TINY, **keys}), seed, dtype=torch.float32, device="cpu"
    )
    assert isinstance(model, Decoder)
    return model


def enliven(model: Decoder) -> Decoder:
    """Makes all parameters large and different, so that nothing a test looks at is hidden by values
    near 0 or 1.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty(parameter.shape).normal_(0, 0.15, generator=generator))
    return model
