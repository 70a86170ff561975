"""data=hf data.streaming=true: what it reads, what it refuses, and what it does not load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest

from smolrun.data.huggingface import HuggingFaceData
from smolrun.errors import DataError

datasets = pytest.importorskip("datasets")

TEXTS = [f"text {number}: " + "abc " * (number * 5 % 17) for number in range(60)]


def quiet(*told: object) -> None:
    """No progress is shown."""


def streamed(path: Path, cache: Path, **changes: Any) -> HuggingFaceData:
    keys: dict[str, Any] = {
        "path": str(path),
        "subset": None,
        "split": "train",
        "eval_split": None,
        "eval_fraction": 0.1,
        "streaming": True,
        "eval_documents": 8,
        "block_documents": 9,
        "prefetch_steps": 2,
        "text_column": None,
        "image_column": None,
        "label_column": None,
        "image_size": None,
        "image_mode": "grey",
        "tokenizer": "bytes",
        "vocab_size": 300,
        "sequence_length": 16,
        "packing": True,
        "max_mb": 100.0,
    }
    return HuggingFaceData(cache, **{**keys, **changes})


def write_lines(folder: Path, name: str, texts: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"title": "no title", "text": text}) for text in texts]
    (folder / name).write_text("\n".join(lines))


def save_to_disk(folder: Path) -> None:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder)


def as_lines(folder: Path) -> None:
    write_lines(folder, "all.jsonl", TEXTS)


@pytest.mark.parametrize("write", [as_lines, save_to_disk])
def test_a_folder_is_read_and_gone_on_with(tmp_path: Path, write: Any) -> None:
    write(tmp_path / "docs")
    data = streamed(tmp_path / "docs", tmp_path / "cache")
    prepared = data.prepare(quiet)
    whole = data.stream(prepared, seed=3)
    expected = [whole.read() for _ in range(120)]
    told = numpy.frombuffer(b"".join(row[:-4] for row in expected), "<i4")
    assert "text 9:" in bytes(told.astype(numpy.uint8)).decode()
    bookmark = json.loads(json.dumps(whole.bookmark_for(70)))
    assert bookmark["place"] is not None
    again = streamed(tmp_path / "docs", tmp_path / "cache").stream(
        prepared, seed=3, row=70, bookmark=bookmark
    )
    assert [again.read() for _ in range(50)] == expected[70:]


def test_evaluation_may_have_a_split_of_its_own(tmp_path: Path) -> None:
    write_lines(tmp_path / "docs", "train.jsonl", TEXTS)
    write_lines(tmp_path / "docs", "validation.jsonl", ["a text to look at"] * 3)
    data = streamed(
        tmp_path / "docs", tmp_path / "cache", eval_split="validation", eval_documents=3
    )
    prepared = data.prepare(quiet)
    assert prepared.eval_size == 3 * 18 // 16
    assert prepared.stream is not None
    assert prepared.stream["first_document"] == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"packing": False}, "a stream is packed"),
        ({"text_column": "body"}, r"data.text_column=body: there is no such column; .*title"),
        ({"image_column": "title"}, "data.streaming=true reads text"),
        ({"split": "moon"}, "moon"),
    ],
)
def test_what_cannot_be_streamed_is_told(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    as_lines(tmp_path / "docs")
    with pytest.raises(DataError, match=reason):
        streamed(tmp_path / "docs", tmp_path / "cache", **changes).prepare(quiet)


def test_the_reader_needs_no_torch(tmp_path: Path) -> None:
    """The driver is light: it reads streams, and never computes."""
    as_lines(tmp_path / "docs")
    code = (
        "import sys; from pathlib import Path; from tests.data.test_huggingface_stream import *\n"
        "data = streamed(Path('docs'), Path('cache'))\n"
        "data.stream(data.prepare(quiet), seed=0).read()\n"
        "print('datasets' in sys.modules, 'torch' in sys.modules)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["True", "False"], done.stderr
