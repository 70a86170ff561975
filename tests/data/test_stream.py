"""Rows of a stream: the same for every reader, from every bookmark, in every pass."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest

from smolrun.data import stream
from smolrun.data.hub_dataset import DatasetDocuments
from smolrun.data.prepared import Prepared
from smolrun.data.splits import open_split
from smolrun.data.stream import (
    Bookmark,
    Bookmarks,
    Packing,
    StreamReader,
    open_stream,
    prepare_stream,
)
from smolrun.data.tokenizer import load_tokenizer
from smolrun.errors import DataError

END = 0
LENGTH = 5
# Between 0 and 12 tokens each; every token names its document.
DOCUMENTS = ["".join(chr(200 + number) for _ in range(number * 7 % 13)) for number in range(23)]


class Shelf:
    """Documents of a list; with places, as a library would tell them, or without."""

    def __init__(self, texts: list[str], *, has_places: bool = True) -> None:
        self.texts = texts
        self.has_places = has_places
        self.given: list[int] = []
        self._at = 0

    def documents(self, start: int, place: Mapping[str, Any] | None) -> Iterator[str]:
        for number in range(start if place is None else place["at"], len(self.texts)):
            self._at = number + 1
            self.given.append(number)
            yield self.texts[number]

    def place(self) -> dict[str, Any] | None:
        return {"at": self._at} if self.has_places else None


def packing(**changes: Any) -> Packing:
    settings: dict[str, Any] = {
        "encode_batch": lambda texts: [[ord(letter) for letter in text] for text in texts],
        "end_id": END,
        "sequence_length": LENGTH,
        "block_documents": 4,
        "first_document": 2,
        "seed": 11,
        "identity": "shelf",
    }
    return Packing(**{**settings, **changes})


def reader(shelf: Shelf | None = None, row: int = 0, bookmark: Any = None) -> StreamReader:
    return StreamReader(shelf or Shelf(DOCUMENTS), packing(), row=row, bookmark=bookmark)


def rows(source: StreamReader, count: int) -> list[list[int]]:
    return [numpy.frombuffer(source.read(), "<i4").tolist() for _ in range(count)]


def documents_of(tokens: list[int]) -> list[str]:
    """Whole documents, in the order in which the tokens tell them."""
    text = "".join("|" if token == END else chr(token) for token in tokens)
    return text.split("|")


def joined(read: list[list[int]]) -> list[int]:
    """The tokens that the windows were cut from."""
    assert all(a[-1] == b[0] for a, b in itertools.pairwise(read)), "windows overlap by one"
    return [*read[0][:1], *(token for row in read for token in row[1:])]


def test_rows_hold_every_document_once_a_pass_each_with_its_end() -> None:
    whole = sorted(text for text in DOCUMENTS[2:] if text)
    one_pass = sum(len(text) + 1 for text in whole)
    told = documents_of(joined(rows(reader(), 3 * one_pass // LENGTH)))
    first, second = told[: len(whole)], told[len(whole) : 2 * len(whole)]
    assert sorted(first) == sorted(second) == whole
    assert first != second, "passes are shuffled differently"
    assert first != [text for text in DOCUMENTS[2:] if text], "and they are shuffled"


def test_documents_stay_within_their_block() -> None:
    told = documents_of(joined(rows(reader(), 16)))
    blocks = [DOCUMENTS[2:6], DOCUMENTS[6:10], DOCUMENTS[10:14]]
    for block in blocks:
        texts = sorted(text for text in block if text)
        assert sorted(told[: len(texts)]) == texts
        told = told[len(texts) :]


def test_another_seed_is_another_order() -> None:
    other = StreamReader(Shelf(DOCUMENTS), packing(seed=12))
    assert rows(other, 20) != rows(reader(), 20)


@pytest.mark.parametrize("has_places", [True, False])
def test_a_reader_that_begins_anywhere_gives_the_same_rows(has_places: bool) -> None:
    whole = reader()
    expected = rows(whole, 90)
    passes = {whole.bookmark_for(row)["pass"] for row in range(90)}
    assert passes >= {0, 1, 2}, "the test is to go over the end of a pass"
    source = reader(Shelf(DOCUMENTS, has_places=has_places))
    rows(source, 80)
    for row in range(80):
        assert rows(reader(row=row), 10) == expected[row : row + 10], "from the start"
        bookmark = json.loads(json.dumps(source.bookmark_for(row)))
        shelf = Shelf(DOCUMENTS, has_places=has_places)
        assert rows(reader(shelf, row, bookmark), 10) == expected[row : row + 10]


def test_a_bookmark_saves_reading_from_the_beginning() -> None:
    source = reader()
    rows(source, 20)
    shelf = Shelf(DOCUMENTS)
    again = reader(shelf, 20, source.bookmark_for(20))
    again.read()
    assert shelf.given[0] > 5
    assert len(shelf.given) <= 8
    # And the reader that went on from a bookmark has bookmarks of its own, of the same stream.
    rows(again, 20)
    assert again.bookmark_for(40) == reader_at(41).bookmark_for(40)


def reader_at(row: int) -> StreamReader:
    source = reader()
    rows(source, row)
    return source


def test_catching_up_reads_ahead_of_the_run_and_tells_how_far_it_is() -> None:
    told: list[tuple[str, int, int]] = []
    source = reader(row=30)
    source.catch_up(lambda *what: told.append(what))
    assert told == [("finding the place", 0, 30)]
    assert rows(source, 3) == rows(reader_at(30), 3)


def test_bookmarks_stay_few_and_the_first_one_stays() -> None:
    kept = Bookmarks(Bookmark(0))
    for number in range(1, 5000):
        kept.keep(Bookmark(number, row=number))
    assert kept.at(0).row == 0
    assert len(kept._kept) <= 512
    assert all(kept.at(row).row <= row for row in range(5000))
    assert kept.at(4999).row > 4900
    with pytest.raises(ValueError, match="before the first"):
        Bookmarks(Bookmark(0, row=7)).at(6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"row": -1}, r"damaged: .*\$\.row"),
        ({"document": "7"}, r"damaged: .*\$\.document"),
        ({"block": True}, r"damaged: .*\$\.block"),
        ({"leftover": [1, 2**40]}, r"damaged: .*\$\.leftover"),
        ({"leftover": None}, r"damaged: .*\$\.leftover"),
        ({"place": [1]}, r"damaged: .*\$\.place"),
        ({"stream": "another"}, "belongs to another stream"),
        ({"row": 99}, "behind row 10"),
    ],
)
def test_a_bad_bookmark_is_told(change: dict[str, Any], reason: str) -> None:
    source = reader()
    rows(source, 10)
    with pytest.raises(DataError, match=reason):
        reader(row=10, bookmark={**source.bookmark_for(10), **change})


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"sequence_length": 6}, {"block_documents": 3}, {"identity": "x"}]
)
def test_a_bookmark_of_other_settings_is_refused(change: dict[str, Any]) -> None:
    source = reader()
    rows(source, 10)
    with pytest.raises(DataError, match="another stream"):
        StreamReader(Shelf(DOCUMENTS), packing(**change), row=10, bookmark=source.bookmark_for(10))


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ([], "no text to train on$"),
        (["a", "b"], "no text to train on behind its first 2 documents"),
        (["a", "b", "", ""], "no text to train on behind its first 2 documents"),
    ],
)
def test_a_stream_without_text_is_an_error_and_not_a_hang(texts: list[str], reason: str) -> None:
    settings = packing(first_document=2 if texts else 0)
    with pytest.raises(DataError, match=reason):
        StreamReader(Shelf(texts), settings).read()


def test_one_short_document_is_enough() -> None:
    source = StreamReader(Shelf(["", "", "ab"]), packing())
    a, b = ord("a"), ord("b")
    assert rows(source, 2) == [[a, b, END, a, b, END], [END, a, b, END, a, b]]


def test_long_documents_end_a_block_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_BLOCK_CHARACTERS", 10)
    shelf = Shelf(["x" * 12] * 8)
    StreamReader(shelf, packing(first_document=0)).read()
    assert len(shelf.given) == 1


datasets = pytest.importorskip("datasets")

TEXTS = [f"text {number}: " + "abc " * (number * 5 % 17) for number in range(60)]


def quiet(*told: object) -> None:
    """No progress is shown."""


def write_jsonl(folder: Path) -> None:
    for part in range(3):
        lines = [json.dumps({"text": text, "n": 1}) for text in TEXTS[20 * part : 20 * part + 20]]
        (folder / f"{part}.jsonl").write_text("\n".join(lines))


def write_parquet(folder: Path) -> None:
    for part in range(3):
        made = datasets.Dataset.from_dict({"text": TEXTS[20 * part : 20 * part + 20]})
        made.to_parquet(folder / f"{part}.parquet", batch_size=7)


def write_lines(folder: Path) -> None:
    (folder / "all.txt").write_text("\n".join(TEXTS))


def documents(folder: Path, column: str = "text") -> DatasetDocuments:
    def open_dataset() -> Any:
        return datasets.load_dataset(str(folder), split="train", streaming=True)

    return DatasetDocuments(open_dataset, lambda dataset: column, f"data.path={folder.name}")


def prepare(folder: Path, cache: Path, **changes: Any) -> Prepared:
    settings: dict[str, Any] = {
        "eval_source": None,
        "eval_documents": 8,
        "tokenizer": "bpe",
        "vocab_size": 300,
        "sequence_length": 16,
        "block_documents": 9,
        "prefetch_steps": 2,
    }
    return prepare_stream(cache, "hf", documents(folder), quiet, **{**settings, **changes})


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    made = tmp_path / "docs"
    made.mkdir()
    write_jsonl(made)
    return made


@pytest.fixture(params=[write_jsonl, write_parquet, write_lines])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write: Callable[[Path], None] = request.param
    made = tmp_path / "docs"
    made.mkdir()
    write(made)
    return made


def test_a_pass_begins_anywhere_by_place_and_by_counting(folder: Path) -> None:
    assert [text.strip() for text in documents(folder).documents(0, None)] == [
        text.strip() for text in TEXTS
    ]
    whole = list(documents(folder).documents(0, None))
    for number in (1, 7, 20, 33, 59):
        source = documents(folder)
        one_pass = source.documents(0, None)
        for _ in range(number):
            next(one_pass)
        place = json.loads(json.dumps(source.place()))
        assert place is not None
        assert list(documents(folder).documents(number, place)) == whole[number:]
        assert list(documents(folder).documents(number, None)) == whole[number:]


def test_a_stream_goes_on_in_the_middle_with_the_same_rows(folder: Path, tmp_path: Path) -> None:
    prepared = prepare(folder, tmp_path / "cache")
    whole = open_stream(prepared, documents(folder), seed=3)
    expected = [whole.read() for _ in range(200)]
    assert whole.bookmark_for(200)["pass"] >= 2
    for row in (0, 1, 29, 77, 150):
        bookmark = json.loads(json.dumps(whole.bookmark_for(row)))
        assert bookmark["place"] is not None or bookmark["document"] == 8
        again = open_stream(prepared, documents(folder), seed=3, row=row, bookmark=bookmark)
        assert [again.read() for _ in range(40)] == expected[row : row + 40]


def test_the_evaluation_part_is_finite_and_never_trained_on(docs: Path, tmp_path: Path) -> None:
    prepared = prepare(docs, tmp_path / "cache", tokenizer="bytes", sequence_length=7)
    split = open_split(prepared, "eval", verify=True)
    told = bytes(split.batch([0]).inputs[0].tolist())
    assert told == TEXTS[0][:7].encode()
    assert len(split) == prepared.eval_size > 5
    reader = open_stream(prepared, documents(docs), seed=0)
    first_pass = b"".join(reader.read()[: 4 * 7] for _ in range(500))[::4].decode()
    held_out, others = TEXTS[:8], TEXTS[8:]
    assert all(text.split(":")[0] + ":" not in first_pass for text in held_out)
    assert all(text.split(":")[0] + ":" in first_pass for text in others)


def test_another_split_may_be_the_evaluation_part(docs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "more.jsonl").write_text(json.dumps({"text": "something else entirely"}) + "\n")
    prepared = prepare(
        docs,
        tmp_path / "cache",
        eval_source=documents(other),
        eval_documents=1,
        tokenizer="bytes",
        sequence_length=5,
    )
    first = open_split(prepared, "eval", verify=True).batch([0]).inputs[0].tolist()
    assert bytes(first) == b"somet"
    assert prepared.stream is not None
    assert prepared.stream["first_document"] == 0


def test_what_is_prepared_is_kept_and_made_anew_when_the_documents_change(
    docs: Path, tmp_path: Path
) -> None:
    first = prepare(docs, tmp_path / "cache")
    assert prepare(docs, tmp_path / "cache") == first
    assert Prepared.from_json(json.loads(json.dumps(first.to_json()))) == first
    assert load_tokenizer(first.tokenizer or "").vocab_size == first.num_outputs == 300
    lines = (docs / "0.jsonl").read_text().replace("text 3:", "text three:")
    (docs / "0.jsonl").write_text(lines)
    assert prepare(docs, tmp_path / "cache").sha256 != first.sha256


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"eval_documents": 61}, "60 documents, fewer than data.eval_documents=61"),
        ({"sequence_length": 5000}, "one sample needs 5001; raise data.eval_documents"),
    ],
)
def test_too_little_for_an_evaluation_is_told(
    docs: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        prepare(docs, tmp_path / "cache", **changes)


def test_a_column_that_is_not_there_is_told_with_those_that_are(docs: Path) -> None:
    with pytest.raises(DataError, match=r"'body'.* not in the dataset.*'text', 'n'"):
        next(documents(docs, "body").documents(0, None))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            '{"n": 5}\n' * 1005,
            "the last 1001 documents of data.path=docs, up to 1020, have no text",
        ),
        ("{what?", "data.path=docs cannot be read on from document"),
    ],
)
def test_a_stream_that_breaks_in_the_middle_is_told(
    docs: Path, tmp_path: Path, line: str, reason: str
) -> None:
    rest = (docs / "1.jsonl").read_text()
    (docs / "1.jsonl").write_text(f"{line}\n{rest}")
    prepared = prepare(docs, tmp_path / "cache", tokenizer="bytes")
    reader = open_stream(prepared, documents(docs), seed=0)
    with pytest.raises(DataError, match=reason):
        for _ in range(100):
            reader.read()


def test_a_column_that_is_no_text_is_told(docs: Path) -> None:
    with pytest.raises(DataError, match=r"'n' of document 0 of .* holds a int, not text"):
        next(documents(docs, "n").documents(0, None))
