"""Text files and the standard library as data: what is read, how it is split, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smolrun.cli.compose import compose
from smolrun.data.documents import read_documents, split_documents
from smolrun.data.python_stdlib import PythonStdlib, source_files
from smolrun.data.splits import Prepared, open_split
from smolrun.data.text import TextFiles
from smolrun.data.tokenizer import load_tokenizer
from smolrun.errors import DataError

KEYS: dict[str, Any] = {
    "glob": "**/*.txt",
    "tokenizer": "bytes",
    "vocab_size": 300,
    "sequence_length": 16,
    "eval_fraction": 0.1,
    "max_mb": None,
}


def quiet(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def prepare(folder: Path, path: Any, **keys: Any) -> Prepared:
    return TextFiles(folder / "cache", path=path, **{**KEYS, **keys}).prepare(quiet)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve small files in two folders; every line is there once in all of them."""
    for number in range(12):
        place = tmp_path / "texts" / ("even" if number % 2 == 0 else "odd")
        place.mkdir(parents=True, exist_ok=True)
        lines = [f"file {number} line {line} says {number * 1000 + line}\n" for line in range(20)]
        (place / f"{number}.txt").write_text("".join(lines))
    (tmp_path / "texts" / "picture.png").write_bytes(bytes(range(256)))
    return tmp_path


NOTES = ["**/*.txt", "**/*.md", "**/*.rst", "**/*.org"]


def test_notes_are_found_by_default_and_hidden_ones_by_name(tmp_path: Path) -> None:
    assert compose(["data=text", "data.path=x"]).data.keywords()["glob"] == NOTES
    for name in ("a.txt", "b.md", "deep/c.rst", "d.org", "e.tex", ".trash/f.md", "g.md.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    def found(glob: Any) -> set[str]:
        files = TextFiles(tmp_path, path=str(tmp_path), **{**KEYS, "glob": glob}).files(quiet)
        return {name.removeprefix("0/") for name in files}

    assert found(NOTES) == {"a.txt", "b.md", "deep/c.rst", "d.org"}
    assert found(["**/*.md", "**/b.*"]) == {"b.md"}
    assert found("**/.trash/*.md") == {".trash/f.md"}


PICTURE = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256))


@pytest.mark.parametrize(
    ("files", "error"),
    [
        (
            {"a.tex": b"x", "b.tex": b"y", "c.png": PICTURE},
            r"2 text files \*.tex: data.glob='\*\*/",
        ),
        (
            {"a.png": PICTURE, "b.png": PICTURE, "c.jpg": bytes(range(128, 256)) * 9, "d": b"x"},
            r"there is no text in it that can be read \(2 .png, 1 .jpg, 1 without a suffix\)",
        ),
        ({".git/config.md": b"x"}, "there are no files in it"),
        ({}, "there are no files in it"),
    ],
)
def test_a_folder_without_notes_gets_a_proposal(
    tmp_path: Path, files: dict[str, bytes], error: str
) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"no file in the folder {folder} matches .*; .*{error}"):
        prepare(tmp_path, str(folder), glob=NOTES)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_all_text_is_there_once_and_train_and_eval_share_nothing(folder: Path, kind: str) -> None:
    prepared = prepare(folder, str(folder / "texts"), tokenizer=kind, sequence_length=1)
    tokenizer = load_tokenizer(str(prepared.tokenizer))
    texts = {}
    for name in ("train", "eval"):
        split = open_split(prepared, name, verify=True)
        batch = split.batch(range(len(split)))
        ids = [*batch.inputs.flatten().tolist(), int(batch.targets[-1, -1])]
        texts[name] = tokenizer.decode([token for token in ids if token != tokenizer.end_id])
    train, held_out = (set(texts[name].splitlines()) for name in ("train", "eval"))
    assert not train & held_out
    assert len(train) + len(held_out) == 12 * 20
    assert 0.05 < len(held_out) / 240 < 0.15


@given(
    texts=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=60), min_size=1, max_size=8),
    share=st.floats(0.05, 0.95),
)
def test_a_split_keeps_every_character_in_order(texts: list[str], share: float) -> None:
    train, held_out = split_documents(texts, share)
    assert "".join(train + held_out) == "".join(texts)
    assert all(train + held_out)
    total = len("".join(texts))
    assert len("".join(train)) <= round(total * (1 - share))


def test_one_long_line_is_split_too(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("x" * 1000)
    prepared = prepare(tmp_path, str(tmp_path / "one.txt"))
    assert (prepared.train_size, prepared.eval_size) == (900 // 16, 100 // 16)


def test_windows_predict_the_next_token(folder: Path) -> None:
    prepared = prepare(folder, str(folder / "texts"))
    split = open_split(prepared, "train", verify=False)
    batch = split.batch([3, 0])
    assert batch.inputs.shape == batch.targets.shape == (2, 16)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    neighbour = split.batch([1])
    assert (
        batch.targets[1, -1] == neighbour.inputs[0, 0]
    )  # every token but the first is predicted exactly once
    assert split.batch([]).inputs.shape == (0, 16)
    for wrong in (-1, len(split)):
        with pytest.raises(IndexError, match=f"sample {wrong} is not within"):
            split.batch([0, wrong])


def test_files_folders_and_lists_may_be_given(folder: Path) -> None:
    one = folder / "texts" / "even" / "0.txt"
    files = prepare(folder, [str(one), str(folder / "texts" / "odd")], max_mb=1)
    assert "in 7 documents" in files.description
    assert "in 3 documents" in prepare(folder, str(folder / "texts"), glob="*/1*.txt").description
    assert files == prepare(folder, [str(one), str(folder / "texts" / "odd")])


def test_a_name_may_begin_with_a_tilde(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Path.expanduser raises where there is no user of that name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~no-such-user.txt").write_bytes((folder / "texts" / "even" / "0.txt").read_bytes())
    one = prepare(folder, str(folder / "texts" / "even" / "0.txt"), max_mb=1)
    assert prepare(folder, "~no-such-user.txt", max_mb=1).train_size == one.train_size


def test_a_moved_folder_is_the_same_data(folder: Path) -> None:
    before = prepare(folder, str(folder / "texts"))
    (folder / "texts").rename(folder / "moved")
    assert prepare(folder, str(folder / "moved")) == before


def test_max_mb_takes_a_fair_mix(folder: Path) -> None:
    prepared = prepare(folder, str(folder / "texts"), max_mb=0.003)
    assert 2900 < prepared.train_size * 16 + prepared.eval_size * 16 <= 3000 + 2 * 16
    texts = read_documents(
        {path.name: path for path in folder.glob("texts/*/*.txt")}, 0.003, quiet
    ).texts
    assert {int(text.split()[1]) % 2 for text in texts} == {0, 1}


def test_bpe_of_little_text_has_fewer_tokens_than_asked(folder: Path) -> None:
    prepared = prepare(folder, str(folder / "texts"), tokenizer="bpe", vocab_size=30_000)
    assert 257 < prepared.num_outputs < 5000
    assert f"bpe tokenizer of {prepared.num_outputs}" in prepared.description


def test_what_cannot_be_read_is_replaced_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("größer\n".encode() * 50 + "größer\n".encode("latin-1") * 2)
    (tmp_path / "b.txt").write_bytes("already \ufffd here\r\n".encode() * 30)
    prepared = prepare(tmp_path, str(tmp_path))
    assert "4 characters in 1 files were not UTF-8" in prepared.description
    documents = read_documents({"b": tmp_path / "b.txt"}, None, quiet)
    assert documents.replaced_characters == 0
    assert documents.texts == ["already \ufffd here\n" * 30]


def test_windows_encodings_are_understood(tmp_path: Path) -> None:
    (tmp_path / "16.txt").write_bytes("größer\r\n".encode("utf-16"))
    (tmp_path / "8.txt").write_bytes("größer\r\n".encode("utf-8-sig"))
    for name in ("16.txt", "8.txt"):
        documents = read_documents({name: tmp_path / name}, None, quiet)
        assert documents.texts == ["größer\n"]
        assert documents.replaced_characters == 0


def test_a_character_cut_by_max_mb_is_not_counted_as_unreadable(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ß" * 600)
    documents = read_documents({"a": tmp_path / "a.txt"}, 0.000601, quiet)
    assert documents.texts == ["ß" * 300]
    assert documents.replaced_characters == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"path": "missing"}, "data.path='missing': there is no file or folder"),
        ({"path": []}, "data.path names no file"),
        (
            {"path": "texts", "glob": "*.md"},
            r"no file in the folder texts matches data.glob=\*.md; it has 12 text files \*.txt",
        ),
        (
            {"path": "texts/even/0.txt", "sequence_length": 5000},
            "too short: its train part has 395 tokens, .* 5001",
        ),
        (
            {"path": "texts/even/0.txt", "sequence_length": 200},
            "too short: its eval part has 4. tokens, .* raise",
        ),
        ({"path": "texts", "glob": "*.png"}, "this is not text"),
        ({"path": "empty.txt"}, "there is no text in"),
        ({"path": "blank.txt"}, "there is no text in"),
        (
            {"path": "texts", "tokenizer": "words"},
            "data.tokenizer=words: there is no such folder, and the hub does not give it",
        ),
        (
            {"path": "texts", "tokenizer": "bpe", "vocab_size": 256},
            "data.vocab_size=256: bpe needs at least 257",
        ),
        ({"path": "texts", "sequence_length": 0}, "data.sequence_length=0"),
        ({"path": "texts", "eval_fraction": 0.0}, "data.eval_fraction=0.0"),
        ({"path": "texts", "eval_fraction": 1.0}, "data.eval_fraction=1.0"),
    ],
)
def test_what_cannot_be_used_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("empty.txt").touch()
    Path("blank.txt").write_text(" \n\n ")
    with pytest.raises(DataError, match=message):
        prepare(folder, **keys)


def test_a_file_that_may_not_be_read_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(
        "builtins.open", refuse
    )  # root may read everything, so permissions alone prove nothing
    with pytest.raises(DataError, match=r"cannot read .*\.txt: Permission denied"):
        prepare(folder, str(folder / "texts"))


def test_the_standard_library_is_code_without_tests_and_packages(tmp_path: Path) -> None:
    files = source_files()
    assert {"argparse.py", "json/decoder.py"} <= set(files)
    assert not {part for name in files for part in name.split("/")} & {
        "test",
        "tests",
        "site-packages",
    }
    keys = {key: value for key, value in KEYS.items() if key != "glob"}
    prepared = PythonStdlib(
        tmp_path, **{**keys, "tokenizer": "bpe", "vocab_size": 512, "max_mb": 0.2}
    ).prepare(quiet)
    assert prepared.num_outputs == 512
    batch = open_split(prepared, "train", verify=True).batch(range(500))
    text = load_tokenizer(str(prepared.tokenizer)).decode(batch.inputs.flatten().tolist())
    assert "def " in text
    assert "import " in text
