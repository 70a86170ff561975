"""Who gets in while a mesh is being built: every rank of the run, and nobody else."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import socket
import threading

import pytest

from smolrun.errors import HandshakeError, SmolrunError, WaitTimeout
from smolrun.mesh.endpoint import Endpoint
from smolrun.mesh.io import IoThread
from smolrun.mesh.rendezvous import Rendezvous, Seat
from smolrun.mesh.tcp import TcpMesh, connect
from smolrun.wire.handshake import Identity

SECRET = secrets.token_bytes(32)


def identity(rank: int, world_size: int = 2) -> Identity:
    return Identity(rank, world_size, "run", "hash", 0, SECRET)


def build(
    identities: list[Identity], *, start_timeout_s: float = 10.0
) -> list[TcpMesh | SmolrunError]:
    """Lets all ranks connect at once; returns each one's mesh or error."""
    endpoints = [Endpoint(["127.0.0.1"]) for _ in identities]
    roster = [
        Seat(rank, f"host{rank}", endpoint.addresses) for rank, endpoint in enumerate(endpoints)
    ]
    results: list[TcpMesh | SmolrunError] = [SmolrunError("never ended")] * len(identities)

    def rank_main(rank: int) -> None:
        try:
            results[rank] = connect(
                endpoints[rank], identities[rank], roster, start_timeout_s=start_timeout_s
            )
        except SmolrunError as error:
            results[rank] = error

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(len(identities))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(start_timeout_s + 10)
    for result in results:
        if isinstance(result, TcpMesh):
            result.close()
    return results


def test_ranks_that_fit_together_build_a_mesh() -> None:
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
    assert any(isinstance(result, HandshakeError) and words in str(result) for result in results), (
        results
    )


@pytest.mark.parametrize(
    "changes",
    [{"config_hash": "other"}, {"generation": 7}],
    ids=lambda changes: next(iter(changes)),
)
def test_both_ends_are_told_at_once_that_their_configurations_differ(
    changes: dict[str, object],
) -> None:
    (key,) = changes
    results = build([identity(0), dataclasses.replace(identity(1), **changes)])  # type: ignore[arg-type]
    for result in results:
        assert isinstance(result, HandshakeError)
        assert f"{key} is" in str(result)


def test_a_missing_rank_is_named_with_its_host_and_address() -> None:
    endpoint, absent = Endpoint(["127.0.0.1"]), Endpoint(["127.0.0.1"])
    roster = [
        Seat(0, "mini1", absent.addresses),
        Seat(1, "mini2", endpoint.addresses),
    ]
    absent.close()
    with pytest.raises(
        WaitTimeout,
        match=rf"no link to rank 0 \(mini1, 127.0.0.1:{absent.addresses[0][1]}\) after 0.5 s",
    ):
        connect(endpoint, identity(1), roster, start_timeout_s=0.5)


def strangers(kind: str, index: int) -> bytes:
    """What somebody without the secret may say first."""
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


STRANGERS = ["garbage", "http", "oversized", "hello", "wrong rank", "false proof", "surrogate"]


def test_a_thousand_strangers_get_nothing_while_honest_ranks_connect() -> None:
    endpoints = [Endpoint(["127.0.0.1"]), Endpoint(["127.0.0.1"])]
    roster = [Seat(rank, "local", endpoint.addresses) for rank, endpoint in enumerate(endpoints)]
    io = IoThread("test-io", lambda error: None)
    io.start()
    rendezvous = Rendezvous(io, endpoints[0], identity(0), roster)
    outcome: list[object] = []
    waiting = threading.Thread(target=lambda: outcome.append(rendezvous.run(60.0)))
    waiting.start()
    bytes_got = 0
    for index in range(1000):
        with socket.create_connection(
            ("127.0.0.1", endpoints[0].addresses[0][1]), timeout=10
        ) as sock:
            try:
                sock.sendall(strangers(STRANGERS[index % len(STRANGERS)], index))
                sock.shutdown(socket.SHUT_WR)
                while got := sock.recv(4096):
                    bytes_got += len(got)
                    assert b"welcome" not in got
            except OSError:
                pass  # hung up on: as good as refused
    assert waiting.is_alive(), "nobody of these may complete the mesh"
    honest = connect(endpoints[1], identity(1), roster)
    waiting.join(10)
    assert isinstance(outcome[0], dict) and set(outcome[0][1]) == {"control", "up", "down"}
    assert rendezvous.refused == 1000
    assert io.crash is None
    assert bytes_got < 1000 * 200, "a challenge at most"
    honest.close()
    io.stop()
