"""A dataset's pictures as rows of bytes: made grey or coloured, all of one size, and mixed.

Shape suffixes: N pictures, P numbers of one picture (rows, columns, colours).
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy

from smolrun.data.columns import is_label
from smolrun.data.feature_file import Rows
from smolrun.data.order import SampleOrder
from smolrun.data.prepared import Progress
from smolrun.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


class Pictures:
    """The pictures of one split. Raises DataError where `pillow` is missing."""

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
        """Of all pictures and classes, whatever files they came in."""
        hasher = hashlib.sha256()
        for done, row in enumerate(self._dataset):
            if done % 1000 == 0:
                progress("looking at pictures", done, len(self))
            hasher.update(hashlib.sha256(_bytes(row[self._image], done)).digest())
            hasher.update(f"{row[self._label]};".encode())
        progress("looking at pictures", len(self), len(self))
        return hasher.hexdigest()

    def classes(self) -> dict[Any, int]:
        """What the column of classes holds -> 0, 1, ...; a class with a name keeps its number."""
        found = set(self._dataset.unique(self._label))
        if None in found or (-1 in found and self.is_named):
            raise DataError(f"some pictures have no class in the column {self._label}")
        if all(isinstance(value, int) and value >= 0 for value in found):
            return {value: value for value in found}
        return {value: number for number, value in enumerate(sorted(found))}

    def read(self, classes: dict[Any, int], progress: Progress) -> Rows:
        """The pictures in an order that mixes classes, always the same one."""
        order = SampleOrder(max(1, len(self)), 0)
        rows: list[numpy.ndarray] = []
        targets: list[int] = []
        total = 0
        for position in range(len(self)):
            if position % 200 == 0:
                progress("reading pictures", position, len(self))
            index = order.index(position)
            row = self._dataset[index]
            if row[self._label] not in classes:
                raise DataError(
                    f"the class {row[self._label]!r} of picture {index} is not in train"
                )
            values = self._decode(row[self._image], index)
            total += values.size
            if self._most_bytes is not None and total > self._most_bytes:
                break
            if rows and values.size != rows[0].size:
                raise DataError(
                    f"picture {index} is larger or smaller than picture {order.index(0)}; say "
                    "data.image_size=28 (or another size for all)"
                )
            rows.append(values)
            targets.append(classes[row[self._label]])
        progress("reading pictures", len(self), len(self))
        if not rows:
            raise DataError("there is no picture, or not one within data.max_mb")
        return Rows(numpy.stack(rows), numpy.asarray(targets))

    def _decode(self, value: Any, index: int) -> numpy.ndarray:
        try:
            from PIL import Image
        except ImportError:
            raise DataError("pictures need the package pillow: pip install pillow") from None
        try:
            with Image.open(io.BytesIO(_bytes(value, index))) as opened:
                image = opened.convert(self._mode)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"picture {index} cannot be read: {error}") from None
        if self._size is not None and image.size != (self._size, self._size):
            image = image.resize((self._size, self._size), Image.Resampling.BILINEAR)
        return numpy.asarray(image, dtype=numpy.uint8).reshape(-1)


def _bytes(value: Any, index: int) -> bytes:
    if value is None:
        raise DataError(f"picture {index} is missing")
    if value["bytes"] is not None:
        return bytes(value["bytes"])
    try:
        return Path(value["path"]).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read picture {index}, {value['path']}: {error.strerror}") from None
