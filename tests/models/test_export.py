"""A checkpoint as a Hugging Face folder: loaded by transformers, it gives our logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from smolrun.checkpoints.folder import commit, part_folder
from smolrun.checkpoints.manifest import merge
from smolrun.checkpoints.reader import CheckpointReader
from smolrun.checkpoints.tensor_slice import TensorSlice
from smolrun.checkpoints.writer import write_shard
from smolrun.data.tokenizer import bytes_tokenizer, train_bpe
from smolrun.errors import ConfigError
from smolrun.models import export
from smolrun.models.huggingface_conversion import config_of, decoder_keys_from_hf, family_of
from tests.models.model_folders import FAMILIES, save_model
from tests.models.test_huggingface import make
from tests.models.test_rope_scaling import LLAMA_32
from tests.models.tiny import MOE, TINY, enliven, make_tiny_decoder

TOKENS = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(1))
GPT2 = {
    "position": "learned",
    "norm": "layernorm",
    "activation": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
}
IN_FILES = {**MOE, "z_loss": 0.0}  # which config.json does not have
SHAPES = [
    pytest.param("gpt2", GPT2, id="gpt2"),
    pytest.param("gpt2", {**GPT2, "tie_embeddings": False, "ffn_width": 40}, id="gpt2-untied"),
    pytest.param("llama", {}, id="llama"),
    pytest.param("llama", {"kv_heads": 2, "head_width": 12, "tie_embeddings": False}, id="grouped"),
    pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, id="biases"),
    pytest.param("llama", {"rope_scaling": {**LLAMA_32, "factor": 4.0}}, id="llama3"),
    pytest.param("mistral", {"sliding_window": 6, "kv_heads": 1}, id="mistral"),
    pytest.param("qwen2", {"attention_bias": "qkv", "rope_theta": 300.0}, id="qwen2"),
    pytest.param("qwen2", {"attention_bias": "qkv", "sliding_window": 5}, id="qwen2-window"),
    pytest.param("qwen3", {"qk_norm": True, "head_width": 16}, id="qwen3"),
    pytest.param("mixtral", {"moe": IN_FILES, "sliding_window": 6, "kv_heads": 2}, id="mixtral"),
    pytest.param(
        "qwen3_moe",
        {"qk_norm": True, "moe": {**IN_FILES, "norm_topk_prob": False}, "ffn_width": 24},
        id="qwen3_moe",
    ),
]


def save(folder: Path, model: nn.Module, state: Any = None, step: int = 7) -> Path:
    """A checkpoint of the model, cut into two ranks' pieces."""
    part = part_folder(folder, step, "t")
    reports = []
    for rank in (0, 1):
        pieces = []
        for name, value in model.named_parameters():
            flat, middle = value.detach().reshape(-1), value.numel() // 3
            half = flat[:middle] if rank == 0 else flat[middle:]
            pieces.append(TensorSlice(f"model/{name}", tuple(value.shape), rank * middle, half))
            pieces.append(
                TensorSlice(f"optimizer/m/{name}", tuple(value.shape), rank * middle, half)
            )
        reports.append(write_shard(part, rank, pieces))
    manifest = merge(
        reports, step=step, run_id="r", config_hash="c", world_size=2, state=state or {}
    )
    return commit(part, manifest)


def export_decoder(tmp_path: Path, model: nn.Module, keys: Any, dtype: str = "as_is") -> Path:
    out = tmp_path / "out"
    out.mkdir()
    with CheckpointReader(save(tmp_path, model)) as checkpoint:
        export.write_decoder(checkpoint, keys, out, dtype, lambda *_: None)
    export.check_loads(out)
    return out


@pytest.mark.parametrize(("family", "keys"), SHAPES)
def test_our_decoder_is_read_with_equal_logits(
    tmp_path: Path, family: str, keys: dict[str, Any]
) -> None:
    model = enliven(make_tiny_decoder(**keys))
    out = export_decoder(tmp_path, model, {**TINY, **keys})
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert theirs.config.model_type == family
    assert not told["missing_keys"] and not told["unexpected_keys"]
    with torch.no_grad():
        expected = model(TOKENS)
        assert expected.abs().max() > 0.5
        assert (theirs(TOKENS).logits - expected).abs().max() < 1e-5
    # What was written tells the same decoder again.
    again = decoder_keys_from_hf(json.loads((out / "config.json").read_text()))
    assert export.shape_of(again) == model.shape


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_transformers_comes_back_as_it_is(tmp_path: Path, family: str) -> None:
    source = save_model(tmp_path / "source", family)
    model = make(source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    out = tmp_path / "out"
    out.mkdir()
    with CheckpointReader(save(tmp_path, model)) as checkpoint:
        export.write_network(checkpoint, source, out, "as_is", lambda *_: None)
    export.check_loads(out)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        assert torch.equal(theirs(TOKENS).logits, model(TOKENS))
    assert (out / "generation_config.json").is_file()


@pytest.mark.parametrize(("asked", "expected"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_another_type_is_written_and_told(tmp_path: Path, asked: str, expected: str) -> None:
    out = export_decoder(tmp_path, make_tiny_decoder(), TINY, asked)
    assert json.loads((out / "config.json").read_text())["dtype"] == expected
    kinds = {value.dtype for value in load_file(out / "model.safetensors").values()}
    assert kinds == {getattr(torch, expected)}
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode


def test_large_models_come_in_several_files(tmp_path: Path) -> None:
    values = {f"layer.{number}": torch.full((10,), float(number)) for number in range(7)}
    readers = {name: (lambda value=value: value) for name, value in values.items()}
    export.write_tensors(readers, tmp_path, "as_is", lambda *_: None, most_bytes=100)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files][::3] == [
        "model-00001-of-00004.safetensors", "model-00004-of-00004.safetensors",
    ]  # fmt: skip
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 280
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], values[name])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"norm": "layernorm"}, "LlamaForCausalLM, which cannot have norm=layernorm"),
        ({**GPT2, "kv_heads": 2}, "GPT2LMHeadModel, which cannot have kv_heads=2"),
        (
            {"attention_bias": "qkv", "mlp_bias": True},
            "LlamaForCausalLM, which cannot have attention_bias=qkv",
        ),
        (
            {"moe": {**MOE, "norm_topk_prob": False}},
            "MixtralForCausalLM, which cannot have moe.norm_topk_prob=False",
        ),
    ],
)
def test_shapes_without_a_class_are_named(keys: dict[str, Any], message: str) -> None:
    shape = make_tiny_decoder(**keys).shape
    with pytest.raises(ConfigError, match=message):
        family_of(shape)


def test_a_checkpoint_of_another_model_is_seen(tmp_path: Path) -> None:
    out = export_decoder(tmp_path, make_tiny_decoder(), TINY)
    shape = make_tiny_decoder(layers=5).shape
    export.write_json(out / "config.json", config_of(shape, 61, "float32"))
    with pytest.raises(ConfigError, match=r"does not fit the checkpoint: model\.layers\.4"):
        export.check_loads(out)


def test_a_checkpoint_of_other_experts_is_seen(tmp_path: Path) -> None:
    out = export_decoder(tmp_path, make_tiny_decoder(moe=MOE), {**TINY, "moe": MOE})
    for other in ({"layers": 5}, {"ffn_width": 40}):
        shape = make_tiny_decoder(moe=MOE, **other).shape
        export.write_json(out / "config.json", config_of(shape, 61, "float32"))
        with pytest.raises(ConfigError, match="MixtralForCausalLM does not fit the checkpoint"):
            export.check_loads(out)


def test_our_tokenizers_are_read_by_transformers(tmp_path: Path) -> None:
    text = "def f(x):\n    return [x] * 2\n"
    for name, ours in (("bpe", train_bpe([text * 9], 300)), ("bytes", bytes_tokenizer())):
        source, out = tmp_path / name, tmp_path / f"{name}-out"
        source.mkdir()
        out.mkdir()
        ours.save(source)
        end_id = export.write_tokenizer(source, out)
        theirs = transformers.AutoTokenizer.from_pretrained(out)
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
        assert end_id == (ours.end_id if name == "bpe" else None)
        assert theirs.eos_token_id == end_id
