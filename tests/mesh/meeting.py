"""Connects the ranks of a test: endpoints, a roster for each of them, TLS if wanted."""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from smolrun.errors import SmolrunError
from smolrun.mesh.certificates import issue_credentials
from smolrun.mesh.connect import connect
from smolrun.mesh.endpoint import Endpoint
from smolrun.mesh.io import IoThread
from smolrun.mesh.rendezvous import Rendezvous, RosterEntry
from smolrun.mesh.tcp import TcpMesh
from smolrun.mesh.tls import MutualTls, TransportSecurity
from smolrun.wire.handshake import Identity

SECRET = secrets.token_bytes(32)
LOOPBACK = "127.0.0.1"


def identity(rank: int, world_size: int = 2, run_id: str = "run") -> Identity:
    return Identity(rank, world_size, run_id, "hash", 0, SECRET)


def tls_ranks(world_size: int, run_id: str = "run") -> list[TransportSecurity]:
    credentials = issue_credentials(run_id, world_size)
    return [MutualTls(credentials[r], identity(r, world_size, run_id)) for r in range(world_size)]


def roster_of(endpoints: Sequence[Endpoint]) -> list[RosterEntry]:
    return [RosterEntry(rank, f"host{rank}", one.addresses) for rank, one in enumerate(endpoints)]


def meet(
    endpoints: Sequence[Endpoint],
    identities: Sequence[Identity],
    rosters: Sequence[list[RosterEntry]] | None = None,
    securities: Sequence[TransportSecurity | None] | None = None,
    *,
    start_timeout_s: float = 10.0,
) -> list[TcpMesh | SmolrunError]:
    """Connects all ranks at once; returns for each its mesh, closed again, or its error."""
    rosters = rosters or [roster_of(endpoints)] * len(identities)
    securities = securities or [None] * len(identities)
    results: list[TcpMesh | SmolrunError] = [SmolrunError("never ended")] * len(identities)

    def rank_main(rank: int) -> None:
        try:
            results[rank] = connect(
                endpoints[rank],
                identities[rank],
                rosters[rank],
                security=securities[rank],
                start_timeout_s=start_timeout_s,
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


@contextmanager
def waiting_rank(
    security: TransportSecurity | None = None,
) -> Iterator[tuple[Rendezvous, Endpoint, Endpoint]]:
    """Rank 0 of two in its rendezvous, and the endpoint of the missing rank 1."""
    mine, absent = Endpoint([LOOPBACK]), Endpoint([LOOPBACK])
    io = IoThread("test-io", lambda error: None)
    io.start()
    rendezvous = Rendezvous(io, mine, identity(0), roster_of([mine, absent]), security)
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(rendezvous.run(50.0))
        except SmolrunError as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="waiting-rank")
    thread.start()
    try:
        yield rendezvous, mine, absent
        thread.join(10)
        assert len(outcome) == 1 and isinstance(outcome[0], dict), outcome
        assert set(outcome[0][1]) == {"control", "up", "down"}
        assert io.crash is None
    finally:
        rendezvous._complete.set()
        thread.join(10)
        io.stop()
        mine.close()
        absent.close()


def join(absent: Endpoint, mine: Endpoint, security: TransportSecurity | None = None) -> None:
    """Rank 1 joins a `waiting_rank`, and closes without GOODBYE, which no rank would answer."""
    mesh = connect(absent, identity(1), roster_of([mine, absent]), security=security)
    mesh.post(lambda: [peer.close() for peer in mesh._peers.values()])  # type: ignore[func-returns-value]
    mesh.close()


@contextmanager
def dead_address(kind: str) -> Iterator[tuple[str, int]]:
    """An address without a rank: it refuses, never answers, or drops every packet."""
    with ExitStack() as stack:
        listening = stack.enter_context(socket.create_server((LOOPBACK, 0), backlog=0))
        where = listening.getsockname()
        if kind == "refuses":
            listening.close()
        elif kind == "swallows":  # Linux drops what a full backlog cannot take
            for _ in range(4):
                sock = stack.enter_context(socket.socket())
                sock.setblocking(False)
                sock.connect_ex(where)
        yield where
