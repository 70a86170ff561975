"""Matches what one peer sends with the receives that were posted, as MPI does: posted receives by
tag, and a queue of unexpected tensors for the rest.

Pure: it hands out the memory before bytes are read, and is called again when they are there. It
refuses (ProtocolError) what does not match. Knows nothing of connections."""

from __future__ import annotations

from smolrun.errors import ProtocolError
from smolrun.mesh.mesh import PostedReceive
from smolrun.wire.frame import EAGER_BYTES, PIECE_BYTES, Header, Tag
from smolrun.wire.tensor import Payload, dtype_of

# Far above what collectives leave unmatched; a peer beyond it sends what no receive will match.
MAX_UNEXPECTED_BYTES = 64 * 1024 * 1024
MAX_UNEXPECTED_TENSORS = 65536


class UnexpectedTensors:
    """Small tensors of one peer whose receive has not been posted yet, by tag, within limits."""

    def __init__(self) -> None:
        self._by_tag: dict[Tag, tuple[Header, memoryview]] = {}
        self._bytes = 0

    def __contains__(self, tag: Tag) -> bool:
        return tag in self._by_tag

    def allocate(self, header: Header) -> memoryview:
        """New memory for a tensor; ProtocolError beyond the limits or for a tag twice."""
        if header.tag in self._by_tag:
            raise ProtocolError(f"two tensors for {header.tag}")
        if (
            self._bytes + header.nbytes > MAX_UNEXPECTED_BYTES
            or len(self._by_tag) >= MAX_UNEXPECTED_TENSORS
        ):
            held = f"{self._bytes} bytes in {len(self._by_tag)} tensors"
            raise ProtocolError(f"too many unexpected tensors: {held} have no receive")
        return memoryview(bytearray(header.nbytes))

    def put(self, header: Header, data: memoryview) -> None:
        """Adds a tensor."""
        self._by_tag[header.tag] = (header, data)
        self._bytes += len(data)

    def take(self, tag: Tag) -> tuple[Header, memoryview]:
        """Removes and returns a tensor."""
        header, data = self._by_tag.pop(tag)
        self._bytes -= len(data)
        return header, data


class ReceiveMatcher:
    """Posted receives and unexpected tensors of one peer."""

    def __init__(self) -> None:
        self._posted: dict[Tag, PostedReceive] = {}
        self._unexpected = UnexpectedTensors()
        # One each: a small tensor and a slice may both be half read.
        self._tensor_scratch = memoryview(bytearray(EAGER_BYTES))
        self._slice_scratch = memoryview(bytearray(PIECE_BYTES))

    @property
    def waits_for(self) -> list[Tag]:
        """Tags that are posted and not complete."""
        return list(self._posted)

    def has_unexpected(self, tag: Tag) -> bool:
        """Whether a small tensor for this tag is here already."""
        return tag in self._unexpected

    def post(self, tag: Tag, receive: PostedReceive) -> None:
        """Posts a receive; an unexpected tensor for its tag is delivered at once."""
        if tag in self._posted:
            raise ProtocolError(f"two receives for {tag}")
        if tag in self._unexpected:
            header, data = self._unexpected.take(tag)
            check_match(header, receive.payload)
            _deliver(receive, data)
        else:
            self._posted[tag] = receive

    def place_tensor(self, header: Header) -> memoryview:
        """The memory that a small tensor is to be read into."""
        if header.size > EAGER_BYTES:
            raise ProtocolError(f"a tensor of {header.size} bytes that was not granted")
        receive = self._posted.get(header.tag)
        if receive is None:
            return self._unexpected.allocate(header)
        check_match(header, receive.payload)
        if receive.combine is not None:
            return self._tensor_scratch[: header.nbytes]
        return receive.payload.data

    def tensor_arrived(self, header: Header, data: memoryview) -> None:
        """A small tensor has been read into the memory of `place_tensor`."""
        receive = self._posted.pop(header.tag, None)
        if receive is None:
            self._unexpected.put(header, data)
        else:
            _deliver(receive, data)

    def place_slice(self, header: Header) -> memoryview:
        """The memory that a slice of a large tensor is to be read into."""
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

    def slice_arrived(self, header: Header, data: memoryview) -> None:
        """A slice has been read into the memory of `place_slice`."""
        receive = self._posted[header.tag]
        if receive.combine is not None:
            receive.combine(header.offset, data)
        receive.received += header.nbytes
        if receive.received == header.size:
            del self._posted[header.tag]
            receive.on_done()


def _deliver(receive: PostedReceive, data: memoryview) -> None:
    if receive.combine is not None:
        receive.combine(0, data)
    elif len(data) and data is not receive.payload.data:  # memory of no bytes is read-only
        receive.payload.data[:] = data
    receive.on_done()


def check_match(header: Header, payload: Payload) -> None:
    """ProtocolError unless both sides use the same dtype and shape for this tag."""
    if (header.dtype, header.shape) != (payload.dtype, payload.shape):
        theirs = f"{dtype_of(header.dtype)} {list(header.shape)}"
        mine = f"{dtype_of(payload.dtype)} {list(payload.shape)}"
        raise ProtocolError(
            f"for {header.tag} rank {header.sender} has {theirs}, this rank has {mine}: "
            "the two ranks run different operations"
        )
