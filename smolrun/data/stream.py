"""A stream of documents as numbered rows of tokens, read by one reader, on the driver.

    documents   d0 d1 d2 | d3 d4 d5 | d6      blocks, each shuffled by (seed, pass, block)
    tokens      d1 # d2 # d0 # d4 # ...       # ends a document
    rows        0 ----1 ----2 ----3 ---       T + 1 tokens each; a row begins with the last
                                              token of the row before, as in a token file

A row's number is its place in the whole run: which tokens it holds follows from the documents, the
seed and the number alone. Streams repeat: after the last document the next pass begins, shuffled
anew. At the border of a block the reader's state is small, and is kept as a bookmark: a reader that
begins at a bookmark gives the same rows as one that never stopped.

Knows no torch, no ranks and no thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy

from smolrun.data.order import SampleOrder
from smolrun.data.prepared import Progress
from smolrun.data.stream_bookmark import Bookmark, Bookmarks
from smolrun.errors import DataError

# A block ends early at so many characters: whole books must not fill the driver's memory.
_BLOCK_CHARACTERS = 8_000_000
# Encoded at once: enough for all cores, and the tokenizer needs about 100 bytes for each token.
_GROUP_CHARACTERS = 200_000
_ROWS_PER_PROGRESS = 256
_TOKEN = numpy.dtype("<i4")


class DocumentSource(Protocol):
    """Documents in an order that is the same in every pass and on every day."""

    def documents(self, start: int, place: Mapping[str, Any] | None) -> Iterator[str]:
        """One pass from document `start` on; `place` is what `place()` said there, or None.

        Raises DataError, in a sentence, when it cannot be read.
        """

    def place(self) -> dict[str, Any] | None:
        """Where the pass stands after its last document, as JSON; None: only counting finds it."""


@dataclass(frozen=True)
class Packing:
    """How documents become rows. The first `first_document` of each pass are left out (they are
    for evaluation); `identity` names the documents and the tokenizer."""

    encode_batch: Callable[[Sequence[str]], list[list[int]]]
    end_id: int
    sequence_length: int
    block_documents: int
    first_document: int
    seed: int
    identity: str

    @property
    def fingerprint(self) -> str:
        """Of all that decides what a row holds."""
        numbers = (self.sequence_length, self.block_documents, self.first_document, self.seed)
        return hashlib.sha256(repr((self.identity, self.end_id, numbers)).encode()).hexdigest()


class StreamReader:
    """The rows from number `row` on, one after the other."""

    def __init__(
        self,
        source: DocumentSource,
        packing: Packing,
        *,
        row: int = 0,
        bookmark: Mapping[str, Any] | None = None,
    ) -> None:
        """Nothing is read yet. `bookmark` is what `bookmark_for(row)` of an earlier reader said.

        Without one the stream is read again from its beginning, up to `row`. Raises DataError for a
        bookmark of another stream, and for one that lies behind `row`.
        """
        begin = Bookmark(packing.first_document)
        if bookmark is not None:
            begin = Bookmark.from_json(bookmark, packing.fingerprint)
        if begin.row > row:
            raise DataError(
                f"the bookmark of the stream is at row {begin.row}, behind row {row}, where this "
                "run goes on: it belongs to a later checkpoint"
            )
        self.row = row
        self.row_bytes = (packing.sequence_length + 1) * _TOKEN.itemsize
        self._source, self._packing = source, packing
        self._bookmarks = Bookmarks(begin)
        self._next_row, self._pass, self._block = begin.row, begin.pass_, begin.block
        self._document, self._place = begin.document, begin.place
        self._documents: Iterator[str] | None = None
        self._tokens = numpy.asarray(begin.leftover, _TOKEN)
        self._texts: list[str] = []  # of this block, not yet encoded, the next one last
        self._is_barren = self._document == packing.first_document  # not a token in this pass yet

    def catch_up(self, progress: Progress) -> None:
        """Reads what lies between the bookmark and the first row now, so that `read` need not."""
        first = self._next_row
        while self._next_row < self.row:
            if (self._next_row - first) % _ROWS_PER_PROGRESS == 0:
                progress("finding the place", self._next_row - first, self.row - first)
            self._next()

    def read(self) -> bytes:
        """The next row, T + 1 little-endian int32; waits for the source.

        Raises DataError, in a sentence, when that cannot be read.
        """
        while self._next_row < self.row:
            self._next()
        row = self._next()
        self.row = self._next_row
        return row.tobytes()

    def bookmark_for(self, row: int) -> dict[str, Any]:
        """The last bookmark kept at or before `row`, as JSON; any thread may ask.

        Raises ValueError for a row before this reader's own beginning.
        """
        return self._bookmarks.at(row).to_json(self._packing.fingerprint)

    def _next(self) -> numpy.ndarray:
        length = self._packing.sequence_length
        while len(self._tokens) <= length:
            if not self._texts:
                self._begin_block()
            self._tokens = numpy.concatenate([self._tokens, *self._encode_group()])
        row, self._tokens = self._tokens[: length + 1], self._tokens[length:]
        self._next_row += 1
        return row

    def _begin_block(self) -> None:
        """Read the next block's texts and leave a bookmark before it."""
        place, texts = self._read_texts()
        if not texts:
            self._begin_pass()
            place, texts = self._read_texts()
        # A copy: a part of an array would keep the whole block in memory.
        leftover = self._tokens.copy()
        self._bookmarks.keep(
            Bookmark(self._document, self._next_row, self._pass, self._block, leftover, place)
        )
        order = SampleOrder(len(texts), self._block_seed())
        self._texts = [texts[index] for index in reversed(order.indices(0, len(texts)))]
        self._document += len(texts)
        self._block += 1

    def _begin_pass(self) -> None:
        first = self._packing.first_document
        if self._is_barren:
            raise DataError(
                "the stream has no text to train on"
                + (
                    f" behind its first {first} documents, which are for evaluation"
                    if first
                    else ""
                )
            )
        self._pass, self._block, self._document = self._pass + 1, 0, first
        self._documents = self._place = None
        self._is_barren = True

    def _read_texts(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The place before the next block, and its texts; none at the end of a pass."""
        if self._documents is None:
            place = self._place
            self._documents = self._source.documents(self._document, place)
        else:
            place = self._source.place()
        texts: list[str] = []
        room = _BLOCK_CHARACTERS
        while room > 0 and len(texts) < self._packing.block_documents:
            text = next(self._documents, None)
            if text is None:
                break
            texts.append(text)
            room -= len(text)
        return place, texts

    def _encode_group(self) -> list[numpy.ndarray]:
        """The tokens of the next few texts, each with its end."""
        texts: list[str] = []
        room = _GROUP_CHARACTERS
        while self._texts and room > 0:
            texts.append(self._texts.pop())
            room -= len(texts[-1])
        # A document without a word is no document, and needs no end.
        rows = [ids for ids in self._packing.encode_batch(texts) if ids]
        self._is_barren = self._is_barren and not rows
        return [numpy.asarray([*ids, self._packing.end_id], _TOKEN) for ids in rows]

    def _block_seed(self) -> int:
        digest = hashlib.sha256(f"{self._packing.seed}:{self._pass}:{self._block}".encode())
        return int.from_bytes(digest.digest()[:8], "little")
