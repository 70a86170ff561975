"""Both tokenizers give every text back, from memory and from their file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from smolrun.data.prepared import Prepared
from smolrun.data.splits import open_split
from smolrun.data.text import TextFiles
from smolrun.data.tokenizer import (
    END_TOKEN,
    TextTokenizer,
    bytes_tokenizer,
    find_tokenizer,
    keep_tokenizer,
    load_tokenizer,
    tokenizer_hash,
    train_bpe,
)
from smolrun.errors import DataError
from tests.data.foreign import foreign_folder

TEXTS = [
    "def add(a, b):\n    return a + b\n" * 20,
    "the cat and the dog and the bird\n" * 20,
    "größer 🐍 naïve\n" * 20,
]
TOKENIZERS = {"bytes": bytes_tokenizer(), "bpe": train_bpe(TEXTS, 300)}


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> TextTokenizer:
    return TOKENIZERS[request.param]


@given(text=st.text())
def test_every_text_comes_back(text: str) -> None:
    for tokenizer in TOKENIZERS.values():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= token < tokenizer.vocab_size for token in ids)


@given(text=st.text())
def test_a_bytes_token_is_the_byte(text: str) -> None:
    assert TOKENIZERS["bytes"].encode(text) == list(text.encode())


def test_bpe_merges_what_it_has_seen() -> None:
    assert len(TOKENIZERS["bpe"].encode(TEXTS[0])) < len(TEXTS[0]) / 2
    assert TOKENIZERS["bpe"].vocab_size == 300
    assert TOKENIZERS["bytes"].vocab_size == 256


def test_bpe_stops_where_nothing_is_left_to_merge() -> None:
    assert train_bpe(["ab ab"], 5000).vocab_size < 300


def test_bpe_is_the_same_each_time() -> None:
    assert train_bpe(TEXTS, 300).encode(TEXTS[1]) == TOKENIZERS["bpe"].encode(TEXTS[1])


def test_the_words_of_the_end_token_are_ordinary_text() -> None:
    for tokenizer in TOKENIZERS.values():
        ids = tokenizer.encode(f"a{END_TOKEN}b")
        assert len(ids) > 3
        assert tokenizer.end_id not in ids
        assert tokenizer.decode(ids) == f"a{END_TOKEN}b"


def test_many_texts_at_once_give_the_same(tokenizer: TextTokenizer) -> None:
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_half_a_character_is_shown_as_unknown(tokenizer: TextTokenizer) -> None:
    assert TOKENIZERS["bytes"].decode("ß".encode()[:1]) == "\ufffd"


def test_it_is_kept_in_a_file(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.end_id == tokenizer.end_id
    for text in TEXTS:
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text


@pytest.mark.parametrize("content", [None, "", "{}", "no json"])
def test_an_unreadable_file_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"cannot read the tokenizer .*tokenizer.json"):
        load_tokenizer(tmp_path)


def quiet(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return foreign_folder(tmp_path / "model")


def prepare(tmp_path: Path, tokenizer: str) -> Prepared:
    for name in ("a", "b"):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{name}.txt").write_text(f"{name} is <|im_end|> there\n" * 20)
    return TextFiles(
        tmp_path / "cache",
        path=str(tmp_path / "texts"),
        glob="*.txt",
        tokenizer=tokenizer,
        vocab_size=300,
        sequence_length=8,
        eval_fraction=0.5,
        max_mb=None,
    ).prepare(quiet)


def test_the_end_of_a_document_is_the_tokenizers_own(tmp_path: Path, folder: Path) -> None:
    prepared = prepare(tmp_path, str(folder))
    tokenizer = load_tokenizer(str(prepared.tokenizer))
    library = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.end_id == library.eos_token_id
    assert prepared.num_outputs == tokenizer.vocab_size == len(library)
    split = open_split(prepared, "train", verify=True)
    ids = split.batch(range(len(split))).inputs.flatten().tolist()
    # The words of the token in a text are text; the token itself stands between documents only.
    assert "<|im_end|>" in tokenizer.decode(ids)
    assert tokenizer.end_id not in ids
    assert "model tokenizer of" in prepared.description


def test_a_document_is_encoded_whole_and_as_the_library_does(folder: Path) -> None:
    text = "What is one and two? It is three.\n" * 5
    tokenizer, library = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False)
    markup = "<|im_start|>user\nHello<|im_end|>"
    expected = library.encode(markup, add_special_tokens=False)
    assert tokenizer.encode_markup([markup]) == [expected]
    assert tokenizer.encode(markup) != expected


def test_ours_have_markup_too() -> None:
    assert bytes_tokenizer().encode_markup(["a\0"]) == [[97, 0]]
    ours = train_bpe(["some text"], 300)
    assert ours.encode_markup([f"a{ours.end_token}"])[0][-1] == ours.end_id
    assert ours.end_id not in ours.encode(f"a{ours.end_token}")


def test_the_kept_folder_is_whole(tmp_path: Path, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "modeling.py").write_text("raise SystemExit")
    kept = Path(str(prepare(tmp_path, str(folder)).tokenizer))
    names = {path.name for path in kept.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} < names
    assert not names & {"model.safetensors", "modeling.py"}
    assert AutoTokenizer.from_pretrained(kept).eos_token == "<|im_end|>"


def test_another_tokenizer_is_other_data(tmp_path: Path, folder: Path) -> None:
    before = prepare(tmp_path, str(folder))
    assert prepare(tmp_path, str(folder / "tokenizer.json")) == before
    moved = folder.rename(tmp_path / "moved")
    assert prepare(tmp_path, str(moved)).path == before.path
    old = tokenizer_hash(moved)
    settings = json.loads((moved / "tokenizer_config.json").read_text())
    settings["eos_token"] = {"content": "<|endoftext|>"}
    (moved / "tokenizer_config.json").write_text(json.dumps(settings))
    assert tokenizer_hash(moved) != old
    assert prepare(tmp_path, str(moved)).path != before.path
    assert load_tokenizer(moved).end_id == 0


def test_an_old_folder_is_converted(tmp_path: Path, folder: Path) -> None:
    """GPT-2's form: vocab.json and merges.txt, and no tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    old = tmp_path / "old"
    old.mkdir()
    vocabulary = {**model["vocab"], "<|endoftext|>": len(model["vocab"])}
    (old / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (old / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (old / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (tmp_path / "kept").mkdir()
    kept = keep_tokenizer(old, tmp_path / "kept")
    assert kept.encode("What is one?") == load_tokenizer(folder).encode("What is one?")
    assert kept.end_token == "<|endoftext|>"


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path) -> None:
    """With the folder that was given, and not the one that it is kept in."""
    folder = foreign_folder(tmp_path / "model", eos_token="<|stop|>")
    (tmp_path / "kept").mkdir()
    with pytest.raises(DataError) as error:
        keep_tokenizer(folder, tmp_path / "kept")
    assert str(error.value).startswith(f"the tokenizer in {folder}: none of its tokens is '<|stop")
    assert "eos_token in tokenizer_config.json" in str(error.value)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    for name, message in (
        (str(tmp_path / "empty"), "there is no tokenizer in"),
        (str(tmp_path / "missing"), "there is no folder"),
        ("./missing", "there is no folder"),
        ("nobody/nothing", "there is no such folder, and the hub does not give it"),
    ):
        with pytest.raises(DataError, match=f"data.tokenizer={name}: {message}"):
            find_tokenizer(name, quiet)
