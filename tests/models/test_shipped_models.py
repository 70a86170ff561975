"""The model and data files in conf/: their keys fit the code, and models have the promised size."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir

from smolrun.models.decoder import build
from tests.models.tiny import Spec

CONF = Path(__file__).parents[2] / "conf"
FILES = sorted([*CONF.glob("model/*.yaml"), *CONF.glob("data/*.yaml")])


def keys_of(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text())
    return {
        key: value for key, value in content.items() if key not in ("name", "target", "defaults")
    }


def test_all_files_are_seen() -> None:
    assert {path.stem for path in FILES} >= {
        *("gpt_tiny", "gpt_small", "gpt2", "mlp", "python_stdlib", "text", "digits")
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_keys_are_the_keyword_only_parameters(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    module, _, name = content["target"].partition(":")
    parameters = inspect.signature(
        getattr(importlib.import_module(module), name)
    ).parameters.values()
    keyword_only = [
        parameter for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY
    ]
    assert {parameter.name for parameter in keyword_only} == set(keys_of(path))
    assert all(parameter.default is parameter.empty for parameter in keyword_only)
    assert content["name"] == path.stem


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_first_line_tells_what_it_is(path: Path) -> None:
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize(
    ("name", "vocab_size", "millions"),
    [
        ("gpt_tiny", 2048, 1.16),
        ("gpt_small", 2048, 10.23),
        ("gpt2", 50257, 124.44),
        ("llama32_1b", 512, 1235.81),
    ],
)
def test_models_have_the_promised_size(name: str, vocab_size: int, millions: float) -> None:
    keys = keys_of(CONF / "model" / f"{name}.yaml")
    with torch.device("meta"):
        model = build(Spec(num_outputs=vocab_size), **keys)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize(
    ("overrides", "data"),
    [
        ([], "python_stdlib"),
        (["model=mlp"], "digits"),
        (["model=mlp", "data=text"], "text"),
        (["data=python_stdlib", "model=mlp"], "python_stdlib"),
        (["model=gpt2"], "python_stdlib"),
    ],
)
def test_a_model_of_pictures_brings_pictures_along(
    tmp_path: Path, overrides: list[str], data: str
) -> None:
    for group in ("model", "data"):
        (tmp_path / group).symlink_to(CONF / group)
    (tmp_path / "config.yaml").write_text(
        "defaults: [data: python_stdlib, model: gpt_tiny, _self_]\n"
    )
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert compose("config", overrides).data.name == data
