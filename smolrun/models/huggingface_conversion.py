"""Conversion between our decoder and Hugging Face checkpoints: parameter names and config.json.

    ours         blocks.3.attention.key.weight
    gpt2         h.3.attn.c_attn.weight, the second third, transposed (Conv1D; q, k, v in one)
    the others   layers.3.self_attn.k_proj.weight

Pure name maps for gpt2, llama (SmolLM and SmolLM2 too), mistral, qwen2, qwen3, and with experts
mixtral and qwen3_moe: it reads no files and needs no transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from smolrun.errors import ConfigError
from smolrun.models.shape import DecoderShape, MoeShape, RopeScaling

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")


@dataclass(frozen=True)
class TensorLocation:
    """A parameter's place: the tensor's name, which of its equal parts, whether transposed."""

    name: str
    part: int = 0
    parts: int = 1
    is_transposed: bool = False


_GPT2_OUTSIDE = {
    "token_embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
_GPT2_INSIDE = {
    "attention_norm": ("ln_1", 0),
    "attention.query": ("attn.c_attn", 0),
    "attention.key": ("attn.c_attn", 1),
    "attention.value": ("attn.c_attn", 2),
    "attention.output": ("attn.c_proj", 0),
    "feed_forward_norm": ("ln_2", 0),
    "feed_forward.up": ("mlp.c_fc", 0),
    "feed_forward.down": ("mlp.c_proj", 0),
}
_LLAMA_OUTSIDE = {"token_embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_LLAMA_INSIDE = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
# Of one expert, behind its number; the module of a block that holds router and experts.
_EXPERT = {
    "mixtral": {"gate": "w1", "up": "w3", "down": "w2"},
    "qwen3_moe": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
}
_MOE = {"mixtral": "block_sparse_moe", "qwen3_moe": "mlp"}


def location_of(name: str, family: str) -> TensorLocation:
    """Where our parameter `name` lies in a checkpoint of `family`.

    Raises ConfigError if the family has no such part, or is unknown.
    """
    module, _, leaf = name.rpartition(".")  # blocks.3.attention.key, weight
    layer = ""
    if module.startswith("blocks."):
        _, layer, module = module.split(".", 2)
    try:
        if family == "gpt2" and layer:
            inside, part = _GPT2_INSIDE[module]
            parts = 3 if inside == "attn.c_attn" else 1
            is_transposed = leaf == "weight" and not inside.startswith("ln_")
            return TensorLocation(
                f"transformer.h.{layer}.{inside}.{leaf}", part, parts, is_transposed
            )
        if family == "gpt2":
            return TensorLocation(f"{_GPT2_OUTSIDE[module]}.{leaf}")
        if family in _MOE and module.startswith("feed_forward."):
            return TensorLocation(f"model.layers.{layer}.{_of_experts(module, family)}.{leaf}")
        if family in FAMILIES and layer:
            return TensorLocation(f"model.layers.{layer}.{_LLAMA_INSIDE[module]}.{leaf}")
        if family in FAMILIES:
            return TensorLocation(f"{_LLAMA_OUTSIDE[module]}.{leaf}")
    except KeyError:
        raise ConfigError(f"a {family} checkpoint has no place for the parameter {name}") from None
    raise ConfigError(f"unknown model family {family!r}: must be one of {', '.join(FAMILIES)}")


def _of_experts(module: str, family: str) -> str:
    """Of feed_forward.router, or of feed_forward.experts.7.up."""
    _, kind, *place = module.split(".")
    if kind == "router":
        return f"{_MOE[family]}.gate"
    number, part = place
    return f"{_MOE[family]}.experts.{number}.{_EXPERT[family][part]}"


def from_huggingface(
    tensors: Mapping[str, Tensor], names: Iterable[str], family: str
) -> dict[str, Tensor]:
    """Our parameters `names` from a checkpoint; a stage of layers asks for its own names only.

    GPT-2 checkpoints come with and without the prefix "transformer."; both are read. Raises
    ConfigError naming a tensor that is missing.
    """
    found = {}
    for name in names:
        place = location_of(name, family)
        source = place.name if place.name in tensors else place.name.removeprefix("transformer.")
        if source not in tensors:
            raise ConfigError(f"the {family} checkpoint lacks {place.name}, which {name} needs")
        tensor = tensors[source].chunk(place.parts, dim=-1)[place.part]
        found[name] = (tensor.T if place.is_transposed else tensor).contiguous()
    return found


def to_huggingface(parameters: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """A checkpoint's tensors from all our parameters, without tied heads, as its own files are."""
    import torch  # seconds: the maps alone do not need it

    pieces: dict[str, dict[int, Tensor]] = {}
    for name, tensor in parameters.items():
        place = location_of(name, family)
        pieces.setdefault(place.name, {})[place.part] = tensor.T if place.is_transposed else tensor
    return {
        name: torch.cat([parts[i] for i in range(len(parts))], dim=-1).contiguous()
        for name, parts in pieces.items()
    }


def decoder_keys_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `decoder.build` for a Hugging Face config.json.

    Raises ConfigError for what our decoder cannot be.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(f"model_type={family!r}: our decoder can be {', '.join(FAMILIES)}")
    return _gpt2_keys(config) if family == "gpt2" else _llama_keys(config, str(family))


def _gpt2_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    _refuse_unless(config, "activation_function", "gelu_new", "gelu_pytorch_tanh")
    _refuse_unless(config, "scale_attn_weights", True)
    _refuse_unless(config, "scale_attn_by_inverse_layer_idx", False)
    return {
        "vocab_size": config["vocab_size"],
        "layers": config["n_layer"],
        "width": config["n_embd"],
        "heads": config["n_head"],
        "kv_heads": None,
        "head_width": None,
        "ffn_width": config.get("n_inner"),
        "max_sequence_length": config["n_positions"],
        "position": "learned",
        "norm": "layernorm",
        "activation": "gelu",
        "tie_embeddings": config.get("tie_word_embeddings", True),
        "attention_bias": True,
        "mlp_bias": True,
        "qk_norm": False,
        "sliding_window": None,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "moe": None,
    }


def _llama_keys(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    _refuse_unless(config, "hidden_act", "silu")
    width = "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"
    return {
        "vocab_size": config["vocab_size"],
        "layers": config["num_hidden_layers"],
        "width": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "kv_heads": config.get("num_key_value_heads"),
        "head_width": config.get("head_dim"),
        "ffn_width": config[width],
        "max_sequence_length": config["max_position_embeddings"],
        "position": "rope",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "tie_embeddings": config.get("tie_word_embeddings", False),
        # Qwen2 always has biases on query, key and value and never on the output.
        "attention_bias": "qkv" if family == "qwen2" else config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
        "qk_norm": family in ("qwen3", "qwen3_moe"),
        "sliding_window": _sliding_window(config, family),
        "rope_theta": _rope_theta(config),
        "rope_scaling": _rope_scaling(config),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "moe": _moe_keys(config, family) if family in _MOE else None,
    }


def _moe_keys(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """The section `moe`; a file says nothing of a z-loss."""
    _refuse_unless(config, "router_jitter_noise", 0.0)
    _refuse_unless(config, "decoder_sparse_step", 1)
    _refuse_unless(config, "mlp_only_layers", [], None)
    names = ("num_experts", "num_local_experts")  # both occur, in files of either family
    return {
        "experts": next(config[name] for name in names if config.get(name) is not None),
        "experts_per_token": config["num_experts_per_tok"],
        "norm_topk_prob": family == "mixtral" or config.get("norm_topk_prob", False),
        "capacity_factor": None,
        "balance_loss": config.get("router_aux_loss_coef", 0.001),
        "z_loss": 0.0,
    }


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`rope_parameters` (transformers 5), or `rope_scaling` (before)."""
    rope: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope


def _rope_theta(config: Mapping[str, Any]) -> float:
    """From `rope_parameters` (transformers 5), or `rope_theta` (before)."""
    return float(_rope(config).get("rope_theta", config.get("rope_theta", 10000.0)))


def _rope_scaling(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The key `rope_scaling`; raises ConfigError for a kind that is neither plain nor Llama 3's."""
    rope = _rope(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ConfigError(f"rope_type={kind!r}: our decoder knows plain rope and llama3 only")
    lacking = [field.name for field in fields(RopeScaling) if field.name not in rope]
    if lacking:
        raise ConfigError(f"rope_type='llama3' needs {', '.join(lacking)} beside it")
    return {field.name: rope[field.name] for field in fields(RopeScaling)}


def _sliding_window(config: Mapping[str, Any], family: str) -> int | None:
    """One window for all layers, or none; Qwen's files name a window even if it is not used."""
    window = config.get("sliding_window")
    if window is None or family == "llama":
        return None
    if family in ("mistral", "mixtral"):
        return int(window)
    if not config.get("use_sliding_window", False):
        return None
    layers = config["num_hidden_layers"]
    kinds = config.get("layer_types") or [
        "full_attention" if layer < config.get("max_window_layers", layers) else "sliding_attention"
        for layer in range(layers)
    ]
    if len(set(kinds)) > 1:
        raise ConfigError("our decoder knows no sliding window on some layers only")
    return int(window) if "sliding_attention" in kinds else None


def _refuse_unless(config: Mapping[str, Any], key: str, *allowed: Any) -> None:
    if config.get(key, allowed[0]) not in allowed:
        choices = " or ".join(map(repr, allowed))
        raise ConfigError(f"{key}={config[key]!r}: our decoder needs {choices}")


_CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
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
    "mixtral": {**_MISTRAL, "mlp_bias": [False]},
    "qwen3_moe": {
        **_MISTRAL,
        "attention_bias": [True, False],
        "mlp_bias": [False],
        "qk_norm": [True],
    },
}


def family_of(shape: DecoderShape) -> str:
    """The first family that the decoder fits; ConfigError names the keys that fit none."""
    misfits = {
        family: _misfits(shape, rules)
        for family, rules in _FAMILIES.items()
        if (family in _MOE) == (shape.moe is not None)
    }
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
    if rules is _FAMILIES["mixtral"] and shape.moe and not shape.moe.norm_topk_prob:
        wrong.append("moe.norm_topk_prob=False")
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
    if family in ("qwen2", "qwen3", "qwen3_moe"):
        has_window = shape.sliding_window is not None
        keys |= {
            "use_sliding_window": has_window,
            "max_window_layers": 0 if has_window else shape.layers,
        }
    return keys | ({} if shape.moe is None else _moe(shape.moe, shape.ffn_width, family))


def _moe(moe: MoeShape, expert_width: int, family: str) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "num_experts_per_tok": moe.experts_per_token,
        "router_aux_loss_coef": moe.balance_loss,
    }
    if family == "mixtral":
        return keys | {"num_local_experts": moe.experts, "router_jitter_noise": 0.0}
    return keys | {
        "num_experts": moe.experts,
        "moe_intermediate_size": expert_width,
        "norm_topk_prob": moe.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
