"""Small random models of transformers whose best token is clearly ahead, and their own text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.models.test_huggingface_conversion import LLAMA3_ROPE

SMALL: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GPT2: dict[str, Any] = {
    "vocab_size": 211,
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 160,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "llama": ("llama", {**SMALL, "attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama", {**SMALL, "rope_parameters": LLAMA3_ROPE}),
    "smollm": ("llama", {**SMALL, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", SMALL),
    "qwen3": ("qwen3", {**SMALL, "head_dim": 32}),
    "mistral": ("mistral", {**SMALL, "sliding_window": 20}),
    "mixtral": ("mixtral", {**SMALL, "num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", {**SMALL, "num_experts": 6, "num_experts_per_tok": 2}),
}
LEAST_MARGIN = 1e-4  # between the two largest logits: below it rounding may decide


@dataclass(frozen=True)
class Text:
    """A prompt, the greedy tokens after it, and by how much each was ahead of the second one."""

    prompt: list[int]
    tokens: list[int]
    margins: list[float]


def save_model(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **keys: Any) -> Any:
    """A folder with a random model of FAMILIES in it; returns transformers' own one."""
    torch.manual_seed(0)
    family, base = FAMILIES[kind]
    config = transformers.AutoConfig.for_model(family, **{**base, **keys})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            # Logits of real models spread by 2 to 3; those of a fresh one hardly differ.
            parameter.copy_(noise * 0.3 if parameter.ndim > 1 else parameter + noise * 0.1)
    model.save_pretrained(folder)
    return model


def texts_of(model: Any, count: int, num_tokens: int, seed: int = 0) -> list[Text]:
    """Greedy texts of transformers' `generate` after random prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1 + (number * 11 + 6) % 43 for number in range(count)]
    prompts = [torch.randint(0, 211, (length,), generator=generator) for length in lengths]
    longest = max(lengths)  # transformers wants its padding on the left
    padded = [torch.cat((prompt.new_zeros(longest - len(prompt)), prompt)) for prompt in prompts]
    masks = [torch.arange(longest) >= longest - length for length in lengths]
    model.generation_config.eos_token_id = None
    made = model.generate(
        torch.stack(padded),
        attention_mask=torch.stack(masks).long(),
        max_new_tokens=num_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(made.logits, 1).topk(2).values  # [count, num_tokens, 2]
    margins = (best[..., 0] - best[..., 1]).tolist()
    tokens = made.sequences[:, longest:].tolist()
    return [
        Text(prompt.tolist(), *row) for prompt, *row in zip(prompts, tokens, margins, strict=True)
    ]
