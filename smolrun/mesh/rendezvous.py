"""How the mesh comes to stand: every rank listens and dials, and nobody is believed without proof.

A pair of ranks first agrees on one path, over its control connection (`pairing.py` decides which);
whoever dialed that then dials the other channels the same way. A stranger costs one small object
and a few seconds at most, and there are never more than a few of them (`strangers.py`)."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass

from smolrun.errors import HandshakeError, SmolrunError, WaitTimeout
from smolrun.mesh.addresses import reachable_as, shown, socket_address
from smolrun.mesh.callers import Callers
from smolrun.mesh.endpoint import Endpoint
from smolrun.mesh.guards import Guard, PlainGuard
from smolrun.mesh.io import IoThread
from smolrun.mesh.knock import Knock, KnockEvents
from smolrun.mesh.link import Pipe
from smolrun.mesh.pairing import FIRST_PAUSE_S, Pairing, Way
from smolrun.mesh.strangers import Strangers
from smolrun.wire.handshake import CHANNELS, Acceptor, Dialer, Identity

_TICK_S = 0.05  # how late a retry or a decision may come
_CONNECTING = {
    0,
    errno.EINPROGRESS,
    errno.EWOULDBLOCK,
    errno.EAGAIN,
    getattr(errno, "WSAEWOULDBLOCK", 0),
}


@dataclass(frozen=True)
class Seat:
    """Where a rank of the run can be reached, as numbers, best first."""

    rank: int
    host: str
    addresses: list[tuple[str, int]]


class Rendezvous:
    """Collects one authenticated pipe per peer and channel. `run` blocks the caller, the work is
    done on the I/O thread."""

    def __init__(
        self,
        io: IoThread,
        endpoint: Endpoint,
        identity: Identity,
        roster: list[Seat],
        guard: Guard | None = None,
    ) -> None:
        self._io = io
        self._identity = identity
        self._guard = guard or PlainGuard()
        self._seats = {seat.rank: seat for seat in roster}
        self._pipes: dict[int, dict[str, Pipe]] = {
            seat.rank: {} for seat in roster if seat.rank != identity.rank
        }
        self._pairings: dict[int, Pairing[Knock]] = {}
        self._dialed: dict[Knock, tuple[int, Way]] = {}
        origins = {(s.rank, a.partition("%")[0]) for s in roster for a, _ in s.addresses}
        strangers: Strangers[Knock] = Strangers(Counter(where for _, where in origins))
        self._events = KnockEvents(self._on_proven, self._on_kept, self._on_failed)
        self._callers = Callers(io, endpoint, identity, self._guard, strangers, self._events)
        self._knocks = self._callers.knocks
        self._called: dict[int, str] = {}  # how the last call that a peer made here went
        self._complete = threading.Event()
        self._error: SmolrunError | None = None
        self._is_over = False

    @property
    def refused(self) -> int:
        """How many connections did not prove themselves."""
        return self._callers.refused

    def run(self, timeout_s: float) -> dict[int, dict[str, Pipe]]:
        """Pipes by rank and channel; raises HandshakeError, or WaitTimeout with who is missing."""
        self._io.post(self._begin)
        self._complete.wait(timeout_s)
        closed = threading.Event()

        def end() -> None:
            self._is_over = True
            if not self._is_complete():
                for channels in self._pipes.values():
                    for pipe in channels.values():
                        pipe.close()
            self._callers.stop()
            closed.set()

        self._io.post(end)
        closed.wait(timeout_s)
        if self._error is not None:
            raise self._error
        if missing := [rank for rank in self._pipes if self._is_missing(rank)]:
            raise WaitTimeout(self._whats_missing(missing, timeout_s))
        return self._pipes

    def _begin(self) -> None:
        self._callers.listen()
        now = time.monotonic()
        for rank in self._pipes:
            ways = [
                (place, reachable, port)
                for place, (address, port) in enumerate(self._seats[rank].addresses)
                for reachable in reachable_as(address)
            ]
            decides = self._identity.rank > rank
            self._pairings[rank] = Pairing(decides=decides, ways=ways, now=now)
        self._check_complete()
        self._tick()

    def _tick(self) -> None:
        if self._is_over:
            return
        for rank in self._pairings:
            self._advance(rank)
        self._io.call_later(_TICK_S, self._tick)

    def _advance(self, rank: int) -> None:
        """Does what is due with one peer."""
        pairing, now = self._pairings[rank], time.monotonic()
        for way in pairing.due(now):
            self._dial(rank, way, "control")
        knock = pairing.choice(now)
        if knock is not None:
            knock.keep()

    # -- connections that begin ----

    def _dial(self, rank: int, way: Way, channel: str) -> None:
        if self._is_over:
            return
        sock = None
        try:
            family, where = socket_address(way.address, way.port)
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setblocking(False)
            code = sock.connect_ex(where)
            if code not in _CONNECTING:
                raise OSError(code, os.strerror(code))
        except OSError as error:
            if sock is not None:
                sock.close()
            self._dial_failed(rank, way, channel, error)
            return
        conversation = Dialer(self._identity, rank, channel)
        pipe = self._guard.dialing(sock, rank)
        knock = Knock(self._io, sock, pipe, conversation, way.place, self._events)
        self._knocks.add(knock)
        self._dialed[knock] = (rank, way)
        knock.begin()

    # -- how they go on ----

    def _on_proven(self, knock: Knock) -> None:
        talk = knock.conversation
        assert talk.peer is not None
        self._callers.has_proven(knock)
        if talk.peer not in self._pairings:  # of this run, but none of those we are to meet
            knock.close()
            self._callers.has_ended(knock)
            return
        if talk.channel != "control":
            if talk.decides:
                knock.keep()
            return
        self._pairings[talk.peer].proven(knock, knock.place, time.monotonic())
        self._advance(talk.peer)

    def _on_kept(self, knock: Knock) -> None:
        rank, channel = knock.conversation.peer, knock.conversation.channel
        assert rank is not None
        self._knocks.discard(knock)
        if channel in self._pipes[rank]:
            self._pipes[rank][channel].close()  # the peer dialed again, so it lost the first
        self._pipes[rank][channel] = knock.pipe
        if channel == "control":
            self._settle(rank, knock)
        self._check_complete()

    def _settle(self, rank: int, kept: Knock) -> None:
        """This is the path: other tries end, and whoever dialed it dials what is missing."""
        self._pairings[rank].kept = kept
        for knock in list(self._knocks):
            talk = knock.conversation
            to, _ = self._dialed.get(knock, (talk.peer, None))
            if to == rank and talk.channel == "control":
                knock.close()
                self._knocks.discard(knock)
        if kept in self._dialed:
            for channel in CHANNELS[1:]:
                self._dial(rank, self._dialed[kept][1], channel)

    def _on_failed(self, knock: Knock, error: Exception) -> None:
        self._callers.has_ended(knock)
        talk = knock.conversation
        if talk.peer in self._pairings:
            self._pairings[talk.peer].gone(knock)
        if isinstance(talk, Dialer):
            # A stranger at one address is no reason to give up, the right peer's word is.
            if isinstance(error, HandshakeError) and talk.peer is not None and not talk.is_proven:
                self._give_up(error)
            self._dial_failed(talk.dialed, self._dialed[knock][1], talk.channel, error)
            return
        if talk.is_proven:
            return  # its rank keeps another one, or dials again
        self._callers.count_refused(error)
        assert isinstance(talk, Acceptor)
        if talk.claimed is not None:
            self._called[talk.claimed] = str(error)
        if talk.refused_because:
            # It knows the secret, so it is one of us, of another generation or configuration.
            self._give_up(HandshakeError(f"refused rank {talk.peer}: {talk.refused_because}"))

    def _dial_failed(self, rank: int, way: Way, channel: str, error: Exception) -> None:
        why = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        if channel == "control":
            self._pairings[rank].failed(way, why, time.monotonic())
            return
        way.outcome = why
        if not self._is_over:
            self._io.call_later(FIRST_PAUSE_S, lambda: self._dial(rank, way, channel))

    def _give_up(self, error: SmolrunError) -> None:
        self._error = self._error or error
        self._complete.set()

    # -- how it ends ----

    def _check_complete(self) -> None:
        if self._is_complete():
            self._complete.set()

    def _is_missing(self, rank: int) -> bool:
        return len(self._pipes[rank]) < len(CHANNELS)

    def _is_complete(self) -> bool:
        return self._error is None and not any(self._is_missing(rank) for rank in self._pipes)

    def _whats_missing(self, missing: list[int], timeout_s: float) -> str:
        me = self._seats[self._identity.rank]
        peers = "; ".join(self._how_it_went(rank) for rank in missing)
        here = ", ".join(shown(*where) for where in me.addresses)
        return (
            f"rank {me.rank} on {me.host} has no link to {peers}, after {timeout_s:g} s: does a "
            f"firewall keep it from them, and them from {here}?"
        )

    def _how_it_went(self, rank: int) -> str:
        """rank 2 (mini3): dialed 10.0.0.3:4000 (connection refused), it has not called."""
        pairing = self._pairings.get(rank)
        ways = pairing.ways if pairing is not None else []
        dialed = ", ".join(f"{shown(way.address, way.port)} ({way.outcome})" for way in ways)
        called = f"its call: {self._called[rank]}" if rank in self._called else "it has not called"
        return f"rank {rank} ({self._seats[rank].host}): dialed {dialed}, {called}"
