"""Llama 3's stretched rotary angles: transformers' own numbers, and bad keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from smolrun.errors import ConfigError
from smolrun.models.attention import rotation_of
from smolrun.models.shape import rope_scaling_of
from tests.models.tiny import MakeDecoder

LLAMA_32: dict[str, Any] = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_angles_are_those_of_transformers() -> None:
    config = transformers.LlamaConfig(
        head_dim=64, rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA_32}
    )
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    positions = torch.tensor([0, 1, 2, 1000])
    cos, sin = rotation_of(positions, 64, 500000.0, rope_scaling_of(LLAMA_32))
    angles = positions[:, None] * frequencies
    torch.testing.assert_close(cos, angles.cos(), atol=2e-4, rtol=0)
    torch.testing.assert_close(sin, angles.sin(), atol=2e-4, rtol=0)
    torch.testing.assert_close(cos[1].acos(), frequencies, atol=1e-3, rtol=0)
    plain, _ = rotation_of(positions, 64, 500000.0)
    assert (plain - cos).abs().max() > 0.5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"factor": 8.0}, "needs factor, low_freq_factor"),
        ({**LLAMA_32, "kind": 1.0}, "found .*kind"),
        ({**LLAMA_32, "factor": 0.0}, "must be above 0"),
        ({**LLAMA_32, "high_freq_factor": 1.0}, "above low_freq_factor"),
    ],
)
def test_bad_keys_are_refused(
    make_decoder: MakeDecoder, keys: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_decoder(rope_scaling=keys)
