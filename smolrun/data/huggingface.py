"""Any dataset that the library `datasets` can read: of the hub, of a folder, of a file.

Shape suffixes: N images, P numbers of one image (rows, columns, colours).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy

from smolrun.data.documents import Documents, split_between
from smolrun.data.feature_file import Rows, prepare_features
from smolrun.data.hub_dataset import (
    DatasetDocuments,
    Wanted,
    has_images,
    image_columns,
    is_label,
    open_dataset,
    text_column,
)
from smolrun.data.order import SampleOrder
from smolrun.data.prepared import Kind, Prepared, Progress
from smolrun.data.stream import StreamReader, open_stream, prepare_stream
from smolrun.data.token_file import prepare_tokens
from smolrun.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


_READ_AT_ONCE = 500  # rows


@dataclass
class HuggingFaceData:
    """Text or images of a dataset; conf/data/hf.yaml explains the keys."""

    produces: ClassVar[Kind | None] = None  # known once the dataset is opened

    cache_dir: Path
    _: KW_ONLY
    path: str
    subset: str | None
    split: str
    eval_split: str | None
    eval_fraction: float
    streaming: bool
    eval_documents: int
    block_documents: int
    prefetch_steps: int
    text_column: str | None
    image_column: str | None
    label_column: str | None
    image_size: int | None
    image_mode: Literal["grey", "rgb"]
    tokenizer: str
    vocab_size: int
    sequence_length: int
    packing: bool
    max_mb: float | None

    def __post_init__(self) -> None:
        self._wanted: Wanted = {
            "text_column": self.text_column,
            "image_column": self.image_column,
            "label_column": self.label_column,
        }
        self._tokens: dict[str, Any] = {
            "tokenizer": self.tokenizer,
            "vocab_size": self.vocab_size,
            "sequence_length": self.sequence_length,
        }
        self._most_bytes = None if self.max_mb is None else int(self.max_mb * 1e6)

    def prepare(self, progress: Progress) -> Prepared:
        """Open the dataset, read its samples and cache them; raises DataError if that fails."""
        if self.streaming:
            return self._prepare_stream(progress)
        train = self._open(self.split, progress)
        held_out = self._open(self.eval_split, progress) if self.eval_split else None
        if has_images(train.features, self._wanted):
            return self._prepare_images(train, held_out, progress)
        documents = self._read_documents(train, held_out, progress)
        return prepare_tokens(
            self.cache_dir,
            "hf",
            documents,
            progress,
            eval_fraction=self.eval_fraction,
            packing=self.packing,
            **self._tokens,
        )

    def stream(
        self,
        prepared: Prepared,
        *,
        seed: int,
        row: int = 0,
        bookmark: Mapping[str, Any] | None = None,
    ) -> StreamReader:
        """The reader of what `prepare` described, from row `row` on; it has read nothing yet."""
        return open_stream(
            prepared, self._documents(self.split), seed=seed, row=row, bookmark=bookmark
        )

    def _prepare_stream(self, progress: Progress) -> Prepared:
        if not self.packing:
            raise DataError(
                "data.packing=false: a stream is packed; set data.packing=true, or "
                "data.streaming=false"
            )
        return prepare_stream(
            self.cache_dir,
            "hf",
            self._documents(self.split),
            progress,
            eval_source=self._documents(self.eval_split) if self.eval_split else None,
            eval_documents=self.eval_documents,
            block_documents=self.block_documents,
            prefetch_steps=self.prefetch_steps,
            **self._tokens,
        )

    def _documents(self, split: str) -> DatasetDocuments:
        return stream_documents(
            self.path, self.subset, split, wanted=self._wanted, cache_dir=self.cache_dir
        )

    def _open(self, split: str, progress: Progress) -> Dataset:
        opened: Any = open_dataset(
            self.path, self.subset, split, cache_dir=self.cache_dir, progress=progress
        )
        if not len(opened):
            raise DataError(f"data.path={self.path}: the split {split!r} is empty")
        return opened

    def _read_documents(
        self, train: Dataset, held_out: Dataset | None, progress: Progress
    ) -> Documents:
        hasher = hashlib.sha256()
        parts: list[list[str]] = []
        for dataset in [train] if held_out is None else [train, held_out]:
            column = text_column(dataset.features, self._wanted)
            texts = list(texts_of(dataset, column, self._most_bytes, progress))
            if not texts:
                raise DataError(f"data.path={self.path}: there is no text in the column {column}")
            for text in texts:
                hasher.update(hashlib.sha256(text.encode(errors="replace")).digest())
            hasher.update(b"the next part")
            parts.append(texts)
        if len(parts) == 1 and len(parts[0]) > 1:
            parts = list(split_between(parts[0], self.eval_fraction))
        return Documents(
            parts[0], hasher.hexdigest(), held_out=parts[1] if len(parts) > 1 else None
        )

    def _prepare_images(
        self, train: Dataset, held_out: Dataset | None, progress: Progress
    ) -> Prepared:
        sets = [
            Images(
                dataset,
                *image_columns(dataset.features, self._wanted),
                mode=self.image_mode,
                size=self.image_size,
                most_bytes=self._most_bytes,
            )
            for dataset in ([train] if held_out is None else [train, held_out])
        ]
        key = {
            "pictures": [pictures.sha256(progress) for pictures in sets],
            "image_mode": self.image_mode,
            "image_size": self.image_size,
            "most_bytes": self._most_bytes,
            "eval_fraction": self.eval_fraction,
        }

        def read() -> tuple[Rows, Rows]:
            classes = sets[0].classes()
            rows = [pictures.read(classes, progress) for pictures in sets]
            return (rows[0], rows[1]) if len(rows) > 1 else self._cut(rows[0])

        return prepare_features(self.cache_dir, "hf", key, read)

    def _cut(self, rows: Rows) -> tuple[Rows, Rows]:
        size = len(rows.targets_N)
        border = max(1, min(size - 1, round(size * (1 - self.eval_fraction))))
        return (
            Rows(rows.inputs_NP[:border], rows.targets_N[:border]),
            Rows(rows.inputs_NP[border:], rows.targets_N[border:]),
        )


def texts_of(
    dataset: Dataset, column: str, most_bytes: int | None, progress: Progress
) -> Iterator[str]:
    """The texts of a column, empty ones left out, at most `most_bytes` of them (UTF-8).

    They come in an order that mixes the whole dataset, always the same one, so that the first few
    and the last few are a fair part of it.
    """
    column_only = dataset.select_columns([column])
    size, room = len(dataset), most_bytes
    order = SampleOrder(max(1, size), 0)
    for start in range(0, size, _READ_AT_ONCE):
        progress("reading text", start, size)
        rows = order.indices(start, min(size, start + _READ_AT_ONCE))
        for text in column_only[rows][column]:
            if text is None or not text.strip():
                continue
            if room is None:
                yield text
                continue
            encoded = text.encode(errors="replace")
            part = text if len(encoded) <= room else encoded[:room].decode(errors="ignore")
            room -= len(encoded)
            if part.strip():
                yield part
            if room <= 0:
                progress("reading text", size, size)
                return
    progress("reading text", size, size)


def stream_documents(
    path: str, subset: str | None, split: str, *, wanted: Wanted, cache_dir: Path
) -> DatasetDocuments:
    """The documents of one split; nothing is opened yet."""

    def open_one() -> Any:
        import datasets

        # Its streams would load torch, only to be understood by torch's own loaders.
        datasets.config.TORCH_AVAILABLE = False
        return open_dataset(
            path, subset, split, cache_dir=cache_dir, progress=_silent, streaming=True
        )

    def pick(dataset: Any) -> str:
        # Without declared features, the library infers the columns from the first few rows.
        features = dataset.features or dataset._resolve_features().features or {}
        if has_images(features, wanted):
            raise DataError(
                f"data.path={path}: data.streaming=true reads text; set data.text_column=NAME, or "
                "data.streaming=false for images"
            )
        return text_column(features, wanted)

    return DatasetDocuments(open_one, pick, f"data.path={path}")


def _silent(what: str, done: int, total: int) -> None:
    """A stream is opened for each pass, which is not reported."""


class Images:
    """The images of one split, as rows of bytes. Raises DataError where `pillow` is missing."""

    def __init__(
        self,
        dataset: Dataset,
        image_column: str,
        label_column: str,
        *,
        mode: Literal["grey", "rgb"],
        size: int | None,
        most_bytes: int | None,
    ) -> None:
        from datasets import Image

        self._dataset = dataset.select_columns([image_column, label_column]).cast_column(
            image_column, Image(decode=False)
        )
        self._image, self._label = image_column, label_column
        self._mode = {"grey": "L", "rgb": "RGB"}[mode]
        self._size = size
        self._most_bytes = most_bytes
        self.is_named = is_label(dataset.features[label_column])

    def __len__(self) -> int:
        return len(self._dataset)

    def sha256(self, progress: Progress) -> str:
        """The hash of all images and classes, independent of the files they came in."""
        hasher = hashlib.sha256()
        for done, row in enumerate(self._dataset):
            if done % 1000 == 0:
                progress("hashing images", done, len(self))
            hasher.update(hashlib.sha256(_bytes(row[self._image], done)).digest())
            hasher.update(f"{row[self._label]};".encode())
        progress("hashing images", len(self), len(self))
        return hasher.hexdigest()

    def classes(self) -> dict[Any, int]:
        """What the column of classes holds -> 0, 1, ...; a class with a name keeps its number."""
        found = set(self._dataset.unique(self._label))
        if None in found or (-1 in found and self.is_named):
            raise DataError(f"some images have no class in the column {self._label}")
        if all(isinstance(value, int) and value >= 0 for value in found):
            return {value: value for value in found}
        return {value: number for number, value in enumerate(sorted(found))}

    def read(self, classes: dict[Any, int], progress: Progress) -> Rows:
        """The images in a fixed order that mixes classes."""
        order = SampleOrder(max(1, len(self)), 0)
        rows: list[numpy.ndarray] = []
        targets: list[int] = []
        total = 0
        for position in range(len(self)):
            if position % 200 == 0:
                progress("reading images", position, len(self))
            index = order.index(position)
            row = self._dataset[index]
            if row[self._label] not in classes:
                raise DataError(f"the class {row[self._label]!r} of image {index} is not in train")
            values = self._decode(row[self._image], index)
            total += values.size
            if self._most_bytes is not None and total > self._most_bytes:
                break
            if rows and values.size != rows[0].size:
                raise DataError(
                    f"image {index} is larger or smaller than image {order.index(0)}; set "
                    "data.image_size=28 (or another size for all)"
                )
            rows.append(values)
            targets.append(classes[row[self._label]])
        progress("reading images", len(self), len(self))
        if not rows:
            raise DataError("there is no image, or none within data.max_mb")
        return Rows(numpy.stack(rows), numpy.asarray(targets))

    def _decode(self, value: Any, index: int) -> numpy.ndarray:
        try:
            from PIL import Image
        except ImportError:
            raise DataError("images need the package pillow: pip install pillow") from None
        try:
            with Image.open(io.BytesIO(_bytes(value, index))) as opened:
                image = opened.convert(self._mode)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"image {index} cannot be read: {error}") from None
        if self._size is not None and image.size != (self._size, self._size):
            image = image.resize((self._size, self._size), Image.Resampling.BILINEAR)
        return numpy.asarray(image, dtype=numpy.uint8).reshape(-1)


def _bytes(value: Any, index: int) -> bytes:
    if value is None:
        raise DataError(f"image {index} is missing")
    if value["bytes"] is not None:
        return bytes(value["bytes"])
    try:
        return Path(value["path"]).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read image {index}, {value['path']}: {error.strerror}") from None
