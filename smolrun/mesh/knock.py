"""A connection whose two ends do not trust each other yet: it connects, secures itself, and talks
until both have proved themselves and keep it, or its time is up.

    connect -> TLS, if there is any -> conversation: proofs -> keep -> a pipe for frames

Runs on the I/O thread. What it means for the mesh, `rendezvous.py` decides."""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from smolrun.mesh.io import READ, WRITE, IoThread
from smolrun.mesh.link import Pipe
from smolrun.mesh.tls import TlsPipe
from smolrun.wire.handshake import Acceptor, Conversation, Dialer

KNOCK_S = 5.0  # a stranger has this long to prove itself


@dataclass(frozen=True)
class KnockEvents:
    """What a knock tells; each but `on_proven` is the last thing it says."""

    on_proven: Callable[[Knock], None]  # both have proved themselves; who decides may keep it
    on_kept: Callable[[Knock], None]  # its pipe is ready for frames
    on_failed: Callable[[Knock, Exception], None]  # it is closed, and why


class Knock:
    """One connection from its first packet on; `place` is which of the acceptor's addresses it
    leads to, 0 is the best."""

    def __init__(
        self,
        io: IoThread,
        sock: socket.socket,
        pipe: Pipe,
        conversation: Conversation,
        place: int,
        events: KnockEvents,
    ) -> None:
        self.conversation = conversation
        self.pipe = pipe
        self.place = place
        self.has_spoken = False  # whether anything came from the other side
        self._io = io
        self._sock = sock
        self._fd = sock.fileno()
        self._events = events
        self._is_open = True
        self._has_begun = False
        self._is_secure = not isinstance(pipe, TlsPipe)

    def begin(self) -> None:
        """Starts; what it tells may come before this returns."""
        this = weakref.ref(self)  # a timer must not keep alive what was closed long ago
        self._io.call_later(KNOCK_S, lambda: _expire(this()))
        if isinstance(self.conversation, Dialer):
            self._io.watch(self._fd, WRITE, self._connected)
        else:
            self._io.watch(self._fd, READ, self._readable)
            self._readable(READ)  # an honest dialer has spoken already

    def keep(self) -> None:
        """Says that this connection is the one."""
        self._send(self.conversation.keep())

    def close(self) -> None:
        """Closes it, whatever state it is in, without another word to anybody."""
        if self._is_open:
            self._is_open = False
            self._io.watch(self._fd, 0, self._readable)
            self.pipe.close()

    def _connected(self, _events: int) -> None:
        if not self._is_open:
            return  # closed in the same turn of the loop
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._fail(OSError(code, os.strerror(code)))
            return
        self._io.watch(self._fd, READ, self._readable)
        self._readable(READ)

    def _readable(self, _events: int) -> None:
        try:
            while self._is_open:
                self._step()
        except BlockingIOError:
            return
        except Exception as error:  # whatever a stranger provokes ends this conversation only
            self._fail(error)

    def _step(self) -> None:
        """Does what is next; BlockingIOError if the other side has to do something first."""
        if not self._is_secure:
            self._secure()
        if isinstance(self.conversation, Dialer) and not self._has_begun:
            self._has_begun = True
            self._send(self.conversation.start())
        count = self.pipe.recv_into(self.conversation.buffer())
        if count == 0:
            raise ConnectionResetError("it hung up during the handshake")
        self.has_spoken = True
        was_proven = self.conversation.is_proven
        self._send(self.conversation.filled(count))
        if self.conversation.is_done and self._is_open:
            self._is_open = False
            self._io.watch(self._fd, 0, self._readable)
            self._events.on_kept(self)
        elif self.conversation.is_proven and not was_proven and self._is_open:
            self._events.on_proven(self)

    def _secure(self) -> None:
        assert isinstance(self.pipe, TlsPipe)
        try:
            self.pipe.secure()
        finally:
            self.has_spoken = self.has_spoken or self.pipe.has_heard
        self._is_secure = True
        if isinstance(self.conversation, Acceptor):
            self.conversation.certified = self.pipe.rank

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
        """Its time is up."""
        if self._is_open:
            what = "no proof" if self.has_spoken else "no answer"
            self._fail(TimeoutError(f"{what} within {KNOCK_S:g} s"))

    def _fail(self, error: Exception) -> None:
        if self._is_open:
            self.close()
            self._events.on_failed(self, error)


def _expire(knock: Knock | None) -> None:
    if knock is not None:
        knock.expire()
