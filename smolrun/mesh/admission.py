"""Admission of connections that have not proved who they are: each gets one small object, a few
seconds to authenticate, and a place in a pool of limited size.

    accept -> UnauthenticatedPool -> TLS, if any -> handshake -> nominated: a pipe for frames

Runs on the I/O thread. Which connections are kept, `rendezvous.py` and `elastic.py` decide."""

from __future__ import annotations

import functools
import logging
import os
import socket
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from smolrun.mesh.endpoint import Endpoint
from smolrun.mesh.io import READ, WRITE, IoThread
from smolrun.mesh.link import Pipe
from smolrun.mesh.tls import TlsPipe, TransportSecurity
from smolrun.wire.handshake import AcceptorHandshake, DialerHandshake, Handshake, Identity

_log = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 5.0
MAX_UNAUTHENTICATED = 64
MAX_PER_ORIGIN = 8
# A rank opens at most so many connections to another one at the same time.
_PER_RANK = 3
_ACCEPTS_PER_TURN = 64  # then other sockets get their turn
_MAX_LOGGED = 20  # refused connections that get a line in the log


class UnauthenticatedPool:
    """Connections that have not authenticated, oldest first. A new one is never refused for them:
    another is evicted instead.

    It decides which, and closes nothing. Honest ranks send as soon as they are connected and need
    milliseconds, so the silent ones go first, then the oldest."""

    def __init__(self, ranks_at: Mapping[str, int], ranks_anywhere: int = 0) -> None:
        """`ranks_at`: how many ranks may connect from an address; `ranks_anywhere`: so many more
        may connect from any address."""
        self._ranks_at = ranks_at
        self._ranks_anywhere = ranks_anywhere
        self._total = MAX_UNAUTHENTICATED + _PER_RANK * (sum(ranks_at.values()) + ranks_anywhere)
        self._origins: dict[PendingConnection, str] = {}

    def __len__(self) -> int:
        return len(self._origins)

    def evict_for(self, origin: str) -> PendingConnection | None:
        """The connection to close before another one from `origin` is added, if any; it is removed
        from the pool."""
        candidates = [one for one, where in self._origins.items() if where == origin]
        ranks = self._ranks_at.get(origin, 0) + self._ranks_anywhere
        if len(candidates) < MAX_PER_ORIGIN + _PER_RANK * ranks:
            if len(self._origins) < self._total:
                return None
            most = Counter(self._origins.values()).most_common(1)[0][0]
            candidates = [one for one, where in self._origins.items() if where == most]
        evicted = min(candidates, key=lambda one: one.has_received)  # min is stable: the oldest
        del self._origins[evicted]
        return evicted

    def add(self, connection: PendingConnection, origin: str) -> None:
        """Adds the newest connection."""
        self._origins[connection] = origin

    def discard(self, connection: PendingConnection) -> None:
        """Removes a connection that has ended or authenticated."""
        self._origins.pop(connection, None)


@dataclass(frozen=True)
class PendingEvents:
    """Callbacks of a pending connection; each but `on_authenticated` is its last one."""

    on_authenticated: Callable[[PendingConnection], None]  # both ends; it may be nominated
    on_nominated: Callable[[PendingConnection], None]  # its pipe is ready for frames
    on_failed: Callable[[PendingConnection, Exception], None]  # it is closed, and why


class PendingConnection:
    """One connection from its first packet until it is nominated, or has failed. `preference` is
    the index of the acceptor's address that it leads to, 0 is the best."""

    def __init__(
        self,
        io: IoThread,
        sock: socket.socket,
        pipe: Pipe,
        handshake: Handshake,
        preference: int,
        events: PendingEvents,
    ) -> None:
        self.handshake = handshake
        self.pipe = pipe
        self.preference = preference
        self.has_received = False  # whether anything came from the other side
        self._io = io
        self._sock = sock
        self._fd = sock.fileno()
        self._events = events
        self._is_open = True
        self._has_begun = False
        self._is_secure = not isinstance(pipe, TlsPipe)

    def start(self) -> None:
        """Starts the handshake; callbacks may run before this returns."""
        this = weakref.ref(self)  # a timer must not keep alive what was closed long ago
        self._io.call_later(HANDSHAKE_TIMEOUT_S, lambda: _expire(this()))
        if isinstance(self.handshake, DialerHandshake):
            self._io.register(self._fd, WRITE, self._connected)
        else:
            self._io.register(self._fd, READ, self._readable)
            self._readable(READ)  # an honest dialer has sent already

    def nominate(self) -> None:
        """Selects this connection; for the controlling side."""
        self._send(self.handshake.nominate())

    def close(self) -> None:
        """Closes at once, in any state, without a callback."""
        if self._is_open:
            self._is_open = False
            self._io.register(self._fd, 0, self._readable)
            self.pipe.close()

    def _connected(self, _events: int) -> None:
        if not self._is_open:
            return  # closed in the same turn of the loop
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._fail(OSError(code, os.strerror(code)))
            return
        self._io.register(self._fd, READ, self._readable)
        self._readable(READ)

    def _readable(self, _events: int) -> None:
        try:
            while self._is_open:
                self._step()
        except BlockingIOError:
            return
        except Exception as error:  # unauthenticated input may fail this connection only
            self._fail(error)

    def _step(self) -> None:
        """One step of TLS or of the handshake; BlockingIOError if the other side is next."""
        if not self._is_secure:
            self._secure()
        if isinstance(self.handshake, DialerHandshake) and not self._has_begun:
            self._has_begun = True
            self._send(self.handshake.start())
        count = self.pipe.recv_into(self.handshake.buffer())
        if count == 0:
            raise ConnectionResetError("it hung up during the handshake")
        self.has_received = True
        was_authenticated = self.handshake.is_authenticated
        self._send(self.handshake.filled(count))
        if self.handshake.is_done and self._is_open:
            self._is_open = False
            self._io.register(self._fd, 0, self._readable)
            self._events.on_nominated(self)
        elif self.handshake.is_authenticated and not was_authenticated and self._is_open:
            self._events.on_authenticated(self)

    def _secure(self) -> None:
        assert isinstance(self.pipe, TlsPipe)
        try:
            self.pipe.secure()
        finally:
            self.has_received = self.has_received or self.pipe.has_received
        self._is_secure = True
        if isinstance(self.handshake, AcceptorHandshake):
            self.handshake.certified = self.pipe.rank

    def _send(self, data: bytes) -> None:
        # A fresh socket takes a kilobyte at once; one that does not is no peer of ours.
        if not data or not self._is_open:
            return
        try:
            if self.pipe.send([memoryview(data)]) != len(data):
                raise ConnectionResetError("the handshake could not be sent")
        except OSError as error:
            self._fail(error)

    def expire(self) -> None:
        """The handshake took too long."""
        if self._is_open:
            what = "no proof" if self.has_received else "no answer"
            self._fail(TimeoutError(f"{what} within {HANDSHAKE_TIMEOUT_S:g} s"))

    def _fail(self, error: Exception) -> None:
        if self._is_open:
            self.close()
            self._events.on_failed(self, error)


def _expire(connection: PendingConnection | None) -> None:
    if connection is not None:
        connection.expire()


class Acceptor:
    """Accepts connections at an endpoint. `pending` are all that have not ended; the owner may add
    connections that it dials itself."""

    def __init__(
        self,
        io: IoThread,
        endpoint: Endpoint,
        identity: Identity,
        security: TransportSecurity,
        pool: UnauthenticatedPool,
        events: PendingEvents,
    ) -> None:
        self.refused = 0  # connections that did not authenticate
        self.pending: set[PendingConnection] = set()
        self._io = io
        self._endpoint = endpoint
        self._identity = identity
        self._security = security
        self._pool = pool
        self._events = events
        self._is_stopped = False

    def start(self) -> None:
        """Starts accepting."""
        for preference, sock in enumerate(self._endpoint.sockets):
            self._io.register(sock, READ, functools.partial(self._accept, sock, preference))

    def stop(self) -> None:
        """Stops accepting, and closes all pending connections."""
        self._is_stopped = True
        for sock in self._endpoint.sockets:
            self._io.register(sock, 0, lambda _events: None)
        for connection in list(self.pending):
            connection.close()
        self.pending.clear()

    def authenticated(self, connection: PendingConnection) -> None:
        """It no longer counts against the limits of the pool."""
        self._pool.discard(connection)

    def ended(self, connection: PendingConnection) -> None:
        """It was nominated, refused, or it failed."""
        self.pending.discard(connection)
        self._pool.discard(connection)

    def count_refused(self, error: Exception) -> None:
        """A connection did not authenticate."""
        self.refused += 1
        if self.refused <= _MAX_LOGGED:
            _log.info("refused a connection: %s", error)
        elif self.refused == _MAX_LOGGED + 1:
            _log.info("refused more connections; further ones are not logged")

    def _accept(self, listening: socket.socket, preference: int, _events: int) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            if self._is_stopped:
                return
            try:
                sock, where = listening.accept()
            except OSError:
                return  # none left, or the dialer has closed it already
            origin = str(where[0]).partition("%")[0]
            evicted = self._pool.evict_for(origin)
            if evicted is not None:
                evicted.close()
                self.pending.discard(evicted)
                self.refused += 1
            connection = PendingConnection(
                self._io,
                sock,
                self._security.server_pipe(sock),
                AcceptorHandshake(self._identity),
                preference,
                self._events,
            )
            self.pending.add(connection)
            self._pool.add(connection, origin)
            connection.start()
