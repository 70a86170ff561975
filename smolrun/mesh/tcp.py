"""The mesh over TCP sockets: one I/O thread, three connections to every peer, heartbeats, and the
same PeerLost on every rank when a peer is lost. `connect.py` builds it.

Knows nothing of collectives."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from smolrun.errors import MeshClosed, PeerLost
from smolrun.mesh.io import IoThread
from smolrun.mesh.link import Pipe
from smolrun.mesh.mesh import Mesh, PostedReceive
from smolrun.mesh.peer import Peer, PeerEvents
from smolrun.wire.frame import FrameKind, Tag
from smolrun.wire.handshake import Identity
from smolrun.wire.tensor import Payload

_log = logging.getLogger(__name__)

# How long a closing mesh waits until its peers have read its GOODBYE and closed their ends.
_FLUSH_S = 5.0


class TcpMesh(Mesh):
    """Built by `connect`: a closed set of peers, the first loss fails everything."""

    def __init__(
        self,
        identity: Identity,
        members: Sequence[int] | None = None,
        *,
        timeout_s: float,
        silence_s: float,
        heartbeat_s: float,
    ) -> None:
        """`members`: the ranks of this generation, this one among them; None: all."""
        super().__init__(
            identity.rank,
            identity.world_size,
            generation=identity.generation,
            timeout_s=timeout_s,
            members=members,
        )
        self.io = IoThread(f"mesh-io-r{identity.rank}", self._io_failed)
        self._silence_s = silence_s
        self._heartbeat_s = heartbeat_s
        self._peers: dict[int, Peer] = {}
        self._last_tick = 0.0
        self._is_closed = False
        self.io.start()

    def adopt(self, pipes: dict[int, dict[str, Pipe]]) -> None:
        """Takes ownership of authenticated pipes, by rank and channel, and starts heartbeats;
        blocks until that is done."""
        adopted = threading.Event()

        def begin() -> None:
            for rank, channels in sorted(pipes.items()):
                self.admit(rank, channels)
            self._last_tick = time.monotonic()
            self._tick()
            adopted.set()

        self.post(begin)
        if not adopted.wait(self.timeout_s):
            raise MeshClosed("the I/O thread does not run")

    def admit(self, rank: int, channels: dict[str, Pipe]) -> None:
        """Adds a peer; only on the I/O thread."""
        events = PeerEvents(
            on_lost=self._lost,
            on_reported=lambda reporter, rank: self._lost(
                rank, f"rank {reporter} lost it", reporter
            ),
            on_mismatch=self.fail,
        )
        self._peers[rank] = self.make_peer(rank, channels, events)

    def make_peer(self, rank: int, channels: dict[str, Pipe], events: PeerEvents) -> Peer:
        """A peer of this mesh."""
        where = (self.io, self.rank, rank, self.generation)
        return Peer(*where, channels, events, self.fingerprints)

    @property
    def bytes_sent(self) -> int:
        return sum(peer.bytes_sent for peer in self._peers.values())

    @property
    def bytes_received(self) -> int:
        return sum(peer.bytes_received for peer in self._peers.values())

    @property
    def dropped_frames(self) -> int:
        """Frames of an earlier generation that were dropped."""
        return sum(peer.dropped_frames for peer in self._peers.values())

    def peer_progress(self, peer: int) -> int:
        return self._peers[peer].progress

    def waits_for(self) -> int | None:
        """A peer that takes nothing is returned first: one that sends nothing may itself be waiting
        for that peer."""
        sends = [rank for rank, peer in self._peers.items() if peer.open_sends]
        receives = [rank for rank, peer in self._peers.items() if peer.receives.waits_for]
        return next(iter([*sends, *receives]), None)

    def describe_waiting(self) -> str:
        named = []
        for rank, peer in self._peers.items():
            at = f"rank {rank} (step {peer.progress})"
            if peer.open_sends:
                named.append(f"{at} to take what is sent to it")
            if tags := peer.receives.waits_for:
                named.append(f"{at} for {tags[0]}")
        return f"rank {self.rank} waits for {', '.join(named) or 'no peer'}"

    def post(self, function: Callable[[], None]) -> None:
        self.io.post(function)

    def post_send(self, peer: int, tag: Tag, payload: Payload, on_done: Callable[[], None]) -> None:
        self._check_present(peer, is_here=not self._peers[peer].has_left)
        self._peers[peer].post_send(tag, payload, on_done)

    def post_recv(self, peer: int, tag: Tag, receive: PostedReceive) -> None:
        link = self._peers[peer]
        self._check_present(peer, is_here=not link.has_left or link.receives.has_unexpected(tag))
        link.post_recv(tag, receive)

    def _check_present(self, rank: int, *, is_here: bool) -> None:
        if not is_here:
            self._lost(rank, "it left the run")
        if self.failure is not None:
            raise self.failure

    def _lost(self, rank: int, reason: str, reported_by: int | None = None) -> None:
        """Fails everything pending with PeerLost, and reports the loss to the other peers, which
        do the same."""
        if self.failure is not None or rank == self.rank:
            return
        _log.warning("lost rank %d: %s", rank, reason)
        self.fail(PeerLost(rank, self.generation, reason, reported_by))
        for other in self._peers.values():
            if other.rank != rank:
                other.send_control(FrameKind.LOST, rank)

    def _io_failed(self, error: BaseException) -> None:
        """A defect on the I/O thread: fails everything pending, and closes the connections."""
        self.fail(error)
        for peer in self._peers.values():
            peer.close()

    def _is_watched(self, peer: Peer) -> bool:
        """Whether its silence is counted."""
        return not peer.has_left and peer.control.is_open

    def _tick(self) -> None:
        """Every `heartbeat_s`: sends a heartbeat to all peers, and counts the silence of each.

        Time in which this thread did not run is not counted: what a peer sent meanwhile has not
        been read yet."""
        if self._is_closed:
            return
        now = time.monotonic()
        elapsed = min(now - self._last_tick, 2 * self._heartbeat_s)
        self._last_tick = now
        for peer in self._peers.values():
            if not self._is_watched(peer):
                continue
            if (
                peer.control.is_idle
            ):  # otherwise it has something to read already, or does not read at all
                peer.send_control(FrameKind.HEARTBEAT, self.progress)
            if peer.tick(elapsed) > self._silence_s:
                self._lost(
                    peer.rank, f"silent for {peer.silence_s:.1f} s: frozen, asleep or cut off"
                )
        self.io.call_later(self._heartbeat_s, self._tick)

    def _stop_listening(self) -> None:
        """Stops admitting ranks; only on the I/O thread."""

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        # A lost peer does not answer GOODBYE.
        flush_s = _FLUSH_S if self.failure is None else _FLUSH_S / 10
        deadline = time.monotonic() + flush_s
        flushed = threading.Event()

        def finish() -> None:
            peers = self._peers.values()
            if time.monotonic() < deadline and not all(peer.is_closed for peer in peers):
                self.io.call_later(0.005, finish)
                return
            for peer in peers:
                peer.close()
            flushed.set()

        def begin() -> None:
            self.fail(MeshClosed("the mesh was closed"))
            self._stop_listening()
            for peer in self._peers.values():
                peer.leave()
            finish()

        self.post(begin)
        flushed.wait(_FLUSH_S + 1.0)
        self.io.stop()
        if self.io.longest_gap_s > 1.0:
            _log.warning("the I/O thread did not run for up to %.1f s", self.io.longest_gap_s)
