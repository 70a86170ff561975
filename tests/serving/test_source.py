"""Sources: folders and checkpoints of every kind, each stage reading its own tensors only."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from smolrun.checkpoints.folder import commit, part_folder
from smolrun.checkpoints.manifest import merge
from smolrun.checkpoints.tensor_slice import TensorSlice
from smolrun.checkpoints.writer import write_shard
from smolrun.data.tokenizer import load_tokenizer, train_bpe
from smolrun.errors import ConfigError, SmolrunError
from smolrun.models.decoder import Decoder
from smolrun.models.huggingface_conversion import from_huggingface
from smolrun.models.huggingface_network import load
from smolrun.models.shape import parameter_shapes
from smolrun.models.trained import TrainedModel
from smolrun.serving import source as source_module
from smolrun.serving.batch import Batch, Row
from smolrun.serving.source import (
    ModelSource,
    load_stage,
    source_of_checkpoint,
    source_of_folder,
)
from smolrun.serving.weight_quantization import dequantize
from tests.models.test_export import save
from tests.models.tiny import KINDS, TINY, enliven, make_tiny_decoder
from tests.serving.chain import Chain
from tests.serving.references import FAMILIES, save_model

TOKENS = torch.randint(0, 61, (20,), generator=torch.Generator().manual_seed(1)).tolist()


def logits_of(source: ModelSource, num_stages: int = 1) -> torch.Tensor:
    """Of TOKENS, by stages one behind the other."""
    source = msgspec.convert(json.loads(msgspec.json.encode(source)), ModelSource)  # as it travels
    chain, hidden = Chain(source, num_stages, capacity=40), None
    for stage in chain.stages:
        hidden = stage.run(Batch(0, [Row(0, 0, len(TOKENS), True, True)], TOKENS), hidden)
    assert hidden is not None
    return hidden


def trained_run(tmp_path: Path, model: torch.nn.Module, section: dict[str, Any]) -> TrainedModel:
    """A run's folder with a checkpoint of two ranks, and a tokenizer."""
    run = tmp_path / "run"
    (run / "tokenizer").mkdir(parents=True)
    train_bpe(["def f(x): return x" * 9], 300).save(run / "tokenizer")
    return TrainedModel(run, save(run, model), {"model": section})


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_folder_gives_the_logits_of_transformers(tmp_path: Path, kind: str) -> None:
    theirs = save_model(tmp_path, kind)
    source = source_of_folder(tmp_path, kind)
    assert (source.kind, source.vocab_size, source.dtype) == ("huggingface", 211, "float32")
    with torch.no_grad():
        expected = theirs(torch.tensor([TOKENS])).logits[0]
    assert (logits_of(source, 3) - expected).abs().max() < 2e-4


@pytest.mark.parametrize("keys", KINDS)
def test_a_run_of_our_decoder(tmp_path: Path, keys: dict[str, Any]) -> None:
    model = enliven(make_tiny_decoder(**keys))
    section = {"name": "gpt_tiny", "target": "smolrun.models.decoder:build", **TINY, **keys}
    trained = trained_run(tmp_path, model, section)
    source = source_of_checkpoint(trained, "mine")
    assert (source.family, source.vocab_size, source.shape) == ("smolrun", 61, model.shape)
    assert source.tokenizer_folder == str(trained.run_folder / "tokenizer")
    assert source.end_ids == [load_tokenizer(trained.run_folder / "tokenizer").end_id]
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS]))[0]
    assert (logits_of(source, 2) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["gpt2", "smollm", "qwen3"])
@pytest.mark.parametrize("keeps_config", [True, False])
def test_a_run_that_trained_a_model_of_transformers(
    tmp_path: Path, kind: str, keeps_config: bool
) -> None:
    folder = tmp_path / "folder"
    save_model(folder, kind)
    model = load(folder, pretrained=True, attention="eager", dropout=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)  # trained: not what is in the folder
    section = {"name": str(folder), "target": "smolrun.models.huggingface:build"}
    trained = trained_run(tmp_path, model, section)
    if keeps_config:
        (folder / "config.json").rename(trained.run_folder / "config.json")
        (trained.run_folder / "model").mkdir()
        (trained.run_folder / "config.json").rename(trained.run_folder / "model" / "config.json")
        source = source_of_checkpoint(trained, "mine")
    else:
        source = source_of_checkpoint(trained, "mine", folder)
    assert source.end_ids == [0]  # of config.json
    model.eval()
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS]))[0]
    assert (logits_of(source, 2) - expected).abs().max() < 2e-4


def test_the_average_is_served_where_a_run_kept_one(tmp_path: Path) -> None:
    model, average = make_tiny_decoder(seed=1), make_tiny_decoder(seed=2)
    slices = [TensorSlice.whole(f"model/{key}", value) for key, value in model.named_parameters()]
    slices += [
        TensorSlice.whole(f"average/{key}", value) for key, value in average.named_parameters()
    ]
    part = part_folder(tmp_path, 1, "t")
    reports = [write_shard(part, 0, slices)]
    manifest = merge(reports, step=1, run_id="r", config_hash="c", world_size=1, state={})
    section = {"name": "gpt_tiny", "target": "smolrun.models.decoder:build", **TINY}
    trained = TrainedModel(tmp_path, commit(part, manifest), {"model": section})
    with torch.no_grad():
        expected = average(torch.tensor([TOKENS]))[0]
    source = source_of_checkpoint(trained, "mine")
    assert (source.tokenizer_folder, source.end_ids) == (None, [])
    assert (logits_of(source) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("target", ["smolrun.models.mlp:build", "my_code:build"])
def test_runs_that_write_no_text_are_refused(tmp_path: Path, target: str) -> None:
    trained = trained_run(tmp_path, make_tiny_decoder(), {"name": "mlp", "target": target})
    with pytest.raises(ConfigError, match="only models that write text can be served"):
        source_of_checkpoint(trained, "mine")


@pytest.mark.parametrize("kind", ["gpt2", "llama", "smollm", "qwen3"])
def test_a_stage_reads_its_own_tensors_only(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path, kind)
    source = source_of_folder(tmp_path, kind)
    read: list[str] = []
    tensors = source_module._FolderTensors
    look_up = tensors.__getitem__

    def noted(self: Any, name: str) -> torch.Tensor:
        read.append(name)
        return look_up(self, name)

    monkeypatch.setattr(tensors, "__getitem__", noted)
    middle = load_stage(source, 1, 2, False, False, "float32")
    assert read and all(".1." in name or ".2." in name for name in read)
    assert set(middle) == set(source.parameter_shapes(1, 2, False, False))
    read.clear()
    load_stage(source, 3, 3, False, True, "float32")
    assert not any(".1." in name or ".2." in name for name in read)


def test_every_stage_has_the_names_and_shapes_of_the_decoder() -> None:
    for keys in (kind.values[0] for kind in KINDS):
        for stage in ((0, 3, True, True), (0, 1, True, False), (1, 2, False, False)):
            model = make_tiny_decoder(stage, **keys)  # type: ignore[arg-type]
            expected = {name: tuple(value.shape) for name, value in model.named_parameters()}
            assert parameter_shapes(model.shape, 61, *stage) == expected
    last = make_tiny_decoder((3, 3, False, True))
    assert isinstance(last, Decoder)
    expected = {name: tuple(value.shape) for name, value in last.named_parameters()}
    assert parameter_shapes(last.shape, 61, 3, 3, False, True) == expected


def split_files(folder: Path) -> None:
    """As large models come: several files and their index; and a copy in another format."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    index: dict[str, str] = {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[number::3]}
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    save_file({"layers.0.wq": torch.zeros(2)}, folder / "consolidated.safetensors")


def test_several_files_with_an_index(tmp_path: Path) -> None:
    theirs = save_model(tmp_path, "mistral")
    split_files(tmp_path)
    with torch.no_grad():
        expected = theirs(torch.tensor([TOKENS])).logits[0]
    assert (logits_of(source_of_folder(tmp_path, "m"), 2) - expected).abs().max() < 2e-4
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConfigError, match="not whole: model-00002-of-00003"):
        source_of_folder(tmp_path, "m")


def test_bf16_weights_are_served_as_bf16(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen2", torch.bfloat16)
    source = source_of_folder(tmp_path, "q")
    assert source.dtype == "bf16"
    loaded = load_stage(source, 0, 3, True, True, "bf16")
    assert {tensor.dtype for tensor in loaded.values()} == {torch.bfloat16}
    half = tmp_path / "half"
    save_model(half, "qwen2", torch.float16)
    assert source_of_folder(half, "q").dtype == "float32"  # bf16 would round its values


def test_a_missing_tensor_and_a_wrong_shape_are_named_before_loading(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.2.mlp.up_proj.weight"
    whole = tensors.pop(name)
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=rf"model tiny: in .*{name} is missing"):
        source_of_folder(tmp_path, "tiny")
    save_file({**tensors, name: whole[:-1].contiguous()}, path)
    with pytest.raises(ConfigError, match=r"has shape \[95, 64\], expected \[96, 64\]"):
        source_of_folder(tmp_path, "tiny")
    save_file({**tensors, name: whole}, path)
    source = source_of_folder(tmp_path, "tiny")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(SmolrunError, match="damaged"):
        load_stage(source, 0, 3, True, True, "float32")


def change_config(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "gpt_neox"}, "model tiny cannot be served: model_type='gpt_neox'"),
        ({"hidden_act": "gelu"}, "model tiny cannot be served: hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "a scheme that cannot be read .quant_method gptq, bits 4.*serving.weights=int4",
        ),
        ({"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}, "mode mxfp4, bits 4"),
        ({"quantization": {"bits": 3, "group_size": 64}}, "mode affine, bits 3, group_size 64"),
        ({"num_hidden_layers": 5}, r"model\.layers\.4\.input_layernorm\.weight is missing"),
        ({"vocab_size": 210}, r"embed_tokens\.weight has shape \[211, 64\], expected \[210, 64\]"),
    ],
)
def test_models_that_cannot_be_served_are_refused(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    save_model(tmp_path, "llama")
    change_config(tmp_path, **keys)
    with pytest.raises(ConfigError, match=message):
        source_of_folder(tmp_path, "tiny")


def write_as_mlx(folder: Path, bits: int, group_size: int) -> dict[str, torch.Tensor]:
    """Quantizes the matrices of a folder with numpy, as mlx.core.quantize stores them; returns what
    all weights are then."""
    stored, values = load_file(folder / "model.safetensors"), {}
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        if tensor.ndim == 1:
            values[name] = packed[name] = tensor
            continue
        groups = tensor.numpy().reshape(len(tensor), -1, group_size)
        biases = groups.min(-1)
        scales = (groups.max(-1) - biases) / (2**bits - 1)
        codes = np.rint((groups - biases[..., None]) / scales[..., None]).astype(np.uint64)
        whole = codes * scales[..., None] + biases[..., None]
        values[name] = torch.from_numpy(whole.reshape(tensor.shape).astype(np.float32))
        words = codes.reshape(len(tensor), -1, 32 // bits)
        words = (words << np.arange(0, 32, bits, dtype=np.uint64)).sum(-1).astype(np.uint32)
        module = name.removesuffix("weight")
        packed[name] = torch.from_numpy(words)
        packed[f"{module}scales"] = torch.from_numpy(scales)
        packed[f"{module}biases"] = torch.from_numpy(biases)
    save_file(packed, folder / "model.safetensors")
    change_config(folder, quantization={"group_size": group_size, "bits": bits})
    return values


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 64), (8, 64)])
def test_folders_of_mlx_are_read(tmp_path: Path, bits: int, group_size: int) -> None:
    save_model(tmp_path, "qwen3", intermediate_size=128)
    written = write_as_mlx(tmp_path, bits, group_size)
    source = source_of_folder(tmp_path, "mlx")
    assert (source.dtype, source.group_size) == (f"int{bits}", group_size)
    plain = load_stage(source, 0, 3, True, True, "float32")
    values = from_huggingface(written, plain, "qwen3")
    for name, tensor in plain.items():
        torch.testing.assert_close(tensor, values[name], rtol=1e-5, atol=1e-5)
    stored = load_stage(source, 0, 3, True, True, source.dtype)
    for name in (one for one in stored if f"{one.removesuffix('weight')}scales" in stored):
        module = name.removesuffix("weight")
        found = dequantize(stored[name], stored[f"{module}scales"], stored.get(f"{module}zeros"))
        error = (found - values[name]).norm() / values[name].norm()
        assert error < (0.003 if bits == 4 and stored[name].dtype == torch.uint8 else 0.01)


def test_a_packed_tensor_of_another_size_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3", intermediate_size=128)
    write_as_mlx(tmp_path, 4, 32)
    change_config(tmp_path, hidden_size=128)
    with pytest.raises(ConfigError, match="has shape"):
        source_of_folder(tmp_path, "mlx")


def test_end_tokens_of_both_files(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    transformers.GenerationConfig(eos_token_id=[7, 9]).save_pretrained(tmp_path)
    assert source_of_folder(tmp_path, "tiny").end_ids == [0, 7, 9]
    (tmp_path / "generation_config.json").unlink()
    change_config(tmp_path, eos_token_id=None)
    assert source_of_folder(tmp_path, "tiny").end_ids == []


def test_progress_and_memory_of_loading(tmp_path: Path) -> None:
    save_model(tmp_path, "llama", hidden_size=256, num_hidden_layers=8)
    source, seen = source_of_folder(tmp_path, "tiny"), []
    tracemalloc.start()
    try:
        loaded = load_stage(source, 0, 3, True, False, "float32", lambda *done: seen.append(done))
        _, python_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seen == [(done, len(loaded)) for done in range(len(loaded) + 1)]
    assert python_bytes < 3 << 20  # headers, and no copy of the weights
    sizes = {tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in loaded.values()}
    assert sizes == {True}  # none of them keeps a file or a larger tensor in memory
