"""The frame: a fixed 48-byte header, up to 8 dimensions of shape, then the payload. All numbers are
little-endian.

    magic version kind dtype ndim sender | generation sequence | stream hop fingerprint |
    operation nbytes | size offset | shape | payload

`FrameDecoder` is sans-IO and copies nothing: it offers the memory that must be filled next, and for
a payload that is the memory chosen by `place`, in general the tensor itself. So every number a peer
sends is checked before a byte of its payload is read, and nothing is ever allocated by a peer's
number alone. Knows nothing of sockets or of matching."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from smolrun.errors import ProtocolError
from smolrun.wire.tensor import ITEM_SIZES

MAGIC = 0x5352  # "RS": neither ASCII text, nor HTTP, nor TLS starts like this
VERSION = 2
MAX_DIMENSIONS = 8
# Larger tensors are granted and sliced: a small one costs less than the round trip of a grant.
EAGER_BYTES = 64 * 1024
# A slice is one frame: larger ones cost fewer headers, smaller ones let streams take turns sooner.
SLICE_BYTES = 1024 * 1024
# So much of a slice is added up at once, while the rest arrives: it fits a core's own cache.
PIECE_BYTES = 256 * 1024

_HEADER = struct.Struct("<HBBBBHIIHHIIIQQ")
HEADER_BYTES = _HEADER.size
_UINT32 = 0xFFFFFFFF


class FrameKind(IntEnum):
    """What a frame is for. HEARTBEAT, TENSOR, GRANT, LOST and GOODBYE use the control connection,
    SLICE the bulk one."""

    HEARTBEAT = 1  # `operation` is the sender's progress (the training step)
    TENSOR = 2  # a whole small tensor, sent without a grant (eager)
    GRANT = 3  # the sender posted a buffer of this dtype and shape for this tag
    SLICE = 4  # bytes [offset, offset + nbytes) of a granted tensor
    LOST = 5  # the sender has lost the rank in `operation`
    GOODBYE = 6  # the sender closes its mesh; the end of the connection follows


_KINDS = frozenset(int(kind) for kind in FrameKind)


class Tag(NamedTuple):
    """Identifies a tensor. Both sides count the operations of a stream in the same order, so tags
    match without communication."""

    stream: int  # 16 bits: one independent sequence of operations
    operation: int  # 32 bits: which operation of that stream
    hop: int  # 16 bits: which transfer of that operation


class Header(NamedTuple):
    """Everything in a frame but its payload. `size` is the whole tensor in bytes, `nbytes` this
    frame's payload."""

    kind: FrameKind
    tag: Tag = Tag(0, 0, 0)
    dtype: int = 0
    shape: tuple[int, ...] = ()
    size: int = 0
    offset: int = 0
    nbytes: int = 0
    sender: int = 0
    generation: int = 0
    sequence: int = 0
    fingerprint: int = 0  # 32 bits: what the operation of the tag is; 0: unknown


class Frame(NamedTuple):
    """A complete frame; `payload` is the memory that `place` gave, now filled."""

    header: Header
    payload: memoryview


def encode_header(header: Header) -> bytes:
    """The bytes that go before the payload. `sequence` must grow by one with every frame of a
    connection."""
    tag, shape = header.tag, header.shape
    head = _HEADER.pack(
        MAGIC, VERSION, header.kind, header.dtype, len(shape), header.sender,
        header.generation, header.sequence & _UINT32,
        tag.stream, tag.hop, header.fingerprint,
        tag.operation & _UINT32, header.nbytes,
        header.size, header.offset,
    )  # fmt: skip
    return head + struct.pack(f"<{len(shape)}Q", *shape) if shape else head


class FrameDecoder:
    """Turns filled memory into frames: `buffer()` is the memory to fill next, `filled(n)` is called
    when n bytes have arrived in it.

    `place(header) -> memoryview` is called before a payload is read, after every check that needs
    no knowledge of what is expected, and must return exactly `header.nbytes` of writable memory; it
    raises ProtocolError to refuse the frame. A slice comes out in pieces of `PIECE_BYTES` at most,
    each like a frame of its own, so that it can be added up while the rest still arrives. A
    decoder that raised must not be used again.
    """

    def __init__(
        self, place: Callable[[Header], memoryview], *, max_payload: int = SLICE_BYTES
    ) -> None:
        self._place = place
        self._max_payload = max_payload
        self._head = memoryview(bytearray(HEADER_BYTES + 8 * MAX_DIMENSIONS))
        self._target = self._head[:HEADER_BYTES]  # memory to fill: header, then shape, then payload
        self._done = 0
        self._header: Header | None = None  # set while a payload is being read
        self._rest: Header | None = None  # of a slice: what comes after the piece being read
        self._sequence = 0

    def buffer(self) -> memoryview:
        """The memory that must be filled next; never empty."""
        if self._header is None and self._rest is not None:
            self._begin_payload(self._rest)
        return self._target[self._done :]

    def filled(self, count: int) -> Frame | None:
        """`count` new bytes are in `buffer()`; returns a frame when one is complete."""
        self._done += count
        if self._done < len(self._target):
            return None
        if self._header is not None:
            return self._finish(self._header)
        ndim = self._head[5]
        if len(self._target) == HEADER_BYTES and 0 < ndim <= MAX_DIMENSIONS:
            self._target = self._head[: HEADER_BYTES + 8 * ndim]  # the shape follows
            return None
        header = self._parse()
        if header.nbytes == 0:
            if header.kind is FrameKind.TENSOR:
                self._place(header)  # an empty tensor is checked like any other
            self._target = memoryview(b"")
            return self._finish(header)
        self._begin_payload(header)
        return None

    def _begin_payload(self, header: Header) -> None:
        """Gets the memory for a payload, or for the next piece of a slice."""
        self._rest = None
        if header.kind is FrameKind.SLICE and header.nbytes > PIECE_BYTES:
            left = header.nbytes - PIECE_BYTES
            self._rest = header._replace(offset=header.offset + PIECE_BYTES, nbytes=left)
            header = header._replace(nbytes=PIECE_BYTES)
        target = self._place(header)
        if len(target) != header.nbytes:
            raise ProtocolError(
                f"{header.kind.name} of {header.nbytes} bytes got {len(target)} bytes of memory"
            )
        self._header, self._target, self._done = header, target, 0

    def _finish(self, header: Header) -> Frame:
        frame = Frame(header, self._target)
        self._header, self._target, self._done = None, self._head[:HEADER_BYTES], 0
        return frame

    def _parse(self) -> Header:
        """The header in `_head`, checked for everything that can be checked without knowing what is
        expected."""
        (
            magic, version, kind, dtype, ndim, sender,
            generation, sequence, stream, hop, fingerprint,
            operation, nbytes, size, offset,
        ) = _HEADER.unpack_from(self._head)  # fmt: skip
        if magic != MAGIC or version != VERSION:
            raise ProtocolError(
                f"not a smolrun frame of version {VERSION} (magic {magic:#06x}, version {version})"
            )
        if kind not in _KINDS or dtype >= len(ITEM_SIZES) or ndim > MAX_DIMENSIONS:
            raise ProtocolError(f"unknown kind {kind}, dtype {dtype}, or {ndim} dimensions")
        if sequence != self._sequence:
            raise ProtocolError(
                f"frame {sequence} where frame {self._sequence} was due: lost, doubled or replayed"
            )
        self._sequence = (sequence + 1) & _UINT32
        shape = struct.unpack_from(f"<{ndim}Q", self._head, HEADER_BYTES)
        header = Header(
            FrameKind(kind),
            Tag(stream, operation, hop),
            dtype,
            shape,
            size,
            offset,
            nbytes,
            sender,
            generation,
            sequence,
            fingerprint,
        )
        _check_sizes(header, self._max_payload)
        return header


def _check_sizes(header: Header, max_payload: int) -> None:
    """Raises ProtocolError where the numbers of a header contradict each other or a limit."""
    kind, nbytes, size = header.kind, header.nbytes, header.size
    if nbytes > max_payload:
        raise ProtocolError(f"{kind.name} of {nbytes} bytes; at most {max_payload} are allowed")
    if header.offset + nbytes > size:
        raise ProtocolError(
            f"{kind.name} of bytes {header.offset}..{header.offset + nbytes} in a tensor of {size}"
        )
    if kind is FrameKind.TENSOR or kind is FrameKind.GRANT:
        if math.prod(header.shape) * ITEM_SIZES[header.dtype] != size:
            raise ProtocolError(
                f"{kind.name}: shape {list(header.shape)} does not make {size} bytes"
            )
        if nbytes != (size if kind is FrameKind.TENSOR else 0):
            raise ProtocolError(
                f"{kind.name} of a {size}-byte tensor with a payload of {nbytes} bytes"
            )
    elif kind is FrameKind.SLICE and (header.offset | nbytes) % ITEM_SIZES[header.dtype]:
        raise ProtocolError(f"a slice of {nbytes} bytes at {header.offset} cuts through an element")
    elif header.shape:
        raise ProtocolError(f"{kind.name} carries no shape")
    elif (kind is FrameKind.SLICE) != (nbytes > 0):
        raise ProtocolError(f"{kind.name} with a payload of {nbytes} bytes")
