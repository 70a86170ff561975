"""One plain TCP stream between two hosts, without frames, threads or encryption: the mark that a
link is measured against.

For benchmarks only; nothing that matters travels over it.
"""

from __future__ import annotations

import socket

from smolrun.errors import ProtocolError

_PIECE_BYTES = 256 * 1024


class RawListener:
    """Where the receiving end waits for its one stream; `port` is the one it got."""

    def __init__(self, address: str, timeout_s: float) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.create_server((address, 0), family=family)
        self._timeout_s = timeout_s
        self._socket.settimeout(timeout_s)
        self.port: int = self._socket.getsockname()[1]

    def accept(self) -> RawStream:
        """The stream, once the sender has come; then nobody else can. OSError after the timeout."""
        with self._socket:
            sock, _ = self._socket.accept()
        return RawStream(sock, self._timeout_s)


class RawStream:
    """Sends or receives so many bytes of no meaning; each `send` ends when all of it has come."""

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        sock.settimeout(timeout_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._memory = memoryview(bytearray(_PIECE_BYTES))

    @classmethod
    def dial(cls, address: str, port: int, timeout_s: float) -> RawStream:
        """To where the other end listens; OSError if there is no way."""
        return cls(socket.create_connection((address, port), timeout_s), timeout_s)

    def send(self, size: int) -> None:
        """Sends `size` bytes and waits for the receiver's word that it has them."""
        while size > 0:
            self._socket.sendall(self._memory[: min(size, _PIECE_BYTES)])
            size -= _PIECE_BYTES
        if not self._socket.recv(1):
            raise ProtocolError("the other end of the raw stream left")

    def receive(self, size: int) -> None:
        """Receives `size` bytes and says so."""
        while size > 0:
            count = self._socket.recv_into(self._memory, min(size, _PIECE_BYTES))
            if count == 0:
                raise ProtocolError("the other end of the raw stream left")
            size -= count
        self._socket.sendall(b"k")

    def close(self) -> None:
        """Closes it."""
        self._socket.close()
