"""An elastic mesh for tests: rank 0 listens, the others join, leave and rejoin."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from smolrun.mesh.certificates import Credentials, issue_credentials
from smolrun.mesh.connect import RosterEntry, connect
from smolrun.mesh.endpoint import Endpoint
from smolrun.mesh.mesh import Mesh
from smolrun.mesh.tcp import TcpMesh
from smolrun.mesh.tls import MutualTls, TransportSecurity
from smolrun.wire.frame import EAGER_BYTES, Tag
from tests.mesh.meeting import LOOPBACK, identity
from tests.waiting import until

SMALL, LARGE = EAGER_BYTES // 4, EAGER_BYTES  # float32 elements
News = tuple[int, bool, str]


class Star:
    """Rank 0 of `world_size`, and the ranks that have joined."""

    def __init__(
        self, world_size: int, credentials: list[Credentials] | None, silence_s: float = 10.0
    ) -> None:
        self.world_size = world_size
        self.credentials = credentials
        self.silence_s = silence_s
        self.news: list[News] = []
        self.guests: list[TcpMesh] = []
        self.endpoint = Endpoint([LOOPBACK])
        self.entry = RosterEntry(0, "server", self.endpoint.addresses)
        self.server = self._connect(0, self.endpoint, [self.entry])
        self.server.on_membership_change(lambda *news: self.news.append(news))

    @property
    def where(self) -> tuple[str, int]:
        return self.entry.addresses[0]

    def security(self, rank: int) -> TransportSecurity | None:
        if self.credentials is None:
            return None
        return MutualTls(self.credentials[rank], identity(rank, self.world_size))

    def join(self, rank: int, *, start_timeout_s: float = 20.0) -> TcpMesh:
        """A rank joins, as a new process of that rank."""
        mine = Endpoint([LOOPBACK])
        own = RosterEntry(rank, "guest", mine.addresses)
        mesh = self._connect(rank, mine, [self.entry, own], start_timeout_s)
        self.guests.append(mesh)
        until(lambda: rank in self.server.present)
        return mesh

    def _connect(
        self,
        rank: int,
        endpoint: Endpoint,
        roster: list[RosterEntry],
        start_timeout_s: float = 20.0,
    ) -> TcpMesh:
        return connect(
            endpoint,
            identity(rank, self.world_size),
            roster,
            security=self.security(rank),
            heartbeat_s=0.05,
            silence_s=self.silence_s,
            timeout_s=20.0,
            start_timeout_s=start_timeout_s,
            elastic=True,
        )

    def close(self) -> None:
        for mesh in [*self.guests, self.server]:
            mesh.close()
            assert mesh.io.crash is None


def exchange(server: Mesh, guest: Mesh, number: int = 0, size: int = LARGE) -> None:
    """One tensor in each direction."""
    tag = Tag(1, number, 0)
    there, back = torch.zeros(size), torch.zeros(size)
    works = [
        server.recv(guest.rank, tag, there),
        guest.recv(0, tag, back),
        guest.send(0, tag, torch.full((size,), 1.0 + guest.rank)),
        server.send(guest.rank, tag, torch.full((size,), -1.0)),
    ]
    for work in works:
        work.wait(20)
    assert bool((there == 1.0 + guest.rank).all()) and bool((back == -1.0).all())


def die(mesh: Mesh) -> None:
    """Closes all connections without GOODBYE, as the kernel does for a killed process."""
    mesh.post(lambda: [peer.close() for peer in mesh._peers.values()])  # type: ignore[attr-defined,func-returns-value]


def fall_silent(mesh: TcpMesh) -> None:
    """Neither sends nor reads any more, while its connections stay open: a frozen process."""
    for peer in mesh._peers.values():
        for connection in peer._connections:
            mesh.post(lambda connection=connection: connection._listen(0))  # type: ignore[misc]
    mesh._is_watched = lambda peer: False  # type: ignore[method-assign]


@contextmanager
def star(world_size: int, kind: str = "tcp", *, silence_s: float = 10.0) -> Iterator[Star]:
    made = Star(
        world_size, issue_credentials("run", world_size) if kind == "tls" else None, silence_s
    )
    try:
        yield made
    finally:
        made.close()
        with suppress(OSError), socket.create_connection(made.where, timeout=5):
            raise AssertionError("the listener is still open")
