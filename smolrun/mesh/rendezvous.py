"""How the mesh is built: every rank listens and dials, and every connection is authenticated.

A pair of ranks first selects one path, over its control connection; the dialer of that then dials
the other channels the same way. Unauthenticated connections are limited in number and time
(`admission.py`)."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from smolrun.errors import (
    EarlierGeneration,
    GenerationEnded,
    HandshakeError,
    SmolrunError,
    WaitTimeout,
)
from smolrun.mesh.addresses import reachable_as, shown, socket_address
from smolrun.mesh.admission import Acceptor, PendingConnection, PendingEvents, UnauthenticatedPool
from smolrun.mesh.endpoint import Endpoint
from smolrun.mesh.io import IoThread
from smolrun.mesh.link import Pipe
from smolrun.mesh.tls import NoTransportSecurity, TransportSecurity
from smolrun.wire.handshake import CHANNELS, AcceptorHandshake, DialerHandshake, Identity

ATTEMPT_DELAY_S = 0.25  # of an address after the better one; RFC 8305 recommends this
LOWER_RANK_DELAY_S = 0.2  # the controlling rank dials first
GRACE_S = 0.5  # a better address may take so much longer than a worse one
FIRST_RETRY_S, MAX_RETRY_S = 0.1, 1.0  # between two attempts at one address
_TICK_S = 0.05  # how late a retry or a decision may come
_CONNECTING = {
    0,
    errno.EINPROGRESS,
    errno.EWOULDBLOCK,
    errno.EAGAIN,
    getattr(errno, "WSAEWOULDBLOCK", 0),
}


@dataclass(eq=False)
class CandidateAddress:
    """One address of a peer, and the outcome of the last attempt; `preference` is its index in the
    peer's own list, 0 is the best."""

    preference: int
    address: str
    port: int
    due_s: float
    is_dialing: bool = False
    outcome: str = "not tried"
    retry_s: float = FIRST_RETRY_S


class PathSelection:
    """One peer: when to dial which of its addresses, and which connection becomes the path.

    controlling rank   dials the peer's best address at once, the next ones a moment later each
    other rank         does the same, but begins a moment later
    controlling rank   nominates the best authenticated connection

    Both dial, as a firewall may let only one of them in. Pure: time is an argument.

    Source: RFC 8305 (Happy Eyeballs) for the delay between addresses, RFC 8445 (ICE) for the
    nomination."""

    def __init__(
        self, *, is_controlling: bool, addresses: Sequence[tuple[int, str, int]], now: float
    ) -> None:
        """`is_controlling`: this rank is the higher one; `addresses`: preference, address, port."""
        begin_s = now if is_controlling else now + LOWER_RANK_DELAY_S
        self.candidates = [
            CandidateAddress(preference, address, port, begin_s + ATTEMPT_DELAY_S * index)
            for index, (preference, address, port) in enumerate(addresses)
        ]
        self.selected: PendingConnection | None = None
        self._is_controlling = is_controlling
        self._nominated: PendingConnection | None = None
        self._authenticated: list[tuple[int, PendingConnection]] = []
        self._authenticated_since_s = now

    def due(self, now: float) -> list[CandidateAddress]:
        """The addresses to dial now; each is then `is_dialing` until `failed` is called for it."""
        if self.selected is not None:
            return []
        due = [one for one in self.candidates if not one.is_dialing and one.due_s <= now]
        for one in due:
            one.is_dialing, one.outcome = True, "no answer yet"
        return due

    def failed(self, candidate: CandidateAddress, why: str, now: float) -> None:
        """An attempt failed: it is retried later, and the next address is due at once."""
        candidate.is_dialing, candidate.outcome = False, why
        candidate.due_s = now + candidate.retry_s
        candidate.retry_s = min(2 * candidate.retry_s, MAX_RETRY_S)
        waiting = [other for other in self.candidates if other.outcome == "not tried"]
        if waiting and candidate.preference <= waiting[0].preference:
            waiting[0].due_s = min(waiting[0].due_s, now)

    def authenticated(self, connection: PendingConnection, preference: int, now: float) -> None:
        """A connection to the acceptor's address number `preference` could be the path."""
        if not self._authenticated:
            self._authenticated_since_s = now
        self._authenticated.append((preference, connection))

    def lost(self, connection: PendingConnection) -> None:
        """An authenticated connection broke."""
        self._authenticated = [one for one in self._authenticated if one[1] is not connection]
        if self._nominated is connection:
            self._nominated = None

    def nominate(self, now: float) -> PendingConnection | None:
        """The connection to nominate, if this rank is the controlling one and it is time; once."""
        if not self._is_controlling or not self._authenticated or self._nominated is not None:
            return None
        preference, best = min(self._authenticated, key=lambda one: one[0])
        if preference > 0 and now < self._authenticated_since_s + GRACE_S:
            return None
        self._nominated = best
        return best


@dataclass(frozen=True)
class RosterEntry:
    """Where a rank of the run can be reached: numeric addresses and ports, best first."""

    rank: int
    host: str
    addresses: list[tuple[str, int]]


class Rendezvous:
    """Collects one authenticated pipe per peer and channel. `run` blocks the caller, everything
    else runs on the I/O thread."""

    def __init__(
        self,
        io: IoThread,
        endpoint: Endpoint,
        identity: Identity,
        roster: list[RosterEntry],
        security: TransportSecurity | None = None,
        is_outdated: Callable[[], bool] = lambda: False,
    ) -> None:
        """`is_outdated()`: whether a later generation has been announced; asked on the I/O thread,
        many times a second."""
        self._is_outdated = is_outdated
        self._io = io
        self._identity = identity
        self._security = security or NoTransportSecurity()
        self._roster = {entry.rank: entry for entry in roster}
        self._pipes: dict[int, dict[str, Pipe]] = {
            entry.rank: {} for entry in roster if entry.rank != identity.rank
        }
        self._selections: dict[int, PathSelection] = {}
        self._dialed: dict[PendingConnection, tuple[int, CandidateAddress]] = {}
        origins = {(e.rank, a.partition("%")[0]) for e in roster for a, _ in e.addresses}
        pool = UnauthenticatedPool(Counter(where for _, where in origins))
        self._events = PendingEvents(self._on_authenticated, self._on_nominated, self._on_failed)
        self._acceptor = Acceptor(io, endpoint, identity, self._security, pool, self._events)
        self._pending = self._acceptor.pending
        self._incoming: dict[int, str] = {}  # how the last connection from a peer failed
        self._complete = threading.Event()
        self._error: SmolrunError | None = None
        self._is_over = False

    @property
    def refused(self) -> int:
        """How many connections did not authenticate."""
        return self._acceptor.refused

    def run(self, timeout_s: float) -> dict[int, dict[str, Pipe]]:
        """Pipes by rank and channel; raises HandshakeError, WaitTimeout with who is missing, or
        GenerationEnded."""
        self._io.post(self._begin)
        self._complete.wait(timeout_s)
        closed = threading.Event()

        def end() -> None:
            self._is_over = True
            if not self._is_complete():
                for channels in self._pipes.values():
                    for pipe in channels.values():
                        pipe.close()
            self._acceptor.stop()
            closed.set()

        self._io.post(end)
        closed.wait(timeout_s)
        if self._error is not None:
            raise self._error
        if missing := [rank for rank in self._pipes if self._is_missing(rank)]:
            raise WaitTimeout(self._describe_missing(missing, timeout_s), missing[0])
        return self._pipes

    def _begin(self) -> None:
        self._acceptor.start()
        now = time.monotonic()
        for rank in self._pipes:
            addresses = [
                (preference, reachable, port)
                for preference, (address, port) in enumerate(self._roster[rank].addresses)
                for reachable in reachable_as(address)
            ]
            self._selections[rank] = PathSelection(
                is_controlling=self._identity.rank > rank, addresses=addresses, now=now
            )
        self._check_complete()
        self._tick()

    def _tick(self) -> None:
        if self._is_over:
            return
        if self._is_outdated():
            self._fail(GenerationEnded("a later generation was announced before it was complete"))
        for rank in self._selections:
            self._advance(rank)
        self._io.call_later(_TICK_S, self._tick)

    def _advance(self, rank: int) -> None:
        """Dials and nominates what is due with one peer."""
        selection, now = self._selections[rank], time.monotonic()
        for candidate in selection.due(now):
            self._dial(rank, candidate, "control")
        connection = selection.nominate(now)
        if connection is not None:
            connection.nominate()

    def _dial(self, rank: int, candidate: CandidateAddress, channel: str) -> None:
        if self._is_over:
            return
        sock = None
        try:
            family, where = socket_address(candidate.address, candidate.port)
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setblocking(False)
            code = sock.connect_ex(where)
            if code not in _CONNECTING:
                raise OSError(code, os.strerror(code))
        except OSError as error:
            if sock is not None:
                sock.close()
            self._dial_failed(rank, candidate, channel, error)
            return
        connection = PendingConnection(
            self._io,
            sock,
            self._security.client_pipe(sock, rank),
            DialerHandshake(self._identity, rank, channel),
            candidate.preference,
            self._events,
        )
        self._pending.add(connection)
        self._dialed[connection] = (rank, candidate)
        connection.start()

    # -- callbacks of pending connections ----

    def _on_authenticated(self, connection: PendingConnection) -> None:
        handshake = connection.handshake
        assert handshake.peer is not None
        self._acceptor.authenticated(connection)
        if handshake.peer not in self._selections:  # a rank of this run, but not in the roster
            connection.close()
            self._acceptor.ended(connection)
            return
        if handshake.channel != "control":
            if handshake.is_controlling:
                connection.nominate()
            return
        self._selections[handshake.peer].authenticated(
            connection, connection.preference, time.monotonic()
        )
        self._advance(handshake.peer)

    def _on_nominated(self, connection: PendingConnection) -> None:
        rank, channel = connection.handshake.peer, connection.handshake.channel
        assert rank is not None
        self._pending.discard(connection)
        if channel in self._pipes[rank]:
            self._pipes[rank][channel].close()  # the peer dialed again, so it lost the first
        self._pipes[rank][channel] = connection.pipe
        if channel == "control":
            self._select(rank, connection)
        self._check_complete()

    def _select(self, rank: int, selected: PendingConnection) -> None:
        """The path is selected: other attempts end, and its dialer dials the other channels."""
        self._selections[rank].selected = selected
        for connection in list(self._pending):
            handshake = connection.handshake
            to, _ = self._dialed.get(connection, (handshake.peer, None))
            if to == rank and handshake.channel == "control":
                connection.close()
                self._pending.discard(connection)
        if selected in self._dialed:
            for channel in CHANNELS[1:]:
                self._dial(rank, self._dialed[selected][1], channel)

    def _on_failed(self, connection: PendingConnection, error: Exception) -> None:
        self._acceptor.ended(connection)
        handshake = connection.handshake
        if handshake.peer in self._selections:
            self._selections[handshake.peer].lost(connection)
        if isinstance(handshake, DialerHandshake):
            # Another process at one address is no reason to fail; a mismatch with this peer is.
            if (
                isinstance(error, HandshakeError)
                and not isinstance(error, EarlierGeneration)  # it will be of this one
                and handshake.peer is not None
                and not handshake.is_authenticated
            ):
                self._fail(error)
            self._dial_failed(
                handshake.dialed, self._dialed[connection][1], handshake.channel, error
            )
            return
        if handshake.is_authenticated:
            return  # its rank selects another one, or dials again
        self._acceptor.count_refused(error)
        assert isinstance(handshake, AcceptorHandshake)
        if handshake.claimed is not None:
            self._incoming[handshake.claimed] = str(error)
        if handshake.refused_because and not handshake.is_of_earlier:
            # It knows the secret: a rank of this run, of another generation or configuration.
            self._fail(
                HandshakeError(f"refused rank {handshake.peer}: {handshake.refused_because}")
            )

    def _dial_failed(
        self, rank: int, candidate: CandidateAddress, channel: str, error: Exception
    ) -> None:
        why = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        if channel == "control":
            self._selections[rank].failed(candidate, why, time.monotonic())
            return
        candidate.outcome = why
        if not self._is_over:
            self._io.call_later(FIRST_RETRY_S, lambda: self._dial(rank, candidate, channel))

    def _fail(self, error: SmolrunError) -> None:
        self._error = self._error or error
        self._complete.set()

    # -- the end ----

    def _check_complete(self) -> None:
        if self._is_complete():
            self._complete.set()

    def _is_missing(self, rank: int) -> bool:
        return len(self._pipes[rank]) < len(CHANNELS)

    def _is_complete(self) -> bool:
        return self._error is None and not any(self._is_missing(rank) for rank in self._pipes)

    def _describe_missing(self, missing: list[int], timeout_s: float) -> str:
        own = self._roster[self._identity.rank]
        peers = "; ".join(self._describe_attempts(rank) for rank in missing)
        here = ", ".join(shown(*where) for where in own.addresses)
        return (
            f"rank {own.rank} on {own.host} has no link to {peers}, after {timeout_s:g} s: does a "
            f"firewall keep it from them, and them from {here}?"
        )

    def _describe_attempts(self, rank: int) -> str:
        """rank 2 (mini3): dialed 10.0.0.3:4000 (connection refused), it has not connected."""
        selection = self._selections.get(rank)
        dialed = ", ".join(
            f"{shown(one.address, one.port)} ({one.outcome})"
            for one in (selection.candidates if selection is not None else [])
        )
        incoming = self._incoming.get(rank)
        received = "it has not connected" if incoming is None else f"its connection: {incoming}"
        return f"rank {rank} ({self._roster[rank].host}): dialed {dialed}, {received}"
