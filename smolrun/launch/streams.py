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

import msgspec

from smolrun.errors import DataError, ProtocolError, SmolrunError
from smolrun.events import Count
from smolrun.launch.control import TaskMessage, decode_data, task_message
from smolrun.launch.driver import Driver, Subscriber

TOPIC = "stream"
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


class StreamRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """This rank needs rows `first` to `stop - 1` of the stream, and then none before `next_first`.

    `next_first` None: none at all. Where first == stop, it needs nothing now.
    """

    first: Count
    stop: Count
    next_first: Count | None


class StreamRows(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rows `first` to `first + count - 1` of the stream, all of one size, concatenated; in the
    order of the requests. `data` is base64 in JSON."""

    first: int
    count: int
    data: bytes


class Channel(Protocol):
    """The part of a worker's channel that a client needs."""

    def send_data(self, topic: str, data: msgspec.Struct) -> None: ...

    def subscribe(self, topic: str, handler: Callable[[TaskMessage], None]) -> None: ...


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
    def wants_row(self) -> bool:
        """Whether the next row is to be read now."""
        next_row = self._lowest + len(self._rows)
        is_asked_for = any(
            asked.stop > next_row for t in self._cursors.values() for asked in t.open
        )
        return is_asked_for and len(self._rows) < self._most_kept

    def want(self, rank: int, wanted: StreamRequest) -> None:
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

    def due(self) -> list[tuple[int, StreamRows]]:
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

    def sent(self, rank: int, message: StreamRows) -> None:
        """A message is with its rank."""
        self._cursors[rank].unsent -= len(message.data)

    def _next_for(self, cursor: _Cursor) -> StreamRows | None:
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
        return StreamRows(first=asked.start, count=count, data=data)

    def _forget(self) -> None:
        """Drop rows that no rank needs any more."""
        lowest = [cursor.lowest for cursor in self._cursors.values() if cursor.lowest is not None]
        while self._rows and (not lowest or self._lowest < min(lowest)):
            self._rows.popleft()
            self._lowest += 1


class StreamServer(Subscriber):
    """Reads in the thread "smolrun-rows" and sends each rank the rows that it requested."""

    topic = TOPIC

    def __init__(self, reader: RowSource) -> None:
        """Nothing is read before the first request."""
        self._reader = reader
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="smolrun-rows", daemon=True)

    def on_start(self, driver: Driver) -> None:
        """Begin to serve the ranks of this driver."""
        reader = self._reader
        self._driver = driver
        self._buffer = StreamBuffer(driver.ranks, first=reader.row, row_bytes=reader.row_bytes)
        self._thread.start()

    def on_message(self, rank: int, message: TaskMessage) -> None:
        """A rank's request; never waits for the reader. ProtocolError if it cannot be met."""
        wanted = decode_data(message, StreamRequest)
        with self._changed:
            self._buffer.want(rank, wanted)
            self._changed.notify_all()

    def on_end(self) -> None:
        """Read no more. A read that hangs is abandoned; its thread ends with the driver."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(_LAST_JOIN_S)

    def _run(self) -> None:
        try:
            while self._hand_out():
                row = self._reader.read()
                with self._changed:
                    self._buffer.add(row)
        except SmolrunError as error:
            self._driver.fail(f"the driver cannot read the stream any more: {error}")
        except Exception as error:  # a library's, or the user's own reader's
            log.exception("the reader of the stream failed")
            what = f"{type(error).__name__}: {error}"
            self._driver.fail(f"the driver cannot read the stream any more: {what}")

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
                sent = functools.partial(self._sent, rank, message)
                self._driver.send(rank, task_message(TOPIC, message), sent)

    def _sent(self, rank: int, message: StreamRows) -> None:
        with self._changed:
            self._buffer.sent(rank, message)
            self._changed.notify_all()


class StreamClient:
    """One rank's end of the stream: ranges of rows, requested ahead of need by `request` and
    returned by `take` in the same order. The channel's thread fills it, the training loop empties
    it; it holds no more than was requested."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._changed = threading.Condition()
        self._asked: deque[range] = deque()  # and not yet there; the first one perhaps in part
        self._there: deque[StreamRows] = deque()
        channel.subscribe(TOPIC, lambda message: self._put(decode_data(message, StreamRows)))

    def request(self, first: int, stop: int, next_first: int | None) -> None:
        """Ask for rows `first` to `stop - 1`; the next request begins at `next_first` or later,
        or never comes (None)."""
        if first < stop:
            with self._changed:
                self._asked.append(range(first, stop))
        self._channel.send_data(TOPIC, StreamRequest(first, stop, next_first))

    def take(self, first: int, stop: int, timeout_s: float) -> bytes:
        """The rows of the oldest request that was not taken yet, waited for; it must be this one.

        Raises DataError when they are not there in time.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._num_there() >= stop - first, timeout_s)
            num_there = min(self._num_there(), stop - first)
            if num_there < stop - first:
                raise DataError(
                    f"waited {timeout_s:g} s for rows {first} to {stop - 1} of the stream, of "
                    f"which the reader on the driver has sent {num_there}: the data, or the way "
                    "to it, is slower than the training; try again or raise mesh.timeout_s"
                )
            parts = []
            while first < stop:
                message = self._there.popleft()
                assert message.first == first, "rows are taken in the order of the requests"
                parts.append(message.data)
                first += message.count
            return b"".join(parts)

    def _put(self, message: StreamRows) -> None:
        """Keep rows that came; ProtocolError if they are not the next ones requested."""
        with self._changed:
            asked = self._asked.popleft() if self._asked else range(0)
            is_next = message.first == asked.start and 0 < message.count <= len(asked)
            if not is_next or len(message.data) % message.count:
                raise ProtocolError(
                    f"the driver sent rows {message.first} to {message.first + message.count - 1} "
                    "of the stream, which this rank did not ask for"
                )
            if message.count < len(asked):
                self._asked.appendleft(asked[message.count :])
            self._there.append(message)
            self._changed.notify_all()

    def _num_there(self) -> int:
        return sum(message.count for message in self._there)
