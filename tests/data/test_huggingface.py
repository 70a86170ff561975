"""Datasets of Hugging Face's library, made here as files and folders: columns, splits, refusals."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from huggingface_hub.errors import HFValidationError
from PIL import Image

from smolrun.data.huggingface import HuggingFaceData
from smolrun.data.prepared import Prepared
from smolrun.data.splits import IGNORE_INDEX, open_split
from smolrun.data.tokenizer import load_tokenizer
from smolrun.errors import DataError

CONF = Path(__file__).parents[2] / "conf" / "data" / "hf.yaml"
KEYS: dict[str, Any] = {
    **yaml.safe_load(CONF.read_text()),
    "eval_fraction": 0.1,
    "eval_documents": 5,
    "block_documents": 10,
    "prefetch_steps": 1,
    "tokenizer": "bytes",
    "vocab_size": 300,
    "sequence_length": 8,
    "max_mb": None,
}
for key in ("name", "target", "path"):
    del KEYS[key]
TEXTS = [f"text number {number}, which is unlike others\n" for number in range(40)]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for a hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def prepare(folder: Path, path: Path | str, **keys: Any) -> Prepared:
    return HuggingFaceData(folder / "cache", path=str(path), **{**KEYS, **keys}).prepare(
        lambda what, done, total: None
    )


def texts_in(prepared: Prepared, name: str) -> list[str]:
    """The documents of a split, as its tokens say."""
    tokenizer = load_tokenizer(str(prepared.tokenizer))
    split = open_split(prepared, "train" if name == "train" else "eval", verify=True)
    batch = split.batch(range(len(split)))
    ids = [int(batch.inputs[0, 0]), *batch.targets.flatten().tolist()]
    return tokenizer.decode(ids).split("\0")


def jsonl(folder: Path, name: str, texts: list[str], **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    rows = [json.dumps({"text": text, **more}) + "\n" for text in texts]
    (folder / name).write_text("".join(rows))
    return folder


def save_to_disk(folder: Path) -> Path:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def save_dict(folder: Path) -> Path:
    data = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict(train=data, validation=data.select(range(5))).save_to_disk(
        str(folder / "saved")
    )
    return folder / "saved"


def parquet(folder: Path) -> Path:
    (folder / "files").mkdir()
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(str(folder / "files" / "a.parquet"))
    return folder / "files"


def table(folder: Path) -> Path:
    with open(folder / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["words"], *([text] for text in TEXTS)])
    return folder / "a.csv"


@pytest.mark.parametrize(
    "make",
    [
        save_to_disk,
        save_dict,
        parquet,
        table,
        lambda folder: jsonl(folder / "files", "train.jsonl", TEXTS),
        lambda folder: jsonl(folder / "files", "all.jsonl", TEXTS) / "all.jsonl",
    ],
    ids=["save_to_disk", "save_to_disk dict", "parquet", "csv file", "jsonl", "jsonl file"],
)
def test_every_form_gives_the_same_text(tmp_path: Path, make: Any) -> None:
    prepared = prepare(tmp_path, make(tmp_path), sequence_length=1)
    documents = texts_in(prepared, "train") + texts_in(prepared, "eval")
    assert sorted(documents) == sorted([*TEXTS, "", ""])  # each ends with the end token
    assert prepared.tokenizer is not None
    first = sum(text in texts_in(prepared, "eval") for text in TEXTS[-10:])
    assert first < 4, "the evaluation part is a mix, not the end of the dataset"


def test_it_is_kept_by_its_content(tmp_path: Path) -> None:
    one = prepare(tmp_path, jsonl(tmp_path / "one", "train.jsonl", TEXTS))
    assert prepare(tmp_path, jsonl(tmp_path / "two", "train.jsonl", TEXTS)) == one
    other = prepare(tmp_path, jsonl(tmp_path / "one", "train.jsonl", [*TEXTS, "one more"]))
    assert other.sha256 != one.sha256


def test_a_split_of_its_own_is_for_evaluation(tmp_path: Path) -> None:
    folder = jsonl(tmp_path / "files", "train.jsonl", TEXTS)
    jsonl(folder, "test.jsonl", ["only for evaluation"] * 3)
    prepared = prepare(tmp_path, folder, eval_split="test", sequence_length=1)
    assert sorted(texts_in(prepared, "train")) == sorted([*TEXTS, ""])
    assert texts_in(prepared, "eval") == [*["only for evaluation"] * 3, ""]
    some = prepare(tmp_path, folder, split="train[:50%]", sequence_length=1)
    assert len(texts_in(some, "train")) + len(texts_in(some, "eval")) == 20 + 2


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    data = {"n": list(range(40)), "title": ["t"] * 40, "body": TEXTS}
    datasets.Dataset.from_dict(data).save_to_disk(str(tmp_path / "saved"))
    prepared = prepare(tmp_path, tmp_path / "saved", text_column="body", sequence_length=1)
    assert set(texts_in(prepared, "train")) < {*TEXTS, ""}
    there = r"its columns: n \(int64\), title \(string\), body \(string\)"
    for keys, message in (
        ({}, r"has 2 columns of text: set data\.text_column=NAME"),
        ({"text_column": "text"}, r"data\.text_column=text: there is no such column"),
        ({"text_column": "n"}, r"data\.text_column=n: is not text"),
        ({"image_column": "title"}, r"data\.label_column=NAME is needed \(found none\)"),
        ({"image_column": "title", "label_column": "n"}, r"image_column=title: holds no images"),
    ):
        with pytest.raises(DataError, match=f"{message}.*; {there}"):
            prepare(tmp_path, tmp_path / "saved", **keys)


def test_max_mb_takes_a_mix_of_all_rows(tmp_path: Path) -> None:
    folder = jsonl(tmp_path / "files", "train.jsonl", TEXTS)
    prepared = prepare(tmp_path, folder, max_mb=0.0005, sequence_length=1)
    found = [text for text in texts_in(prepared, "train") if text in TEXTS]
    assert 8 < len(found) < 13
    assert max(map(TEXTS.index, found)) > 25


def test_rows_without_text_are_left_out(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": [None, "", "  \n", *TEXTS]}).save_to_disk(
        str(tmp_path / "saved")
    )
    prepared = prepare(tmp_path, tmp_path / "saved", sequence_length=1)
    assert "in 40 documents" in prepared.description
    datasets.Dataset.from_dict({"text": ["", "  "]}).save_to_disk(str(tmp_path / "blank"))
    with pytest.raises(DataError, match="there is no text in the column text"):
        prepare(tmp_path, tmp_path / "blank")


def test_without_packing_documents_share_no_sample(tmp_path: Path) -> None:
    texts = ["short", "a document that is longer than one sample", "x"] * 4
    folder = jsonl(tmp_path / "files", "train.jsonl", texts)
    prepared = prepare(tmp_path, folder, packing=False, sequence_length=16, eval_fraction=0.2)
    tokenizer = load_tokenizer(str(prepared.tokenizer))
    learnt = []
    for name in ("train", "eval"):
        split = open_split(prepared, name, verify=True)
        batch = split.batch(range(len(split)))
        for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
            # All that is learnt stands together, and what fills the row up is the end token.
            count = int((targets != IGNORE_INDEX).sum())
            assert torch.equal(inputs[1:count], targets[: count - 1])
            assert (inputs[count + 1 :] == tokenizer.end_id).all()
            assert (targets[count:] == IGNORE_INDEX).all()
            learnt.append(tokenizer.decode([int(inputs[0]), *targets[:count].tolist()]))
    whole = "".join(learnt)
    assert learnt.count("short\0") == 4
    assert learnt.count("x\0") == 4
    # A longer one goes on in the next row, which begins with the last token of the row before.
    assert "a document that i" in learnt
    assert "is longer than on" in learnt
    assert whole.count("\0") == 12


@pytest.mark.parametrize(
    ("path", "keys", "message"),
    [
        ("files", {"split": "tset"}, r"split 'tset'.*Should be one of \['train'\]"),
        ("files", {"eval_split": "dev"}, r"split 'dev'.*Should be one of \['train'\]"),
        ("files", {"subset": "de"}, r"subset 'de'.*'de' not found. Available: \['default'\]"),
        ("nowhere/at/all", {}, "nowhere/at/all"),
        ("nobody/nothing", {}, "no such file or folder here, the hub cannot be reached"),
        ("empty", {}, "doesn't contain any data files"),
        ("broken", {}, "JSON"),
        ("notes.xyz", {}, "files may end with .json, .jsonl"),
        ("script", {}, "scripts are no longer supported, but found script.py"),
        ("saved", {"split": "test"}, "there is no split 'test', but train$"),
        ("files", {"sequence_length": 5000}, "the text is too short"),
        ("files", {"streaming": True, "packing": False}, "data.packing=false: a stream is packed"),
    ],
)
def test_what_cannot_be_used_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, keys: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "files", "train.jsonl", TEXTS)
    save_to_disk(tmp_path)
    for name in ("empty", "broken", "script"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "a.jsonl").write_text('{"text": "fine"}\n{broken\n')
    (tmp_path / "notes.xyz").write_text("notes")
    (tmp_path / "script" / "script.py").write_text("raise SystemExit('this must never run')\n")
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, path, **keys)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("no route to host"), "no such file or folder here, the hub cannot be reached"),
        (HFValidationError("no name"), "and no such dataset on the hub that you may read"),
    ],
)
def test_a_hub_that_cannot_be_asked_is_told_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def answer(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", answer)
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, "nobody/nothing")
    assert not datasets.config.HF_HUB_OFFLINE


# -- pictures ----


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """A folder a class, as image sets often come: ten pictures each, class by class."""
    for kind, colour in (("cat", 200), ("dog", 90), ("eel", 10)):
        (tmp_path / "animals" / kind).mkdir(parents=True)
        for number in range(10):
            picture = Image.new("RGB", (6, 4), (colour, colour, number))
            picture.save(tmp_path / "animals" / kind / f"{number}.png")
    return tmp_path / "animals"


def test_pictures_become_rows(tmp_path: Path, animals: Path) -> None:
    prepared = prepare(tmp_path, animals, image_mode="rgb", eval_fraction=0.2)
    assert (prepared.kind, prepared.num_inputs, prepared.num_outputs) == ("features", 72, 3)
    assert (prepared.train_size, prepared.eval_size) == (24, 6)
    seen = set()
    for name, size in (("train", 24), ("eval", 6)):
        batch = open_split(prepared, name, verify=True).batch(range(size))
        colours = batch.inputs[:, 0].mul(255).round().int().tolist()
        assert colours == [[200, 90, 10][kind] for kind in batch.targets.tolist()]
        numbers = batch.inputs[:, 2].mul(255).round().int().tolist()
        seen |= set(zip(batch.targets.tolist(), numbers, strict=True))
        assert len(set(batch.targets[:6].tolist())) > 1  # mixed, not class after class
    assert len(seen) == 30


def test_pictures_are_made_grey_and_of_one_size(tmp_path: Path, animals: Path) -> None:
    assert prepare(tmp_path, animals).num_inputs == 24
    Image.new("L", (9, 9), 5).save(animals / "eel" / "large.png")
    with pytest.raises(DataError, match=r"larger or smaller than .* data\.image_size=28"):
        prepare(tmp_path, animals)
    assert prepare(tmp_path, animals, image_size=5).num_inputs == 25
    assert prepare(tmp_path, animals, image_size=5, max_mb=0.0005).train_size == 18


def test_a_picture_that_is_none_is_named(tmp_path: Path, animals: Path) -> None:
    (animals / "cat" / "3.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="image 3 cannot be read"):
        prepare(tmp_path, animals)


def test_classes_may_be_numbers_or_names(tmp_path: Path, animals: Path) -> None:
    files = sorted(map(str, animals.rglob("*.png")))
    for labels, classes in (([2] * 15 + [5] * 15, 6), (["b"] * 15 + ["a"] * 15, 2)):
        data = datasets.Dataset.from_dict({"picture": files, "label": labels})
        data = data.cast_column("picture", datasets.Image())
        data.save_to_disk(str(tmp_path / f"saved{classes}"))
        assert prepare(tmp_path, tmp_path / f"saved{classes}").num_outputs == classes


@pytest.mark.parametrize("label", [0.5, [1], {"x": 1}], ids=str)
def test_other_labels_are_refused_with_the_columns(
    tmp_path: Path, animals: Path, label: object
) -> None:
    files = sorted(map(str, animals.rglob("*.png")))[:4]
    data = datasets.Dataset.from_dict({"picture": files, "label": [label] * 4})
    data.cast_column("picture", datasets.Image()).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(
        DataError, match=r"label_column=label: holds no classes.* picture \(image\)"
    ):
        prepare(tmp_path, tmp_path / "saved")
