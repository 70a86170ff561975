"""Building a mesh: every rank of the run is connected, and no other process."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import socket
import sys
import threading

import pytest

from smolrun.errors import GenerationEnded, HandshakeError, SmolrunError, WaitTimeout
from smolrun.mesh.connect import connect
from smolrun.mesh.endpoint import Endpoint
from smolrun.mesh.rendezvous import RosterEntry
from smolrun.mesh.tcp import TcpMesh
from smolrun.wire.handshake import Identity
from tests.mesh.meeting import (
    LOOPBACK,
    dead_address,
    identity,
    join,
    meet,
    roster_of,
    tls_ranks,
    waiting_rank,
)
from tests.waiting import until


def build(
    identities: list[Identity], *, start_timeout_s: float = 10.0
) -> list[TcpMesh | SmolrunError]:
    endpoints = [Endpoint([LOOPBACK]) for _ in identities]
    return meet(endpoints, identities, start_timeout_s=start_timeout_s)


def test_ranks_of_one_run_build_a_mesh() -> None:
    assert all(
        isinstance(result, TcpMesh) for result in build([identity(rank, 4) for rank in range(4)])
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"secret": b"x" * 32}, "does not know this run's secret"),
        ({"run_id": "yesterday"}, "does not know this run's secret"),
    ],
)
def test_a_rank_of_another_run_is_refused(changes: dict[str, object], words: str) -> None:
    results = build([identity(0), dataclasses.replace(identity(1), **changes)], start_timeout_s=2.0)  # type: ignore[arg-type]
    assert all(isinstance(result, SmolrunError) for result in results)
    assert any(words in str(result) for result in results), results


def test_different_configurations_are_an_error_at_both_ends_at_once() -> None:
    results = build([identity(0), dataclasses.replace(identity(1), config_hash="other")])
    for result in results:
        assert isinstance(result, HandshakeError)
        assert "config_hash is" in str(result)


@pytest.mark.parametrize("late", [0, 1])
def test_only_the_rank_of_an_earlier_generation_fails_at_once(late: int) -> None:
    """It may be one that was frozen; the others wait for those of their own generation."""
    identities = [identity(0), identity(1)]
    identities[1 - late] = dataclasses.replace(identities[1 - late], generation=7)
    results = build(identities, start_timeout_s=2.0)
    assert isinstance(results[late], HandshakeError)
    assert "generation is" in str(results[late])
    waits = results[1 - late]
    assert isinstance(waits, WaitTimeout) and waits.rank == late


@pytest.mark.parametrize("is_secure", [False, True], ids=["plain", "tls"])
def test_ranks_of_a_later_generation_link_although_one_of_an_earlier_dials_them(
    is_secure: bool,
) -> None:
    endpoints = [Endpoint([LOOPBACK]) for _ in range(3)]
    later = [dataclasses.replace(identity(rank, 3), generation=1) for rank in (0, 1)]
    both = roster_of(endpoints)[:2]
    securities = tls_ranks(3) if is_secure else None
    results = meet(
        endpoints, [*later, identity(2, 3)], [both, both, roster_of(endpoints)], securities
    )
    first, second, late = results
    assert isinstance(first, TcpMesh) and isinstance(second, TcpMesh), results
    assert (first.members, second.members) == ([0, 1], [0, 1])
    assert isinstance(late, SmolrunError)


def test_the_wait_ends_when_a_later_generation_is_announced() -> None:
    endpoint, is_outdated = Endpoint([LOOPBACK]), threading.Event()
    with dead_address("silent") as silent:
        roster = [RosterEntry(0, "x", [silent]), RosterEntry(1, "y", endpoint.addresses)]
        threading.Timer(0.2, is_outdated.set).start()
        with pytest.raises(GenerationEnded):
            connect(endpoint, identity(1), roster, is_outdated=is_outdated.is_set)


def test_a_missing_rank_is_named_with_host_and_the_outcome_of_every_address() -> None:
    endpoint = Endpoint([LOOPBACK])
    with dead_address("refuses") as first, dead_address("silent") as second:
        roster = [
            RosterEntry(0, "mini1", [first, second]),
            RosterEntry(1, "mini2", endpoint.addresses),
        ]
        with pytest.raises(WaitTimeout) as caught:
            connect(endpoint, identity(1), roster, start_timeout_s=0.5)
    assert str(caught.value) == (
        "rank 1 on mini2 has no link to rank 0 (mini1): "
        f"dialed 127.0.0.1:{first[1]} (Connection refused), "
        f"127.0.0.1:{second[1]} (no answer yet), it has not connected, after 0.5 s: "
        f"does a firewall keep it from them, and them from 127.0.0.1:{endpoint.addresses[0][1]}?"
    )


DEAD = [
    "refuses",
    "silent",
    pytest.param(
        "swallows",
        marks=pytest.mark.skipif(sys.platform != "linux", reason="how a full backlog behaves"),
    ),
]


@pytest.mark.parametrize("kind", DEAD)
@pytest.mark.parametrize("rank", [0, 1], ids=["lower", "higher"])
def test_a_dead_first_address_does_not_prevent_the_link(kind: str, rank: int) -> None:
    endpoints = [Endpoint([LOOPBACK]), Endpoint([LOOPBACK])]
    with dead_address(kind) as dead:
        roster = roster_of(endpoints)
        roster[rank] = RosterEntry(rank, "x", [dead, *endpoints[rank].addresses])
        results = meet(endpoints, [identity(0), identity(1)], [roster, roster])
        assert all(isinstance(result, TcpMesh) for result in results), results


@pytest.mark.parametrize("caller", [0, 1], ids=["lower", "higher"])
@pytest.mark.parametrize("is_secure", [False, True], ids=["plain", "tls"])
def test_it_is_enough_that_one_of_two_ranks_can_dial(caller: int, is_secure: bool) -> None:
    endpoints = [Endpoint([LOOPBACK]) for _ in range(2)]
    securities = tls_ranks(2) if is_secure else None
    with dead_address("silent") as dead:
        blind = roster_of(endpoints)
        blind[caller] = RosterEntry(caller, "x", [dead])  # the other rank's roster
        rosters = [blind, blind]
        rosters[caller] = roster_of(endpoints)
        results = meet(endpoints, [identity(0), identity(1)], rosters, securities)
    assert all(isinstance(result, TcpMesh) for result in results), results


def test_ranks_connect_over_ipv6_and_prefer_the_first_address() -> None:
    try:
        endpoints = [Endpoint(["::1", LOOPBACK]) for _ in range(3)]
    except SmolrunError:
        pytest.skip("this machine has no IPv6")
    assert [where[0] for where in endpoints[0].addresses] == ["::1", LOOPBACK]
    kept: list[str] = []
    wrapped = []

    def spy(pipe, rank, channel):  # type: ignore[no-untyped-def]
        sock = socket.socket(fileno=os.dup(pipe.fileno()))
        kept.append(sock.getsockname()[0])
        sock.close()
        return pipe

    def rank_main(rank: int) -> None:
        wrapped.append(connect(endpoints[rank], identity(rank, 3), roster_of(endpoints), wrap=spy))

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for mesh in wrapped:
        mesh.close()
    assert kept == ["::1"] * 18


@pytest.mark.parametrize("is_secure", [False, True], ids=["plain", "tls"])
def test_many_ranks_of_one_host_connect(is_secure: bool) -> None:
    count = 12
    endpoints = [Endpoint([LOOPBACK]) for _ in range(count)]
    securities = tls_ranks(count) if is_secure else None
    identities = [identity(rank, count) for rank in range(count)]
    results = meet(endpoints, identities, securities=securities, start_timeout_s=40.0)
    assert all(isinstance(result, TcpMesh) for result in results), results


def test_a_running_mesh_cannot_be_reached_at_all() -> None:
    endpoints = [Endpoint([LOOPBACK]), Endpoint([LOOPBACK])]
    listening = [where for one in endpoints for where in one.addresses]
    results = meet(endpoints, [identity(0), identity(1)])
    assert all(isinstance(result, TcpMesh) for result in results)
    for where in listening:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(where, timeout=5)


def first_bytes(kind: str, index: int) -> bytes:
    """What a dialer without the secret may send first."""
    hello = {
        "type": "hello",
        "version": 1,
        "rank": 1,
        "channel": "control",
        "nonce": secrets.token_hex(16),
    }
    spoken = {
        "garbage": os.urandom(64),
        "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        "oversized": b"\xff\xff" + bytes(100),
        "hello": _framed(hello),
        "wrong rank": _framed({**hello, "rank": index}),
        "false proof": _framed(hello)
        + _framed({"type": "proof", "generation": 0, "config_hash": "hash", "proof": "0" * 64}),
    }
    surrogate = {"type": "proof", "proof": "\ud800"}
    spoken["surrogate"] = _framed(hello) + _framed(surrogate)
    return spoken[kind]


def _framed(message: dict[str, object]) -> bytes:
    raw = json.dumps(message).encode()
    return len(raw).to_bytes(2, "little") + raw


FIRST_BYTES = ["garbage", "http", "oversized", "hello", "wrong rank", "false proof", "surrogate"]


def test_a_thousand_unauthenticated_connections_get_nothing_while_honest_ranks_connect() -> None:
    bytes_got = 0
    with waiting_rank() as (rendezvous, mine, absent):
        for index in range(1000):
            with socket.create_connection(mine.addresses[0], timeout=10) as sock:
                try:
                    sock.sendall(first_bytes(FIRST_BYTES[index % len(FIRST_BYTES)], index))
                    sock.shutdown(socket.SHUT_WR)
                    while got := sock.recv(4096):
                        bytes_got += len(got)
                        assert b"welcome" not in got
                except OSError:
                    pass  # hung up on: as good as refused
        assert not rendezvous._complete.is_set(), "none of these may complete the mesh"
        until(lambda: rendezvous.refused == 1000)
        join(absent, mine)
    assert bytes_got < 1000 * 200, "a challenge at most"
