"""Where what one peer sends finds its place: receives that were posted, and a mailbox for the rest.

Pure: it is asked for memory before bytes are read, and told when they are there. It refuses
(ProtocolError) whatever nobody here expects. Knows nothing of connections.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from smolrun.errors import ProtocolError
from smolrun.mesh.mailbox import Mailbox
from smolrun.mesh.mesh import Combine
from smolrun.wire.frame import EAGER_BYTES, PIECE_BYTES, Header, Tag
from smolrun.wire.tensor import Payload, dtype_of


@dataclass(slots=True)
class Receive:
    """A posted receive: where bytes go, or the function they are handed to instead."""

    payload: Payload
    on_done: Callable[[], None]
    combine: Combine | None
    received: int = 0


class Inbox:
    """What is expected of one peer."""

    def __init__(self) -> None:
        self._posted: dict[Tag, Receive] = {}
        self._mailbox = Mailbox()
        # One each: a small tensor and a slice may both be half read.
        self._tensor_scratch = memoryview(bytearray(EAGER_BYTES))
        self._slice_scratch = memoryview(bytearray(PIECE_BYTES))

    @property
    def waits_for(self) -> list[Tag]:
        """Tags that are posted and have not come yet."""
        return list(self._posted)

    def has_mail(self, tag: Tag) -> bool:
        """Whether a small tensor for this tag is here already."""
        return tag in self._mailbox

    def post(self, tag: Tag, receive: Receive) -> None:
        """Expects a tensor; if it is in the mailbox, it is delivered at once."""
        if tag in self._posted:
            raise ProtocolError(f"two receives for {tag}")
        if tag in self._mailbox:
            header, data = self._mailbox.take(tag)
            check_match(header, receive.payload)
            _deliver(receive, data)
        else:
            self._posted[tag] = receive

    def place_tensor(self, header: Header) -> memoryview:
        """Memory for a small tensor that is about to be read."""
        if header.size > EAGER_BYTES:
            raise ProtocolError(f"a tensor of {header.size} bytes that was not granted")
        receive = self._posted.get(header.tag)
        if receive is None:
            return self._mailbox.room_for(header)
        check_match(header, receive.payload)
        if receive.combine is not None:
            return self._tensor_scratch[: header.nbytes]
        return receive.payload.data

    def tensor_came(self, header: Header, data: memoryview) -> None:
        """A small tensor is there, in the memory that `place_tensor` gave."""
        receive = self._posted.pop(header.tag, None)
        if receive is None:
            self._mailbox.put(header, data)
        else:
            _deliver(receive, data)

    def place_slice(self, header: Header) -> memoryview:
        """Memory for a slice of a large tensor that is about to be read."""
        receive = self._posted.get(header.tag)
        if receive is None or len(receive.payload.data) <= EAGER_BYTES:
            raise ProtocolError(f"a slice for {header.tag}, which was never granted")
        expected = (receive.payload.dtype, len(receive.payload.data), receive.received)
        if (header.dtype, header.size, header.offset) != expected:
            raise ProtocolError(
                f"a slice at {header.offset} of {header.size} bytes does not continue {header.tag}"
            )
        if receive.combine is not None:
            return self._slice_scratch[: header.nbytes]
        return receive.payload.data[header.offset : header.offset + header.nbytes]

    def slice_came(self, header: Header, data: memoryview) -> None:
        """A slice is there, in the memory that `place_slice` gave."""
        receive = self._posted[header.tag]
        if receive.combine is not None:
            receive.combine(header.offset, data)
        receive.received += header.nbytes
        if receive.received == header.size:
            del self._posted[header.tag]
            receive.on_done()


def _deliver(receive: Receive, data: memoryview) -> None:
    if receive.combine is not None:
        receive.combine(0, data)
    elif len(data) and data is not receive.payload.data:  # memory of nothing is read-only
        receive.payload.data[:] = data
    receive.on_done()


def check_match(header: Header, payload: Payload) -> None:
    """Raises ProtocolError unless the other side means the same dtype and shape by this tag."""
    if (header.dtype, header.shape) != (payload.dtype, payload.shape):
        theirs = f"{dtype_of(header.dtype)} {list(header.shape)}"
        mine = f"{dtype_of(payload.dtype)} {list(payload.shape)}"
        raise ProtocolError(
            f"for {header.tag} rank {header.sender} has {theirs}, this rank has {mine}: "
            "the two ranks run different operations"
        )
