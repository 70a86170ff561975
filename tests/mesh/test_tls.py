"""TlsPipe: every byte arrives in order, and only close_notify ends the stream."""

from __future__ import annotations

import os
import random
import select
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import cast

import pytest

from smolrun.errors import HandshakeError
from smolrun.mesh.certificates import issue_credentials
from smolrun.mesh.tls import MutualTls, TlsPipe
from tests.mesh.meeting import identity
from tests.waiting import until

CREDENTIALS = issue_credentials("run", 2)
GUARDS = [MutualTls(CREDENTIALS[rank], identity(rank)) for rank in range(2)]


def sockets() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        dialing = socket.create_connection(listening.getsockname())
        accepted, _ = listening.accept()
    return dialing, accepted


def shake_hands(dialer: TlsPipe, acceptor: TlsPipe) -> None:
    waiting = [dialer, acceptor]

    def go_on() -> bool:
        for pipe in list(waiting):
            try:
                pipe.secure()
                waiting.remove(pipe)
            except BlockingIOError:
                continue
        return not waiting

    until(go_on)


@pytest.fixture
def pipes() -> Iterator[tuple[TlsPipe, TlsPipe]]:
    dialing, accepted = sockets()
    pair = (
        cast(TlsPipe, GUARDS[1].client_pipe(dialing, 0)),
        cast(TlsPipe, GUARDS[0].server_pipe(accepted)),
    )
    shake_hands(*pair)
    yield pair
    for pipe in pair:
        pipe.close()


def send_all(pipe: TlsPipe, data: bytes, drain: Callable[[], None]) -> None:
    """Sends as a Connection does: after BlockingIOError with the same bytes."""
    left = memoryview(data)
    while left:
        try:
            left = left[pipe.send([left[:1000], left[1000:700_000]]) :]
        except BlockingIOError:
            drain()


def read_some(pipe: TlsPipe, into: bytearray, size: int) -> bool:
    """Reads until the pipe blocks or ends; whether it has ended."""
    buffer = memoryview(bytearray(size))
    while True:
        try:
            count = pipe.recv_into(buffer)
        except BlockingIOError:
            return False
        if count == 0:
            return True
        into += buffer[:count]


@pytest.mark.parametrize("size", [1, 16_383, 16_384, 16_385, 300_000, 30_000_000])
@pytest.mark.parametrize("room", [777, 1_000_000])
def test_every_byte_arrives_although_the_kernel_takes_no_more(
    pipes: tuple[TlsPipe, TlsPipe], size: int, room: int
) -> None:
    data = random.Random(size).randbytes(size)
    for one, other in (pipes, pipes[::-1]):
        got = bytearray()
        send_all(one, data, lambda other=other, got=got: read_some(other, got, room))  # type: ignore[misc]
        until(lambda other=other, got=got: not read_some(other, got, room) and len(got) >= size)  # type: ignore[misc]
        assert got == data


def test_the_server_side_has_the_rank_of_the_certificate(pipes: tuple[TlsPipe, TlsPipe]) -> None:
    assert pipes[1].rank == 1


def test_after_the_end_of_one_direction_the_other_still_works(
    pipes: tuple[TlsPipe, TlsPipe],
) -> None:
    dialer, acceptor = pipes
    early, late = bytearray(), bytearray()
    acceptor.send([memoryview(b"sent before, read after")])
    select.select([dialer], [], [], 5)
    dialer.end()
    until(lambda: read_some(acceptor, bytearray(), 100))
    acceptor.send([memoryview(b"the answer")])
    until(lambda: read_some(dialer, early, 5) or len(early) == 33)
    assert early == b"sent before, read afterthe answer"
    acceptor.end()
    until(lambda: read_some(dialer, late, 100))
    assert late == b""


def test_end_blocks_until_the_kernel_takes_close_notify(pipes: tuple[TlsPipe, TlsPipe]) -> None:
    dialer, acceptor = pipes
    got, sent = bytearray(), 0
    with pytest.raises(BlockingIOError):
        while True:
            sent += dialer.send([memoryview(bytes(100_000))])
    until(lambda: read_some(acceptor, got, 1_000_000) or len(got) > sent)
    dialer.send([memoryview(bytes(100_000))])
    dialer.end()
    until(lambda: read_some(acceptor, got, 1_000_000))
    assert len(got) == sent + 100_000


@pytest.mark.parametrize("how", ["fin", "rst"])
def test_an_end_without_close_notify_is_an_error(pipes: tuple[TlsPipe, TlsPipe], how: str) -> None:
    dialer, acceptor = pipes
    dialer.send([memoryview(b"half a mess")])
    until(lambda: bool(select.select([acceptor], [], [], 0)[0]))
    if how == "fin":
        dialer._socket.shutdown(socket.SHUT_WR)
    else:
        dialer._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        dialer._socket.close()
    with pytest.raises(ConnectionError):
        until(lambda: read_some(acceptor, bytearray(), 100))


def test_a_changed_byte_is_an_error_and_nothing_of_its_record_is_read() -> None:
    dialing, accepted = sockets()
    wire, far = sockets()  # dialer -> dialing ~ accepted -> (changed) -> wire ~ far -> acceptor
    dialer = cast(TlsPipe, GUARDS[1].client_pipe(dialing, 0))
    acceptor = cast(TlsPipe, GUARDS[0].server_pipe(far))
    accepted.setblocking(False)
    wire.setblocking(False)

    def carry(change: bool) -> None:
        for source, target in ((accepted, wire), (wire, accepted)):
            try:
                data = bytearray(source.recv(1 << 20))
            except BlockingIOError:
                continue
            if change:
                data[len(data) // 2] ^= 1
            target.sendall(data)

    done: list[TlsPipe] = []

    def go_on() -> bool:
        carry(change=False)
        for pipe in (dialer, acceptor):
            try:
                pipe.secure()
                done.append(pipe)
            except BlockingIOError:
                continue
        return dialer in done and acceptor in done

    until(go_on)
    dialer.send([memoryview(bytes(5000))])
    until(lambda: bool(select.select([accepted], [], [], 0)[0]))
    carry(change=True)
    got = bytearray()
    with pytest.raises(ssl.SSLError):
        until(lambda: read_some(acceptor, got, 10_000))
    assert got == b""
    for one in (dialer, acceptor, accepted, wire):
        one.close()


def test_a_dialer_refuses_another_rank_at_the_address() -> None:
    three = issue_credentials("run", 3)
    ranks = [MutualTls(three[rank], identity(rank, 3)) for rank in range(3)]
    dialing, accepted = sockets()
    dialer = cast(TlsPipe, ranks[2].client_pipe(dialing, 0))
    impostor = cast(TlsPipe, ranks[1].server_pipe(accepted))
    with pytest.raises(HandshakeError, match="no TLS of this run: it asked for another rank"):
        shake_hands(dialer, impostor)
    for pipe in (dialer, impostor):
        pipe.close()


def test_a_dialer_refuses_the_certificate_of_another_rank() -> None:
    three = issue_credentials("run", 3)
    ranks = [MutualTls(three[rank], identity(rank, 3)) for rank in range(3)]
    ranks[1]._server.sni_callback = None  # the impostor answers for any name
    dialing, accepted = sockets()
    dialer = cast(TlsPipe, ranks[2].client_pipe(dialing, 0))
    impostor = cast(TlsPipe, ranks[1].server_pipe(accepted))
    with pytest.raises(HandshakeError, match="Hostname mismatch"):
        shake_hands(dialer, impostor)
    for pipe in (dialer, impostor):
        pipe.close()


def test_small_buffers_are_sent_as_one_record(pipes: tuple[TlsPipe, TlsPipe]) -> None:
    dialer, acceptor = pipes
    assert dialer.send([memoryview(os.urandom(48)), memoryview(os.urandom(400))]) == 448
    until(lambda: bool(select.select([acceptor], [], [], 0)[0]))
    assert len(acceptor._socket.recv(10_000)) == 448 + 5 + 1 + 16  # header, content type, tag
