"""Data and models on their way to a host: by content, once, whole."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from smolrun.data.prepared import Prepared
from smolrun.errors import HostError
from smolrun.launch.delivery import store
from smolrun.launch.delivery.files import (
    FileHashes,
    PreparedFiles,
    deliver_files,
    file_bundle,
    folder_bundle,
)
from smolrun.launch.delivery.store import TransferProgress
from tests.launch.here import HereMachine

DATA = b"tokens" * 1000


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    """Data with a tokenizer, and a model with a tokenizer of its own, on the driver."""
    data, words, model = (tmp_path / name for name in ("data", "words", "model"))
    for folder in (data, words, model):
        folder.mkdir()
    (data / "tokens.safetensors").write_bytes(DATA)
    (words / "tokenizer.json").write_text("{}")
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "model.safetensors").write_bytes(b"weights" * 1000)
    for name in ("pytorch_model.bin", ".token", "trainer.py", "optimizer.pt"):
        (model / name).write_bytes(b"not for hosts")
    return Prepared(
        kind="tokens",
        path=str(data / "tokens.safetensors"),
        sha256=hashlib.sha256(DATA).hexdigest(),
        num_outputs=100,
        num_inputs=None,
        sequence_length=16,
        tokenizer=str(words),
        train_size=10,
        eval_size=2,
        description="words",
        model_folder=str(model),
    )


@pytest.fixture
def mini1(tmp_path: Path) -> HereMachine:
    return HereMachine(tmp_path / "mini1")


def deliver(
    machine: Any, prepared: Prepared, told: TransferProgress | None = None, **keys: Any
) -> Prepared:
    return PreparedFiles(prepared, FileHashes(), **keys).deliver(
        machine, told or TransferProgress("files"), f"{machine.workdir}/runs/r1"
    )


def names(folder: str | None) -> list[str]:
    return sorted(os.listdir(folder or ""))


def test_everything_a_rank_opens_lies_on_the_host(mini1: HereMachine, prepared: Prepared) -> None:
    told: list[tuple[str, int, int]] = []
    there = deliver(
        mini1, prepared, TransferProgress("sending data", lambda *done: told.append(done))
    )
    assert Path(there.path).read_bytes() == DATA
    assert prepared.sha256 in there.path
    assert names(there.tokenizer) == ["tokenizer.json"]
    assert names(there.model_folder) == ["config.json", "model.safetensors"]
    assert all(
        place and place.startswith(mini1.workdir)
        for place in (there.path, there.tokenizer, there.model_folder)
    )
    size = sum(size for _, size in mini1.puts)
    assert told[-1] == ("sending data", size, size)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_nothing_travels_twice(mini1: HereMachine, prepared: Prepared) -> None:
    one = deliver(mini1, prepared)
    mini1.puts.clear()
    mini1.calls.clear()
    assert deliver(mini1, prepared) == one
    assert mini1.puts == []
    assert mini1.calls == [("store", "look")]


def test_a_model_that_brings_the_tokenizer_travels_once(
    mini1: HereMachine, prepared: Prepared
) -> None:
    (Path(prepared.model_folder or "") / "tokenizer.json").write_text("{}")
    both = Prepared.from_json({**prepared.to_json(), "tokenizer": prepared.model_folder})
    there = deliver(mini1, both)
    assert there.tokenizer == there.model_folder
    assert len([path for path, _ in mini1.puts if path.endswith("tokenizer.json")]) == 1


def test_a_model_without_its_weights(mini1: HereMachine, prepared: Prepared) -> None:
    there = deliver(mini1, prepared, weights=False)
    assert names(there.model_folder) == ["config.json"]


def test_data_alone(mini1: HereMachine, prepared: Prepared) -> None:
    alone = Prepared.from_json({**prepared.to_json(), "tokenizer": None, "model_folder": None})
    there = deliver(mini1, alone)
    assert (there.tokenizer, there.model_folder) == (None, None)
    assert len(mini1.puts) == 1


def test_what_is_not_wanted_any_more_is_not_begun_and_what_came_stays(
    mini1: HereMachine, tmp_path: Path
) -> None:
    bundles = []
    for number in range(3):
        (tmp_path / f"layer-{number}").write_bytes(bytes([number]) * 1000)
        bundles.append(file_bundle(tmp_path / f"layer-{number}", FileHashes()))
    transfer = TransferProgress("layers", is_wanted=lambda: len(mini1.puts) < 2)
    root = deliver_files(mini1, bundles, transfer, None)  # type: ignore[arg-type]
    assert [os.path.isdir(f"{root}/{one.key}") for one in bundles] == [True, True, False]
    assert transfer.done == 2000
    mini1.puts.clear()
    deliver_files(mini1, bundles, TransferProgress("layers"), None)  # type: ignore[arg-type]
    assert [size for _, size in mini1.puts] == [1000]
    assert not [name for name in os.listdir(root) if name.startswith(".")]


@pytest.mark.parametrize("damage", ["bytes", "cut", "gone", "link"])
def test_a_damaged_file_is_replaced(
    mini1: HereMachine, prepared: Prepared, tmp_path: Path, damage: str
) -> None:
    there = deliver(mini1, prepared)
    file = Path(there.path)
    if damage == "bytes":
        file.write_bytes(b"X" + DATA[1:])
    elif damage == "cut":
        file.write_bytes(DATA[:-1])
    else:
        file.unlink()
    if damage == "link":
        (tmp_path / "other").write_bytes(DATA)
        try:
            file.symlink_to(tmp_path / "other")
        except OSError:
            pytest.skip("this system lets nobody make links")
    mini1.puts.clear()
    assert deliver(mini1, prepared) == there
    assert file.read_bytes() == DATA
    assert not file.is_symlink()
    assert len(mini1.puts) == 1, "what is whole stays"


def test_bytes_that_are_not_what_they_must_be_get_no_place(
    mini1: HereMachine, prepared: Prepared
) -> None:
    Path(prepared.path).write_bytes(b"changed since it was prepared")
    with pytest.raises(HostError, match=r"mini1: tokens\.safetensors arrived there with other"):
        deliver(mini1, prepared)
    files = Path(mini1.workdir) / "files"
    assert not (files / prepared.sha256).exists()
    assert not [name for name in os.listdir(files) if name.startswith(".")]


def test_a_disk_without_room_is_told_before_anything_travels(
    mini1: HereMachine, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_SPARE_BYTES", 1 << 62)
    with pytest.raises(HostError) as failed:
        deliver(mini1, prepared)
    assert "to spare, do not fit on the disk of" in str(failed.value)
    assert "set workdir: in the cluster file" in str(failed.value)
    assert mini1.puts == []


def test_a_disk_that_fills_up_meanwhile_is_told_as_such(
    mini1: HereMachine, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: str) -> None:
        monkeypatch.setattr(store, "_SPARE_BYTES", 1 << 62)
        raise HostError("mini1", "Failure")

    mini1.before_put = full
    with pytest.raises(HostError, match="do not fit on the disk"):
        deliver(mini1, prepared)
    assert os.listdir(Path(mini1.workdir) / "files") == []


def test_what_no_run_used_for_long_goes_when_something_new_comes(
    mini1: HereMachine, prepared: Prepared
) -> None:
    files = Path(mini1.workdir) / "files"
    for name in ("f" * 64, "e" * 64):
        (files / name).mkdir(parents=True)
        (files / f"{name}.json").write_text("{}")
    os.utime(files / f"{'f' * 64}.json", (0, 0))
    deliver(mini1, prepared)
    assert not (files / ("f" * 64)).exists()
    assert (files / ("e" * 64)).is_dir()


def test_a_hash_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    file, memory = tmp_path / "big", tmp_path / "cache" / "hashes.json"
    file.write_bytes(b"one")
    right = hashlib.sha256(b"one").hexdigest()
    assert FileHashes(memory).file(file).sha256 == right
    state = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert FileHashes(memory).file(file).sha256 == right, "it was read again"
    file.write_bytes(b"three")
    assert FileHashes(memory).file(file).sha256 == hashlib.sha256(b"three").hexdigest()


@pytest.mark.parametrize("content", ["", "[]", "no json", '{"a": 1}', '{"PATH": ["x"]}'])
def test_a_damaged_memory_is_forgotten(tmp_path: Path, content: str) -> None:
    file, memory = tmp_path / "big", tmp_path / "hashes.json"
    file.write_bytes(b"one")
    memory.write_text(content.replace("PATH", str(file.resolve())))
    assert FileHashes(memory).file(file).sha256 == hashlib.sha256(b"one").hexdigest()


def test_a_folders_key_depends_on_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("1")
    keys = [folder_bundle(tmp_path, FileHashes()).key]
    (tmp_path / "a.json").rename(tmp_path / "b.json")
    keys.append(folder_bundle(tmp_path, FileHashes()).key)
    (tmp_path / "b.json").write_text("2")
    keys.append(folder_bundle(tmp_path, FileHashes()).key)
    (tmp_path / "photo.png").write_text("no part of a model")
    assert folder_bundle(tmp_path, FileHashes()).key == keys[-1]
    assert len(set(keys)) == 3
