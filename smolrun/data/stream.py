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
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec
import numpy
from safetensors.numpy import save_file

from smolrun.data.cache import DATA_FILE, cached
from smolrun.data.order import SampleOrder
from smolrun.data.prepared import Natural, Prepared, Progress
from smolrun.data.token_file import token_dtype
from smolrun.data.tokenizer import (
    BPE_TRAINING_CHARACTERS,
    FILE_NAME,
    Encoder,
    encoder_for,
    load_tokenizer,
)
from smolrun.errors import DataError

# A block ends early at so many characters: whole books must not fill the driver's memory.
_BLOCK_CHARACTERS = 8_000_000
# Encoded at once: enough for all cores, and the tokenizer needs about 100 bytes for each token.
_GROUP_CHARACTERS = 200_000
_ROWS_PER_PROGRESS = 256
# More bookmarks are thinned out: every second one goes, so the memory is bounded however long the
# run, and old ones are merely further apart.
_MOST_KEPT = 512
_LARGEST_TOKEN = 2**31 - 1
_TOKEN = numpy.dtype("<i4")


class DocumentSource(Protocol):
    """Documents in an order that is the same in every pass and on every day."""

    def documents(self, start: int, place: Mapping[str, Any] | None) -> Iterator[str]:
        """One pass from document `start` on; `place` is what `place()` returned there, or None.

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
        """Nothing is read yet. `bookmark` is what `bookmark_for(row)` of an earlier reader
        returned.

        Without one the stream is read again from its beginning, up to `row`. Raises DataError for a
        bookmark of another stream, and for one that lies behind `row`.
        """
        begin = Bookmark(packing.first_document)
        if bookmark is not None:
            begin = Bookmark.from_json(bookmark, packing.fingerprint)
        if begin.row > row:
            raise DataError(
                f"the bookmark of the stream is at row {begin.row}, behind row {row}, where this "
                "run continues: it belongs to a later checkpoint"
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
        # A document without tokens is skipped, without an end token.
        rows = [ids for ids in self._packing.encode_batch(texts) if ids]
        self._is_barren = self._is_barren and not rows
        return [numpy.asarray([*ids, self._packing.end_id], _TOKEN) for ids in rows]

    def _block_seed(self) -> int:
        digest = hashlib.sha256(f"{self._packing.seed}:{self._pass}:{self._block}".encode())
        return int.from_bytes(digest.digest()[:8], "little")


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
        """A JSON object; `identity` is the hash of the stream and of how it is read."""
        leftover = [int(token) for token in self.leftover]
        saved = _SavedBookmark(
            identity, self.document, self.row, self.pass_, self.block, leftover, self.place
        )
        plain: dict[str, Any] = msgspec.to_builtins(saved)
        return plain

    @classmethod
    def from_json(cls, data: Mapping[str, Any], identity: str) -> Bookmark:
        """What `to_json` made; raises DataError for anything else, and for another stream's."""
        try:
            saved = msgspec.convert(data, _SavedBookmark)
        except msgspec.ValidationError as error:
            raise DataError(f"the bookmark of the stream is damaged: {error}") from None
        if saved.stream != identity:
            raise DataError(
                "the bookmark belongs to another stream, or to one that was read in another way: "
                "data, tokenizer, data.sequence_length, seed and the size of the blocks must be as "
                "they were"
            )
        counts = (saved.document, saved.row, saved.pass_, saved.block)
        return cls(*counts, tuple(saved.leftover), saved.place)


class _SavedBookmark(msgspec.Struct, frozen=True):
    """A bookmark as JSON."""

    stream: str
    document: Natural
    row: Natural
    pass_: Natural = msgspec.field(name="pass")
    block: Natural
    leftover: list[Annotated[int, msgspec.Meta(ge=0, le=_LARGEST_TOKEN)]]
    place: dict[str, Any] | None


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


def prepare_stream(
    cache_dir: Path,
    name: str,
    source: DocumentSource,
    progress: Progress,
    *,
    eval_source: DocumentSource | None,
    eval_documents: int,
    tokenizer: str,
    vocab_size: int,
    sequence_length: int,
    block_documents: int,
    prefetch_steps: int,
) -> Prepared:
    """The first `eval_documents` of `eval_source` as the evaluation part, from the cache or made
    now; without an `eval_source` they are those of the stream, which then begins behind them.

    Raises DataError for a stream that cannot be read or is too short.
    """
    encoder = encoder_for(tokenizer, vocab_size, progress)
    first_document = 0 if eval_source is not None else eval_documents
    held_out = _read(eval_source or source, 0, eval_documents, progress)
    learns = encoder.key["tokenizer"] == "bpe"
    texts = _first_texts(source, first_document, progress) if learns else []
    key = {"eval": _hash(held_out), "learnt from": _hash(texts), **encoder.key}
    entry = cached(cache_dir, name, key, lambda folder: _write(folder, encoder, texts, held_out))
    facts = entry.facts
    _check_length(facts["eval"], len(held_out), sequence_length)
    return Prepared(
        kind="tokens",
        path=str(entry.data_path),
        sha256=entry.sha256,
        num_outputs=facts["vocab_size"],
        num_inputs=None,
        sequence_length=sequence_length,
        tokenizer=str(entry.folder),
        train_size=0,
        eval_size=(facts["eval"] - 1) // sequence_length,
        description=f"{name}: a stream of documents, {facts['eval']:,} eval tokens, "
        f"{encoder.name} tokenizer of {facts['vocab_size']}",
        stream={
            "first_document": first_document,
            "block_documents": block_documents,
            "prefetch_steps": prefetch_steps,
        },
    )


def open_stream(
    prepared: Prepared,
    source: DocumentSource,
    *,
    seed: int,
    row: int = 0,
    bookmark: Mapping[str, Any] | None = None,
) -> StreamReader:
    """The reader of a prepared stream, from row `row` on; nothing is read yet.

    Raises DataError for a bookmark that is not of this stream.
    """
    assert prepared.stream is not None, "prepared by prepare_stream"
    folder = Path(prepared.tokenizer or "")
    tokenizer = load_tokenizer(folder)
    packing = Packing(
        encode_batch=tokenizer.encode_batch,
        end_id=tokenizer.end_id,
        sequence_length=prepared.sequence_length or 1,
        block_documents=prepared.stream["block_documents"],
        first_document=prepared.stream["first_document"],
        seed=seed,
        identity=prepared.sha256 + hashlib.sha256((folder / FILE_NAME).read_bytes()).hexdigest(),
    )
    return StreamReader(source, packing, row=row, bookmark=bookmark)


def _write(
    folder: Path, encoder: Encoder, texts: Sequence[str], held_out: Sequence[str]
) -> dict[str, Any]:
    """Fills a new cache entry; returns the number of eval tokens and the vocabulary."""
    tokenizer = encoder.make(folder, texts)
    dtype = token_dtype(tokenizer.vocab_size)
    rows = [[*ids, tokenizer.end_id] for ids in tokenizer.encode_batch(held_out) if ids]
    tokens = numpy.fromiter(itertools.chain.from_iterable(rows), dtype)
    save_file({"eval": tokens}, folder / DATA_FILE)
    return {"eval": len(tokens), "vocab_size": tokenizer.vocab_size}


def _check_length(tokens: int, documents: int, sequence_length: int) -> None:
    if tokens <= sequence_length:
        raise DataError(
            f"the evaluation part, {documents} documents of the stream, has {tokens} tokens, one "
            f"sample needs {sequence_length + 1}; raise data.eval_documents or lower "
            "data.sequence_length"
        )


def _read(source: DocumentSource, start: int, count: int, progress: Progress) -> list[str]:
    texts: list[str] = []
    for text in itertools.islice(source.documents(start, None), count):
        progress("reading the evaluation part", len(texts), count)
        texts.append(text)
    progress("reading the evaluation part", count, count)
    if len(texts) < count:
        raise DataError(
            f"the stream has {len(texts)} documents, fewer than data.eval_documents={count}"
        )
    return texts


def _first_texts(source: DocumentSource, start: int, progress: Progress) -> list[str]:
    """Enough text to learn a tokenizer from; the evaluation part is none of it."""

    def enough() -> Iterator[str]:
        done = 0
        for text in source.documents(start, None):
            progress("reading text for the tokenizer", done, BPE_TRAINING_CHARACTERS)
            yield text
            done += len(text)
            if done >= BPE_TRAINING_CHARACTERS:
                return

    texts = list(enough())
    progress("reading text for the tokenizer", 1, 1)
    return texts


def _hash(texts: Sequence[str]) -> str:
    hasher = hashlib.sha256()
    for text in texts:
        hasher.update(hashlib.sha256(text.encode("utf-8", "replace")).digest())
    return hasher.hexdigest()
