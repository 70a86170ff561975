"""Files of folders that others made, built to fill the memory or to end the process."""

from __future__ import annotations

import itertools
import json
import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smolrun.cli.compose import compose
from smolrun.cli.run import run
from smolrun.data.tokenizer import END_TOKEN, load_tokenizer
from smolrun.errors import CheckpointError, ConfigError, DataError
from smolrun.files import (
    MAX_DEPTH,
    MAX_JSON_BYTES,
    MAX_TOKENIZER_BYTES,
    MAX_YAML_BYTES,
    LimitPassed,
    decode_json,
    read_json,
    read_yaml,
)
from smolrun.models import huggingface, trained
from smolrun.tracking.past_runs import look
from smolrun.tracking.run_folder import RunFolder
from smolrun.tracking.run_view import Chunk, read_on

KEYS: dict[str, Any] = {"pretrained": True, "revision": None, "attention": "auto", "dropout": 0.0}


def alias_bomb(lines: int = 9) -> str:
    """9**lines values in 300 bytes."""
    names = "abcdefghijk"[: lines + 1]
    text = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for before, name in itertools.pairwise(names):
        text += f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    return text


@pytest.mark.parametrize("levels", [MAX_DEPTH + 2, 500_000])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_json_is_refused_by_its_depth(levels: int, opening: str):
    closing = {"[": "]", '{"a":': "}"}[opening]
    with pytest.raises(LimitPassed, match=str(MAX_DEPTH)):
        decode_json((opening * levels + "1" + closing * levels).encode())
    assert decode_json((opening * MAX_DEPTH + "1" + closing * MAX_DEPTH).encode())


def test_a_large_file_is_not_read_to_its_end(tmp_path: Path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 34)  # sparse
    tracemalloc.start()
    with pytest.raises(LimitPassed, match="16 MiB"):
        read_json(path)
    assert tracemalloc.get_traced_memory()[1] < 3 * MAX_JSON_BYTES
    tracemalloc.stop()


@pytest.mark.skipif(os.name != "posix", reason="Windows")
@pytest.mark.timeout(30)
def test_a_fifo_and_a_device_are_refused_without_blocking(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("fifo", "device"):
        with pytest.raises(LimitPassed, match="not a regular file"):
            read_yaml(tmp_path / name)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 28)


def fifo(path: Path) -> None:
    if os.name != "posix":
        pytest.skip("Windows has no FIFOs in folders")
    os.mkfifo(path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [sparse, fifo])
def test_no_file_of_a_run_folder_blocks_or_fills_the_memory(
    tmp_path: Path, make: Callable[[Path], None]
):
    folder = RunFolder(tmp_path)
    names = ("driver.json", "summary.json", "remote.json", "driver.lock", "config.yaml")
    for name in (*names, "metrics.jsonl", "driver.log"):
        make(tmp_path / name)
    tracemalloc.start()
    run = look(folder)
    assert (run.step, run.steps, run.state) == (None, None, "remote" if make is sparse else "died")
    assert (folder.driver(), folder.summary(), folder.remote()) == ({}, {}, None)
    assert not folder.has_own_config()
    assert folder.claim(), "the lock of no living process"
    if make is fifo:
        assert read_on(folder.metrics, None) == read_on(folder.driver_log, None) == Chunk()
        make(tmp_path / "stop")
        with pytest.raises(OSError, match=r"(?i)device"):
            folder.ask_to_stop()
    assert tracemalloc.get_traced_memory()[1] < 3 * MAX_JSON_BYTES
    tracemalloc.stop()


def test_an_alias_bomb_is_refused_and_an_alias_is_not(tmp_path: Path):
    path = tmp_path / "config.yaml"
    began = time.monotonic()
    for text in (alias_bomb(), "a: &a [*a]\n", "[" * 300_000):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"aliases stand for|too deep|nesting depth"):
            read_yaml(path)
    assert time.monotonic() - began < 20.0, "not the years that writing it out takes"
    path.write_text("a: &a [1, 2]\nb: *a\n")
    assert read_yaml(path) == path.read_bytes()


def test_a_bomb_in_a_run_folder_is_an_unknown_figure_and_never_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(Path("outputs") / "20260131-142501-x-aaaa")
    (folder.checkpoints / "step-00000001").mkdir(parents=True)
    folder.config.write_text(alias_bomb())
    assert look(folder).steps is None
    assert run([f"checkpoint.resume={folder.run_id}"]) == 2
    said = capsys.readouterr().err
    assert "config.yaml cannot be read: its aliases stand for more than 100,000 values" in said
    monkeypatch.setattr(trained, "locate", lambda *_: (folder.path, folder.checkpoints))
    with pytest.raises(CheckpointError, match="aliases"):
        trained.find(Path("outputs"), lambda _: None, run=folder.run_id)


def test_a_bomb_in_a_cluster_file_is_named_before_anything_is_composed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "conf" / "cluster" / "home.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(f"# Machines at home\n{alias_bomb()}")
    with pytest.raises(ConfigError, match=r"home\.yaml: its aliases stand for"):
        compose(["cluster=home"])


def test_large_yaml_that_is_no_choice_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for place, is_choice in (("a/b/c/d", False), ("a/b", True), ("a", True), (".", True)):
        file = tmp_path / "conf" / place / "large.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("#" * (MAX_YAML_BYTES + 1))
        if is_choice:
            with pytest.raises(ConfigError, match=r"large\.yaml: larger than 1 MiB"):
                compose([])
            file.unlink()
        else:
            compose([])


def model_folder(folder: Path, **files: str) -> Path:
    (folder / "config.json").write_text(files.get("config", '{"model_type": "gpt2"}'))
    return folder


@pytest.mark.parametrize("levels", [100, 100_000])
def test_a_deep_config_json_is_a_problem_of_that_file(tmp_path: Path, levels: int):
    config = '{"model_type": "gpt2", "a": ' + "[" * levels + "]" * levels + "}"
    folder = model_folder(tmp_path, config=config)
    with pytest.raises(ConfigError, match=r"config\.json cannot be read: nested deeper than 50"):
        huggingface.prepare(tmp_path, lambda *_: None, str(folder), **KEYS)


def test_a_huge_table_of_contents_is_not_read(tmp_path: Path):
    folder = model_folder(
        tmp_path, config='{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}'
    )
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 90_000_000))
        file.truncate(90_000_100)
    tracemalloc.start()
    with pytest.raises(
        ConfigError, match=r"table of contents has 90,000,000 bytes, the limit is 16 MiB"
    ):
        huggingface.prepare(tmp_path, lambda *_: None, str(folder), **KEYS)
    assert tracemalloc.get_traced_memory()[1] < 2 * MAX_JSON_BYTES
    tracemalloc.stop()


def test_a_deep_table_of_contents_is_damage(tmp_path: Path):
    folder = model_folder(
        tmp_path, config='{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}'
    )
    header = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ConfigError, match="its table of contents cannot be read"):
        huggingface.prepare(tmp_path, lambda *_: None, str(folder), **KEYS)


def test_a_huge_tokenizer_is_not_loaded(tmp_path: Path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(MAX_TOKENIZER_BYTES + 1)
    with pytest.raises(DataError, match=r"tokenizer\.json: larger than 128 MiB"):
        load_tokenizer(tmp_path)


def test_a_deep_tokenizer_config_is_a_problem_of_the_tokenizer(tmp_path: Path):
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {}}))
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path)


def tokenizer(folder: Path, **parts: Any) -> Path:
    whole = {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "decoder")),
        "post_processor": None,
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, END_TOKEN: 2}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(whole | parts))
    return folder


def test_replacements_that_multiply_are_refused(tmp_path: Path):
    steps = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}] * 9
    bomb = {"type": "Sequence", "normalizers": steps}
    with pytest.raises(DataError, match="its replacements make a text more than 1000 times longer"):
        load_tokenizer(tokenizer(tmp_path, normalizer=bomb))
    harmless = {"type": "Sequence", "normalizers": steps[:2]}
    assert load_tokenizer(tokenizer(tmp_path, normalizer=harmless)).encode("a") == [0] * 100


def test_a_pattern_that_backtracks_without_end_is_an_error(tmp_path: Path):
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    loaded = load_tokenizer(tokenizer(tmp_path, pre_tokenizer=pattern | {"invert": False}))
    with pytest.raises(DataError, match=r"the tokenizer failed: .*retry-limit"):
        loaded.encode("a" * 40 + "b")
    with pytest.raises(DataError, match="the tokenizer failed"):
        loaded.encode_batch(["a" * 40 + "b", "a"])
