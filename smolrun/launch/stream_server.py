"""The driver's end of a stream: one reader's rows, handed out to the ranks that asked for them.

    reader  -- row 0, 1, 2 ... -->  buffer  -- rows 0 to 3 --> rank 0
                                            -- rows 4 to 7 --> rank 1

Rows are read in order, and only when a rank has requested them or later ones. A row is kept until
no rank can request it any more; a rank far behind the others pauses the reading, so memory is
bounded. `StreamBuffer` decides and is pure; `StreamServer` is the thread "smolrun-rows" around it.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from smolrun.errors import ProtocolError, SmolrunError
from smolrun.launch.control import Message, RowsMessage, WantRowsMessage

# Of one line, before base64: any line renews the lease, and on a slow link (1 Mbit/s: 3 s) the next
# one must not be long in coming.
_CHUNK_BYTES = 256 * 1024
_MOST_BYTES = 64 * 1024 * 1024  # of rows kept for ranks that have not asked for them yet
# Of rows that wait for one rank to read them: enough to keep a fast link busy. A rank that reads
# nothing gets no more.
_MOST_UNSENT_BYTES = 4 * 1024 * 1024
_MOST_OPEN = 1024  # requests of one rank; an honest one has a few steps' worth
_LAST_JOIN_S = 2.0

log = logging.getLogger(__name__)


class RowSource(Protocol):
    """Rows of one size, in order. `row` is the number of the next one."""

    @property
    def row(self) -> int: ...

    @property
    def row_bytes(self) -> int: ...

    def read(self) -> bytes:
        """The next row; may block, and raises SmolrunError with a sentence."""


@dataclass
class _Cursor:
    """One rank. It asks for nothing before `frontier` any more; None: for nothing at all."""

    frontier: int | None
    open: deque[range] = field(default_factory=deque)
    unsent: int = 0  # bytes that are on their way to it

    @property
    def lowest(self) -> int | None:
        """The first row it needs or may still ask for."""
        return self.open[0].start if self.open else self.frontier


class StreamBuffer:
    """Who asked for what, which rows are kept, which are to be sent, and whether to read on."""

    def __init__(self, ranks: Iterable[int], *, first: int, row_bytes: int) -> None:
        """`ranks` are the ranks that will ask for rows; row `first` is the first to be read."""
        self._cursors = {rank: _Cursor(first) for rank in ranks}
        self._rows: deque[bytes] = deque()
        self._lowest = first  # the number of the first row that is kept
        self._chunk = max(1, _CHUNK_BYTES // row_bytes)
        self._most_kept = max(self._chunk, _MOST_BYTES // row_bytes)

    @property
    def num_kept(self) -> int:
        """Rows in memory."""
        return len(self._rows)

    @property
    def wants_row(self) -> bool:
        """Whether the next row is to be read now."""
        next_row = self._lowest + len(self._rows)
        is_asked_for = any(
            asked.stop > next_row for t in self._cursors.values() for asked in t.open
        )
        return is_asked_for and len(self._rows) < self._most_kept

    def want(self, rank: int, wanted: WantRowsMessage) -> None:
        """A rank's request; raises ProtocolError if it breaks its own promises."""
        cursor = self._cursors.get(rank)
        if cursor is None or cursor.frontier is None:
            raise ProtocolError("asks for rows of the stream, of which it is to get none")
        next_first = wanted.stop if wanted.next_first is None else wanted.next_first
        if not cursor.frontier <= wanted.first <= wanted.stop <= next_first:
            raise ProtocolError(
                f"asks for rows {wanted.first} to {wanted.stop - 1} of the stream, though it said "
                f"that it needs none before {cursor.frontier}"
            )
        if len(cursor.open) >= _MOST_OPEN:
            raise ProtocolError(f"asks for rows of the stream, with {_MOST_OPEN} requests open")
        cursor.frontier = wanted.next_first
        if wanted.first < wanted.stop:
            cursor.open.append(range(wanted.first, wanted.stop))
        self._forget()

    def add(self, row: bytes) -> None:
        """The next row was read."""
        self._rows.append(row)

    def due(self) -> list[tuple[int, RowsMessage]]:
        """What can be sent now, rank and message; each is on its way until `sent`."""
        messages = []
        for rank, cursor in self._cursors.items():
            while (
                cursor.unsent < _MOST_UNSENT_BYTES
                and (message := self._next_for(cursor)) is not None
            ):
                cursor.unsent += len(message.data)
                messages.append((rank, message))
        self._forget()
        return messages

    def sent(self, rank: int, message: RowsMessage) -> None:
        """A message is with its rank."""
        self._cursors[rank].unsent -= len(message.data)

    def _next_for(self, cursor: _Cursor) -> RowsMessage | None:
        """A whole request, or a chunk of a long one; None if that is not there yet."""
        if not cursor.open:
            return None
        asked = cursor.open[0]
        count = min(len(asked), self._chunk)
        begin = asked.start - self._lowest
        if begin + count > len(self._rows):
            return None
        data = b"".join(self._rows[index] for index in range(begin, begin + count))
        if count == len(asked):
            cursor.open.popleft()
        else:
            cursor.open[0] = asked[count:]
        return RowsMessage(first=asked.start, count=count, data=data)

    def _forget(self) -> None:
        """Drop rows that nobody needs any more."""
        lowest = [cursor.lowest for cursor in self._cursors.values() if cursor.lowest is not None]
        while self._rows and (not lowest or self._lowest < min(lowest)):
            self._rows.popleft()
            self._lowest += 1


class StreamServer:
    """Reads in a thread of its own; `send` and `fail` are called from there and must not block."""

    def __init__(
        self,
        reader: RowSource,
        ranks: Iterable[int],
        *,
        send: Callable[[int, Message, Callable[[], None]], None],
        fail: Callable[[str], None],
    ) -> None:
        """Nothing is read before the first `want`. `send` calls its last argument, from any thread,
        once the rank has the message. `fail` gets the sentence, and is the last."""
        self._reader = reader
        self._send, self._fail = send, fail
        self._buffer = StreamBuffer(ranks, first=reader.row, row_bytes=reader.row_bytes)
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="smolrun-rows", daemon=True)
        self._thread.start()

    def want(self, rank: int, wanted: WantRowsMessage) -> None:
        """A rank's request; never waits for the reader. ProtocolError if it is none to be met."""
        with self._changed:
            self._buffer.want(rank, wanted)
            self._changed.notify_all()

    def close(self) -> None:
        """Read no more. A read that hangs is left behind, in a thread that ends with the driver."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(_LAST_JOIN_S)

    def _run(self) -> None:
        try:
            while self._hand_out():
                row = self._reader.read()
                with self._changed:
                    self._buffer.add(row)
        except SmolrunError as error:
            self._fail(f"the driver cannot read the stream any more: {error}")
        except Exception as error:  # a library's, or the user's own reader's
            log.exception("the reader of the stream failed")
            what = f"{type(error).__name__}: {error}"
            self._fail(f"the driver cannot read the stream any more: {what}")

    def _hand_out(self) -> bool:
        """Send what is due, then wait until a row is wanted; False: never again."""
        while True:
            with self._changed:
                due = self._buffer.due()
                while not (due or self._closing or self._buffer.wants_row):
                    self._changed.wait()
                    due = self._buffer.due()
                if self._closing:
                    return False
            if not due:
                return True
            for rank, message in due:
                self._send(rank, message, functools.partial(self._sent, rank, message))

    def _sent(self, rank: int, message: RowsMessage) -> None:
        with self._changed:
            self._buffer.sent(rank, message)
            self._changed.notify_all()
