"""A mesh that outlives its peers: the loss of one fails the work with it and nothing else, and
ranks may come, or come back, at any time.

    mesh = connect(endpoint, identity, [own seat], elastic=True)     waits at its open door
    mesh.watch(lambda rank, is_here, reason: ...)                    who comes and goes

A rank that comes back begins anew: what was sent to it or by it before is forgotten. Its second
link does not replace one that still lives: a rank has one process, so a claimant beside a healthy
link is a mistake or worse, while an honest one need only wait until its own dead link has been
silent for a moment."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

from smolrun.errors import BROKE_PROTOCOL, CollectiveMismatch, PeerLost, ProtocolError
from smolrun.mesh.door import Door
from smolrun.mesh.endpoint import Endpoint
from smolrun.mesh.guards import Guard
from smolrun.mesh.link import Pipe
from smolrun.mesh.mesh import Combine, Mesh, Work
from smolrun.mesh.peer import Peer, PeerEvents
from smolrun.mesh.tcp import TcpMesh
from smolrun.wire.frame import Tag
from smolrun.wire.handshake import Identity
from smolrun.wire.tensor import Payload

_log = logging.getLogger(__name__)

# A link that was silent for so long may be replaced: several heartbeats, and no hiccup of a host.
_STALE_S = 1.0


class ElasticMesh(TcpMesh):
    """See TcpMesh. A collective may need every peer, so it fails with the first that is lost."""

    def __init__(
        self, identity: Identity, *, timeout_s: float, silence_s: float, heartbeat_s: float
    ) -> None:
        self._present: frozenset[int] = frozenset()
        self._door: Door | None = None
        self._sent_before = 0  # over links that have been replaced
        self._received_before = 0
        super().__init__(
            identity, timeout_s=timeout_s, silence_s=silence_s, heartbeat_s=heartbeat_s
        )

    def open_door(
        self,
        endpoint: Endpoint,
        identity: Identity,
        guard: Guard | None = None,
        wrap: Callable[[Pipe, int, str], Pipe] | None = None,
    ) -> None:
        """From now on ranks may come in at `endpoint`, which is the mesh's to close."""

        def admit(rank: int, pipes: dict[str, Pipe]) -> None:
            if wrap is not None:
                pipes = {channel: wrap(pipe, rank, channel) for channel, pipe in pipes.items()}
            self.admit(rank, pipes)

        self._door = Door(self.io, endpoint, identity, guard, may_come=self._may_come, admit=admit)
        self.post(self._door.open)
        self.adopt({})

    @property
    def present(self) -> frozenset[int]:
        """See Mesh."""
        return self._present

    @property
    def bytes_sent(self) -> int:
        """See Mesh."""
        return self._sent_before + super().bytes_sent

    @property
    def bytes_received(self) -> int:
        """See Mesh."""
        return self._received_before + super().bytes_received

    def peer_progress(self, peer: int) -> int:
        """See Mesh; 0 for one that was never here."""
        return self._peers[peer].progress if peer in self._peers else 0

    # -- who comes and goes ----

    def admit(self, rank: int, channels: dict[str, Pipe]) -> None:
        """See TcpMesh; a link of the same rank that is left over ends."""
        old = self._peers.get(rank)
        if old is not None:
            self._lose(old, "it came back")
            self._sent_before += old.bytes_sent
            self._received_before += old.bytes_received
        events = PeerEvents(
            on_lost=lambda _, reason: self._lose(peer, reason),
            on_told=lambda teller, lost: None,  # whom another rank lost may be here all the same
            on_left=lambda _: self._lose(peer, "it left the run"),
            on_mismatch=lambda error: self._lose(peer, str(error)),
        )
        peer = self.make_peer(rank, channels, events)
        # A new dict: other threads may be reading the old one.
        self._peers = {**self._peers, rank: peer}
        self._present |= {rank}
        _log.info("rank %d has joined", rank)
        self.announce(rank, True, "joined" if old is None else "came back")

    def _may_come(self, rank: int) -> bool:
        if rank not in self._present:
            return True
        peer = self._peers[rank]
        return peer.has_left or peer.silence_s > max(_STALE_S, 4 * self._heartbeat_s)

    def _lose(self, peer: Peer, reason: str) -> None:
        """This very link is gone; a later one of the same rank is none of its business."""
        if self._peers.get(peer.rank) is not peer or peer.rank not in self._present:
            return
        self._present -= {peer.rank}
        peer.close()
        if peer.has_left:
            _log.info("rank %d has left", peer.rank)
        else:
            _log.warning("lost rank %d: %s", peer.rank, reason)
        self.fail_work_with(PeerLost(peer.rank, self.generation, reason))
        self.announce(peer.rank, False, "left" if peer.has_left else reason)

    def _lost(self, rank: int, reason: str, told_by: int | None = None) -> None:
        if rank in self._peers:
            self._lose(self._peers[rank], reason)

    def _is_watched(self, peer: Peer) -> bool:
        return not peer.is_closed  # one that said goodbye must come to its end too

    # -- posting ----

    def begin_operation(self, tag: Tag, fingerprint: int) -> None:
        """See Mesh; a peer that runs another operation under this tag is lost instead."""
        try:
            super().begin_operation(tag, fingerprint)
        except CollectiveMismatch as error:
            self.fingerprints.forget(tag)
            super().begin_operation(tag, fingerprint)
            (peer,) = set(error.ranks) - {self.rank}
            # Posted: a loss fails every pending collective, and this one may not need the peer.
            self.post(functools.partial(self._lost, peer, str(error)))

    def post_send(self, peer: int, tag: Tag, payload: Payload, on_done: Callable[[], None]) -> None:
        """See Mesh; PeerLost if the peer is not here."""
        self._here(peer).post_send(tag, payload, on_done)

    def post_recv(
        self,
        peer: int,
        tag: Tag,
        payload: Payload,
        on_done: Callable[[], None],
        combine: Combine | None = None,
    ) -> None:
        """See Mesh; PeerLost if the peer is not here, and did not leave mail for this tag."""
        self._here(peer, tag).post_recv(tag, payload, on_done, combine)

    def _here(self, rank: int, tag: Tag | None = None) -> Peer:
        if self.failure is not None:
            raise self.failure
        peer = self._peers.get(rank)
        if peer is not None and peer.has_left:
            if tag is not None and peer.inbox.has_mail(tag):
                return peer
        elif peer is not None and rank in self._present:
            return peer
        raise PeerLost(rank, self.generation, "it is not here")

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
        """See Mesh; but the loss of a peer ends only the work with it."""
        if isinstance(error, PeerLost):
            self.fail_work_with(error)
        else:
            super().fail(error)

    def _io_failed(self, error: BaseException) -> None:
        Mesh.fail(self, error)  # a defect, whatever its kind
        super()._io_failed(error)

    def _stop_listening(self) -> None:
        if self._door is not None:
            self._door.close()
