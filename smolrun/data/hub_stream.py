"""A dataset of the library `datasets` that is read while training, as a stream of its texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smolrun.data.columns import Wanted, has_pictures, text_column
from smolrun.data.stream_source import DatasetDocuments
from smolrun.errors import DataError


def stream_documents(
    path: str, subset: str | None, split: str, *, wanted: Wanted, cache_dir: Path
) -> DatasetDocuments:
    """The documents of one split; nothing is opened yet."""

    def open_one() -> Any:
        import datasets

        from smolrun.data.hub_dataset import open_dataset

        # Its streams would load torch, only to be understood by torch's own loaders.
        datasets.config.TORCH_AVAILABLE = False
        return open_dataset(
            path, subset, split, cache_dir=cache_dir, progress=_silent, streaming=True
        )

    def pick(dataset: Any) -> str:
        # Where only the data itself tells the columns, the library looks at the first few rows.
        features = dataset.features or dataset._resolve_features().features or {}
        if has_pictures(features, wanted):
            raise DataError(
                f"data.path={path}: data.streaming=true reads text; say data.text_column=NAME, or "
                "data.streaming=false for pictures"
            )
        return text_column(features, wanted)

    return DatasetDocuments(open_one, pick, f"data.path={path}")


def _silent(what: str, done: int, total: int) -> None:
    """A stream is opened anew for each pass, which is nothing to tell of."""
