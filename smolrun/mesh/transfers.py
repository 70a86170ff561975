"""Large tensors on their way out, in slices: streams take turns, a stream's tensors go in order.

    stream 1:  [tensor a: slice slice slice] [tensor b: slice ...]
    stream 2:  [tensor c: slice slice]                   on the wire:  a c a c a b b ...

Pure: it decides which slice is next and moves nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from smolrun.wire.frame import SLICE_BYTES, Tag
from smolrun.wire.tensor import Payload


@dataclass(slots=True)
class Transfer:
    """A large tensor that somebody wants to send; `offset` bytes of it have been cut off."""

    tag: Tag
    payload: Payload
    on_done: Callable[[], None]
    offset: int = 0


class Slice(NamedTuple):
    """Bytes [start, stop) of a transfer; `is_last` if nothing follows."""

    transfer: Transfer
    start: int
    stop: int
    is_last: bool


class Transfers:
    """Granted transfers to one peer."""

    def __init__(self, slice_bytes: int = SLICE_BYTES) -> None:
        self._slice_bytes = slice_bytes
        self._streams: dict[int, deque[Transfer]] = {}
        self._turns: deque[int] = deque()  # streams that have something to send

    def __bool__(self) -> bool:
        return bool(self._turns)

    def add(self, transfer: Transfer) -> None:
        """Puts a transfer behind the others of its stream."""
        stream = self._streams.setdefault(transfer.tag.stream, deque())
        if not stream:
            self._turns.append(transfer.tag.stream)
        stream.append(transfer)

    def next_slice(self) -> Slice | None:
        """Cuts the next slice off the stream whose turn it is; None if there is nothing to send."""
        if not self._turns:
            return None
        stream = self._streams[self._turns[0]]
        transfer = stream[0]
        start, size = transfer.offset, len(transfer.payload.data)
        transfer.offset = min(start + self._slice_bytes, size)
        is_last = transfer.offset == size
        if is_last:
            stream.popleft()
        if stream:
            self._turns.rotate(-1)
        else:
            del self._streams[self._turns.popleft()]
        return Slice(transfer, start, transfer.offset, is_last)
