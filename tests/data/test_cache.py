"""The cache of prepared data: found again at once, whole or not there, safe between runs."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from smolrun.cli.compose import compose
from smolrun.data.cache import DATA_FILE, cached
from smolrun.data.python_stdlib import PythonStdlib
from smolrun.data.splits import Prepared, open_split
from smolrun.data.text import TextFiles
from smolrun.driver.prepare import prepare_data
from smolrun.errors import DataError

KEYS: dict[str, Any] = {
    "tokenizer": "bpe",
    "vocab_size": 300,
    "sequence_length": 16,
    "eval_fraction": 0.1,
    "max_mb": 1,
}


class Maker:
    """Counts how often it had to make an entry."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Path) -> Mapping[str, Any]:
        self.calls += 1
        (folder / DATA_FILE).write_bytes(b"some data")
        return {"answer": 42}


def test_an_entry_is_made_once(tmp_path: Path) -> None:
    make = Maker()
    entries = [cached(tmp_path / "new" / "cache", "x", {"key": 1}, make) for _ in range(3)]
    assert make.calls == 1
    assert entries[0] == entries[1] == entries[2]
    assert entries[0].facts == {"answer": 42}
    assert entries[0].data_path.read_bytes() == b"some data"


def test_another_key_is_another_entry(tmp_path: Path) -> None:
    make = Maker()
    assert (
        cached(tmp_path, "x", {"key": 1}, make).folder
        != cached(tmp_path, "x", {"key": 2}, make).folder
    )


@pytest.mark.parametrize("file", [DATA_FILE, "facts.json"])
@pytest.mark.parametrize("damage", ["change", "remove"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, file: str, damage: str) -> None:
    make = Maker()
    entry = cached(tmp_path, "x", {}, make)
    if damage == "change":
        (entry.folder / file).write_bytes(b"other data")
    else:
        (entry.folder / file).unlink()
    assert cached(tmp_path, "x", {}, make) == entry
    assert make.calls == 2
    assert entry.data_path.read_bytes() == b"some data"
    assert [path.name for path in tmp_path.iterdir()] == [entry.folder.name]


def test_a_maker_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(folder: Path) -> Mapping[str, Any]:
        (folder / DATA_FILE).write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, "x", {}, fail)
    assert list(tmp_path.iterdir()) == []


def test_the_entry_of_a_faster_run_is_kept(tmp_path: Path) -> None:
    def slow(folder: Path) -> Mapping[str, Any]:
        faster.append(cached(tmp_path, "x", {}, Maker()))
        (folder / DATA_FILE).write_bytes(b"some data")
        return {"answer": 42}

    faster: list[Any] = []
    assert cached(tmp_path, "x", {}, slow) == faster[0]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_cache_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write to the cache folder .*file"):
        cached(tmp_path / "file", "x", {}, Maker())


def test_a_cache_that_cannot_be_made_is_told_before_any_data_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").touch()
    folder = tmp_path / "home" / "cache"
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda _: folder)
    config = compose(["data=hf", "data.path=rows.json", "training.steps=2"])
    with pytest.raises(DataError) as error:
        prepare_data(config, lambda *_: None)
    assert str(error.value).startswith(f"the cache folder {folder / 'data'} cannot be made: ")


def prepare_and_read(folder: str, results: Any) -> None:
    """Runs in a process of its own."""
    data = TextFiles(Path(folder, "cache"), path=str(Path(folder, "text.txt")), glob="", **KEYS)
    prepared = data.prepare(lambda *_: None)
    size = len(open_split(prepared, "train", verify=True))
    results.put((prepared.to_json(), size))


def test_runs_that_prepare_at_once_all_get_whole_data(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"line {number}\n" for number in range(3000)))
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    runs = [
        context.Process(target=prepare_and_read, args=(str(tmp_path), results)) for _ in range(2)
    ]
    for run in runs:
        run.start()
    answers = [results.get(timeout=50) for _ in runs]
    for run in runs:
        run.join()
        assert run.exitcode == 0
    assert answers[0] == answers[1]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_second_time_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = PythonStdlib(tmp_path, **KEYS)
    first = data.prepare(lambda *_: None)
    monkeypatch.setattr("smolrun.data.cache.tempfile.mkdtemp", pytest.fail)
    assert data.prepare(lambda *_: None) == first


def test_a_window_length_needs_no_new_tokens(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words\n" * 500)
    for length in (8, 16):
        TextFiles(
            tmp_path / "cache",
            path=str(tmp_path / "text.txt"),
            glob="",
            **{**KEYS, "sequence_length": length},
        ).prepare(lambda *_: None)
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    (tmp_path / "text.txt").write_text("some words\n" * 500)
    return TextFiles(tmp_path / "cache", path=str(tmp_path / "text.txt"), glob="", **KEYS).prepare(
        lambda *_: None
    )


def test_a_changed_file_is_found_by_its_hash(prepared: Prepared) -> None:
    data = bytearray(Path(prepared.path).read_bytes())
    data[-1] ^= 1
    Path(prepared.path).write_bytes(data)
    with pytest.raises(
        DataError,
        match=f"is not the file that was prepared: its sha256 is .* expected {prepared.sha256}",
    ):
        open_split(prepared, "train", verify=True)
    open_split(prepared, "train", verify=False)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_file_that_shrank_is_told(prepared: Prepared, keep: int) -> None:
    path = Path(prepared.path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="is not the file that was prepared"):
        open_split(prepared, "train", verify=True)
    with pytest.raises(DataError, match="cannot read the prepared data"):
        open_split(prepared, "train", verify=False)


def test_a_file_that_is_gone_or_garbage_is_named(prepared: Prepared) -> None:
    Path(prepared.path).write_bytes(b"garbage")
    with pytest.raises(DataError, match="cannot read the prepared data"):
        open_split(prepared, "train", verify=False)
    Path(prepared.path).unlink()
    for verify in (True, False):
        with pytest.raises(DataError, match="cannot read the prepared data"):
            open_split(prepared, "train", verify=verify)


def test_the_description_travels_as_json(prepared: Prepared) -> None:
    assert Prepared.from_json(prepared.to_json()) == prepared


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"kind": "sound"}, "kind"),
        ({"train_size": "7"}, "train_size"),
        ({"train_size": True}, "train_size"),
        ({"eval_size": 0}, "eval_size"),
        ({"sequence_length": None}, "sequence_length"),
        ({"kind": "features"}, "num_inputs"),
        ({"more": 1}, "more"),
        ({"path": None, "sha256": 5}, "path"),
        ({"train_size": 0}, "train_size"),
        ({"stream": {"first_document": 0, "block_documents": 0, "prefetch_steps": 0}}, "stream"),
    ],
)
def test_a_damaged_description_is_refused(
    prepared: Prepared, changes: dict[str, Any], wrong: str
) -> None:
    with pytest.raises(DataError, match=f"damaged: .*{wrong}"):
        Prepared.from_json({**prepared.to_json(), **changes})
    with pytest.raises(DataError, match=r"damaged: .*missing required field `path`"):
        Prepared.from_json(
            {key: value for key, value in prepared.to_json().items() if key != "path"}
        )


def test_sizes_that_do_not_fit_the_file_are_found(prepared: Prepared) -> None:
    wrong = Prepared.from_json({**prepared.to_json(), "train_size": prepared.train_size + 1})
    with pytest.raises(DataError, match=f"holds {prepared.train_size} train samples, expected"):
        open_split(wrong, "train", verify=True)
