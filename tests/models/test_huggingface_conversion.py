"""Our decoder against transformers' own models: the same numbers, both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from smolrun.errors import ConfigError
from smolrun.models.decoder import Decoder, build
from smolrun.models.huggingface_conversion import (
    decoder_keys_from_hf,
    from_huggingface,
    location_of,
    to_huggingface,
)
from smolrun.models.initialise import build_model
from tests.models.tiny import Spec

LLAMA = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT2 = {
    "vocab_size": 61,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# As Llama 3.1 has it, but for a text of 16 tokens, so that every kind of angle is there.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = [
    pytest.param("gpt2", GPT2, id="gpt2"),
    pytest.param("llama", LLAMA, id="llama"),
    pytest.param("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True}, id="llama-biases"),
    pytest.param(
        "llama", {**LLAMA, "tie_word_embeddings": True, "num_key_value_heads": 1}, id="smollm"
    ),
    pytest.param("qwen2", LLAMA, id="qwen2"),
    pytest.param(
        "qwen2",
        {**LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
        id="qwen2-window",
    ),
    pytest.param("qwen3", {**LLAMA, "head_dim": 16}, id="qwen3"),
    pytest.param("llama", {**LLAMA, "rope_parameters": LLAMA3_ROPE}, id="llama3"),
    pytest.param("mistral", {**LLAMA, "sliding_window": 6, "rope_theta": 500.0}, id="mistral"),
]


def huggingface_model(family: str, keys: dict[str, Any]) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **keys)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # norms and biases must matter too
    return model


def ours_for(config: dict[str, Any]) -> Decoder:
    keys = decoder_keys_from_hf(config)
    model = build_model(lambda: build(Spec(), **keys), 0, dtype=torch.float32, device="cpu")
    assert isinstance(model, Decoder)
    return model


@pytest.mark.parametrize(("family", "keys"), CONFIGS)
def test_logits_equal_both_ways(family: str, keys: dict[str, Any]) -> None:
    theirs = huggingface_model(family, keys)
    ours = ours_for(theirs.config.to_dict())
    fresh = {name: value.clone() for name, value in ours.state_dict().items()}
    inputs = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(1))

    ours.load_state_dict(from_huggingface(theirs.state_dict(), fresh, family))
    with torch.no_grad():
        expected = theirs(inputs).logits
        assert expected.abs().max() > 0.5
        assert (ours(inputs) - expected).abs().max() < 1e-5

    ours.load_state_dict(fresh)
    missing, unexpected = theirs.load_state_dict(to_huggingface(fresh, family), strict=False)
    theirs.tie_weights()
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied: files hold it once
    with torch.no_grad():
        assert (ours(inputs) - theirs(inputs).logits).abs().max() < 1e-5


def test_a_stretch_of_layers_reads_its_own_tensors_only() -> None:
    theirs = huggingface_model("gpt2", GPT2)
    keys = decoder_keys_from_hf(theirs.config.to_dict())
    with torch.device("meta"):
        names = list(build(Spec(), 1, 1, False, False, **keys).state_dict())
    available = {name: tensor for name, tensor in theirs.state_dict().items() if ".h.1." in name}
    assert set(from_huggingface(available, names, "gpt2")) == set(names)
    without_prefix = {
        name.removeprefix("transformer."): tensor for name, tensor in available.items()
    }
    assert set(from_huggingface(without_prefix, names, "gpt2")) == set(names)
    with pytest.raises(ConfigError, match=r"lacks transformer\.h\.2\.ln_1\.weight"):
        from_huggingface(available, ["blocks.2.attention_norm.weight"], "gpt2")


def test_a_config_file_made_before_transformers_5_is_read() -> None:
    keys = decoder_keys_from_hf(
        {**LLAMA, "model_type": "llama", "rope_theta": 5e5, "rope_scaling": None}
    )
    assert keys["rope_theta"] == 5e5
    assert keys["tie_embeddings"] is False
    unused_window = {
        **LLAMA,
        "model_type": "qwen2",
        "sliding_window": 4096,
        "use_sliding_window": False,
    }
    assert decoder_keys_from_hf(unused_window)["sliding_window"] is None
    assert decoder_keys_from_hf({**GPT2, "model_type": "gpt2"})["tie_embeddings"] is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type='bert'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (
            {**EXPERTS, "model_type": "qwen3_moe", "mlp_only_layers": [0]},
            r"mlp_only_layers=\[0\]",
        ),
        ({**EXPERTS, "model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ({**EXPERTS, "model_type": "mixtral", "router_jitter_noise": 0.1}, "router_jitter_noise"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "rope_type='yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs low_freq_factor"),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 2,
            },
            "on some layers only",
        ),
    ],
)
def test_models_that_our_decoder_cannot_be_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        decoder_keys_from_hf({**LLAMA, "model_type": "llama", **changes})


def test_unknown_parameters_and_families_are_refused() -> None:
    with pytest.raises(ConfigError, match="no place for the parameter"):
        location_of("blocks.0.attention.query_norm.weight", "gpt2")
    with pytest.raises(ConfigError, match="unknown model family"):
        location_of("norm.weight", "bert")
