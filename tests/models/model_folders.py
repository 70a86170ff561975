"""Tiny random models of transformers, saved as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GPT2: dict[str, Any] = {
    "vocab_size": 61,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "tie_word_embeddings": True},
    "gpt2": GPT2,
    "qwen2": SMALL,
}


def save_model(
    folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **keys: Any
) -> Path:
    """A folder with a random model in it; returns it."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**FAMILIES.get(family, SMALL), **keys})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # norms and biases must matter too
    model.save_pretrained(folder)
    return folder


def change_config(folder: Path, **keys: Any) -> None:
    """Other keys in a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
