"""Test tools for distributed code without a cluster: ranks as threads or as processes, and links
that fail on demand.

run_ranks(3, lambda mesh: new_group(mesh).all_reduce(torch.ones(4)))    threads, memory
run_ranks(3, fn, kind="tcp")                                             threads, real sockets
run_ranks(3, fn, kind="tls")                                             and encrypted
run_ranks(3, fn, kind="torch")                                           threads, gloo
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from typing import TypeVar

from smolrun.mesh.certificates import issue_credentials
from smolrun.mesh.connect import Endpoint, RosterEntry, connect
from smolrun.mesh.link import Pipe
from smolrun.mesh.memory import MemoryWorld
from smolrun.mesh.mesh import Mesh
from smolrun.mesh.tcp import TcpMesh
from smolrun.mesh.tls import MutualTls
from smolrun.mesh.torch_mesh import TorchMesh, connect_torch
from smolrun.wire.handshake import Identity

T = TypeVar("T")

Wrap = Callable[[Pipe, int, str], Pipe]


def run_ranks(
    world_size: int,
    function: Callable[[Mesh], T],
    *,
    kind: str = "memory",
    timeout_s: float = 30.0,
    silence_s: float = 10.0,
    wrap: Callable[[int], Wrap] | None = None,
    elastic: bool = False,
) -> list[T]:
    """Runs `function(mesh)` once per rank, each in a thread of its own; returns the results in rank
    order.

    `kind` is "memory", "tcp", "tls" or "torch". The first exception of any rank is raised, after
    all have ended. `wrap(rank)` gives the wrapper of that rank's pipes, for faults. `elastic`: as
    in a run with a parameter server, rank 0 starts alone, the others have a link with it only."""
    results: list[T | None] = [None] * world_size
    errors: list[BaseException | None] = [None] * world_size
    build = _builder(kind, world_size, timeout_s, silence_s, wrap, elastic=elastic)

    def rank_main(rank: int) -> None:
        mesh = None
        try:
            mesh = build(rank)
            results[rank] = function(mesh)
        except BaseException as error:
            errors[rank] = error
        finally:
            if mesh is not None:
                mesh.close()
                crash = mesh.io.crash if isinstance(mesh, TcpMesh | TorchMesh) else None
                errors[rank] = errors[rank] or crash  # a defect, even if the function survived it

    threads = [
        threading.Thread(target=rank_main, args=(rank,), name=f"rank-{rank}", daemon=True)
        for rank in range(world_size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s + 30)
        if thread.is_alive():
            raise TimeoutError(f"{thread.name} did not end")
    for error in errors:
        if error is not None:
            raise error
    return results  # type: ignore[return-value]


def _builder(
    kind: str,
    world_size: int,
    timeout_s: float,
    silence_s: float,
    wrap: Callable[[int], Wrap] | None,
    *,
    elastic: bool,
) -> Callable[[int], Mesh]:
    if kind == "memory":
        world = MemoryWorld(world_size, timeout_s=timeout_s, elastic=elastic)
        return lambda rank: world.meshes[rank]
    endpoints = [Endpoint(["127.0.0.1"]) for _ in range(world_size)]
    roster = [
        RosterEntry(rank, "local", endpoint.addresses) for rank, endpoint in enumerate(endpoints)
    ]
    secret = secrets.token_bytes(32)
    credentials = issue_credentials("test", world_size) if kind == "tls" else []

    def build(rank: int) -> Mesh:
        identity = Identity(rank, world_size, "test", "hash", 0, secret)
        if kind == "torch":
            return connect_torch(endpoints[rank], identity, roster, timeout_s=timeout_s)
        return connect(
            endpoints[rank],
            identity,
            [seat for seat in roster if not elastic or seat.rank == rank or seat.rank == 0],
            timeout_s=timeout_s,
            silence_s=silence_s,
            security=MutualTls(credentials[rank], identity) if credentials else None,
            wrap=wrap(rank) if wrap is not None else None,
            heartbeat_s=0.05,
            elastic=elastic,
        )

    return build


class FaultyPipe:
    """A pipe with a fault: it cuts the connection or goes silent after so many bytes, or moves a
    few bytes at a time."""

    def __init__(
        self,
        pipe: Pipe,
        *,
        cut_after: int | None = None,
        silent_after: int | None = None,
        piece_bytes: int | None = None,
    ) -> None:
        self._pipe = pipe
        self._cut_after = cut_after
        self._silent_after = silent_after
        self._piece = piece_bytes
        self._sent = 0

    def fileno(self) -> int:
        return self._pipe.fileno()

    def send(self, buffers: list[memoryview]) -> int:
        """Counts bytes, and applies the fault when the count is reached."""
        if self._cut_after is not None and self._sent >= self._cut_after:
            raise ConnectionResetError("cut by FaultyPipe")
        if self._silent_after is not None and self._sent >= self._silent_after:
            raise BlockingIOError
        sent = self._pipe.send(buffers if self._piece is None else [buffers[0][: self._piece]])
        self._sent += sent
        return sent

    def recv_into(self, buffer: memoryview) -> int:
        return self._pipe.recv_into(buffer if self._piece is None else buffer[: self._piece])

    def end(self) -> None:
        self._pipe.end()

    def close(self) -> None:
        self._pipe.close()
