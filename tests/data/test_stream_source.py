"""Real datasets, read as streams from folders: the same rows again, bad ends are sentences."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smolrun.data.base import open_split
from smolrun.data.prepared import Prepared
from smolrun.data.stream_prepare import open_stream, prepare_stream
from smolrun.data.stream_source import DatasetDocuments
from smolrun.data.tokenizer import load_tokenizer
from smolrun.errors import DataError

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
