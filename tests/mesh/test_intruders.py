"""A rank with TLS accepts the ranks of its run only, whatever credentials others have.

"0 bytes decoded" is meant literally: the decoders of the handshake and of frames are watched.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import cast

import psutil
import pytest

from smolrun.mesh.certificates import Credentials, issue_credentials, peer_name
from smolrun.mesh.tcp import TcpMesh
from smolrun.mesh.tls import MutualTls, TlsPipe
from smolrun.wire.frame import FrameDecoder
from smolrun.wire.handshake import AcceptorHandshake, DialerHandshake
from tests.mesh.meeting import identity, join, meet, tls_ranks, waiting_rank
from tests.waiting import until

OURS = issue_credentials("run", 3)
SPARE = issue_credentials("run", 3)  # the same names, another authority
OTHER_RUN = issue_credentials("yesterday", 3)
HELLO = DialerHandshake(identity(1), 0, "control").start()
Folder = Path


def context(folder: Folder, credentials: Credentials | None, **settings: object) -> ssl.SSLContext:
    """A client that checks nothing."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.verify_mode = ssl.CERT_NONE
    for name, value in settings.items():
        setattr(made, name, value)
    if credentials is not None:
        file = folder / "key.pem"
        file.write_text(credentials.certificate + credentials.key)
        made.load_cert_chain(file, password=credentials.passphrase)
    return made


def by_tls(sock: socket.socket, client: ssl.SSLContext, name: str | None = None) -> None:
    """Shakes hands as far as it goes, says hello, and listens for an answer."""
    sni = name or peer_name(0, "run")
    with client.wrap_socket(sock, server_hostname=sni) as tls:
        tls.sendall(HELLO)
        assert tls.recv(1) == b"", "nothing is sent to an unauthenticated peer"


def by_bytes(sock: socket.socket, data: bytes) -> None:
    """Says something that is no TLS of this run, and listens for an answer."""
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    while got := sock.recv(65536):
        assert b"challenge" not in got


def recorded() -> bytes:
    """All that an honest rank 1 says to rank 0, TLS and the first words inside it."""
    said = b""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        near = socket.create_connection(listening.getsockname())
        far, _ = listening.accept()
    dialer = MutualTls(OURS[1], identity(1, 3)).client_pipe(near, 0)
    inner, outer = socket.socketpair()
    acceptor = MutualTls(OURS[0], identity(0, 3)).server_pipe(inner)
    far.setblocking(False)
    outer.setblocking(False)

    def go_on() -> bool:
        nonlocal said
        with suppress(BlockingIOError):
            cast(TlsPipe, dialer).secure()
            dialer.send([memoryview(HELLO)])
        with suppress(BlockingIOError):
            data = far.recv(65536)
            said += data
            outer.sendall(data)
        with suppress(BlockingIOError):
            cast(TlsPipe, acceptor).secure()
            return acceptor.recv_into(memoryview(bytearray(100))) > 0
        with suppress(BlockingIOError):
            far.sendall(outer.recv(65536))
        return False

    until(go_on)
    for one in (dialer, acceptor, far, outer):
        one.close()
    return said


V12 = ssl.TLSVersion.TLSv1_2
INTRUDERS: dict[str, Callable[[socket.socket, Folder], None]] = {
    "wrong authority": lambda s, f: by_tls(s, context(f, SPARE[1])),
    "another run": lambda s, f: by_tls(s, context(f, OTHER_RUN[1])),
    "no certificate": lambda s, f: by_tls(s, context(f, None)),
    "TLS 1.2": lambda s, f: by_tls(s, context(f, OURS[1], maximum_version=V12)),
    "asks for another rank": lambda s, f: by_tls(s, context(f, OURS[1]), peer_name(2, "run")),
    "asks for another run": lambda s, f: by_tls(s, context(f, OURS[1]), peer_name(0, "x")),
    "plaintext": lambda s, f: by_bytes(s, HELLO),
    "garbage": lambda s, f: by_bytes(s, os.urandom(500)),
    "a TLS record of garbage": lambda s, f: by_bytes(s, b"\x16\x03\x01\x01\xf4" + os.urandom(500)),
    "http": lambda s, f: by_bytes(s, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    "replay": lambda s, f: by_bytes(s, recorded()),
}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes the decoders were given on the called side."""
    counts: list[int] = []
    for decoder in (AcceptorHandshake, FrameDecoder):
        filled = decoder.filled

        def watch(
            self: AcceptorHandshake, count: int, filled: Callable[..., object] = filled
        ) -> object:
            counts.append(count)
            return filled(self, count)

        monkeypatch.setattr(decoder, "filled", watch)
    return counts


@pytest.mark.parametrize("who", INTRUDERS)
def test_an_intruder_gets_no_byte_decoded_and_honest_ranks_connect(
    who: str, decoded: list[int], tmp_path: Path
) -> None:
    securities = [MutualTls(OURS[rank], identity(rank, 3)) for rank in range(2)]
    with waiting_rank(securities[0]) as (rendezvous, mine, absent):
        for _ in range(3):
            sock = socket.create_connection(mine.addresses[0], timeout=10)
            with sock, suppress(OSError):  # hung up on: as good as refused
                INTRUDERS[who](sock, tmp_path)
        until(lambda: rendezvous.refused == 3)
        assert decoded == []
        join(absent, mine, securities[1])
    assert decoded, "the honest rank was heard"


def test_a_rank_that_claims_to_be_another_is_refused(decoded: list[int]) -> None:
    securities = [MutualTls(OURS[rank], identity(rank, 3)) for rank in range(3)]
    with waiting_rank(securities[0]) as (rendezvous, mine, absent):
        with socket.create_connection(mine.addresses[0], timeout=10) as sock:
            pipe = cast(TlsPipe, securities[2].client_pipe(sock, 0))
            until(lambda: _is_done(pipe.secure))
            pipe.send([memoryview(HELLO)])  # as rank 1
            until(lambda: rendezvous.refused == 1)
            with suppress(OSError):
                assert pipe.recv_into(memoryview(bytearray(100))) == 0
        assert "claims to be rank 1 with rank 2's key" not in rendezvous._incoming.values()
        assert sum(decoded) == len(HELLO)
        join(absent, mine, securities[1])


def _is_done(act: Callable[[], None]) -> bool:
    try:
        act()
    except BlockingIOError:
        return False
    return True


@pytest.mark.parametrize("is_secure", [False, True], ids=["plain", "tls"])
def test_a_thousand_idle_connections_do_not_block_honest_ranks(is_secure: bool) -> None:
    securities = tls_ranks(2) if is_secure else [None, None]
    with ExitStack() as stack, waiting_rank(securities[0]) as (rendezvous, mine, absent):
        before = psutil.Process().memory_info().rss
        where = mine.addresses[0]
        for _ in range(1000):
            stack.enter_context(socket.create_connection(where, timeout=10))
        until(lambda: rendezvous.refused >= 1000 - 64)
        assert len(rendezvous._pending) <= 64
        assert psutil.Process().memory_info().rss - before < 64 * 1024 * 1024
        join(absent, mine, securities[1])


def test_two_runs_do_not_mix() -> None:
    """A rank of another run at a roster address, with the same names of ranks."""
    from smolrun.mesh.endpoint import Endpoint

    endpoints = [Endpoint(["127.0.0.1"]) for _ in range(2)]
    mixed = [MutualTls(OURS[0], identity(0)), MutualTls(SPARE[1], identity(1))]
    identities = [identity(0), identity(1)]
    results = meet(endpoints, identities, securities=mixed, start_timeout_s=1.0)
    assert not any(isinstance(result, TcpMesh) for result in results)
    assert "certificate" in f"{results[0]} {results[1]}"
