"""Frames of a connection to a joined machine: the pipes of many processes over one stream. Pure.

    kind (1 byte) | channel (4) | length (4) | payload, 64 KiB at most

A channel is one request: `open`, then the bytes of three streams, then `exit`. A stream has credit:
bytes that may be sent before the receiver has used some; so a process whose output is not read
waits, and delays no other channel.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, TypeVar

import msgspec

from smolrun.errors import ProtocolError

MAX_PAYLOAD = 64 * 1024
# Of each stream, before the receiver has used any: at 1 Gbit/s it lasts for 8 ms of latency.
WINDOW = 1 << 20
_HEADER = struct.Struct("!BII")
_CREDIT = struct.Struct("!BI")

_Data = TypeVar("_Data")


class Kind(IntEnum):
    """What a frame is."""

    HELLO = 1  # who this side is; the first frame in both directions
    BYE = 2  # this side ends the connection, with a reason for people
    ALIVE = 3  # once a second
    OPEN = 4  # a request, by the coordinator
    IN = 5  # bytes of the three streams
    OUT = 6
    ERR = 7
    END = 8  # of one stream
    CREDIT = 9  # so many bytes more of one stream
    EXIT = 10  # how the request ended, by the agent; the channel is free then
    CANCEL = 11  # the coordinator wants it ended now


STREAMS = (Kind.IN, Kind.OUT, Kind.ERR)


def frame(kind: Kind, channel: int = 0, payload: bytes = b"") -> bytes:
    """The bytes of a frame."""
    assert len(payload) <= MAX_PAYLOAD, "senders cut what is longer"
    return _HEADER.pack(kind, channel, len(payload)) + payload


def credit(channel: int, stream: Kind, num_bytes: int) -> bytes:
    """The frame that allows so many bytes more."""
    return frame(Kind.CREDIT, channel, _CREDIT.pack(stream, num_bytes))


def read_credit(payload: bytes) -> tuple[Kind, int]:
    """The stream and the number of bytes; ProtocolError."""
    if len(payload) != _CREDIT.size:
        raise ProtocolError("sent a malformed credit")
    stream, num_bytes = _CREDIT.unpack(payload)
    return as_stream(stream), num_bytes


def as_stream(number: int) -> Kind:
    """The stream of that number; ProtocolError."""
    if number not in STREAMS:
        raise ProtocolError(f"named a stream {number}, which there is not")
    return Kind(number)


def encode(data: Any) -> bytes:
    """A payload of JSON."""
    return msgspec.json.encode(data)


def decode(payload: bytes, kind: type[_Data]) -> _Data:
    """The data of a payload; ProtocolError if it is not a `kind`."""
    try:
        return msgspec.json.decode(payload, type=kind)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"sent an invalid message ({error})") from None


class FrameSplitter:
    """Bytes in, whole frames out; holds back one unfinished frame."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[Kind, int, bytes]]:
        """The frames that `data` completes; ProtocolError at the first that cannot be."""
        self._rest += data
        while len(self._rest) >= _HEADER.size:
            number, channel, length = _HEADER.unpack_from(self._rest)
            if length > MAX_PAYLOAD or number not in Kind.__members__.values():
                raise ProtocolError(f"sent a frame of kind {number} with {length} bytes")
            end = _HEADER.size + length
            if len(self._rest) < end:
                return
            payload = bytes(self._rest[_HEADER.size : end])
            del self._rest[:end]
            yield Kind(number), channel, payload
