"""Where in a stream a reader stood between two blocks: small enough for a checkpoint's manifest.

A bookmark comes back from a file, so each of its fields is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy

from smolrun.errors import DataError

# More than these are thinned out: every second one goes, so the memory is bounded however long the
# run, and old ones are merely further apart.
_MOST_KEPT = 512
_LARGEST_TOKEN = 2**31 - 1


@dataclass(frozen=True)
class Bookmark:
    """Before row `row` come the `leftover` tokens, then block `block` of pass `pass_`, which
    begins with document `document`, where the source stands at `place` (None: by counting)."""

    document: int
    row: int = 0
    pass_: int = 0
    block: int = 0
    leftover: numpy.ndarray | tuple[int, ...] = ()
    place: dict[str, Any] | None = None

    def to_json(self, identity: str) -> dict[str, Any]:
        """A JSON object; `identity` says of which stream, read in which way."""
        return {
            "stream": identity,
            "document": self.document,
            "row": self.row,
            "pass": self.pass_,
            "block": self.block,
            "leftover": [int(token) for token in self.leftover],
            "place": self.place,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], identity: str) -> Bookmark:
        """What `to_json` made; raises DataError for anything else, and for another stream's."""
        wrong = [name for name in ("document", "row", "pass", "block") if not _is_count(data, name)]
        leftover, place = data.get("leftover"), data.get("place")
        if not isinstance(leftover, list) or not all(_is_token(token) for token in leftover):
            wrong.append("leftover")
        if not isinstance(place, dict | None):
            wrong.append("place")
        if wrong:
            raise DataError(
                f"the bookmark of the stream is damaged: wrong or missing {', '.join(wrong)}"
            )
        if data.get("stream") != identity:
            raise DataError(
                "the bookmark belongs to another stream, or to one that was read in another way: "
                "data, tokenizer, data.sequence_length, seed and the size of the blocks must be as "
                "they were"
            )
        counts = (data["document"], data["row"], data["pass"], data["block"])
        return cls(*counts, tuple(leftover or ()), place)


class Bookmarks:
    """The bookmarks of one reader, in order. One thread keeps, any thread looks up."""

    def __init__(self, first: Bookmark) -> None:
        self._kept = [first]

    def keep(self, bookmark: Bookmark) -> None:
        """Add one that lies behind all others; of two at one place the later one stays."""
        # Always a new list, never a changed one: another thread may be looking something up.
        kept = self._kept
        kept = [kept[0], *kept[2::2]] if len(kept) >= _MOST_KEPT else kept
        self._kept = [*kept, bookmark]

    def at(self, row: int) -> Bookmark:
        """The last one at or before `row`; ValueError if even the first one lies behind it."""
        for bookmark in reversed(self._kept):
            if bookmark.row <= row:
                return bookmark
        raise ValueError(f"row {row} lies before the first bookmark, at row {self._kept[0].row}")


def _is_count(data: Mapping[str, Any], name: str) -> bool:
    value = data.get(name)
    return type(value) is int and value >= 0


def _is_token(value: object) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_TOKEN
