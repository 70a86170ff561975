"""The documents of a dataset of Hugging Face's library that is read as a stream: one text column.

The library itself is loaded by whoever opens the dataset; here it is only read.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from smolrun.errors import DataError

# A document without text is passed over; so many in a row mean that the column is no longer there.
_MOST_EMPTY = 1000


class DatasetDocuments:
    """`open_dataset()` gives an `IterableDataset`, a new one for each pass; `pick_column(dataset)`
    says which column is read; `name` is for errors."""

    def __init__(
        self, open_dataset: Callable[[], Any], pick_column: Callable[[Any], str], name: str
    ) -> None:
        self._open_dataset = open_dataset
        self._pick_column = pick_column
        self._name = name
        self._column = ""  # picked when the first pass begins
        self._dataset: Any = None

    def documents(self, start: int, place: Mapping[str, Any] | None) -> Iterator[str]:
        """One pass from document `start` on, empty where one has no text; `place` is what `place()`
        said there, or None."""
        number = start
        try:
            # The state of a dataset is a place that it returns to with every pass, so each pass
            # has a dataset of its own.
            self._dataset = self._open()
            if place is not None:
                self._dataset.load_state_dict(dict(place))
            # Counted by hand: the places of `dataset.skip(n)` mean nothing to the dataset itself.
            examples = itertools.islice(self._dataset, 0 if place is not None else start, None)
            num_empty = 0
            for example in examples:
                text = self._text(example, number)
                num_empty = 0 if text else num_empty + 1
                if num_empty > _MOST_EMPTY:
                    raise DataError(
                        f"the last {num_empty} documents of {self._name}, up to {number}, have no "
                        f"text in the column {self._column!r}"
                    )
                yield text
                number += 1
        except DataError:
            raise
        except Exception as error:  # whatever a library meets on a disk or in a network
            reason = str(error).strip().splitlines() or [""]
            raise DataError(
                f"{self._name} cannot be read on from document {number}: "
                f"{type(error).__name__}: {reason[0]}"
            ) from error

    def place(self) -> dict[str, Any] | None:
        """Where the pass stands after its last document, as JSON; None: only counting finds it."""
        try:
            state: dict[str, Any] = self._dataset.state_dict()
            return state if json.loads(json.dumps(state)) == state else None
        except Exception:  # a dataset that cannot tell: counting finds the place again
            return None

    def _open(self) -> Any:
        dataset = self._open_dataset()
        if not self._column:
            self._column = self._pick_column(dataset)
        # Other columns may be pictures, which would be decoded for nothing.
        return dataset.select_columns([self._column]) if dataset.features else dataset

    def _text(self, example: Mapping[str, Any], number: int) -> str:
        if self._column not in example:
            raise DataError(
                f"document {number} of {self._name} has no column {self._column!r}; "
                f"it has {', '.join(map(repr, example)) or 'none'}"
            )
        text = example[self._column]
        if not isinstance(text, str | None):
            raise DataError(
                f"the column {self._column!r} of document {number} of {self._name} holds a "
                f"{type(text).__name__}, not text"
            )
        return text if text and not text.isspace() else ""
