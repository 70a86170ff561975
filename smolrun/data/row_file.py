"""Marked documents laid out in rows of one length: which tokens are to be learnt is kept beside.

    row     A A A A # B B # . .      # ends a document, . fills up
    learn   0 0 1 1 1 0 1 1 0 0      the last token of a row is a target only: rows have T + 1

A row's first token is never learnt, and neither is a document's, because nothing before it belongs
to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy

from smolrun.data.token_file import token_dtype

# Rows that still have room and are tried for the next document: more would hardly pack tighter.
_OPEN_ROWS = 64


@dataclass(frozen=True)
class Marked:
    """The tokens of one document, and for each whether it is to be learnt."""

    ids: numpy.ndarray
    learn: numpy.ndarray

    @classmethod
    def of(cls, ids: Sequence[int], learn: Sequence[bool]) -> Marked:
        """Kept small: a list of numbers needs ten times as much memory."""
        marks = numpy.asarray(learn, numpy.uint8)
        marks[:1] = 0
        return cls(numpy.asarray(ids, numpy.int32), marks)

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, width: int) -> Marked:
        """Its first `width` tokens."""
        return Marked(self.ids[:width], self.learn[:width])

    def pieces(self, width: int) -> Iterator[Marked]:
        """All of it in pieces of at most `width`, each beginning with the last token of the one
        before, so that every token is learnt once."""
        for start in range(0, max(1, len(self) - 1), width - 1):
            yield Marked(self.ids[start : start + width], self.learn[start : start + width])


@dataclass(frozen=True)
class Rows:
    """Tokens and marks, both [N, T + 1]."""

    tokens: numpy.ndarray
    learn: numpy.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def rows_of(
    documents: Iterable[Marked], width: int, *, end_id: int, vocab_size: int, packing: bool
) -> Rows:
    """Rows of `width` tokens, filled up with `end_id`; no document is longer than that.

    With packing a document goes into the first row that has room for the whole of it.
    """
    rows: list[list[Marked]] = []
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
    learn = numpy.zeros((len(rows), width), numpy.uint8)
    for row, members in enumerate(rows):
        at = 0
        for document in members:
            tokens[row, at : at + len(document)] = document.ids
            learn[row, at : at + len(document)] = document.learn
            learn[row, at] = 0
            at += len(document)
    return Rows(tokens, learn)
