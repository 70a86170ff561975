"""Whose tokenizer the data gets, and that model and data that differ are told before the start."""

from __future__ import annotations

from pathlib import Path

import pytest

from smolrun.cli.compose import compose
from smolrun.data.prepared import Prepared
from smolrun.driver import prepare
from smolrun.driver.prepare import (
    prepare_data,
    prepare_model,
    tokenizer_for,
    with_model,
    with_pinned_model,
)
from smolrun.errors import ConfigError, DataError
from smolrun.models import huggingface
from tests.models.model_folders import save_model

DATA = Prepared(
    kind="tokens",
    path="data",
    sha256="0",
    num_outputs=61,
    num_inputs=None,
    sequence_length=16,
    tokenizer=None,
    train_size=1,
    eval_size=1,
    description="",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


def test_our_own_models_need_no_preparing() -> None:
    config = compose([])
    assert prepare_model(config, lambda *_: None) is None
    assert tokenizer_for(config, None) == "bpe"
    assert with_model(config, DATA, None) is DATA
    assert tokenizer_for(compose(["data.tokenizer=bytes"]), None) == "bytes"
    assert tokenizer_for(compose(["model=mlp", "data=digits"]), None) is None


def test_weights_of_a_run_bring_the_tokenizer_of_that_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for run in ("a-run", "b-run"):
        (tmp_path / "outputs" / run).mkdir(parents=True)
        (tmp_path / "outputs" / run / "config.yaml").touch()
    config = compose(["checkpoint.weights=a-run"])
    with pytest.raises(ConfigError, match=r"data.tokenizer: there is no tokenizer in .*a-run"):
        tokenizer_for(config, None)
    with pytest.raises(ConfigError, match="there is no run and no checkpoint 'c-run'"):
        tokenizer_for(compose(["checkpoint.weights=c-run"]), None)
    for run in ("a-run", "b-run"):
        (tmp_path / "outputs" / run / "tokenizer").mkdir()
        (tmp_path / "outputs" / run / "tokenizer" / "tokenizer.json").touch()
    assert tokenizer_for(config, None) == str(tmp_path / "outputs" / "a-run" / "tokenizer")
    assert tokenizer_for(compose(["checkpoint.weights=a-run", "data.tokenizer=bpe"]), None) == "bpe"
    resumed = compose(["checkpoint.weights=a-run", "checkpoint.resume=b-run"])
    assert tokenizer_for(resumed, None) == str(tmp_path / "outputs" / "b-run" / "tokenizer")


@pytest.mark.parametrize(
    "data", [("data=text", "data.path=nots"), ("data=chat", "data.path=~/chats.jsonl")]
)
def test_a_missing_file_is_found_before_a_model_is_fetched(
    data: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    monkeypatch.setattr(prepare, "prepare_model", lambda config, _: fetched.append("model"))
    with pytest.raises(DataError, match="there is no file"):
        prepare_data(compose(["model=smollm2_135m", *data]), lambda *_: None)
    assert fetched == []


def test_a_model_gives_its_tokenizer_and_its_folder(folder: Path) -> None:
    (folder / "tokenizer.json").touch()
    config = compose(["model=hf", f"model.name={folder}"])
    model = prepare_model(config, lambda *_: None)
    assert tokenizer_for(config, model) == str(folder)
    asked = compose(["model=hf", f"model.name={folder}", "data.tokenizer=bpe"])
    assert tokenizer_for(asked, model) == "bpe"
    prepared = with_model(config, DATA, model)
    assert Prepared.from_json(prepared.to_json()).model_folder == str(folder)


def test_trained_weights_without_a_tokenizer_need_one(folder: Path) -> None:
    config = compose(["model=hf", f"model.name={folder}"])
    with pytest.raises(ConfigError, match="brings no tokenizer"):
        tokenizer_for(config, prepare_model(config, lambda *_: None))
    config = compose(["model=hf", f"model.name={folder}", "model.pretrained=false"])
    assert tokenizer_for(config, prepare_model(config, lambda *_: None)) == "bpe"


def test_data_that_does_not_fit_is_told_before_the_start(folder: Path) -> None:
    config = compose(["model=hf", f"model.name={folder}"])
    model = prepare_model(config, lambda *_: None)
    data = Prepared.from_json({**DATA.to_json(), "num_outputs": 99, "sequence_length": 65})
    with pytest.raises(ConfigError) as error:
        with_model(config, data, model)
    assert "99 tokens" in error.value.problems[0]
    assert "knows 61" in error.value.problems[0]
    assert "data.sequence_length=65" in error.value.problems[1]


def test_a_model_of_the_hub_is_pinned_and_a_folder_is_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def commit_of(name: str, revision: str | None) -> str:
        asked.append((name, revision))
        return "a" * 40

    monkeypatch.setattr(huggingface, "commit_of", commit_of)

    def revision(*overrides: str) -> str | None:
        config = with_pinned_model(compose(["model=hf", *overrides]))
        return config.model.keywords()["revision"]

    assert revision("model.name=me/small", "model.revision=main") == "a" * 40
    assert revision("model.name=me/small", f"model.revision={'b' * 40}") == "b" * 40
    assert revision(f"model.name={folder}") is None
    assert asked == [("me/small", "main")]
