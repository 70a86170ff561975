from __future__ import annotations

import errno
import socket

import pytest

from smolrun.launch.ssh import dial as module
from smolrun.launch.ssh.dial import dial
from smolrun.launch.ssh.hop import Failed


def named(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[str, int]) -> None:
    """A name with these addresses."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
    monkeypatch.setattr(module.socket, "getaddrinfo", lambda *_, **__: found)


def test_the_first_address_that_answers(monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        named(monkeypatch, ("127.0.0.1", 1), server.getsockname())
        dialled = dial("box", 22, 5)
        assert dialled.getpeername() == server.getsockname()
        assert dialled.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        dialled.close()


def test_a_silent_address_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as server, silent() as address:
        named(monkeypatch, address, server.getsockname())
        dial("box", 22, 2).close()


class silent:  # noqa: N801  # reads as a word
    """An address that swallows all packets: its queue of connections is full."""

    def __enter__(self) -> tuple[str, int]:
        self.server = socket.create_server(("127.0.0.1", 0), backlog=0)
        self.waiting = []
        for _ in range(4):
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(self.server.getsockname())
            self.waiting.append(one)
        address: tuple[str, int] = self.server.getsockname()
        return address

    def __exit__(self, *_: object) -> None:
        for one in (*self.waiting, self.server):
            one.close()


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "x"), "box (127.0.0.1) port 22 refuses"),
        (TimeoutError("timed out"), "box (127.0.0.1) port 22 does not answer"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"),
         "box (127.0.0.1) port 22 cannot be reached (network is unreachable)"),
    ],
)  # fmt: skip
def test_the_sentences(monkeypatch: pytest.MonkeyPatch, error: OSError, sentence: str):
    class Socket(socket.socket):
        def connect(self, address: object) -> None:
            raise error

    named(monkeypatch, ("127.0.0.1", 22))
    monkeypatch.setattr(module.socket, "socket", Socket)
    with pytest.raises(Failed) as caught:
        dial("box", 22, 1)
    assert caught.value.what.startswith(sentence)
    assert caught.value.todo


@pytest.mark.parametrize("name", ["no.such.invalid", "a" * 300, "\udcff"])
def test_a_name_that_nobody_has(name: str):
    with pytest.raises(Failed, match="no address is found for"):
        dial(name, 22, 1)
