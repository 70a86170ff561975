"""The worker's end of a stream: asks the driver for rows ahead of need, and keeps those that came.

The channel's thread fills it, the training loop empties it. It holds no more than was asked for.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from smolrun.errors import DataError, ProtocolError
from smolrun.launch.control import Message, RowsMessage, WantRowsMessage


class StreamClient:
    """Ranges of rows, asked for by `request` and given by `take` in the same order."""

    def __init__(self, send: Callable[[Message], None]) -> None:
        self._send = send
        self._changed = threading.Condition()
        self._asked: deque[range] = deque()  # and not yet there; the first one perhaps in part
        self._there: deque[RowsMessage] = deque()

    def request(self, first: int, stop: int, next_first: int | None) -> None:
        """Ask for rows `first` to `stop - 1`; the next request begins at `next_first` or later,
        or never comes (None)."""
        if first < stop:
            with self._changed:
                self._asked.append(range(first, stop))
        self._send(WantRowsMessage(first=first, stop=stop, next_first=next_first))

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

    def put(self, message: RowsMessage) -> None:
        """For the channel: rows that came; ProtocolError if they are not those that come next."""
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
