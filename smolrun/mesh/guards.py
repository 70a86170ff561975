"""How connections are protected: TLS with one rank's credentials, or not at all.

    guard.dialing(socket, rank)  -> a pipe to that rank and nobody else
    guard.accepting(socket)      -> a pipe to whoever of the run has dialed

TLS 1.3 only, and both ends must show a certificate of this run's authority. What certificates are
and who makes them, `security.py` knows."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import tempfile
from typing import Protocol

from smolrun.errors import HandshakeError
from smolrun.mesh.link import Pipe, PlainPipe
from smolrun.mesh.security import peer_name
from smolrun.mesh.tls import TlsPipe
from smolrun.wire.credentials import Credentials
from smolrun.wire.handshake import Identity


class Guard(Protocol):
    """How connections are protected: makes a pipe of a fresh socket."""

    def dialing(self, sock: socket.socket, rank: int) -> Pipe:
        """A pipe over a socket that was, or is being, connected to `rank`."""

    def accepting(self, sock: socket.socket) -> Pipe:
        """A pipe over a socket that somebody connected to us."""


class PlainGuard:
    """No encryption: the conversation that follows still proves who is there."""

    def dialing(self, sock: socket.socket, rank: int) -> Pipe:
        """See Guard."""
        return PlainPipe(sock)

    def accepting(self, sock: socket.socket) -> Pipe:
        """See Guard."""
        return PlainPipe(sock)


class TlsGuard:
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
        # Shared by all pipes, as one thread drives them all.
        self._scratch = TlsPipe.new_scratch()

    def dialing(self, sock: socket.socket, rank: int) -> Pipe:
        """See Guard."""
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = self._client.wrap_bio(incoming, outgoing, server_hostname=self._names[rank])
        return TlsPipe(sock, tls, incoming, outgoing, self._scratch)

    def accepting(self, sock: socket.socket) -> Pipe:
        """See Guard."""
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = self._server.wrap_bio(incoming, outgoing, server_side=True)
        return TlsPipe(sock, tls, incoming, outgoing, self._scratch, self._rank_of)

    def _rank_of(self, names: list[str]) -> int:
        """The rank that a certificate of this run's authority was made for."""
        rank = self._ranks.get(names[0]) if len(names) == 1 else None
        if rank is None:
            raise HandshakeError(f"a certificate for {', '.join(names)[:80] or 'nobody'}")
        return rank


def _load_key(credentials: Credentials, *contexts: ssl.SSLContext) -> None:
    """ssl reads keys from files only: it gets one for a moment, encrypted, and for us alone."""
    handle, path = tempfile.mkstemp(prefix="smolrun-")  # mode 0600
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(credentials.certificate + credentials.key)
        for context in contexts:
            context.load_cert_chain(path, password=credentials.passphrase)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
