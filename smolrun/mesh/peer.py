"""One other rank: its connections, and the matching of what it sends with what was posted here.

    control   heartbeats, grants, and tensors up to EAGER_BYTES, sent at once, kept in a mailbox
              until they are asked for
    up, down  larger tensors in slices, one way each, only after the receiver has granted a buffer

So nothing large arrives that nobody waits for, a heartbeat never queues behind a large tensor, and
two streams that are used in different order on two ranks cannot block each other. Runs on the I/O
thread only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from smolrun.errors import ProtocolError
from smolrun.mesh.io import IoThread
from smolrun.mesh.link import Connection, Pipe
from smolrun.mesh.mailbox import Mailbox
from smolrun.mesh.mesh import Combine
from smolrun.mesh.transfers import Transfer, Transfers
from smolrun.wire.frame import EAGER_BYTES, PIECE_BYTES, Frame, FrameKind, Header, Tag
from smolrun.wire.tensor import Payload, dtype_of

# So many large tensors may wait for their grant, or grants for their tensor.
_MAX_WAITING = 65536


@dataclass(slots=True)
class _Receive:
    payload: Payload
    on_done: Callable[[], None]
    combine: Combine | None
    received: int = 0


@dataclass(frozen=True)
class PeerEvents:
    """What a peer tells its mesh."""

    on_lost: Callable[[int, str], None]  # this rank is gone, and why
    on_told: Callable[[int, int], None]  # this rank says that it has lost that rank


class Peer:
    """Sends to and receives from one rank; counts what came from an earlier generation and was
    dropped."""

    def __init__(
        self,
        io: IoThread,
        me: int,
        rank: int,
        generation: int,
        pipes: dict[str, Pipe],
        events: PeerEvents,
    ) -> None:
        self.rank = rank
        self.progress = 0
        self.silence_s = 0.0
        self.has_left = False
        self.dropped_frames = 0
        self._me = me
        self._generation = generation
        self._events = events
        self._posted: dict[Tag, _Receive] = {}
        self._mailbox = Mailbox()
        self._grants: dict[Tag, Header] = {}
        self._ungranted: dict[Tag, Transfer] = {}
        self._transfers = Transfers()
        self._scratch = memoryview(bytearray(PIECE_BYTES))
        self._heard = 0
        self.control = Connection(
            io,
            pipes["control"],
            place=self._place_control,
            on_frame=self._control_frame,
            on_closed=self._closed,
        )
        # One socket per direction: the kernel lets only one side of a socket work at a time.
        sending, receiving = ("up", "down") if me > rank else ("down", "up")
        self.outgoing = Connection(
            io,
            pipes[sending],
            place=self._place_nothing,
            on_frame=self._bulk_frame,
            on_closed=self._closed,
            refill=self._refill,
        )
        self.incoming = Connection(
            io,
            pipes[receiving],
            place=self._place_bulk,
            on_frame=self._bulk_frame,
            on_closed=self._closed,
        )
        self.connections = (self.control, self.outgoing, self.incoming)

    # -- posting ----

    def post_send(self, tag: Tag, payload: Payload, on_done: Callable[[], None]) -> None:
        """Sends at once if small, otherwise as soon as the peer has granted it."""
        if len(payload.data) <= EAGER_BYTES:
            self.control.send(self._header(FrameKind.TENSOR, tag, payload), payload.data, on_done)
            return
        send = Transfer(tag, payload, on_done)
        grant = self._grants.pop(tag, None)
        if grant is None:
            self._ungranted[tag] = send
        else:
            self._start(send, grant)

    def post_recv(
        self, tag: Tag, payload: Payload, on_done: Callable[[], None], combine: Combine | None
    ) -> None:
        """Takes it from the mailbox if it is there, otherwise remembers it, and grants it if it is
        large."""
        if tag in self._posted:
            raise ProtocolError(f"two receives from rank {self.rank} for {tag}")
        receive = _Receive(payload, on_done, combine)
        if len(payload.data) > EAGER_BYTES:
            self._posted[tag] = receive
            self.control.send(self._header(FrameKind.GRANT, tag, payload)._replace(nbytes=0))
        elif tag in self._mailbox:
            header, data = self._mailbox.take(tag)
            self._check_match(header, payload)
            self._deliver(receive, data)
        else:
            self._posted[tag] = receive

    def has_mail(self, tag: Tag) -> bool:
        """Whether a small tensor for this tag has come already."""
        return tag in self._mailbox

    def say(self, kind: FrameKind, operation: int = 0) -> None:
        """Sends a frame that is its own message: HEARTBEAT, LOST or GOODBYE."""
        if self.control.is_open:
            tag = Tag(0, operation, 0)
            self.control.send(Header(kind, tag, sender=self._me, generation=self._generation))

    def close(self) -> None:
        """Closes all connections at once."""
        for connection in self.connections:
            connection.close()

    @property
    def bytes_sent(self) -> int:
        """Bytes handed to the kernel for this peer, headers included."""
        return sum(connection.bytes_sent for connection in self.connections)

    @property
    def bytes_received(self) -> int:
        """Bytes that came from this peer."""
        return sum(connection.bytes_received for connection in self.connections)

    @property
    def is_flushed(self) -> bool:
        """Whether the kernel has everything that was to be sent, or nothing can be sent any more."""
        return all(connection.is_idle or not connection.is_open for connection in self.connections)

    @property
    def waits_for(self) -> list[Tag]:
        """Tags of the receives that this rank still waits for."""
        return list(self._posted)

    def tick(self, elapsed_s: float) -> float:
        """Counts `elapsed_s` as silence unless bytes came since the last tick; returns the silence
        so far."""
        heard = self.bytes_received
        self.silence_s = 0.0 if heard != self._heard else self.silence_s + elapsed_s
        self._heard = heard
        return self.silence_s

    # -- frames that arrive ----

    def _is_current(self, header: Header) -> bool:
        """Whether a frame is of this generation; raises ProtocolError for one that cannot be from
        this peer."""
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
        if not self._is_current(header):
            return self._scratch[: header.nbytes]
        if header.kind is not FrameKind.TENSOR or header.size > EAGER_BYTES:
            raise ProtocolError(
                f"{header.kind.name} of {header.size} bytes on the control connection"
            )
        receive = self._posted.get(header.tag)
        if receive is not None:
            self._check_match(header, receive.payload)
            return (
                receive.payload.data if receive.combine is None else self._scratch[: header.nbytes]
            )
        return self._mailbox.room_for(header)

    def _control_frame(self, frame: Frame) -> None:
        header = frame.header
        if not self._is_current(header):
            self.dropped_frames += 1
            return
        match header.kind:
            case FrameKind.HEARTBEAT:
                self.progress = header.tag.operation
            case FrameKind.TENSOR:
                self._tensor_came(header, frame.payload)
            case FrameKind.GRANT:
                self._granted(header)
            case FrameKind.LOST:
                self._events.on_told(self.rank, header.tag.operation)
            case FrameKind.GOODBYE:
                self._said_goodbye()
            case _:
                raise ProtocolError(f"{header.kind.name} on the control connection")

    def _tensor_came(self, header: Header, data: memoryview) -> None:
        receive = self._posted.pop(header.tag, None)
        if receive is not None:
            self._deliver(receive, data)
        else:
            self._mailbox.put(header, data)

    def _deliver(self, receive: _Receive, data: memoryview) -> None:
        if receive.combine is not None:
            receive.combine(0, data)
        elif data is not receive.payload.data:
            receive.payload.data[:] = data
        receive.on_done()

    def _granted(self, header: Header) -> None:
        send = self._ungranted.pop(header.tag, None)
        if send is not None:
            self._start(send, header)
        elif len(self._grants) >= _MAX_WAITING or header.tag in self._grants:
            raise ProtocolError(f"grant for {header.tag} twice, or too many grants")
        else:
            self._grants[header.tag] = header

    def _said_goodbye(self) -> None:
        self.has_left = True
        if self._posted or self._ungranted or self._transfers:
            self._events.on_lost(
                self.rank, "it left the run while this rank still had work with it"
            )

    def _place_bulk(self, header: Header) -> memoryview:
        if not self._is_current(header):
            return self._scratch[: header.nbytes]
        receive = self._posted.get(header.tag)
        if (
            header.kind is not FrameKind.SLICE
            or receive is None
            or len(receive.payload.data) <= EAGER_BYTES
        ):
            raise ProtocolError(f"{header.kind.name} for {header.tag}, which was never granted")
        if (header.dtype, header.size, header.offset) != (
            receive.payload.dtype,
            len(receive.payload.data),
            receive.received,
        ):
            raise ProtocolError(
                f"slice at {header.offset} of {header.size} bytes does not continue {header.tag}"
            )
        if receive.combine is not None:
            return self._scratch[: header.nbytes]
        return receive.payload.data[header.offset : header.offset + header.nbytes]

    def _place_nothing(self, header: Header) -> memoryview:
        raise ProtocolError(f"{header.kind.name} against the direction of its connection")

    def _bulk_frame(self, frame: Frame) -> None:
        header = frame.header
        if not self._is_current(header):
            self.dropped_frames += 1
            return
        if header.kind is not FrameKind.SLICE:
            raise ProtocolError(f"{header.kind.name} on the bulk connection")
        receive = self._posted[header.tag]
        if receive.combine is not None:
            receive.combine(header.offset, frame.payload)
        receive.received += header.nbytes
        if receive.received == header.size:
            del self._posted[header.tag]
            receive.on_done()

    def _closed(self, reason: str) -> None:
        if not self.has_left:
            self._events.on_lost(self.rank, reason)

    # -- bulk transfers ----

    def _start(self, transfer: Transfer, grant: Header) -> None:
        self._check_match(grant, transfer.payload)
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
        self.outgoing.send(
            header, payload.data[piece.start : piece.stop], on_done if piece.is_last else None
        )

    def _header(self, kind: FrameKind, tag: Tag, payload: Payload) -> Header:
        size = len(payload.data)
        return Header(
            kind, tag, payload.dtype, payload.shape, size, 0, size, self._me, self._generation
        )

    def _check_match(self, header: Header, payload: Payload) -> None:
        if (header.dtype, header.shape) != (payload.dtype, payload.shape):
            theirs = f"{dtype_of(header.dtype)} {list(header.shape)}"
            mine = f"{dtype_of(payload.dtype)} {list(payload.shape)}"
            raise ProtocolError(
                f"for {header.tag} rank {self.rank} has {theirs}, rank {self._me} has {mine}: "
                "the two ranks run different operations"
            )
