"""One other rank: three connections, what may go over each, and how it leaves or gets lost.

    control   both ways: heartbeats, grants, and tensors up to EAGER_BYTES, sent at once
    up, down  one way each: larger tensors in slices, after the receiver has granted a buffer

So nothing large arrives that nobody waits for, a heartbeat never queues behind a large tensor, and
two streams that are used in different order on two ranks cannot block each other. Runs on the I/O
thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from smolrun.errors import CollectiveMismatch, ProtocolError
from smolrun.mesh.inbox import Inbox, Receive, check_match
from smolrun.mesh.io import IoThread
from smolrun.mesh.link import Connection, Pipe
from smolrun.mesh.mesh import Combine
from smolrun.mesh.streams import Fingerprints
from smolrun.mesh.transfers import Transfer, Transfers
from smolrun.wire.frame import EAGER_BYTES, Frame, FrameKind, Header, Tag
from smolrun.wire.tensor import Payload

# So many large tensors may wait for their grant, or grants for their tensor.
_MAX_WAITING = 65536
# The end of another connection may overtake the goodbye on control by this much; one that breaks
# is not followed by any goodbye.
_GOODBYE_S = 5.0


@dataclass(frozen=True)
class PeerEvents:
    """What a peer tells its mesh."""

    on_lost: Callable[[int, str], None]  # this rank is gone, and why
    on_told: Callable[[int, int], None]  # this rank says that it has lost that rank
    on_left: Callable[[int], None] = lambda rank: None  # it said goodbye, and all it sent is read
    # It runs another operation than this rank, or than a third one.
    on_mismatch: Callable[[CollectiveMismatch], None] = lambda error: None


class Peer:
    """Sends to and receives from one rank; drops and counts what is from an earlier generation."""

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
        self.inbox = Inbox()
        self._io = io
        self._me = me
        self._generation = generation
        self._events = events
        self._fingerprints = fingerprints
        self._grants: dict[Tag, Header] = {}
        self._ungranted: dict[Tag, Transfer] = {}
        self._transfers = Transfers()
        self.open_sends = self._heard = 0  # sends without a grant, or that the kernel has not taken
        self.control = Connection(
            io,
            pipes["control"],
            place=self._place_control,
            on_frame=self._control_frame,
            on_closed=self._control_closed,
        )
        # One socket per direction: the kernel lets only one side of a socket work at a time.
        sending, receiving = ("up", "down") if me > rank else ("down", "up")
        self.outgoing = Connection(
            io,
            pipes[sending],
            place=self._place_nothing,
            on_frame=self._slice_frame,
            on_closed=self._bulk_closed,
            refill=self._refill,
        )
        self.incoming = Connection(
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
        transfer = Transfer(tag, payload, sent)
        grant = self._grants.pop(tag, None)
        if grant is None:
            self._ungranted[tag] = transfer
        else:
            self._start(transfer, grant)

    def post_recv(
        self, tag: Tag, payload: Payload, on_done: Callable[[], None], combine: Combine | None
    ) -> None:
        """Takes it from the mailbox, or expects it, and grants it if it is large."""
        self.inbox.post(tag, Receive(payload, on_done, combine))
        if len(payload.data) > EAGER_BYTES:
            self.control.send(self._header(FrameKind.GRANT, tag, payload)._replace(nbytes=0))

    def say(self, kind: FrameKind, operation: int = 0) -> None:
        """Sends a frame that is its own message: HEARTBEAT, LOST or GOODBYE."""
        if self.control.is_open:
            tag = Tag(0, operation, 0)
            self.control.send(Header(kind, tag, sender=self._me, generation=self._generation))

    # -- leaving ----

    def leave(self) -> None:
        """Says goodbye, and that nothing follows; the peer answers by closing its ends."""
        self.say(FrameKind.GOODBYE)
        for connection in self._connections:
            connection.finish()

    def close(self) -> None:
        """Closes all connections at once."""
        for connection in self._connections:
            connection.close()

    @property
    def is_closed(self) -> bool:
        """Whether nothing can come or go any more."""
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
        """Counts `elapsed_s` as silence unless bytes came since the last tick; returns the sum."""
        heard = self.bytes_received
        self.silence_s = 0.0 if heard != self._heard else self.silence_s + elapsed_s
        self._heard = heard
        return self.silence_s

    def _control_closed(self, reason: str) -> None:
        if not self.has_left:
            self._events.on_lost(self.rank, reason)
        self._check_left()

    def _bulk_closed(self, reason: str) -> None:
        def judge() -> None:
            if not self.has_left:
                self._events.on_lost(self.rank, reason)

        # Its goodbye may still be on the way, over another connection.
        self._io.call_later(_GOODBYE_S, judge)
        self._check_left()

    def _check_left(self) -> None:
        """A peer that has left owes nothing once its last byte has been read."""
        if not (self.has_left and self.is_closed):
            return
        if self.inbox.waits_for or self.open_sends:
            self._events.on_lost(self.rank, "it left the run while work with it was pending")
        self._events.on_left(self.rank)

    # -- frames that arrive ----

    def _is_current(self, header: Header) -> bool:
        """Whether a frame is of this generation; ProtocolError for what cannot be its own."""
        if header.sender != self.rank:
            raise ProtocolError(
                f"rank {self.rank} sent a frame in the name of rank {header.sender}"
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
        return self.inbox.place_tensor(header)

    def _control_frame(self, frame: Frame) -> None:
        header = frame.header
        if not self._is_current(header):
            self.dropped_frames += 1
            return
        match header.kind:
            case FrameKind.HEARTBEAT:
                self.progress = header.tag.operation
            case FrameKind.TENSOR:
                self.inbox.tensor_came(header, frame.payload)
            case FrameKind.GRANT:
                self._check_fingerprint(header)
                self._granted(header)
            case FrameKind.LOST:
                self._events.on_told(self.rank, header.tag.operation)
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
        transfer = self._ungranted.pop(header.tag, None)
        if transfer is not None:
            self._start(transfer, header)
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
        return self.inbox.place_slice(header)

    def _slice_frame(self, frame: Frame) -> None:
        if frame.header.kind is not FrameKind.SLICE:
            raise ProtocolError(f"{frame.header.kind.name} among slices")
        if self._is_current(frame.header):
            self.inbox.slice_came(frame.header, frame.payload)
        else:
            self.dropped_frames += 1

    # -- large tensors on their way out ----

    def _start(self, transfer: Transfer, grant: Header) -> None:
        check_match(grant, transfer.payload)
        self._transfers.add(transfer)
        self.outgoing.flush()

    def _refill(self) -> None:
        """Queues one slice of whatever is next."""
        piece = self._transfers.next_slice()
        if piece is None:
            return
        tag, payload, on_done = piece.transfer.tag, piece.transfer.payload, piece.transfer.on_done
        header = self._header(FrameKind.SLICE, tag, payload)._replace(
            shape=(), offset=piece.start, nbytes=piece.stop - piece.start
        )
        data = payload.data[piece.start : piece.stop]
        self.outgoing.send(header, data, on_done if piece.is_last else None)

    def _header(self, kind: FrameKind, tag: Tag, payload: Payload) -> Header:
        size, fingerprint = len(payload.data), self._fingerprints.of(tag)
        whole = (payload.dtype, payload.shape, size, 0, size)
        return Header(kind, tag, *whole, self._me, self._generation, fingerprint=fingerprint)
