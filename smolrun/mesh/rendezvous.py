"""How the mesh comes to stand: every rank listens, higher ranks dial lower ones, and nobody is
believed without proof.

A stranger costs one small object and at most `_KNOCK_S` seconds, and there are never more than
`_MAX_KNOCKS` of them."""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from smolrun.errors import HandshakeError, SmolrunError, WaitTimeout
from smolrun.mesh.io import READ, WRITE, IoThread
from smolrun.mesh.link import Pipe, PlainPipe, tune
from smolrun.wire.handshake import CHANNELS, Acceptor, Conversation, Dialer, Identity

_log = logging.getLogger(__name__)

_KNOCK_S = 5.0  # a stranger has this long to prove itself
_MAX_KNOCKS = 64
_RETRY_S = 0.1
_CONNECTING = {
    0,
    errno.EINPROGRESS,
    errno.EWOULDBLOCK,
    errno.EAGAIN,
    getattr(errno, "WSAEWOULDBLOCK", 0),
}


@dataclass(frozen=True)
class Seat:
    """Where a rank of the run can be reached."""

    rank: int
    host: str
    address: str
    port: int


class Endpoint:
    """A listening socket; `port` is the one it really got."""

    def __init__(self, address: str, port: int = 0) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.socket = socket.create_server((address, port), family=family, backlog=128)
        self.socket.setblocking(False)
        self.port: int = self.socket.getsockname()[1]

    def close(self) -> None:
        """Stops listening."""
        self.socket.close()


class Rendezvous:
    """Collects one authenticated pipe per peer and channel. `run` blocks the caller, the work is
    done on the I/O thread."""

    def __init__(
        self, io: IoThread, endpoint: Endpoint, identity: Identity, roster: list[Seat]
    ) -> None:
        self.refused = 0  # connections that did not prove themselves
        self._io = io
        self._endpoint = endpoint
        self._identity = identity
        self._seats = {seat.rank: seat for seat in roster}
        self._pipes: dict[int, dict[str, Pipe]] = {
            seat.rank: {} for seat in roster if seat.rank != identity.rank
        }
        self._knocks: set[_Knock] = set()
        self._complete = threading.Event()
        self._error: SmolrunError | None = None
        self._is_over = False

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
            self._io.watch(self._endpoint.socket, 0, self._accept)
            for knock in list(self._knocks):
                knock.close()
            closed.set()

        self._io.post(end)
        closed.wait(timeout_s)
        if self._error is not None:
            raise self._error
        missing = [
            seat
            for rank, seat in self._seats.items()
            if rank in self._pipes and len(self._pipes[rank]) < len(CHANNELS)
        ]
        if missing:
            names = ", ".join(f"rank {s.rank} ({s.host}, {s.address}:{s.port})" for s in missing)
            raise WaitTimeout(
                f"rank {self._identity.rank} has no link to {names} after {timeout_s:g} s: "
                "is a firewall between them?"
            )
        return self._pipes

    def _begin(self) -> None:
        self._io.watch(self._endpoint.socket, READ, self._accept)
        for seat in self._seats.values():
            if seat.rank < self._identity.rank:
                for channel in CHANNELS:
                    self._dial(seat, channel)
        self._check_complete()

    def _accept(self, _events: int) -> None:
        while not self._is_over:
            try:
                sock, _ = self._endpoint.socket.accept()
            except OSError:
                return  # nobody more, or the caller has gone already
            strangers = sum(isinstance(k.conversation, Acceptor) for k in self._knocks)
            if strangers >= _MAX_KNOCKS:
                self.refused += 1
                sock.close()
                continue
            self._knocks.add(_Knock(self._io, sock, Acceptor(self._identity), self._knocked))

    def _dial(self, seat: Seat, channel: str) -> None:
        if self._is_over:
            return
        family = socket.AF_INET6 if ":" in seat.address else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        conversation = Dialer(self._identity, seat.rank, channel)
        if sock.connect_ex((seat.address, seat.port)) not in _CONNECTING:
            sock.close()
            self._io.call_later(_RETRY_S, lambda: self._dial(seat, channel))
            return
        self._knocks.add(_Knock(self._io, sock, conversation, self._knocked))

    def _knocked(self, knock: _Knock, error: Exception | None) -> None:
        """A conversation ended, well (error is None) or not."""
        self._knocks.discard(knock)
        talk = knock.conversation
        if error is None and talk.peer is not None and not self._is_over:
            if talk.channel in self._pipes[talk.peer]:
                self._pipes[talk.peer][
                    talk.channel
                ].close()  # it dialed again, so it lost the first
            self._pipes[talk.peer][talk.channel] = PlainPipe(knock.sock)
            self._check_complete()
            return
        knock.close()
        self.refused += 1
        if isinstance(talk, Dialer):
            if isinstance(error, HandshakeError):
                self._error = error
                self._complete.set()
            elif not self._is_over:
                seat, channel = self._seats[talk.dialed], talk.channel
                self._io.call_later(_RETRY_S, lambda: self._dial(seat, channel))
        else:
            _log.info("refused a connection: %s", error)
            if isinstance(talk, Acceptor) and talk.refused_because:
                # It knows the secret, so it is one of us, of another generation or configuration.
                self._error = HandshakeError(f"refused rank {talk.peer}: {talk.refused_because}")
                self._complete.set()

    def _check_complete(self) -> None:
        if self._is_complete():
            self._complete.set()

    def _is_complete(self) -> bool:
        full = all(len(channels) == len(CHANNELS) for channels in self._pipes.values())
        return full and self._error is None


class _Knock:
    """A connection whose other end has not proved itself yet."""

    def __init__(
        self,
        io: IoThread,
        sock: socket.socket,
        conversation: Conversation,
        on_end: Callable[[_Knock, Exception | None], None],
    ) -> None:
        tune(sock)
        self.sock = sock
        self.conversation = conversation
        self._io = io
        self._on_end = on_end
        self._deadline = time.monotonic() + _KNOCK_S
        self._is_open = True
        io.call_later(_KNOCK_S, self._expired)
        if isinstance(conversation, Dialer):
            io.watch(sock, WRITE, self._connected)
        else:
            io.watch(sock, READ, self._readable)

    def _connected(self, _events: int) -> None:
        code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._end(OSError(code, "connecting failed"))
            return
        assert isinstance(self.conversation, Dialer)
        self._io.watch(self.sock, READ, self._readable)
        self._send(self.conversation.start())

    def _readable(self, _events: int) -> None:
        try:
            while self._is_open:
                count = self.sock.recv_into(self.conversation.buffer())
                if count == 0:
                    raise ConnectionResetError("closed during the handshake")
                self._send(self.conversation.filled(count))
                if self.conversation.is_done:
                    self._end(None)
        except BlockingIOError:
            return
        except Exception as error:  # whatever a stranger provokes ends this conversation only
            self._end(error)

    def _send(self, data: bytes) -> None:
        # A fresh socket takes a kilobyte at once; one that does not is no peer of ours.
        if data and self._is_open:
            try:
                if self.sock.send(data) != len(data):
                    raise ConnectionResetError("the handshake could not be sent")
            except OSError as error:
                self._end(error)

    def _expired(self) -> None:
        if self._is_open:
            self._end(TimeoutError(f"no proof within {_KNOCK_S:g} s"))

    def _end(self, error: Exception | None) -> None:
        if self._is_open:
            self._is_open = False
            self._io.watch(self.sock, 0, self._readable)
            self._on_end(self, error)

    def close(self) -> None:
        """Closes the socket, whatever state the conversation is in."""
        if self._is_open:
            self._is_open = False
            self._io.watch(self.sock, 0, self._readable)
        self.sock.close()
