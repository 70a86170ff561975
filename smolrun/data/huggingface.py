"""Any dataset that the library `datasets` can read: of the hub, of a folder, of a file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from smolrun.data.columns import Wanted, has_pictures, image_columns, text_column
from smolrun.data.document_rows import prepare_rows
from smolrun.data.documents import Documents, split_between
from smolrun.data.feature_file import Rows, prepare_features
from smolrun.data.hub_stream import stream_documents
from smolrun.data.order import SampleOrder
from smolrun.data.prepared import Kind, Prepared, Progress
from smolrun.data.stream import StreamReader
from smolrun.data.stream_prepare import open_stream, prepare_stream
from smolrun.data.stream_source import DatasetDocuments
from smolrun.data.token_file import prepare_tokens
from smolrun.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_READ_AT_ONCE = 500  # rows


class HuggingFaceData:
    """Text or pictures of a dataset; conf/data/hf.yaml explains the keys."""

    produces: ClassVar[Kind | None] = None  # only the dataset itself tells

    def __init__(
        self,
        cache_dir: Path,
        *,
        path: str,
        subset: str | None,
        split: str,
        eval_split: str | None,
        eval_fraction: float,
        streaming: bool,
        eval_documents: int,
        block_documents: int,
        prefetch_steps: int,
        text_column: str | None,
        image_column: str | None,
        label_column: str | None,
        image_size: int | None,
        image_mode: Literal["grey", "rgb"],
        tokenizer: str,
        vocab_size: int,
        sequence_length: int,
        packing: bool,
        max_mb: float | None,
    ) -> None:
        self.cache_dir = cache_dir
        self.path, self.subset, self.split, self.eval_split = path, subset, split, eval_split
        self.eval_fraction = eval_fraction
        self.streaming = streaming
        self.stream_keys: dict[str, Any] = {
            "eval_documents": eval_documents,
            "block_documents": block_documents,
            "prefetch_steps": prefetch_steps,
        }
        self.wanted: Wanted = {
            "text_column": text_column,
            "image_column": image_column,
            "label_column": label_column,
        }
        self.image_size: int | None = image_size
        self.image_mode: Literal["grey", "rgb"] = image_mode
        self.tokens: dict[str, Any] = {
            "tokenizer": tokenizer,
            "vocab_size": vocab_size,
            "sequence_length": sequence_length,
        }
        self.packing = packing
        self.most_bytes = None if max_mb is None else int(max_mb * 1e6)

    def prepare(self, progress: Progress) -> Prepared:
        """Opens the dataset, reads and keeps what is to be learnt; raises DataError if it can't."""
        if self.streaming:
            return self._prepare_stream(progress)
        train = self._open(self.split, progress)
        held_out = self._open(self.eval_split, progress) if self.eval_split else None
        if has_pictures(train.features, self.wanted):
            return self._prepare_pictures(train, held_out, progress)
        documents = self._read_documents(train, held_out, progress)
        prepare = prepare_tokens if self.packing else prepare_rows
        return prepare(
            self.cache_dir,
            "hf",
            documents,
            progress,
            eval_fraction=self.eval_fraction,
            **self.tokens,
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
                "data.packing=false: a stream is packed; say data.packing=true, or "
                "data.streaming=false"
            )
        return prepare_stream(
            self.cache_dir,
            "hf",
            self._documents(self.split),
            progress,
            eval_source=self._documents(self.eval_split) if self.eval_split else None,
            **self.stream_keys,
            **self.tokens,
        )

    def _documents(self, split: str) -> DatasetDocuments:
        return stream_documents(
            self.path, self.subset, split, wanted=self.wanted, cache_dir=self.cache_dir
        )

    def _open(self, split: str, progress: Progress) -> Dataset:
        from smolrun.data.hub_dataset import open_dataset  # a second, which other data need not pay

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
            column = text_column(dataset.features, self.wanted)
            texts = list(texts_of(dataset, column, self.most_bytes, progress))
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

    def _prepare_pictures(
        self, train: Dataset, held_out: Dataset | None, progress: Progress
    ) -> Prepared:
        from smolrun.data.pictures import Pictures

        sets = [
            Pictures(
                dataset,
                *image_columns(dataset.features, self.wanted),
                mode=self.image_mode,
                size=self.image_size,
                most_bytes=self.most_bytes,
            )
            for dataset in ([train] if held_out is None else [train, held_out])
        ]
        key = {
            "pictures": [pictures.sha256(progress) for pictures in sets],
            "image_mode": self.image_mode,
            "image_size": self.image_size,
            "most_bytes": self.most_bytes,
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
