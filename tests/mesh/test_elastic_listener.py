"""The listener of an elastic mesh admits the ranks of its run, and no other process."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from smolrun.errors import HandshakeError
from smolrun.mesh.certificates import issue_credentials
from smolrun.mesh.connect import RosterEntry, connect
from smolrun.mesh.endpoint import Endpoint
from tests.mesh.meeting import LOOPBACK, identity
from tests.mesh.star import Star, die, exchange, star
from tests.mesh.test_intruders import by_bytes, by_tls, context
from tests.mesh.test_rendezvous import FIRST_BYTES, first_bytes
from tests.waiting import until


def _refused(made: Star) -> int:
    return made.server._listener.refused  # type: ignore[attr-defined]


def test_unauthenticated_connections_get_nothing_and_honest_ranks_join() -> None:
    with star(3) as made:
        exchange(made.server, made.join(1))
        for index in range(140):
            with socket.create_connection(made.where, timeout=10) as sock, suppress(OSError):
                sock.sendall(first_bytes(FIRST_BYTES[index % len(FIRST_BYTES)], index))
                sock.shutdown(socket.SHUT_WR)
                while got := sock.recv(4096):
                    assert b"welcome" not in got
        until(lambda: _refused(made) == 140)
        assert made.server.present == {1}
        exchange(made.server, made.join(2))


def test_intruders_at_a_tls_listener_are_refused(tmp_path: Path) -> None:
    spare = issue_credentials("run", 3)  # the same names, another authority
    with star(3, "tls") as made:
        first = made.join(1)
        assert made.credentials is not None
        intruders = [
            lambda sock: by_tls(sock, context(tmp_path, spare[1])),
            lambda sock: by_tls(sock, context(tmp_path, None)),
            lambda sock: by_bytes(sock, first_bytes("hello", 0)),
            lambda sock: by_bytes(sock, os.urandom(500)),
        ]
        for act in intruders:
            with socket.create_connection(made.where, timeout=10) as sock, suppress(OSError):
                act(sock)
        until(lambda: _refused(made) == len(intruders))
        assert made.server.present == {1}
        exchange(made.server, first)
        exchange(made.server, made.join(2))


def test_idle_connections_do_not_block_a_rank_that_rejoins() -> None:
    with star(2) as made, ExitStack() as stack:
        die(made.join(1))
        until(lambda: 1 not in made.server.present)
        for _ in range(200):
            stack.enter_context(socket.create_connection(made.where, timeout=10))
        exchange(made.server, made.join(1))
        assert len(made.server._listener._acceptor.pending) <= 64 + 3  # type: ignore[attr-defined]


def test_a_rank_of_another_configuration_is_refused() -> None:
    with star(2) as made:
        mine = Endpoint([LOOPBACK])
        other_run = replace(identity(1, 2), config_hash="other")
        with pytest.raises(HandshakeError, match="rank 0 refused: your config_hash"):
            connect(
                mine, other_run, [made.entry, RosterEntry(1, "x", mine.addresses)], elastic=True
            )
        assert made.server.present == frozenset()
