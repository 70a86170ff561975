"""A TCP socket with TLS as a pipe, whose encryption happens in memory.

    send:       buffers -> SSLObject -> outgoing -> socket      one system call for many records
    recv_into:  socket -> incoming -> SSLObject -> buffer

Beside the five methods of a Pipe it has `secure`, to be called until it does not block, before
anything else. Knows nothing of certificates beyond the names in them; not for use by two threads at
once."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from typing import Any

from smolrun.errors import HandshakeError
from smolrun.mesh.link import tune

# So much is encrypted, or taken from the socket, at once. Measured on loopback: from 64 KiB to
# 1 MiB it makes no difference beyond the noise.
_CHUNK_BYTES = 256 * 1024
_RECORD_BYTES = 16 * 1024  # TLS makes records of this size; what fits in one travels as one


class TlsPipe:
    """See Pipe. `rank` is who the other side's certificate says it is, once `secure` is done.

    `rank_of` turns the names in a certificate into that rank; without it, TLS itself has checked
    the name that was expected."""

    def __init__(
        self,
        sock: socket.socket,
        tls: ssl.SSLObject,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        scratch: memoryview,
        rank_of: Callable[[list[str]], int] | None = None,
    ) -> None:
        tune(sock)
        self.rank: int | None = None
        self.has_heard = False  # whether the other side has said anything yet
        self._socket = sock
        self._tls = tls
        self._incoming = incoming
        self._outgoing = outgoing
        self._scratch = scratch
        self._rank_of = rank_of
        self._unsent = memoryview(b"")  # encrypted, and not yet taken by the kernel
        self._promised = 0  # how many plain bytes the unsent ones stand for
        self._early = bytearray()  # decrypted before anybody asked
        self._has_ended = False

    @staticmethod
    def new_scratch() -> memoryview:
        """Memory for what comes off a socket; pipes of one thread may share it."""
        return memoryview(bytearray(_CHUNK_BYTES))

    def fileno(self) -> int:
        """See Pipe."""
        return self._socket.fileno()

    def secure(self) -> None:
        """Goes on with the TLS handshake; BlockingIOError until it is done. Raises HandshakeError
        if the other side has no right to be here."""
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._send_all()
                self._take()
                self.has_heard = True
            except ssl.SSLError as error:
                self._complain()
                raise HandshakeError(f"no TLS of this run: {_reason(error)}") from None
        self._send_all()
        if self._rank_of is not None:
            certificate = self._tls.getpeercert() or {}
            pairs: Any = certificate.get("subjectAltName", ())
            self.rank = self._rank_of([str(name) for kind, name in pairs if kind == "DNS"])

    def send(self, buffers: list[memoryview]) -> int:
        """See Pipe."""
        if not self._unsent:
            self._promised = self._encrypt(buffers)
            self._unsent = memoryview(self._outgoing.read())
        self._push()
        return self._promised

    def recv_into(self, buffer: memoryview) -> int:
        """See Pipe. ConnectionError if the connection ends and the other side never said so."""
        if self._early:
            return self._hand_over(buffer)
        count = 0
        while count < len(buffer):
            try:
                got = self._read(buffer[count:])
            except ssl.SSLWantReadError:
                if count:
                    break
                self._take()
                continue
            if got == 0:
                break
            count += got
        return count

    def end(self) -> None:
        """See Pipe: TLS's own farewell, then TCP's."""
        if not self._has_ended:
            self._has_ended = True
            self._read_ahead()
            try:
                self._tls.unwrap()
            except ssl.SSLWantReadError:
                pass  # ours is written, theirs has not come
            self._unsent = memoryview(self._outgoing.read())
        self._push()
        self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """See Pipe."""
        self._socket.close()

    def _encrypt(self, buffers: list[memoryview]) -> int:
        """Encrypts a beginning of the buffers; returns how many bytes."""
        total = sum(len(buffer) for buffer in buffers)
        if total <= _RECORD_BYTES and len(buffers) > 1:
            return self._tls.write(b"".join(buffers))
        room = _CHUNK_BYTES
        for buffer in buffers:
            if room > 0:
                room -= self._tls.write(buffer[:room])
        return _CHUNK_BYTES - room

    def _read(self, buffer: memoryview) -> int:
        """Decrypts into `buffer` what has come; 0 if the other side said that nothing follows."""
        try:
            return int(self._tls.read(len(buffer), buffer))
        except ssl.SSLZeroReturnError:
            return 0

    def _push(self) -> None:
        """Gives the kernel what is encrypted; BlockingIOError if it does not take all of it."""
        while self._unsent:
            self._unsent = self._unsent[self._socket.send(self._unsent) :]

    def _take(self) -> None:
        """Gives TLS what the socket has; BlockingIOError if that is nothing."""
        count = self._socket.recv_into(self._scratch)
        if count == 0:
            raise ConnectionResetError("it was cut off, without a farewell")
        self._incoming.write(self._scratch[:count])

    def _read_ahead(self) -> None:
        """Decrypts what has come: TLS's farewell takes no pleasure in data that waits."""
        while True:
            try:
                data = self._tls.read(_CHUNK_BYTES)
            except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
                return
            if not data:
                return
            self._early += data

    def _hand_over(self, buffer: memoryview) -> int:
        count = min(len(buffer), len(self._early))
        buffer[:count] = self._early[:count]
        del self._early[:count]
        return count

    def _send_all(self) -> None:
        # A fresh socket takes a handshake's few kilobytes at once; no peer of ours lets it wait.
        data = self._outgoing.read()
        if data and self._socket.send(data) != len(data):
            raise ConnectionResetError("the handshake could not be sent")

    def _complain(self) -> None:
        """Tells the other side why, in TLS's own way, if it still listens."""
        try:
            self._send_all()
        except OSError:
            pass  # it is refused in any case


def _reason(error: ssl.SSLError) -> str:
    """OpenSSL's own words, without its place in the source."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return str(error.verify_message)
    if error.reason == "CALLBACK_FAILED":
        return "it asked for another rank"
    return (error.reason or str(error)).lower().replace("_", " ")
