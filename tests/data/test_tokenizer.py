"""Both tokenizers give every text back, from memory and from their file."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolrun.data.tokenizer import (
    END_TOKEN,
    TextTokenizer,
    bytes_tokenizer,
    load_tokenizer,
    train_bpe,
)
from smolrun.errors import DataError

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
