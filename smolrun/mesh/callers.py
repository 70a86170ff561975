"""Who calls at our listening sockets: each gets a knock, a few seconds to prove itself, and a place
among a limited number of strangers.

Runs on the I/O thread. Who may stay, `rendezvous.py` and `door.py` decide."""

from __future__ import annotations

import functools
import logging
import socket

from smolrun.mesh.endpoint import Endpoint
from smolrun.mesh.guards import Guard
from smolrun.mesh.io import READ, IoThread
from smolrun.mesh.knock import Knock, KnockEvents
from smolrun.mesh.strangers import Strangers
from smolrun.wire.handshake import Acceptor, Identity

_log = logging.getLogger(__name__)

_ACCEPTS_PER_TURN = 64  # then others get theirs
_MOST_TOLD = 20  # strangers that get a line in the log


class Callers:
    """Accepts connections at an endpoint. `knocks` are all that have not ended; whoever dials may
    add its own."""

    def __init__(
        self,
        io: IoThread,
        endpoint: Endpoint,
        identity: Identity,
        guard: Guard,
        strangers: Strangers[Knock],
        events: KnockEvents,
    ) -> None:
        self.refused = 0  # connections that did not prove themselves
        self.knocks: set[Knock] = set()
        self._io = io
        self._endpoint = endpoint
        self._identity = identity
        self._guard = guard
        self._strangers = strangers
        self._events = events
        self._is_over = False

    def listen(self) -> None:
        """Lets callers in."""
        for place, sock in enumerate(self._endpoint.sockets):
            self._io.watch(sock, READ, functools.partial(self._accept, sock, place))

    def stop(self) -> None:
        """Lets nobody in any more, and closes all knocks."""
        self._is_over = True
        for sock in self._endpoint.sockets:
            self._io.watch(sock, 0, self._nothing)
        for knock in list(self.knocks):
            knock.close()
        self.knocks.clear()

    def has_proven(self, knock: Knock) -> None:
        """It is no stranger any more."""
        self._strangers.discard(knock)

    def has_ended(self, knock: Knock) -> None:
        """It was kept, refused, or it broke."""
        self.knocks.discard(knock)
        self._strangers.discard(knock)

    def count_refused(self, error: Exception) -> None:
        """A caller did not prove itself."""
        self.refused += 1
        if self.refused <= _MOST_TOLD:
            _log.info("refused a connection: %s", error)
        elif self.refused == _MOST_TOLD + 1:
            _log.info("more connections are refused, and no longer told")

    def _nothing(self, _events: int) -> None:
        """Nobody is let in any more."""

    def _accept(self, listening: socket.socket, place: int, _events: int) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            if self._is_over:
                return
            try:
                sock, where = listening.accept()
            except OSError:
                return  # nobody more, or the caller has gone already
            origin = str(where[0]).partition("%")[0]
            leaving = self._strangers.room_for(origin)
            if leaving is not None:
                leaving.close()
                self.knocks.discard(leaving)
                self.refused += 1
            pipe = self._guard.accepting(sock)
            knock = Knock(self._io, sock, pipe, Acceptor(self._identity), place, self._events)
            self.knocks.add(knock)
            self._strangers.add(knock, origin)
            knock.begin()
