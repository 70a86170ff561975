"""Transport security: what makes a pipe of a fresh socket, with mutual TLS or without encryption.

    security.client_pipe(socket, rank)  -> a pipe to that rank and no other
    security.server_pipe(socket)        -> a pipe to any rank of the run

TLS 1.3 only; both ends must show a certificate of this run's authority (certificates.py). The
encryption happens in memory:

    send:       buffers -> SSLObject -> outgoing -> socket      one system call for many records
    recv_into:  socket -> incoming -> SSLObject -> buffer
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import tempfile
from collections.abc import Callable
from typing import Any, Protocol

from smolrun.errors import HandshakeError
from smolrun.mesh.certificates import Credentials, peer_name
from smolrun.mesh.link import Pipe, PlainPipe, tune
from smolrun.wire.handshake import Identity

# So much is encrypted, or taken from the socket, at once. Measured on loopback: from 64 KiB to
# 1 MiB it makes no difference beyond the noise.
_CHUNK_BYTES = 256 * 1024
_RECORD_BYTES = 16 * 1024  # TLS makes records of this size; what fits in one travels as one


class TlsPipe:
    """A TCP socket with TLS as a Pipe. `secure` has to be called until it does not block, before
    anything else; `rank` is then the one of the other side's certificate. Not thread-safe.

    `rank_of` maps the names in a certificate to that rank; without it, TLS itself has checked the
    expected name."""

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
        self.has_received = False  # whether anything came from the other side
        self._socket = sock
        self._tls = tls
        self._incoming = incoming
        self._outgoing = outgoing
        self._scratch = scratch
        self._rank_of = rank_of
        self._unsent = memoryview(b"")  # encrypted, and not yet taken by the kernel
        self._promised = 0  # how many plain bytes the unsent ones stand for
        self._early = bytearray()  # decrypted before it was asked for
        self._has_ended = False

    def fileno(self) -> int:
        return self._socket.fileno()

    def secure(self) -> None:
        """Continues the TLS handshake; BlockingIOError until it is done. HandshakeError if the
        other side does not authenticate."""
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._send_all()
                self._take()
                self.has_received = True
            except ssl.SSLError as error:
                with contextlib.suppress(OSError):  # it is refused in any case
                    self._send_all()  # TLS's alert
                raise HandshakeError(f"no TLS of this run: {_reason(error)}") from None
        self._send_all()
        if self._rank_of is not None:
            certificate = self._tls.getpeercert() or {}
            pairs: Any = certificate.get("subjectAltName", ())
            self.rank = self._rank_of([str(name) for kind, name in pairs if kind == "DNS"])

    def send(self, buffers: list[memoryview]) -> int:
        if not self._unsent:
            self._promised = self._encrypt(buffers)
            self._unsent = memoryview(self._outgoing.read())
        self._push()
        return self._promised

    def recv_into(self, buffer: memoryview) -> int:
        """ConnectionError where the stream ends without TLS's close_notify."""
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
        """TLS's close_notify, then TCP's FIN."""
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
        """Decrypts into `buffer` what has come; 0 after the other side's close_notify."""
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
            raise ConnectionResetError("it was cut off, without close_notify")
        self._incoming.write(self._scratch[:count])

    def _read_ahead(self) -> None:
        """Decrypts what has come: close_notify fails while unread data is there."""
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
        # A fresh socket takes a handshake's few kilobytes at once.
        data = self._outgoing.read()
        if data and self._socket.send(data) != len(data):
            raise ConnectionResetError("the handshake could not be sent")


def _reason(error: ssl.SSLError) -> str:
    """OpenSSL's reason, without its position in OpenSSL's source."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return str(error.verify_message)
    if error.reason == "CALLBACK_FAILED":
        return "it asked for another rank"
    return (error.reason or str(error)).lower().replace("_", " ")


class TransportSecurity(Protocol):
    """Makes a pipe of a fresh socket."""

    def client_pipe(self, sock: socket.socket, rank: int) -> Pipe:
        """A pipe over a socket that was, or is being, connected to `rank`."""

    def server_pipe(self, sock: socket.socket) -> Pipe:
        """A pipe over an accepted socket."""


class NoTransportSecurity:
    """No encryption; the handshake that follows still authenticates both ends."""

    def client_pipe(self, sock: socket.socket, rank: int) -> Pipe:
        return PlainPipe(sock)

    def server_pipe(self, sock: socket.socket) -> Pipe:
        return PlainPipe(sock)


class MutualTls:
    """Mutual TLS 1.3 with the credentials of one rank."""

    def __init__(self, credentials: Credentials, identity: Identity) -> None:
        ranks = range(identity.world_size)
        self._names = {rank: peer_name(rank, identity.run_id) for rank in ranks}
        self._ranks = {name: rank for rank, name in self._names.items()}
        self._client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._server.verify_mode = ssl.CERT_REQUIRED
        self._server.num_tickets = 0  # nothing is ever resumed
        mine = self._names[identity.rank]
        self._server.sni_callback = lambda _, asked, __: (
            None if asked == mine else ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
        )
        for context in (self._client, self._server):
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.hostname_checks_common_name = False
            context.load_verify_locations(cadata=credentials.ca)
        _load_key(credentials, self._client, self._server)
        # Sockets are read into it. Shared by all pipes, as one thread drives them all.
        self._scratch = memoryview(bytearray(_CHUNK_BYTES))

    def client_pipe(self, sock: socket.socket, rank: int) -> Pipe:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = self._client.wrap_bio(incoming, outgoing, server_hostname=self._names[rank])
        return TlsPipe(sock, tls, incoming, outgoing, self._scratch)

    def server_pipe(self, sock: socket.socket) -> Pipe:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = self._server.wrap_bio(incoming, outgoing, server_side=True)
        return TlsPipe(sock, tls, incoming, outgoing, self._scratch, self._rank_of)

    def _rank_of(self, names: list[str]) -> int:
        """The rank that a certificate of this run's authority was made for."""
        rank = self._ranks.get(names[0]) if len(names) == 1 else None
        if rank is None:
            raise HandshakeError(f"a certificate for {', '.join(names)[:80] or 'no name'}")
        return rank


def _load_key(credentials: Credentials, *contexts: ssl.SSLContext) -> None:
    """ssl reads keys from files only: it gets a temporary one, encrypted, mode 0600."""
    handle, path = tempfile.mkstemp(prefix="smolrun-")  # mode 0600
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(credentials.certificate + credentials.key)
        for context in contexts:
            context.load_cert_chain(path, password=credentials.passphrase)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
