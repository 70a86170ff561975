"""A mesh that outlives its peers: the loss of one fails the work with it and nothing else, and
ranks may join, or rejoin, at any time.

    mesh = connect(endpoint, identity, [own entry], elastic=True)       listens for the others
    mesh.on_membership_change(lambda rank, is_present, reason: ...)

A rank that rejoins starts anew: what was sent to it or by it before is forgotten. Its second link
does not replace a live one: a rank has one process, so a second link beside a healthy one is a
mistake or an attack, while a restarted rank need only wait until its old link has been silent for a
moment."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

from smolrun.errors import BROKE_PROTOCOL, CollectiveMismatch, PeerLost, ProtocolError
from smolrun.mesh.admission import Acceptor, PendingConnection, PendingEvents, UnauthenticatedPool
from smolrun.mesh.endpoint import Endpoint
from smolrun.mesh.io import IoThread
from smolrun.mesh.link import Pipe
from smolrun.mesh.mesh import Mesh, PostedReceive, Work
from smolrun.mesh.peer import Peer, PeerEvents
from smolrun.mesh.tcp import TcpMesh
from smolrun.mesh.tls import NoTransportSecurity, TransportSecurity
from smolrun.wire.frame import Tag
from smolrun.wire.handshake import CHANNELS, AcceptorHandshake, Identity
from smolrun.wire.tensor import Payload

_log = logging.getLogger(__name__)

# A link that was silent for so long may be replaced: several heartbeats, more than a short stall.
_STALE_S = 1.0
# From the first channel of a rank to its last one: a rank that dies in between blocks its own
# restart no longer than that.
ADMISSION_TIMEOUT_S = 5.0


class ElasticMesh(TcpMesh):
    """A TcpMesh whose peers join and leave. A collective may need every peer, so it fails with the
    first that is lost."""

    def __init__(
        self, identity: Identity, *, timeout_s: float, silence_s: float, heartbeat_s: float
    ) -> None:
        self._present: frozenset[int] = frozenset()
        self._listener: ElasticListener | None = None
        self._sent_before = 0  # over links that have been replaced
        self._received_before = 0
        super().__init__(
            identity, timeout_s=timeout_s, silence_s=silence_s, heartbeat_s=heartbeat_s
        )

    def listen(
        self,
        endpoint: Endpoint,
        identity: Identity,
        security: TransportSecurity | None = None,
        wrap: Callable[[Pipe, int, str], Pipe] | None = None,
    ) -> None:
        """From now on ranks may join at `endpoint`, which the mesh owns and closes."""

        def admit(rank: int, pipes: dict[str, Pipe]) -> None:
            if wrap is not None:
                pipes = {channel: wrap(pipe, rank, channel) for channel, pipe in pipes.items()}
            self.admit(rank, pipes)

        self._listener = ElasticListener(
            self.io, endpoint, identity, security, may_join=self._may_join, admit=admit
        )
        self.post(self._listener.start)
        self.adopt({})

    @property
    def present(self) -> frozenset[int]:
        return self._present

    @property
    def bytes_sent(self) -> int:
        return self._sent_before + super().bytes_sent

    @property
    def bytes_received(self) -> int:
        return self._received_before + super().bytes_received

    def peer_progress(self, peer: int) -> int:
        """0 for a rank that has not joined yet."""
        return self._peers[peer].progress if peer in self._peers else 0

    # -- membership ----

    def admit(self, rank: int, channels: dict[str, Pipe]) -> None:
        """Adds a peer; only on the I/O thread. An old link of the same rank is closed."""
        old = self._peers.get(rank)
        if old is not None:
            self._lose(old, "it rejoined")
            self._sent_before += old.bytes_sent
            self._received_before += old.bytes_received
        events = PeerEvents(
            on_lost=lambda _, reason: self._lose(peer, reason),
            on_reported=lambda reporter, lost: None,  # lost by another rank, maybe not by this one
            on_left=lambda _: self._lose(peer, "it left the run"),
            on_mismatch=lambda error: self._lose(peer, str(error)),
        )
        peer = self.make_peer(rank, channels, events)
        # A new dict: other threads may be reading the old one.
        self._peers = {**self._peers, rank: peer}
        self._present |= {rank}
        _log.info("rank %d has joined", rank)
        self.membership_changed(rank, True, "joined" if old is None else "rejoined")

    def _may_join(self, rank: int) -> bool:
        if rank not in self._present:
            return True
        peer = self._peers[rank]
        return peer.has_left or peer.silence_s > max(_STALE_S, 4 * self._heartbeat_s)

    def _lose(self, peer: Peer, reason: str) -> None:
        """Closes this link; a later one of the same rank is not affected."""
        if self._peers.get(peer.rank) is not peer or peer.rank not in self._present:
            return
        self._present -= {peer.rank}
        peer.close()
        if peer.has_left:
            _log.info("rank %d has left", peer.rank)
        else:
            _log.warning("lost rank %d: %s", peer.rank, reason)
        self.fail_work_with(PeerLost(peer.rank, self.generation, reason))
        self.membership_changed(peer.rank, False, "left" if peer.has_left else reason)

    def _lost(self, rank: int, reason: str, reported_by: int | None = None) -> None:
        if rank in self._peers:
            self._lose(self._peers[rank], reason)

    def _is_watched(self, peer: Peer) -> bool:
        return not peer.is_closed  # after GOODBYE a peer must close its connections too

    # -- posting ----

    def begin_operation(self, tag: Tag, fingerprint: int) -> None:
        """A peer that runs another operation under this tag is lost instead."""
        try:
            super().begin_operation(tag, fingerprint)
        except CollectiveMismatch as error:
            self.fingerprints.forget(tag)
            super().begin_operation(tag, fingerprint)
            (peer,) = set(error.ranks) - {self.rank}
            # Posted: a loss fails every pending collective, and this one may not need the peer.
            self.post(functools.partial(self._lost, peer, str(error)))

    def post_send(self, peer: int, tag: Tag, payload: Payload, on_done: Callable[[], None]) -> None:
        """PeerLost if the peer is not present."""
        self._peer(peer).post_send(tag, payload, on_done)

    def post_recv(self, peer: int, tag: Tag, receive: PostedReceive) -> None:
        """PeerLost if the peer is not present and has not sent a tensor for this tag."""
        self._peer(peer, tag).post_recv(tag, receive)

    def _peer(self, rank: int, tag: Tag | None = None) -> Peer:
        if self.failure is not None:
            raise self.failure
        peer = self._peers.get(rank)
        if peer is not None and peer.has_left:
            if tag is not None and peer.receives.has_unexpected(tag):
                return peer
        elif peer is not None and rank in self._present:
            return peer
        raise PeerLost(rank, self.generation, "it is not connected")

    # -- failing ----

    def _could_not_start(self, work: Work, error: Exception) -> None:
        if isinstance(error, ProtocolError) and work.peer in self._present:
            self._lost(work.peer, f"{BROKE_PROTOCOL}: {error}")
        elif isinstance(error, PeerLost):
            self._pending.discard(work)
            work.finish(error)
        else:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """The loss of a peer fails only the work with it."""
        if isinstance(error, PeerLost):
            self.fail_work_with(error)
        else:
            super().fail(error)

    def _io_failed(self, error: BaseException) -> None:
        Mesh.fail(self, error)  # a defect, whatever its kind
        super()._io_failed(error)

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.close()


class ElasticListener:
    """Admits ranks that start late or restart, at any time.

    dialer -> authenticated -> control nominated -> its other channels -> admit(rank, pipes)

    The dialer is in its own rendezvous and is the higher rank, so it dials and nominates.
    Authentication and limits are those of the rendezvous, and no frame is read before all channels
    are there. One admission per rank at a time. Runs on the I/O thread."""

    def __init__(
        self,
        io: IoThread,
        endpoint: Endpoint,
        identity: Identity,
        security: TransportSecurity | None,
        *,
        may_join: Callable[[int], bool],
        admit: Callable[[int, dict[str, Pipe]], None],
    ) -> None:
        """`may_join(rank)` is called when a rank has authenticated; `admit(rank, pipes)` takes
        ownership of the pipes. Owns the endpoint."""
        self._io = io
        self._endpoint = endpoint
        self._may_join = may_join
        self._admit = admit
        self._admissions: dict[int, dict[str, Pipe]] = {}
        self._acceptor = Acceptor(
            io,
            endpoint,
            identity,
            security or NoTransportSecurity(),
            UnauthenticatedPool({}, ranks_anywhere=identity.world_size - 1),
            PendingEvents(self._on_authenticated, self._on_nominated, self._on_failed),
        )

    @property
    def refused(self) -> int:
        """How many connections did not authenticate."""
        return self._acceptor.refused

    def start(self) -> None:
        """Starts accepting."""
        self._acceptor.start()

    def close(self) -> None:
        """Stops accepting, and closes all unfinished admissions."""
        self._acceptor.stop()
        for rank in list(self._admissions):
            self._end_admission(rank)
        self._endpoint.close()

    def _on_authenticated(self, connection: PendingConnection) -> None:
        handshake = connection.handshake
        assert handshake.peer is not None
        self._acceptor.authenticated(connection)
        is_joining = handshake.peer in self._admissions
        if handshake.channel == "control":
            is_allowed = (
                not is_joining and not handshake.is_controlling and self._may_join(handshake.peer)
            )
        else:
            is_allowed = is_joining
        if not is_allowed:
            _log.info("refused a second link of rank %d", handshake.peer)
            connection.close()
            self._acceptor.ended(connection)

    def _on_nominated(self, connection: PendingConnection) -> None:
        rank, channel = connection.handshake.peer, connection.handshake.channel
        assert rank is not None
        self._acceptor.ended(connection)
        if channel == "control":
            self._begin_admission(rank)
        channels = self._admissions.get(rank)
        if channels is None:  # it took longer than ADMISSION_TIMEOUT_S
            connection.pipe.close()
            return
        if channel in channels:
            channels[channel].close()  # the peer dialed again, so it lost the first
        channels[channel] = connection.pipe
        if len(channels) == len(CHANNELS):
            del self._admissions[rank]
            self._admit(rank, channels)

    def _begin_admission(self, rank: int) -> None:
        self._end_admission(rank)
        channels: dict[str, Pipe] = {}
        self._admissions[rank] = channels

        def expire() -> None:
            if self._admissions.get(rank) is channels:
                self._end_admission(rank)

        self._io.call_later(ADMISSION_TIMEOUT_S, expire)

    def _end_admission(self, rank: int) -> None:
        for pipe in self._admissions.pop(rank, {}).values():
            pipe.close()

    def _on_failed(self, connection: PendingConnection, error: Exception) -> None:
        self._acceptor.ended(connection)
        handshake = connection.handshake
        if handshake.is_authenticated:
            return  # a rank of this run: it dials again
        self._acceptor.count_refused(error)
        if isinstance(handshake, AcceptorHandshake) and handshake.refused_because:
            _log.warning("refused rank %s: %s", handshake.peer, handshake.refused_because)
