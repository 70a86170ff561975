"""One other rank: three connections, what may be sent over each, and how it leaves or is lost.

    control   both ways: heartbeats, grants, and tensors up to EAGER_BYTES, sent at once (eager)
    up, down  one way each: larger tensors in slices, after the receiver has granted a buffer

So no large tensor arrives without a posted receive, a heartbeat never queues behind a large tensor,
and two streams that are used in different order on two ranks cannot block each other. Granted
tensors are sent round robin over streams, and in order within a stream:

    stream 1:  [tensor a: slice slice slice] [tensor b: slice ...]
    stream 2:  [tensor c: slice slice]                   on the wire:  a c a c a b b ...

Runs on the I/O thread only. Source: the eager and rendezvous protocols of MPI implementations."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from smolrun.errors import CollectiveMismatch, ProtocolError
from smolrun.mesh.io import IoThread
from smolrun.mesh.link import FrameConnection, Pipe
from smolrun.mesh.matching import ReceiveMatcher, check_match
from smolrun.mesh.mesh import PostedReceive
from smolrun.mesh.streams import Fingerprints
from smolrun.wire.frame import EAGER_BYTES, SLICE_BYTES, Frame, FrameKind, Header, Tag
from smolrun.wire.tensor import Payload

# So many large tensors may wait for their grant, or grants for their tensor.
_MAX_WAITING = 65536
# The end of another connection may overtake the GOODBYE on control by this much; one that breaks
# is followed by none.
_GOODBYE_S = 5.0


@dataclass(slots=True)
class PendingSend:
    """A large tensor to send; slices of the first `offset` bytes have been cut."""

    tag: Tag
    payload: Payload
    on_done: Callable[[], None]
    offset: int = 0


class SendSlice(NamedTuple):
    """Bytes [start, stop) of a send; `is_last` if nothing follows."""

    send: PendingSend
    start: int
    stop: int
    is_last: bool


class SliceQueue:
    """Granted sends to one peer: cuts the next slice, and moves nothing."""

    def __init__(self, slice_bytes: int = SLICE_BYTES) -> None:
        self._slice_bytes = slice_bytes
        self._streams: dict[int, deque[PendingSend]] = {}
        self._ready: deque[int] = deque()  # streams that have something to send, next one first

    def __bool__(self) -> bool:
        return bool(self._ready)

    def add(self, send: PendingSend) -> None:
        """Appends a send to those of its stream."""
        stream = self._streams.setdefault(send.tag.stream, deque())
        if not stream:
            self._ready.append(send.tag.stream)
        stream.append(send)

    def next_slice(self) -> SendSlice | None:
        """Cuts the next slice of the stream whose turn it is; None if there is nothing to send."""
        if not self._ready:
            return None
        stream = self._streams[self._ready[0]]
        send = stream[0]
        start, size = send.offset, len(send.payload.data)
        send.offset = min(start + self._slice_bytes, size)
        is_last = send.offset == size
        if is_last:
            stream.popleft()
        if stream:
            self._ready.rotate(-1)
        else:
            del self._streams[self._ready.popleft()]
        return SendSlice(send, start, send.offset, is_last)


@dataclass(frozen=True)
class PeerEvents:
    """Callbacks of a peer, on the I/O thread."""

    on_lost: Callable[[int, str], None]  # this rank is gone, and why
    on_reported: Callable[[int, int], None]  # this rank has lost that rank
    on_left: Callable[[int], None] = lambda rank: None  # it sent GOODBYE, and all it sent is read
    # It runs another operation than this rank, or than a third one.
    on_mismatch: Callable[[CollectiveMismatch], None] = lambda error: None


class Peer:
    """Sends to and receives from one rank; drops and counts frames of earlier generations."""

    def __init__(
        self,
        io: IoThread,
        me: int,
        rank: int,
        generation: int,
        pipes: dict[str, Pipe],
        events: PeerEvents,
        fingerprints: Fingerprints,
    ) -> None:
        self.rank = rank
        self.progress = 0
        self.silence_s = 0.0
        self.has_left = False
        self.dropped_frames = 0
        self.receives = ReceiveMatcher()
        self._io, self._me = io, me
        self._generation = generation
        self._events = events
        self._fingerprints = fingerprints
        self._grants: dict[Tag, Header] = {}
        self._ungranted: dict[Tag, PendingSend] = {}
        self._slices = SliceQueue()
        self.open_sends = 0  # sends without a grant, or that the kernel has not taken
        self._received_at_tick = 0
        self.control = FrameConnection(
            io,
            pipes["control"],
            place=self._place_control,
            on_frame=self._control_frame,
            on_closed=self._control_closed,
        )
        # One socket per direction: the kernel lets only one side of a socket work at a time.
        sending, receiving = ("up", "down") if me > rank else ("down", "up")
        self.outgoing = FrameConnection(
            io,
            pipes[sending],
            place=self._place_nothing,
            on_frame=self._slice_frame,
            on_closed=self._bulk_closed,
            refill=self._refill,
        )
        self.incoming = FrameConnection(
            io,
            pipes[receiving],
            place=self._place_slice,
            on_frame=self._slice_frame,
            on_closed=self._bulk_closed,
        )
        self._connections = (self.control, self.outgoing, self.incoming)

    # -- posting ----

    def post_send(self, tag: Tag, payload: Payload, on_done: Callable[[], None]) -> None:
        """Sends at once if small, otherwise as soon as the peer has granted it."""
        self.open_sends += 1

        def sent() -> None:
            self.open_sends -= 1
            on_done()

        if len(payload.data) <= EAGER_BYTES:
            self.control.send(self._header(FrameKind.TENSOR, tag, payload), payload.data, sent)
            return
        send = PendingSend(tag, payload, sent)
        grant = self._grants.pop(tag, None)
        if grant is None:
            self._ungranted[tag] = send
        else:
            self._start(send, grant)

    def post_recv(self, tag: Tag, receive: PostedReceive) -> None:
        """Posts a receive, and grants it if it is large."""
        self.receives.post(tag, receive)
        if len(receive.payload.data) > EAGER_BYTES:
            grant = self._header(FrameKind.GRANT, tag, receive.payload)._replace(nbytes=0)
            self.control.send(grant)

    def send_control(self, kind: FrameKind, operation: int = 0) -> None:
        """Sends a frame without payload: HEARTBEAT, LOST or GOODBYE."""
        if self.control.is_open:
            tag = Tag(0, operation, 0)
            self.control.send(Header(kind, tag, sender=self._me, generation=self._generation))

    # -- leaving ----

    def leave(self) -> None:
        """Sends GOODBYE and ends the sending directions; the peer then closes its ends."""
        self.send_control(FrameKind.GOODBYE)
        for connection in self._connections:
            connection.finish()

    def close(self) -> None:
        """Closes all connections at once."""
        for connection in self._connections:
            connection.close()

    @property
    def is_closed(self) -> bool:
        """Whether all connections are closed."""
        return not any(connection.is_open for connection in self._connections)

    @property
    def bytes_sent(self) -> int:
        """Bytes handed to the kernel for this peer, headers included."""
        return sum(connection.bytes_sent for connection in self._connections)

    @property
    def bytes_received(self) -> int:
        """Bytes that came from this peer."""
        return sum(connection.bytes_received for connection in self._connections)

    def tick(self, elapsed_s: float) -> float:
        """Adds `elapsed_s` to the silence unless bytes came since the last tick; returns it."""
        received = self.bytes_received
        self.silence_s = 0.0 if received != self._received_at_tick else self.silence_s + elapsed_s
        self._received_at_tick = received
        return self.silence_s

    def _control_closed(self, reason: str) -> None:
        if not self.has_left:
            self._events.on_lost(self.rank, reason)
        self._check_left()

    def _bulk_closed(self, reason: str) -> None:
        def check() -> None:
            if not self.has_left:
                self._events.on_lost(self.rank, reason)

        # Its GOODBYE may still be on the way, over another connection.
        self._io.call_later(_GOODBYE_S, check)
        self._check_left()

    def _check_left(self) -> None:
        """Reports a peer that has left once its last byte has been read."""
        if not (self.has_left and self.is_closed):
            return
        if self.receives.waits_for or self.open_sends:
            self._events.on_lost(self.rank, "it left the run while work with it was pending")
        self._events.on_left(self.rank)

    # -- frames that arrive ----

    def _is_current(self, header: Header) -> bool:
        """Whether a frame is of this generation; ProtocolError for a later one or wrong sender."""
        if header.sender != self.rank:
            raise ProtocolError(
                f"rank {self.rank} sent a frame with rank {header.sender} as its sender"
            )
        if header.generation > self._generation:
            raise ProtocolError(
                f"frame of generation {header.generation} in generation {self._generation}"
            )
        return header.generation == self._generation

    def _place_control(self, header: Header) -> memoryview:
        if header.kind is not FrameKind.TENSOR:
            raise ProtocolError(f"{header.kind.name} on the control connection")
        if not self._is_current(header):
            return memoryview(bytearray(header.nbytes))  # read and dropped; bounded by the decoder
        self._check_fingerprint(header)
        return self.receives.place_tensor(header)

    def _control_frame(self, frame: Frame) -> None:
        header = frame.header
        if not self._is_current(header):
            self.dropped_frames += 1
            return
        match header.kind:
            case FrameKind.HEARTBEAT:
                self.progress = header.tag.operation
            case FrameKind.TENSOR:
                self.receives.tensor_arrived(header, frame.payload)
            case FrameKind.GRANT:
                self._check_fingerprint(header)
                self._granted(header)
            case FrameKind.LOST:
                self._events.on_reported(self.rank, header.tag.operation)
            case FrameKind.GOODBYE:
                self.has_left = True
                self.outgoing.finish()
            case _:
                raise ProtocolError(f"{header.kind.name} on the control connection")

    def _check_fingerprint(self, header: Header) -> None:
        try:
            self._fingerprints.check(self.rank, header.tag, header.fingerprint)
        except CollectiveMismatch as error:
            self._events.on_mismatch(error)

    def _granted(self, header: Header) -> None:
        send = self._ungranted.pop(header.tag, None)
        if send is not None:
            self._start(send, header)
        elif len(self._grants) >= _MAX_WAITING or header.tag in self._grants:
            raise ProtocolError(f"grant for {header.tag} twice, or too many grants")
        else:
            self._grants[header.tag] = header

    def _place_nothing(self, header: Header) -> memoryview:
        raise ProtocolError(f"{header.kind.name} against the direction of its connection")

    def _place_slice(self, header: Header) -> memoryview:
        if header.kind is not FrameKind.SLICE:
            raise ProtocolError(f"{header.kind.name} among slices")
        if not self._is_current(header):
            return memoryview(bytearray(header.nbytes))
        return self.receives.place_slice(header)

    def _slice_frame(self, frame: Frame) -> None:
        if frame.header.kind is not FrameKind.SLICE:
            raise ProtocolError(f"{frame.header.kind.name} among slices")
        if self._is_current(frame.header):
            self.receives.slice_arrived(frame.header, frame.payload)
        else:
            self.dropped_frames += 1

    # -- sending large tensors ----

    def _start(self, send: PendingSend, grant: Header) -> None:
        check_match(grant, send.payload)
        self._slices.add(send)
        self.outgoing.flush()

    def _refill(self) -> None:
        """Queues the next slice."""
        piece = self._slices.next_slice()
        if piece is None:
            return
        tag, payload, on_done = piece.send.tag, piece.send.payload, piece.send.on_done
        header = self._header(FrameKind.SLICE, tag, payload)._replace(
            shape=(), offset=piece.start, nbytes=piece.stop - piece.start
        )
        data = payload.data[piece.start : piece.stop]
        self.outgoing.send(header, data, on_done if piece.is_last else None)

    def _header(self, kind: FrameKind, tag: Tag, payload: Payload) -> Header:
        size, fingerprint = len(payload.data), self._fingerprints.of(tag)
        whole = (payload.dtype, payload.shape, size, 0, size)
        return Header(kind, tag, *whole, self._me, self._generation, fingerprint=fingerprint)
