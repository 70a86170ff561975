"""Documents to one file of token ids, train and eval part; made once and kept in the cache.

    packed       A A A A # B B # C C      # ends a document; windows of T + 1 tokens overlap by one
    rows         A A A A # B B # . .      . fills up; a row is T + 1 tokens, its last a target only
    loss_mask    0 0 1 1 1 0 1 1 0 0      which targets of a row count in the loss

The first token of a row and of a document is never a target: nothing before it belongs to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy
from safetensors.numpy import save_file

from smolrun.data.cache import DATA_FILE, Entry, cached
from smolrun.data.documents import Documents, read_documents
from smolrun.data.prepared import Kind, Prepared, Progress
from smolrun.data.tokenizer import TextTokenizer, encoder_for
from smolrun.errors import DataError

# Long documents are encoded in pieces, so that progress can be shown and all cores have work.
_PIECE_CHARACTERS = 100_000
_AT_ONCE = 256  # documents: the tokenizer then has work for all cores
# Rows that still have room and are tried for the next document: more would hardly pack tighter.
_OPEN_ROWS = 64


@dataclass(kw_only=True)
class TextSource(ABC):
    """Text files as training data: the keys that all such data has, and one way to prepare it.
    `name` begins the name of a cache entry."""

    produces: ClassVar[Kind] = "tokens"
    name: ClassVar[str]

    cache_dir: Path = field(kw_only=False)
    tokenizer: str
    vocab_size: int
    sequence_length: int
    eval_fraction: float
    max_mb: float | None

    @abstractmethod
    def files(self, progress: Progress) -> Mapping[str, Path | bytes]:
        """Name -> path, or what is in the file. Raises DataError where there is none."""

    def prepare(self, progress: Progress) -> Prepared:
        """Reads, tokenises and keeps the text; raises DataError for none or too little of it."""
        return prepare_tokens(
            self.cache_dir,
            self.name,
            read_documents(self.files(progress), self.max_mb, progress),
            progress,
            tokenizer=self.tokenizer,
            vocab_size=self.vocab_size,
            sequence_length=self.sequence_length,
            eval_fraction=self.eval_fraction,
        )


def prepare_tokens(
    cache_dir: Path,
    name: str,
    documents: Documents,
    progress: Progress,
    *,
    tokenizer: str,
    vocab_size: int,
    sequence_length: int,
    eval_fraction: float,
    packing: bool = True,
) -> Prepared:
    """Tokenised documents from the cache, or made now.

    With packing, documents follow each other in windows of sequence_length + 1 tokens; without,
    each begins a row of its own and a longer one continues in the next row. Raises DataError for
    settings out of range and for text too short for one sample in train or in eval.
    """
    check_numbers(sequence_length, eval_fraction)
    encoder = encoder_for(tokenizer, vocab_size, progress)
    key = {"documents": documents.sha256, "eval_fraction": eval_fraction, **encoder.key}
    if not packing:
        key["rows"] = sequence_length

    def make(folder: Path) -> dict[str, Any]:
        parts = dict(zip(("train", "eval"), documents.parts(eval_fraction), strict=True))
        # From train only: the tokenizer must not have seen the eval text either.
        made = encoder.make(folder, parts["train"])
        if packing:
            tensors, facts = _windows(parts, made, progress)
        else:
            tensors, facts = _rows(parts, made, sequence_length, progress)
        save_file(tensors, folder / DATA_FILE)
        return {**facts, "vocab_size": made.vocab_size}

    entry = cached(cache_dir, name, key, make)
    train_size, eval_size = _sizes(entry, sequence_length, packing)
    return Prepared(
        kind="tokens",
        path=str(entry.data_path),
        sha256=entry.sha256,
        num_outputs=entry.facts["vocab_size"],
        num_inputs=None,
        sequence_length=sequence_length,
        tokenizer=str(entry.folder),
        train_size=train_size,
        eval_size=eval_size,
        description=describe(name, documents, encoder.name, entry.facts),
        masked=not packing,
    )


def _sizes(entry: Entry, sequence_length: int, packing: bool) -> list[int]:
    """Samples in train and in eval."""
    parts = ("train", "eval")
    if packing:
        return [_num_windows(entry, part, sequence_length) for part in parts]
    return [entry.facts[f"{part}_rows"] for part in parts]


def _windows(
    parts: Mapping[str, Sequence[str]], tokenizer: TextTokenizer, progress: Progress
) -> tuple[dict[str, numpy.ndarray], dict[str, int]]:
    """The tokens of each part as one sequence, and how many there are."""
    dtype = token_dtype(tokenizer.vocab_size)
    total = sum(len(text) for texts in parts.values() for text in texts)
    done = 0
    tensors: dict[str, numpy.ndarray] = {}
    for part, texts in parts.items():
        rows = [numpy.empty(0, dtype)]
        for text in texts:
            pieces = list(_pieces(text))
            rows += [numpy.asarray(ids, dtype) for ids in tokenizer.encode_batch(pieces)]
            rows.append(numpy.asarray([tokenizer.end_id], dtype))
            done += len(text)
            progress("encoding text", done, total)
        tensors[part] = numpy.concatenate(rows)
    return tensors, {part: len(tokens) for part, tokens in tensors.items()}


def _rows(
    parts: Mapping[str, Sequence[str]],
    tokenizer: TextTokenizer,
    sequence_length: int,
    progress: Progress,
) -> tuple[dict[str, numpy.ndarray], dict[str, int]]:
    """The rows of each part and their loss masks, and how many tokens and rows there are."""
    facts: dict[str, int] = {}
    tensors: dict[str, numpy.ndarray] = {}
    for part, texts in parts.items():
        if not texts:
            raise DataError(f"there is no document for the {part} part; change data.eval_fraction")
        pieces: list[MaskedTokens] = []
        facts[part] = 0
        for start in range(0, len(texts), _AT_ONCE):
            progress(f"encoding {part} text", start, len(texts))
            for ids in tokenizer.encode_batch(texts[start : start + _AT_ONCE]):
                whole = MaskedTokens.of([*ids, tokenizer.end_id], [True] * (len(ids) + 1))
                pieces += whole.pieces(sequence_length + 1)
                facts[part] += len(whole)
        progress(f"encoding {part} text", len(texts), len(texts))
        rows = pack_rows(
            pieces,
            sequence_length + 1,
            end_id=tokenizer.end_id,
            vocab_size=tokenizer.vocab_size,
            packing=False,
        )
        tensors |= rows.tensors(part)
        facts[f"{part}_rows"] = len(rows)
    return tensors, facts


def token_dtype(vocab_size: int) -> Any:
    """The smallest type that holds every id."""
    return numpy.uint16 if vocab_size <= 1 << 16 else numpy.int32


def describe(name: str, documents: Documents, tokenizer: str, facts: Mapping[str, Any]) -> str:
    """One line about what was made of the documents."""
    size = documents.characters
    characters = f"{size / 1e6:.1f} M characters" if size >= 1e5 else f"{size:,} characters"
    description = (
        f"{name}: {characters} in {documents.count} documents, "
        f"{facts['train']:,} train and {facts['eval']:,} eval tokens, "
        f"{tokenizer} tokenizer of {facts['vocab_size']}"
    )
    if documents.replaced_characters:
        replaced, files = documents.replaced_characters, documents.replaced_files
        description += f"; {replaced} characters in {files} files were not UTF-8"
    return description


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of at most _PIECE_CHARACTERS, each ending with a line if it can."""
    start = 0
    while start < len(text):
        stop = min(len(text), start + _PIECE_CHARACTERS)
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


def check_numbers(sequence_length: int, eval_fraction: float) -> None:
    """Raises DataError for what the configuration would have refused."""
    problems = []
    if sequence_length < 1:
        problems.append(f"data.sequence_length={sequence_length}: must be at least 1")
    if not 0 < eval_fraction < 1:
        problems.append(f"data.eval_fraction={eval_fraction}: must be above 0 and below 1")
    if problems:
        raise DataError("; ".join(problems))


def _num_windows(entry: Entry, part: str, sequence_length: int) -> int:
    if entry.facts[part] > sequence_length:
        return (int(entry.facts[part]) - 1) // sequence_length
    remedy = "raise data.eval_fraction" if part == "eval" else "lower data.eval_fraction"
    raise DataError(
        f"the text is too short: its {part} part has {entry.facts[part]} tokens, one sample needs "
        f"{sequence_length + 1}; give more text, lower data.sequence_length or {remedy}"
    )


@dataclass(frozen=True)
class MaskedTokens:
    """The tokens of one document, int32, and for each whether it counts in the loss, uint8."""

    ids: numpy.ndarray
    loss_mask: numpy.ndarray

    @classmethod
    def of(cls, ids: Sequence[int], loss_mask: Sequence[bool]) -> MaskedTokens:
        """Arrays: lists of numbers need ten times as much memory."""
        mask = numpy.asarray(loss_mask, numpy.uint8)
        mask[:1] = 0
        return cls(numpy.asarray(ids, numpy.int32), mask)

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, width: int) -> MaskedTokens:
        """Its first `width` tokens."""
        return MaskedTokens(self.ids[:width], self.loss_mask[:width])

    def pieces(self, width: int) -> Iterator[MaskedTokens]:
        """All of it in pieces of at most `width`, each beginning with the last token of the one
        before, so that every token is a target once."""
        for start in range(0, max(1, len(self) - 1), width - 1):
            stop = start + width
            yield MaskedTokens(self.ids[start:stop], self.loss_mask[start:stop])


@dataclass(frozen=True)
class MaskedRows:
    """Tokens and loss masks, both [N, T + 1]."""

    tokens: numpy.ndarray
    loss_mask: numpy.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def tensors(self, part: str) -> dict[str, numpy.ndarray]:
        """By their names in the data file."""
        return {part: self.tokens, f"{part}_learn": self.loss_mask}


def pack_rows(
    documents: Iterable[MaskedTokens], width: int, *, end_id: int, vocab_size: int, packing: bool
) -> MaskedRows:
    """Rows of `width` tokens, filled up with `end_id`; no document is longer than that.

    With packing a document goes into the first row that has room for the whole of it.
    """
    rows: list[list[MaskedTokens]] = []
    room: dict[int, int] = {}  # of rows that may still take one, in their order
    for document in documents:
        place = next((row for row, left in room.items() if left >= len(document)), None)
        if place is None:
            place = len(rows)
            rows.append([])
            room[place] = width if packing else 0
        rows[place].append(document)
        room[place] -= len(document)
        if room[place] < 2:
            del room[place]
        elif len(room) > _OPEN_ROWS:
            del room[min(room, key=room.__getitem__)]
    tokens = numpy.full((len(rows), width), end_id, token_dtype(vocab_size))
    loss_mask = numpy.zeros((len(rows), width), numpy.uint8)
    for row, members in enumerate(rows):
        at = 0
        for document in members:
            tokens[row, at : at + len(document)] = document.ids
            loss_mask[row, at : at + len(document)] = document.loss_mask
            loss_mask[row, at] = 0
            at += len(document)
    return MaskedRows(tokens, loss_mask)
