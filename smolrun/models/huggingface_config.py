"""Which Hugging Face class our decoder is, and the config.json that says so: the way back of
`huggingface_names.decoder_keys_from_hf`.

Pure: it reads no files and needs no transformers.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from smolrun.errors import ConfigError
from smolrun.models.shape import DecoderShape

_CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_Rules = dict[str, list[Any]]
# What each family allows; an empty list allows everything.
_GPT2: _Rules = {
    "position": ["learned"],
    "norm": ["layernorm"],
    "activation": ["gelu"],
    "attention_bias": [True],
    "mlp_bias": [True],
    "qk_norm": [False],
    "sliding_window": [None],
}
_LLAMA: _Rules = {
    "position": ["rope"],
    "norm": ["rmsnorm"],
    "activation": ["swiglu"],
    "attention_bias": [True, False],
    "mlp_bias": [True, False],
    "qk_norm": [False],
    "sliding_window": [None],
}
_MISTRAL: _Rules = {**_LLAMA, "attention_bias": [False], "mlp_bias": [False], "sliding_window": []}
_FAMILIES: dict[str, _Rules] = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "qwen2": {**_MISTRAL, "attention_bias": ["qkv"]},
    "qwen3": {**_MISTRAL, "attention_bias": [True, False], "qk_norm": [True]},
}


def family_of(shape: DecoderShape) -> str:
    """The first family that the decoder fits; ConfigError names the keys that fit none."""
    misfits = {family: _misfits(shape, rules) for family, rules in _FAMILIES.items()}
    for family, wrong in misfits.items():
        if not wrong:
            return family
    nearest = min(misfits, key=lambda family: len(misfits[family]))
    raise ConfigError(
        "transformers has no class for this decoder; nearest is "
        f"{_CLASSES[nearest]}, which cannot have {', '.join(misfits[nearest])}"
    )


def config_of(shape: DecoderShape, vocab_size: int, dtype: str) -> dict[str, Any]:
    """config.json for the decoder, without its special tokens."""
    family = family_of(shape)
    shared = {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "vocab_size": vocab_size,
        "tie_word_embeddings": shape.tie_embeddings,
        "dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return shared | (_gpt2(shape) if family == "gpt2" else _llama(shape, family))


def _misfits(shape: DecoderShape, rules: _Rules) -> list[str]:
    wrong = [
        f"{key}={getattr(shape, key)}"
        for key, allowed in rules.items()
        if allowed and getattr(shape, key) not in allowed
    ]
    if rules is _GPT2:
        wrong += [f"kv_heads={shape.kv_heads}"] if shape.kv_heads != shape.heads else []
        is_even = shape.head_width * shape.heads == shape.width
        wrong += [] if is_even else [f"head_width={shape.head_width}"]
    return wrong


def _gpt2(shape: DecoderShape) -> dict[str, Any]:
    return {
        "activation_function": "gelu_new",
        "n_layer": shape.layers,
        "n_embd": shape.width,
        "n_head": shape.heads,
        "n_inner": shape.ffn_width,
        "n_positions": shape.max_sequence_length,
        "layer_norm_epsilon": shape.norm_eps,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def _llama(shape: DecoderShape, family: str) -> dict[str, Any]:
    scaling = {} if shape.rope_scaling is None else asdict(shape.rope_scaling)
    rope = {"rope_type": "llama3" if scaling else "default", **scaling}
    keys: dict[str, Any] = {
        "hidden_act": "silu",
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.width,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_width,
        "intermediate_size": shape.ffn_width,
        "max_position_embeddings": shape.max_sequence_length,
        "rms_norm_eps": shape.norm_eps,
        "attention_dropout": 0.0,
        # For transformers 5, and for the versions before it.
        "rope_parameters": {**rope, "rope_theta": shape.rope_theta},
        "rope_theta": shape.rope_theta,
        "rope_scaling": rope if scaling else None,
    }
    if family != "qwen2":
        keys["attention_bias"] = shape.attention_bias
    if family == "llama":
        keys["mlp_bias"] = shape.mlp_bias
    if family != "llama":
        keys["sliding_window"] = shape.sliding_window
    if family in ("qwen2", "qwen3"):
        has_window = shape.sliding_window is not None
        keys |= {
            "use_sliding_window": has_window,
            "max_window_layers": 0 if has_window else shape.layers,
        }
    return keys
