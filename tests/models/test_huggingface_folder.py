"""What is told of a model folder before anything starts: not whole, not safe, not there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smolrun.errors import ConfigError
from smolrun.models import huggingface
from smolrun.models.huggingface_folder import ModelFolder, check_fit
from tests.models.model_folders import change_config, save_model
from tests.models.tiny import Spec

KEYS: dict[str, Any] = {"pretrained": True, "revision": None, "attention": "auto", "dropout": 0.0}


def prepare(name: object, **keys: Any) -> ModelFolder:
    return huggingface.prepare(Path(), lambda *_: None, str(name), **{**KEYS, **keys})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


def test_a_whole_folder_is_ready_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = prepare(folder)
    assert (found.folder, found.tokenizer_folder) == (str(folder), None)
    (folder / "tokenizer.json").write_text("{}")
    assert prepare(folder).tokenizer_folder == str(folder)
    monkeypatch.chdir(folder.parent)
    assert prepare("model") == prepare(folder)
    change_config(folder, rms_norm_eps=1e-3)
    assert prepare(folder).sha256 != found.sha256


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def foreign_config(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"hidden_size": 4}')


def remote_code(folder: Path) -> None:
    auto_map = {"AutoModelForCausalLM": "modeling_strange.Strange"}
    change_config(folder, model_type="strange", auto_map=auto_map)


def no_writer(folder: Path) -> None:
    change_config(folder, model_type="clip", architectures=["CLIPModel"])


def gguf(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "tiny-Q4_0.gguf")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def foreign(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)


def half(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_config, "is not a model folder: it has no config.json"),
        (foreign_config, "is not a JSON object"),
        (no_json, r"config\.json cannot be read"),
        (no_type, "has no model_type"),
        (remote_code, "model_type='strange' needs Python code that comes with the weights"),
        (no_writer, "no class that writes text for model_type='clip'"),
        (gguf, r"tiny-Q4_0\.gguf is GGUF, which is not read.*save_pretrained"),
        (no_weights, r"has no weights .*model\.pretrained=false"),
        (pickled, r"in pytorch_model\.bin only, .*save_pretrained"),
        (truncated, r"is damaged: it has \d+ bytes, expected \d+"),
        (foreign, "it is not a safetensors file"),
        (half, r"is not whole: model-00002-of-00002\.safetensors is missing"),
    ],
)
def test_bad_folders_are_refused(folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder)
    with pytest.raises(ConfigError, match=message):
        prepare(folder)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/no-such-folder", "a/b/c"])
def test_a_path_is_never_asked_from_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(ConfigError, match="there is no such folder"):
        prepare(name)


def test_preparing_loads_no_torch(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from smolrun.models import huggingface as h;"
        f"h.prepare(Path(), print, {str(folder)!r}, **{KEYS!r});"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50)


@pytest.mark.parametrize(
    "keys",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization": {"group_size": 64, "bits": 4}},
    ],
)
def test_quantized_weights_are_not_trained(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="quantized, which cannot be trained"):
        check_fit(keys, "tiny", Spec())
